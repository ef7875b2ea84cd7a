"""The verb that cuts slides into tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.core.errors import SettingError
from histosynth.study.verbs.show import describe
from histosynth.tiles.slides.cutting import CutConfig, cut


def cut_(
    *paths: Annotated[Path, Parameter(name="SLIDES-AND-OUT")],
    config: Annotated[CutConfig, Parameter(name="*")] = CutConfig(),
    workers: int | None = None,
) -> None:
    """Cut whole-slide images into a tile set: histosynth tiles cut SLIDE... OUT

    Args:
        paths: slides, folders of slides, or CSV files (slide, patient, label, annotations, mpp), and at the end the
            folder of the new tile set. Annotations of QuPath are also found as SLIDE.geojson beside a slide.
        workers: number of processes; all processors by default.
    """
    if len(paths) < 2:
        raise SettingError(
            f"{len(paths)} path(s) were given.", "Give at least one slide and, last, the folder to make."
        )
    describe(cut(paths[:-1], paths[-1], config, workers))
