"""Verbs that make synthetic tiles and judge them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.core.progress import say
from histosynth.study.generators import GenerateConfig, make_tiles
from histosynth.study.verbs.show import describe
from histosynth.tiles.tileset import TileSet


def generate(
    checkpoint: Path, out: Path, *, config: Annotated[GenerateConfig, Parameter(name="*")] = GenerateConfig()
) -> None:
    """Make synthetic tiles; repeat the command to go on.

    Args:
        checkpoint: what `histosynth train gan` or `train diffusion` wrote.
        out: folder of the new tile set.
    """
    describe(make_tiles(checkpoint, out, config))


@dataclass(frozen=True)
class EvaluateConfig:
    """A judgement without training."""

    out: Path = Path("runs/evaluate")
    """Folder of the scores."""
    size: int = 64
    """Edge length in pixels."""
    encoder: str = "tissue-tiny"
    """Encoder of the scores (see `histosynth encoders`)."""
    seed: int = 0
    """Seed of the subsamples."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def evaluate(
    real: Path, synthetic: Path, *, config: Annotated[EvaluateConfig, Parameter(name="*")] = EvaluateConfig()
) -> None:
    """Fidelity, diversity and copies of synthetic tiles, with the real-real floor beside every score.

    Args:
        real: a tile set with train and test.
        synthetic: a tile set that a generator made.
    """
    from histosynth.study.fidelity import evaluate_sets

    path = evaluate_sets(TileSet.open(real), TileSet.open(synthetic), config)
    say(f"Scores: {path}")
