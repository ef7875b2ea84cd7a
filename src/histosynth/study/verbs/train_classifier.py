"""The verb that trains a classifier; apart from those of the generators, whose libraries take seconds to import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.classify.config import TrainClassifierConfig


def train_classifier(
    tiles: Path,
    out: Path,
    *,
    config: Annotated[TrainClassifierConfig, Parameter(name="*")] = TrainClassifierConfig(),
) -> None:
    """Train a classifier on the split train, calibrate it on val, and score the saved file on both and on test.

    Writes its checkpoint, predictions.csv (see `histosynth calibrate`), confusion matrices and the learning curve;
    repeat the command to go on. `histosynth convert` exports the checkpoint.

    Args:
        tiles: a tile set.
        out: folder of the run.
    """
    from histosynth.study.classifier import run_training

    run_training(tiles, out, config)
