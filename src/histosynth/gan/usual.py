"""What the settings of `GanConfig` that are left open stand for: by the start, the space and the architecture."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histosynth.autoencoder.network import FACTOR, AutoencoderShape
from histosynth.core.checkpoint import read_card

if TYPE_CHECKING:
    from histosynth.gan.config import GanConfig

LATENTS = astuple(AutoencoderShape())
"""Width, blocks and channels of the shipped autoencoder."""
SHIPPED = {"architecture": "residual", "noise": True, "autoencoder": list(LATENTS)}
"""What has to be known of the shape of the shipped weights, without opening them."""

_STYLEGAN2 = {"lr_g": 0.0025, "lr_d": 0.0025, "mapping_lr": 0.01, "r1_every": 16, "ema": 5.0}
_OTHERS = {  # of other architectures; 0 leaves them open
    "residual": {"lr_g": 0.001, "lr_d": 0.001, "mapping_lr": 1.0, "r1_every": 4, "ema": 20.0},
    "lite": _STYLEGAN2 | {"mapping_lr": 1.0},
}


def shape_of_start(init: str) -> dict[str, Any]:
    """The shape in the card of a start (`GanConfig.init`); empty where there is none to ask."""
    path = Path(init)
    if init in ("base", "none") or not (path.is_file() and path.suffix == ".safetensors"):
        return SHIPPED if init == "base" else {}
    return dict(read_card(path).get("shape", {}))


def _space(config: GanConfig, start: dict[str, Any], needs_pixels: bool) -> str:
    """Latents, as far as the start, the size and the other settings allow.

    Args:
        start: see `shape_of_start`.
        needs_pixels: a setting in use does.
    """
    fits = bool(start.get("autoencoder")) or not start
    large = config.size >= (32 if start else 64)
    return "latents" if fits and large and config.architecture != "lite" and not needs_pixels else "pixels"


def usual(config: GanConfig, needs_pixels: bool) -> dict[str, Any]:
    """The values of all settings that are left open, by name.

    Args:
        needs_pixels: a setting in use does.
    """
    start = shape_of_start(config.init)
    space = _space(config, start, needs_pixels) if config.space == "auto" else config.space
    latents = space == "latents"
    architecture = start.get("architecture", "residual" if latents else "stylegan2")
    architecture = architecture if config.architecture == "auto" else config.architecture
    loss = ("relativistic" if latents else "logistic") if config.loss == "auto" else config.loss
    most = (64 if latents else 128) if config.channel_max is None else config.channel_max
    found = {
        "space": space,
        "architecture": architecture,
        "loss": loss,
        "start": "code" if architecture == "residual" else start.get("start", "code"),
        "noise": start.get("noise", latents),
        "head": "" if latents else "tissue-tiny",
        "ada_pipe": "latents" if latents else "tissue",
        "ada_target": 0.95 if loss == "relativistic" else 0.6,
        "class_groups": latents and config.sampling == "balanced",
        "channel_max": most,
        "channel_base": most * config.size // FACTOR if latents else 2048,
    }
    found = {name: value for name, value in found.items() if getattr(config, name) in (None, "auto")}
    of_kind = _OTHERS.get(architecture, _STYLEGAN2)
    return found | {name: value for name, value in of_kind.items() if getattr(config, name) == 0}
