"""The diffusion model as experiments see it."""

from __future__ import annotations

from pathlib import Path

from histosynth.core.types import Generator, GeneratorFamily, Score
from histosynth.diffusion.sample import DiffusionGenerator
from histosynth.diffusion.train import DiffusionConfig, train_diffusion
from histosynth.tiles.batches import TileArray

_LOOK_EVERY = 100  # steps between two losses on validation tiles, at least: each costs about as much as three steps


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

    From random numbers, the autoencoder is trained on the same tiles first. The weights are those with the lowest
    loss on the validation tiles; `score` is not asked, since making tiles for it would take longer than training.
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
        validate_every=max(_LOOK_EVERY, steps // 4) if validation is not None else 0,
    )
    return train_diffusion(data, config, folder, device=device, held_out=validation)


def load(path: Path, device: str) -> Generator:
    """See `GeneratorFamily.load`."""
    return DiffusionGenerator.from_checkpoint(path, device)


FAMILY = GeneratorFamily(
    name="diffusion", title="Diffusion", train=train, load=load, steps_per_second=1.7, tiles_per_second=4.0
)
