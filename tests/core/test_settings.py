"""Ranges and words that settings have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pytest

from histosynth.core.errors import SettingError
from histosynth.core.settings import check_settings


@dataclass
class Kitchen:
    pots: int = 1
    heat: float = 1.0
    salt: float | None = None
    lid: float = 0.5
    food: Literal["soup", "stew", "pie"] = "soup"


def look(kitchen: Kitchen) -> None:
    check_settings(kitchen, counts=["pots"], positive=["heat"], not_negative=["salt"], shares=["lid"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pots": 0}, "pots is 0. Give a positive number."),
        ({"pots": 0.5}, "pots is 0.5"),
        ({"heat": 0}, "heat is 0. Give a positive number."),
        ({"heat": math.nan}, "heat is nan"),
        ({"heat": math.inf}, "heat is inf"),
        ({"salt": -1}, "salt is -1. Give 0 or more."),
        ({"lid": 1.01}, "lid is 1.01. Give a number from 0 to 1."),
        ({"lid": math.nan}, "lid is nan"),
        ({"food": "pies"}, "food is 'pies'. Use soup, stew or pie."),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(changes: dict, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        look(Kitchen(**changes))
    assert message in str(caught.value)


def test_the_ends_of_the_ranges_and_none_pass() -> None:
    for changes in ({"pots": 1}, {"heat": 1e-9}, {"salt": 0}, {"salt": None}, {"lid": 0}, {"lid": 1}, {"food": "pie"}):
        look(Kitchen(**changes))
