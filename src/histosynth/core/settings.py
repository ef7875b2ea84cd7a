"""What most groups of settings have in common: numbers with a range, and words from a list."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from histosynth.core.errors import SettingError


def check_settings(
    settings: Any,
    *,
    counts: Iterable[str] = (),
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
    shares: Iterable[str] = (),
) -> None:
    """Refuse numbers out of range (infinity and NaN among them), and unknown words in fields whose type is a `Literal`.

    None passes as a number.

    Args:
        settings: a dataclass.
        counts, positive, not_negative, shares: names of fields from 1, above 0, from 0, and from 0 to 1.

    Raises:
        SettingError: names the setting, its value and the remedy.
    """
    ranges = (
        (counts, lambda value: 1 <= value < math.inf, "Give a positive number."),
        (positive, lambda value: 0 < value < math.inf, "Give a positive number."),
        (not_negative, lambda value: 0 <= value < math.inf, "Give 0 or more."),
        (shares, lambda value: 0 <= value <= 1, "Give a number from 0 to 1."),
    )
    for names, fits, remedy in ranges:
        for name in names:
            value = getattr(settings, name)
            if value is not None and not fits(value):
                raise SettingError(f"{name} is {value}.", remedy)
    for name, known in _words(settings.__class__).items():
        value = getattr(settings, name)
        if value not in known:
            raise SettingError(f"{name} is {value!r}.", f"Use {', '.join(known[:-1])} or {known[-1]}.")


@cache
def _words(kind: type) -> dict[str, tuple[Any, ...]]:
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}
