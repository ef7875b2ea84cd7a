"""The verb that makes synthetic tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.study.generators import GenerateConfig, make_tiles
from histosynth.study.verbs.show import describe


def generate(
    checkpoint: Path, out: Path, *, config: Annotated[GenerateConfig, Parameter(name="*")] = GenerateConfig()
) -> None:
    """Make synthetic tiles; repeat the command to go on.

    Args:
        checkpoint: what `histosynth train gan` or `train diffusion` wrote.
        out: folder of the new tile set.
    """
    describe(make_tiles(checkpoint, out, config))
