"""The verb that looks at a tile set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from histosynth.core.progress import say
from histosynth.study.overview.page import OverviewConfig
from histosynth.study.overview.page import overview as write_overview


def overview(
    tiles: Path,
    out: Path | None = None,
    *,
    config: Annotated[OverviewConfig, Parameter(name="*")] = OverviewConfig(),
) -> None:
    """One page about a tile set: counts, pictures, quality, colour, duplicates, and leakage probes.

    Args:
        tiles: a tile set; import other folders first.
        out: a folder, or the name of the page; the tile set's own folder by default.
    """
    page, report = write_overview(tiles, out, config)
    for finding in report["findings"]:
        if finding["level"] == "warning":
            say(f"Warning: {finding['text']}")
    Console().print(f"Overview: {page}", highlight=False, soft_wrap=True)
