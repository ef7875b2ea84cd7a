"""The verb that stains real tiles anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.study.restain import RestainConfig
from histosynth.study.restain import restain as make
from histosynth.study.verbs.show import describe


def restain(
    checkpoint: Path, tiles: Path, out: Path, *, config: Annotated[RestainConfig, Parameter(name="*")] = RestainConfig()
) -> None:
    """Stain real tiles anew with a diffusion model: the layout stays, the look is drawn again (SDEdit).

    Args:
        checkpoint: what `histosynth train diffusion` wrote.
        tiles: the tile set with the real tiles.
        out: folder of the new tile set.
    """
    describe(make(checkpoint, tiles, out, config))
