"""PixCell (Yellapragada et al. 2025), a diffusion model of histology told what to draw by UNI2-h, without remote code.

Everything is built on diffusers' PixArt transformer and autoencoder; a checkpoint gives numbers and nothing else.
Names resolve when they are used, so that the cards can be read without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "CARDS": "cards",
    "PixCell": "model",
    "Memory": "model",
    "PixCellGenerator": "sample",
    "PixCellShape": "shape",
    "PixCellTransformer": "transformer",
}
__all__ = ["CARDS", "Memory", "PixCell", "PixCellGenerator", "PixCellShape", "PixCellTransformer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
