"""The verb that draws what a generator has learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.core.progress import say
from histosynth.gan.explore import ExploreSettings
from histosynth.gan.explore import explore as write


def explore(
    checkpoint: Path, out: Path, *, config: Annotated[ExploreSettings, Parameter(name="*")] = ExploreSettings()
) -> None:
    """Draw what a GAN has learnt: classes, truncation, style mixing, ways between tiles, and the film of its training.

    Args:
        checkpoint: what `histosynth train gan` or `convert` wrote.
        out: folder of the pictures.
    """
    for path in write(checkpoint, out, config):
        say(f"Wrote {path}")
