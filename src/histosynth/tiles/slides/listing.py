"""Which slides there are: files, folders, or a CSV that also gives patients, labels and annotations."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from histosynth.core.errors import DataError, did_you_mean
from histosynth.tiles.slides.reader import PLAIN_SUFFIXES, SCANNER_SUFFIXES, TIFF_SUFFIXES
from histosynth.tiles.tileset import safe_name


@dataclass(frozen=True)
class Slide:
    """A slide to be cut: its name in the tile set, its file, and what is known of it."""

    name: str
    path: Path
    patient: str
    label: str = ""
    annotations: Path | None = None
    mpp: float | None = None


def list_slides(sources: Sequence[Path | str]) -> list[Slide]:
    """The slides of files, folders and CSV files, each once, with names that differ.

    Folders are searched to any depth; PNG and JPEG files in them count only where there is no other slide, since
    they are more often pictures of slides.

    Raises:
        DataError: a source that is not there, a folder without slides, or a CSV that lacks what is needed.
    """
    rows: list[dict[str, Any]] = []
    for source in map(Path, sources):
        if source.is_dir():
            rows += [{"path": path} for path in _in_folder(source)]
        elif not source.exists():
            raise DataError(f"{source} does not exist.", "Give slides, folders of slides, or a CSV.")
        elif source.suffix.lower() == ".csv":
            rows += _from_csv(source)
        else:
            rows.append({"path": source})
    if not rows:
        raise DataError("No slide was given.", "Give slides, folders of slides, or a CSV.")
    unique = {row["path"].resolve(): row for row in reversed(rows)}  # the first mention of a file counts
    rows = [row for row in rows if unique[row["path"].resolve()] is row]
    slides = []
    for row, name in zip(rows, _names([row["path"] for row in rows]), strict=True):
        beside = row["path"].with_name(f"{_stem(row['path'])}.geojson")
        annotations = row.get("annotations") or (beside if beside.is_file() else None)
        patient = row.get("patient") or name
        slides.append(Slide(name, row["path"], patient, row.get("label", ""), annotations, row.get("mpp")))
    return slides


def _in_folder(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        files += [Path(parent) / name for name in sorted(names) if not name.startswith(".")]
    found = [f for f in files if f.suffix.lower() in TIFF_SUFFIXES | SCANNER_SUFFIXES]
    found = found or [f for f in files if f.suffix.lower() in PLAIN_SUFFIXES]
    if not found:
        known = ", ".join(sorted(TIFF_SUFFIXES | SCANNER_SUFFIXES))
        raise DataError(f"{folder} has no slides ({known}).", "Give a folder that holds slides.")
    return found


def _from_csv(path: Path) -> Iterator[dict[str, Any]]:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True)
    except (OSError, ValueError) as error:
        raise DataError(f"The table {path} cannot be read: {error}.", "Save it as UTF-8 CSV.") from error
    table.columns = [str(c).strip().lower() for c in table.columns]
    if "slide" not in table:
        raise DataError(
            f"The table {path} has no column 'slide' (it has: {', '.join(table.columns)}).",
            f"{did_you_mean('slide', table.columns)} The columns are slide, patient, label, annotations, mpp.",
        )
    for number, row in enumerate(table.to_dict("records"), start=2):
        row = {str(k): str(v).strip() for k, v in row.items()}
        if not row["slide"]:
            raise DataError(f"Line {number} of {path} names no slide.", "Fill the column slide in every row.")
        if "patient" in row and not row["patient"]:
            raise DataError(f"Line {number} of {path} has no patient.", "Fill the column, or leave it out altogether.")
        mpp = None
        if row.get("mpp"):
            try:
                mpp = float(row["mpp"])
            except ValueError as error:
                raise DataError(f"Line {number} of {path} has mpp {row['mpp']!r}.", "Give a number.") from error
        given = path.parent / row["annotations"] if row.get("annotations") else None
        yield row | {"path": path.parent / row["slide"], "annotations": given, "mpp": mpp}


def _stem(path: Path) -> str:
    """The file name without its ending; .ome.tif is one ending."""
    return path.stem[:-4] if path.stem.lower().endswith(".ome") else path.stem


def _names(paths: list[Path]) -> list[str]:
    """A short name a slide: its file name, with the folder and then a number where two would be the same."""
    stems = [_stem(p) for p in paths]
    counts = Counter(stems)
    names: list[str] = []
    taken: set[str] = set()
    for path, stem in zip(paths, stems, strict=True):
        name = base = safe_name(stem if counts[stem] == 1 else f"{path.resolve().parent.name}-{stem}")
        number = 1
        while name.casefold() in taken:  # also where upper and lower case are one file
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names
