"""Verbs that train a generator on a tile set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from histosynth.core.errors import SettingError
from histosynth.core.progress import say
from histosynth.diffusion.config import DiffusionConfig
from histosynth.gan.config import GanConfig
from histosynth.tiles.tileset import TileSet


def train_gan(
    tiles: Path,
    out: Path,
    *,
    config: Annotated[GanConfig, Parameter(name="*")] = GanConfig(),
    split: str = "train",
    device: str = "auto",
) -> None:
    """Train or fine-tune the GAN on a tile set; repeat the command to go on.

    Its split val, if it has one, chooses the weights. On several GPUs: accelerate launch -m histosynth train gan ...

    Args:
        tiles: a tile set.
        out: folder of the run.
        split: the split to learn from, never test.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    from histosynth.gan.train import train_gan as train
    from histosynth.study.validation import validation

    tileset = TileSet.open(tiles)
    chosen_by: dict[str, Any] = {}
    if split != "val" and config.validate_every and (tileset.kept.split == "val").any():
        held_out = tileset.array("val", size=config.size)
        chosen_by = dict(zip(("validation", "score"), validation(held_out, config.choose_encoder, device), strict=True))
    _train(partial(train, **chosen_by), tiles, out, config, split, device)


def train_diffusion(
    tiles: Path,
    out: Path,
    *,
    config: Annotated[DiffusionConfig, Parameter(name="*")] = DiffusionConfig(),
    split: str = "train",
    device: str = "auto",
) -> None:
    """Train or fine-tune the diffusion model on a tile set; repeat the command to go on.

    Its split val, if validate-every is set, chooses the weights. On several GPUs: accelerate launch -m histosynth
    train diffusion ..., with one micro-batch (accumulate) or more a GPU.

    Args:
        tiles: a tile set.
        out: folder of the run.
        split: the split to learn from, never test.
        device: auto, cpu, cuda, cuda:N or mps.
    """
    from histosynth.diffusion.train import train_diffusion as train

    held_out = None
    if config.validate_every and split != "val":
        tileset = TileSet.open(tiles)
        held_out = tileset.array("val", size=config.size) if (tileset.kept.split == "val").any() else None
    _train(partial(train, held_out=held_out), tiles, out, config, split, device)


def _train(train: Callable[..., Path], tiles: Path, out: Path, config: Any, split: str, device: str) -> None:
    if split == "test":
        raise SettingError("split is 'test'.", "Train on train or val: the test is for the scores alone.")
    array = TileSet.open(tiles).array(split, size=config.size)
    say(f"Checkpoint: {train(array, config, out, device=device)}")
