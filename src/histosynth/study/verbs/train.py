"""Verbs that train one model on a tile set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from histosynth.classify.train import ClassifierConfig
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


@dataclass(frozen=True)
class TrainClassifierConfig:
    """A classifier on a tile set."""

    classifier: ClassifierConfig = ClassifierConfig()
    """The training."""
    size: int = 64
    """Edge length in pixels."""
    seed: int = 0
    """Seed of the training."""


def train_classifier(
    tiles: Path,
    out: Path,
    *,
    config: Annotated[TrainClassifierConfig, Parameter(name="*")] = TrainClassifierConfig(),
) -> None:
    """Train a classifier on the train split, calibrate it on val, and score it on test.

    Args:
        tiles: a tile set.
        out: folder of the run.
    """
    from histosynth.classify.scores import scores
    from histosynth.classify.train import train_classifier as train
    from histosynth.core.progress import bar
    from histosynth.core.run import Run

    tileset = TileSet.open(tiles)
    splits = {s: tileset.array(s, size=config.size) for s in ("train", "val", "test")}
    with Run.open(out, "train classifier", config, parents=[tileset.digest]) as run:
        with bar("Classifier", config.classifier.steps) as tick:
            model = train(splits["train"], splits["val"], config.classifier, seed=config.seed, tick=lambda: tick(1))
        model.save(run.checkpoint_path("classifier"))
        found = scores(model.probabilities(splits["test"].tensor()).numpy(), splits["test"].labels, tileset.classes)
        run.finish(test=found)
    say(
        f"Test: balanced accuracy {found['balanced_accuracy']:.3f}, macro-F1 {found['macro_f1']:.3f}, "
        f"ECE {found['ece']:.3f} on {len(splits['test'])} tiles."
    )
    say(f"Classifier: {run.checkpoint_path('classifier')}")


def _train(train: Callable[..., Path], tiles: Path, out: Path, config: Any, split: str, device: str) -> None:
    if split == "test":
        raise SettingError("split is 'test'.", "Train on train or val: the test is for the scores alone.")
    array = TileSet.open(tiles).array(split, size=config.size)
    say(f"Checkpoint: {train(array, config, out, device=device)}")
