"""Write the table of tiles (path, label, patient) of an unpacked data set, as its layout in the catalogue says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from histosynth.core.errors import DataError
from histosynth.core.files import atomic_path
from histosynth.core.progress import say
from histosynth.tiles.download.catalogue import Dataset
from histosynth.tiles.images import EXTENSIONS


def write_table(dataset: Dataset, out: Path, folders: Sequence[Path]) -> int:
    """Write `out/tiles.csv`; return the number of tiles.

    Args:
        dataset: with a layout of the kind "table" or "folders".
        out: paths in the table are relative to it.
        folders: what the archives were unpacked to, inside `out`.

    Raises:
        DataError: no tile found, an unknown class folder, or a metadata table without the named columns.
    """
    import csv

    images = sorted(p for f in folders for p in f.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    rows = _from_metadata(dataset, out, images) if dataset.layout["kind"] == "table" else _from_folders(dataset, images)
    if not rows:
        raise DataError(
            f"The archives of {dataset.title} in {out} hold no tile of the expected layout.",
            f"Look at {dataset.page}: the data set may have changed.",
        )
    if len(rows) != dataset.tiles:
        say(f"{dataset.title} should have {dataset.tiles} tiles; {len(rows)} were found.")
    with atomic_path(out / "tiles.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "patient"])
        writer.writerows((path.relative_to(out).as_posix(), label, patient) for path, label, patient in rows)
    return len(rows)


def _from_metadata(dataset: Dataset, out: Path, images: Sequence[Path]) -> list[tuple[Path, str, str]]:
    """Images that a metadata table names by their stem."""
    import pandas as pd

    layout = dataset.layout
    path = out / layout["table"]
    try:
        with open(path, encoding="utf-8-sig") as stream:
            tab = "\t" in stream.readline()  # some repositories turn a CSV into tab-separated values
        table = pd.read_csv(path, sep="\t" if tab else ",", dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError, pd.errors.ParserError) as error:
        raise DataError(f"The table {path} cannot be read: {error}.", "Remove it and repeat the command.") from error
    columns = [layout["image"], layout["label"], *([layout["patient"]] if "patient" in layout else [])]
    missing = [c for c in columns if c not in table]
    if missing:
        raise DataError(
            f"The table {path} has no column {missing[0]!r} (it has: {', '.join(map(str, table.columns))}).",
            f"Look at {dataset.page}: the data set may have changed.",
        )
    by_stem = {p.stem: p for p in images}
    rows = []
    for record in table[columns].drop_duplicates(columns[0]).itertuples(index=False):
        image, label, *patient = record
        if image in by_stem and label:
            rows.append((by_stem[image], label, patient[0] if patient else ""))
    for number, what in ((len(images) - len(rows), "image(s)"), (len(table) - len(rows), "row(s)")):
        if number:
            say(f"{path.name}: {number} {what} without a counterpart left out.")
    return rows


def _from_folders(dataset: Dataset, images: Sequence[Path]) -> list[tuple[Path, str, str]]:
    """Images in <CLASS>/<images>/; what lies in other folders (masks) is no tile."""
    layout = dataset.layout
    labels = {_key(k): v for k, v in layout["labels"].items()}
    pattern = re.compile(layout["patient"], re.IGNORECASE)
    rows = []
    for path in images:
        if path.parent.name.lower() != layout["images"].lower():
            continue
        folder = path.parent.parent.name
        if _key(folder) not in labels:
            raise DataError(
                f"{dataset.title} has a class folder {folder!r} that the catalogue does not know.",
                f"Known: {', '.join(layout['labels'])}. Look at {dataset.page}: the data set may have changed.",
            )
        match = pattern.match(path.stem)
        # a name without a patient is a patient of its own
        rows.append((path, labels[_key(folder)], "".join(match.groups()).upper() if match else path.stem))
    return rows


def _key(name: str) -> str:
    return re.sub(r"[^a-z]", "", name.lower())
