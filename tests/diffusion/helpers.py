"""Tiny stand-ins: tiles of 16 px, an autoencoder of eight channels, an encoder that only averages colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from histosynth.core.types import EncoderCard
from histosynth.diffusion.train import DiffusionConfig
from histosynth.tiles.batches import TileArray

CLASSES = ("STR", "TUM", "LYM")
TINY = {"size": 16, "steps": 6, "batch": 4, "save_every": 3, "sample_every": 0, "backbone": "transformer", "width": 32,
        "layers": 2, "heads": 2, "tokens": 2, "warmup": 2, "bank": 5, "precision": "fp32"}  # fmt: skip
UNET = TINY | {"backbone": "unet", "width": 8, "layers": 1}


class ColourMeans:
    """An encoder of 12 numbers: mean colours of the four quarters of a tile."""

    def __init__(self, name: str = "colour-means", dim: int = 12) -> None:
        self.card = EncoderCard(name=name, dim=dim, input_size=16, licence="Apache-2.0")

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self._means(images.float() / 255)

    def differentiable(self, images: torch.Tensor) -> torch.Tensor:
        return self._means((images + 1) / 2)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Colours at two scales."""
        return [torch.nn.functional.adaptive_avg_pool2d(images, n) for n in (4, 2)]

    def _means(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        return means.repeat(1, 1 + self.card.dim // 12)[:, : self.card.dim]


def make_tiles(counts: dict[str, int], size: int = 16, seed: int = 0) -> TileArray:
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for label, n in enumerate(counts.values()):
        colour = np.array([90 + 40 * label, 60 + 20 * label, 120 + 30 * label])[:, None, None]
        images += [np.clip(colour + rng.normal(0, 30, (3, size, size)), 0, 255) for _ in range(n)]
        labels += [label] * n
    return TileArray(
        np.array(images, dtype=np.uint8), np.array(labels, dtype=np.int64), [f"t{i}" for i in range(len(labels))],
        tuple(counts),
    )  # fmt: skip


def tuning(base: Path, **changes: object) -> DiffusionConfig:
    settings = {k: v for k, v in TINY.items() if k not in ("backbone", "width", "layers", "heads", "tokens")}
    settings |= {"init": str(base), "finetune": "adapter_lora", "lora_rank": 2, "lr_lora": 1e-2}
    return DiffusionConfig(**{**settings, **changes})
