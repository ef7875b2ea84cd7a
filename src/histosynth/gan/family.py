"""The GAN as experiments see it."""

from __future__ import annotations

from pathlib import Path

from histosynth.core.types import Generator, GeneratorFamily, Score
from histosynth.gan.config import GanConfig
from histosynth.gan.sample import GanGenerator
from histosynth.gan.train import train_gan
from histosynth.tiles.batches import TileArray

_LOOK_EVERY = 100  # steps between two scores on validation tiles, at least: each costs about as much as five steps


def train(
    data: TileArray,
    folder: Path,
    *,
    size: int,
    steps: int,
    seconds: float | None,
    seed: int,
    init: str,
    device: str,
    validation: TileArray | None = None,
    score: Score | None = None,
) -> Path:
    """Train with the default settings; see `GeneratorFamily.train`."""
    looks = max(_LOOK_EVERY, steps // 4)
    config = GanConfig(
        size=size, steps=steps, seconds=seconds, seed=seed, init=init, save_every=50, validate_every=looks
    )  # fmt: skip
    return train_gan(data, config, folder, validation=validation, score=score, device=device)


def load(path: Path, device: str) -> Generator:
    """See `GeneratorFamily.load`."""
    return GanGenerator.from_checkpoint(path, device)


FAMILY = GeneratorFamily(name="gan", title="GAN", train=train, load=load, steps_per_second=4.0, tiles_per_second=100.0)
