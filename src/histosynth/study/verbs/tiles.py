"""Verbs that make tile sets of real or simulated tissue."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.study.verbs.show import describe
from histosynth.tiles.simulate import PhantomConfig, simulate
from histosynth.tiles.sources.source import ImportConfig, import_tiles


def import_(source: Path, out: Path, *, config: Annotated[ImportConfig, Parameter(name="*")] = ImportConfig()) -> None:
    """Import tiles as a tile set: class folders, a table (path, label, patient, split), or an archive of either.

    Args:
        source: a folder of class folders, a CSV or parquet file or a folder with one, a zip or tar archive, or
            what NVIDIA's dataset_tool makes.
        out: folder of the new tile set.
    """
    describe(import_tiles(source, out, config))


def phantom(out: Path, *, config: Annotated[PhantomConfig, Parameter(name="*")] = PhantomConfig()) -> None:
    """Simulate the tiles of a hospital: nine tissue classes, patients with their own staining.

    Args:
        out: folder of the new tile set.
    """
    describe(simulate(out, config))
