"""A set of tiny tiles whose classes differ in colour, and networks small enough for a test."""

from __future__ import annotations

from typing import Any

import numpy as np

from histosynth.gan.generator import Shape
from histosynth.gan.train import GanConfig
from histosynth.tiles.batches import TileArray

TINY = {"channel_base": 256, "channel_max": 16, "z_dim": 8, "w_dim": 12}


def tiles(per_class: int = 6, classes: tuple[str, ...] = ("ADI", "LYM", "TUM"), size: int = 32) -> TileArray:
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 220, size=(len(classes), 3, 1, 1))
    labels = np.repeat(np.arange(len(classes)), per_class)
    images = np.clip(colours[labels] + rng.normal(0, 12, (len(labels), 3, size, size)), 0, 255).astype(np.uint8)
    return TileArray(images, labels, [f"t{i}" for i in range(len(labels))], classes)


def tiny_shape(classes: int = 3, size: int = 32) -> Shape:
    return Shape(size=size, classes=classes, **TINY)


def tiny_config(**changes: Any) -> GanConfig:
    settings: dict[str, Any] = dict(
        size=32, steps=6, batch=4, init="none", precision="fp32", save_every=3, log_every=2, sample_every=0,
        ada_speed=0.1, r1_every=2, **TINY,
    )  # fmt: skip
    return GanConfig(**(settings | changes))
