"""The diffusion model as experiments see it."""

from __future__ import annotations

from pathlib import Path

from histosynth.core.types import Generator, GeneratorFamily, Score
from histosynth.diffusion.sample import DiffusionGenerator
from histosynth.diffusion.train import DiffusionConfig, train_diffusion
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
    validation: TileArray | None = None,
    score: Score | None = None,
) -> Path:
    """Train with the default settings; see `GeneratorFamily.train`.

    From random numbers, the autoencoder is trained on the same tiles first. The weights are the last ones: the
    validation tiles choose nothing here.
    """
    config = DiffusionConfig(
        size=size,
        steps=steps,
        seconds=seconds,
        seed=seed,
        init=init,
        autoencoder="train" if init == "none" else "base",
        autoencoder_steps=steps,
        save_every=50,
    )
    return train_diffusion(data, config, folder, device=device)


def load(path: Path, device: str) -> Generator:
    """See `GeneratorFamily.load`."""
    return DiffusionGenerator.from_checkpoint(path, device)


FAMILY = GeneratorFamily(
    name="diffusion", title="Diffusion", train=train, load=load, steps_per_second=2.0, tiles_per_second=5.0
)
