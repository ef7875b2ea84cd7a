"""Floor 2: frozen networks, tiles in and features out.

Adding an encoder costs one file and one line in `_OURS`; another package adds its own through the
entry-point group "histosynth.encoders" (name = "module:load", where `load(device)` gives an `Encoder`).
Importing this module imports no torch.
"""

from __future__ import annotations

from histosynth.core.errors import PluginError
from histosynth.core.registry import Registry
from histosynth.core.types import Encoder, EncoderCard

_OURS = {
    "histosynth.encoders.tiny:load": EncoderCard(
        "tissue-tiny", 256, 64, "Apache-2.0", source="trained by histosynth.encoders.train_tiny on simulated tissue"
    ),
    "histosynth.encoders.colour:load": EncoderCard(
        "colour", 66, 0, "Apache-2.0", source="no network: colour means, deviations and a coarse histogram"
    ),
}

REGISTRY = Registry("encoder", {card.name: target for target, card in _OURS.items()}, "histosynth.encoders")


def load(name: str, device: str = "auto") -> Encoder:
    """The encoder called `name`, ready on `device`.

    Raises:
        SettingError: no encoder has this name (near names are suggested).
        PluginError: its code cannot be loaded, or what it gives is not an encoder.
        CheckpointError: its weights are missing or damaged.
    """
    encoder = REGISTRY.load(name)(device=device)
    if not isinstance(encoder, Encoder):
        raise PluginError(
            f"The encoder {name!r} gives a {type(encoder).__name__} without card, encode or differentiable.",
            "Reinstall or remove the package that provides it.",
        )
    return encoder


def cards() -> list[EncoderCard]:
    """A card for every known encoder, by name. Encoders of other packages are not imported for it, so
    their cards say only where they come from (dim and input_size are 0)."""
    ours = {card.name: card for card in _OURS.values()}
    return [
        ours.get(name) or EncoderCard(name, 0, 0, "unknown", source=f"plug-in {target}")
        for name, target in sorted(REGISTRY.targets().items())
    ]


def card(name: str) -> EncoderCard:
    """The card of one of our own encoders.

    Raises:
        SettingError: none of ours has this name.
    """
    for known in _OURS.values():
        if known.name == name:
            return known
    return load(name).card
