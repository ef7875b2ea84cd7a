"""Floor 2: frozen networks, tiles in and features out.

Adding an encoder costs one file and one entry in `cards.yaml`; another package adds its own through the
entry-point group "histosynth.encoders" (name = "module:load", where `load(device)` gives an `Encoder`; it may also
take `weights` and `precision`). Importing this module imports no torch.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from histosynth.core.errors import PluginError, SettingError
from histosynth.core.registry import Registry
from histosynth.core.types import Encoder, EncoderCard


@lru_cache(maxsize=1)
def _table() -> dict[str, tuple[str, EncoderCard]]:
    """Name -> ("module:load", card), as `cards.yaml` has it."""
    entries = yaml.safe_load(Path(__file__).with_name("cards.yaml").read_text(encoding="utf-8"))
    return {name: (entry.pop("load"), _card(name, entry)) for name, entry in entries.items()}


def _card(name: str, entry: dict[str, Any]) -> EncoderCard:
    files = tuple(entry.pop("files", ()))
    return EncoderCard(name, files=files, **{"weights": files[0] if files else ""} | entry)


REGISTRY = Registry("encoder", {name: target for name, (target, _) in _table().items()}, "histosynth.encoders")


def load(name: str, device: str = "auto", weights: Path | str | None = None, precision: str = "float32") -> Encoder:
    """The encoder called `name`, ready on `device`. Nothing is ever downloaded.

    Args:
        weights: the weight file; None looks where `locate` looks.
        precision: float32, or bfloat16 where the card says that it is safe.

    Raises:
        SettingError: no encoder has this name (near names are suggested), or it cannot have these settings.
        PluginError: its code cannot be loaded, or what it gives is not an encoder.
        CheckpointError: its weights are missing (with the remedy), damaged, or not its own.
    """
    make = REGISTRY.load(name)
    settings: dict[str, Any] = {"weights": Path(weights)} if weights is not None else {}
    if precision != "float32":
        settings["precision"] = precision
    missing = [s for s in settings if s not in inspect.signature(make).parameters] if settings else []
    if missing:
        raise SettingError(f"The encoder {name!r} takes no {missing[0]}.", "Leave that setting out.")
    encoder = make(device=device, **settings)
    if not isinstance(encoder, Encoder):
        raise PluginError(
            f"The encoder {name!r} gives a {type(encoder).__name__} without card, encode or differentiable.",
            "Reinstall or remove the package that provides it.",
        )
    return encoder


def locate(name: str, weights: Path | str | None = None) -> Path | None:
    """Where the weights of an encoder are, or None: the file given, the file in the environment variable
    HISTOSYNTH_WEIGHTS_<NAME>, then the weights folder (HISTOSYNTH_WEIGHTS), and the caches of torch hub and
    Hugging Face.

    Raises:
        SettingError: none of ours has this name.
    """
    from histosynth.encoders.weights import find

    return find(card(name), None if weights is None else Path(weights))


def cards() -> list[EncoderCard]:
    """A card for every known encoder, by name. Encoders of other packages are not imported for it, so
    their cards say only where they come from (dim and input_size are 0)."""
    ours = _table()
    return [
        ours[name][1] if name in ours else EncoderCard(name, 0, 0, "unknown", source=f"plug-in {target}")
        for name, target in sorted(REGISTRY.targets().items())
    ]


def card(name: str) -> EncoderCard:
    """The card of an encoder.

    Raises:
        SettingError: none has this name.
    """
    ours = _table()
    return ours[name][1] if name in ours else load(name).card
