"""The verb that asks whether synthetic tiles help a classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.study.usefulness.plan import UtilityConfig


def utility(
    real: Path,
    *synthetic: Annotated[Path, Parameter(name="SYNTHETIC")],
    config: Annotated[UtilityConfig, Parameter(name="*")] = UtilityConfig(),
) -> Path:
    """Do synthetic tiles help a classifier on patients it never saw? Repeat the command to go on.

    One classifier is trained for every arm (real tiles; with classical augmentation; with the tiles of each generator,
    of all generators, selected ones, or some for rare classes alone; synthetic tiles only), number of real tiles a
    class, share of synthetic tiles, and seed; all of them for the same number of steps.

    Args:
        real: a tile set that is split by patient.
        synthetic: tile sets of generators that were trained on its split train.
    """
    from histosynth.study.compare import spell
    from histosynth.study.usefulness.run import run_utility

    return run_utility(real, synthetic, config, spell("utility", [real, *synthetic], config, config.out))
