"""The GAN as experiments see it."""

from __future__ import annotations

from pathlib import Path

from histosynth.core.types import Generator, GeneratorFamily
from histosynth.gan.sample import GanGenerator
from histosynth.gan.train import GanConfig, train_gan
from histosynth.tiles.batches import TileArray


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
) -> Path:
    """Train with the default settings; see `GeneratorFamily.train`."""
    config = GanConfig(size=size, steps=steps, seconds=seconds, seed=seed, init=init, save_every=50)
    return train_gan(data, config, folder, device=device)


def load(path: Path, device: str) -> Generator:
    """See `GeneratorFamily.load`."""
    return GanGenerator.from_checkpoint(path, device)


FAMILY = GeneratorFamily(name="gan", title="GAN", train=train, load=load, steps_per_second=2.2, tiles_per_second=100.0)
