"""The verb that judges synthetic tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.core.progress import say
from histosynth.study.compare import spell
from histosynth.study.evaluation.run import EvaluateConfig, evaluate_sets
from histosynth.tiles.tileset import TileSet


def evaluate(
    real: Path, synthetic: Path, *, config: Annotated[EvaluateConfig, Parameter(name="*")] = EvaluateConfig()
) -> Path:
    """Fidelity, diversity, copies, staining and labels of synthetic tiles, each between real tiles and hopeless ones.

    Args:
        real: a tile set with train and test; the scores compare with its test, which nothing was trained on.
        synthetic: a tile set that a generator made, or a second real one.
    """
    words = spell("evaluate", [real, synthetic], config, config.out)
    page = evaluate_sets(TileSet.open(real), TileSet.open(synthetic), config, words)
    say(f"Report: {page}")
    return page
