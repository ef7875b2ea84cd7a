"""The verb that draws how tiles are made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.core.progress import say
from histosynth.study.denoising import DenoisingConfig, draw_denoising


def denoising(
    checkpoint: Path, out: Path, *, config: Annotated[DenoisingConfig, Parameter(name="*")] = DenoisingConfig()
) -> None:
    """Draw how a diffusion model makes tiles: a timeline of the steps (PNG) and a film.

    Args:
        checkpoint: what `histosynth train diffusion` wrote.
        out: folder of the pictures.
    """
    for path in draw_denoising(checkpoint, out, config):
        say(f"Wrote {path}")
