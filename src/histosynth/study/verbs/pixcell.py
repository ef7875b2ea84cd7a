"""The verb that draws zero-shot tiles with PixCell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.study.pixcell import PixCellConfig, draw_zero_shot
from histosynth.study.verbs.show import describe


def pixcell(
    references: Path, out: Path, *, config: Annotated[PixCellConfig, Parameter(name="*")] = PixCellConfig()
) -> None:
    """Draw new tiles with PixCell from real training tiles, without training; repeat the command to go on.

    PixCell (CC BY-NC-ND 4.0), the autoencoder of Stable Diffusion 3.5 and UNI2-h are gated: get their weights first;
    `histosynth doctor` says how. No code that comes with weights is run.

    Args:
        references: a tile set (only its training tiles are shown), or a folder of class folders or of tiles.
        out: folder of the new tile set.
    """
    describe(draw_zero_shot(references, out, config))
