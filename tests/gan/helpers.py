"""A set of tiny tiles whose classes differ in colour, and networks small enough for a test."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from histosynth.gan.config import GanConfig
from histosynth.gan.generator import Shape
from histosynth.tiles.batches import TileArray

TINY = {"channel_base": 256, "channel_max": 16, "z_dim": 8, "w_dim": 12}

# between them, every loss, guard and option whose numbers have to survive a kill
RICH: dict[str, Any] = {
    "head": "tissue-tiny", "accumulate": 2, "path_length": 2.0, "path_length_every": 2, "lr_schedule": "cosine",
    "channel_stats": 1.0, "perceptual": 1.0, "saturation": 1.0, "saturation_above": 0.1, "feature_matching": 1.0,
    "diversity": 1.0, "diversity_below": 1.0, "drift": 0.1, "saturation_guard": True, "saturation_limit": 0.1,
    "d_stop_steps": 50, "clip_g": 1.0, "clip_d": 1.0, "workers": 2, "label_conditioning": "mapping",
    "validate_every": 2, "validate_per_class": 2, "loss": "relativistic", "class_groups": True,
}  # fmt: skip
LITE: dict[str, Any] = {
    "architecture": "lite", "class_embedding": "add", "head": "tissue-tiny", "head_mode": "features",
    "head_joint": True, "alpha_gate": True, "alpha_freeze": 0, "alpha_on": 0.1, "alpha_off": 0.05, "alpha_step": 1.0,
    "alpha_tau": 2.0, "loss": "bce", "r1_lazy": False, "r1_gamma": 15.0, "ada": "accuracy", "ada_pipe": "poc",
    "ada_freeze": 0, "ada_max": 0.5, "ada_cap": 0.4, "ada_rate": 100.0, "ada_target": 0.1, "output_clamp": 0.9,
    "ema_decay": 0.9, "perceptual": 0.01, "paired": True, "feature_matching": 0.1, "snapshots": True,
}  # fmt: skip


class Brightness:
    """A score for tests: distance of the mean pixel from that of the real tiles; `calls` counts."""

    name = "brightness"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, real: torch.Tensor, fake: torch.Tensor) -> float:
        self.calls += 1
        return abs(float(real.float().mean() - fake.float().mean()))


def tiles(
    per_class: int = 6, classes: tuple[str, ...] = ("ADI", "LYM", "TUM"), size: int = 32, name: str = "t"
) -> TileArray:
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 220, size=(len(classes), 3, 1, 1))
    labels = np.repeat(np.arange(len(classes)), per_class)
    images = np.clip(colours[labels] + rng.normal(0, 12, (len(labels), 3, size, size)), 0, 255).astype(np.uint8)
    return TileArray(images, labels, [f"{name}{i}" for i in range(len(labels))], classes)


def tiny_shape(classes: int = 3, size: int = 32) -> Shape:
    return Shape(size=size, classes=classes, **TINY)


def tiny_config(**changes: Any) -> GanConfig:
    settings: dict[str, Any] = dict(
        size=32, steps=6, batch=4, init="none", precision="fp32", save_every=3, log_every=2, sample_every=0,
        ada_speed=0.1, r1_every=2, head="", noise=True, start="constant",
        d_channel_base=0, d_channel_max=0, **TINY,
    )  # fmt: skip
    return GanConfig(**(settings | changes))
