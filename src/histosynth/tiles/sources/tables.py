"""The table of a source (path, label, patient, split) from class folders, a CSV, a parquet file or dataset.json."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from histosynth.core.errors import DataError, did_you_mean
from histosynth.tiles.classes import CLASS_TABLES
from histosynth.tiles.images import EXTENSIONS
from histosynth.tiles.tileset import PARQUET_DAMAGE, SPLITS

COLUMNS = ["path", "label", "patient", "split"]
_ENDS = tuple(EXTENSIONS)
SPLIT_ALIASES = {"validation": "val", "valid": "val", "training": "train", "testing": "test"}


def is_image(name: str) -> bool:
    """Whether a name ends like an image and is not hidden."""
    last = name.rpartition("/")[2]
    return not last.startswith(".") and last.lower().endswith(_ENDS)


def from_folders(names: Iterable[str], folders: Iterable[str], where: str) -> pd.DataFrame:
    """A row an image that lies in a class folder.

    Args:
        names: relative paths of all files.
        folders: the top folders, empty ones included.
        where: the source, for messages.

    Returns:
        The table; attrs["empty"] lists the folders without images.

    Raises:
        DataError: no images in class folders, or folders that are splits or collections and not classes.
    """
    rows = [(n, n.partition("/")[0], "", "") for n in names if "/" in n and is_image(n)]
    if not rows:
        raise DataError(
            f"{where} has no class folders with images ({', '.join(sorted(EXTENSIONS))}).",
            "Expected SOURCE/<CLASS>/<tile>.png, or a CSV with the columns path, label, patient.",
        )
    labels = {row[1] for row in rows}
    if {label.lower() for label in labels} <= {*SPLITS, *SPLIT_ALIASES}:
        raise DataError(
            f"The folders of {where} are called {', '.join(sorted(labels))}, like splits and not like classes.",
            "Give a CSV with the columns path, label, patient, split, or import one of these folders.",
        )
    inner = {n.split("/")[1] if n.count("/") > 1 else "" for n, *_ in rows}
    known = {label for table in CLASS_TABLES.values() for label in table}
    if min(len(labels), len(inner)) > 1 and inner <= known and labels.isdisjoint(known):
        raise DataError(
            f"The folders of {where} ({', '.join(sorted(labels))}) are no classes: they hold folders of classes "
            f"({', '.join(sorted(inner))}).",
            "Give each of them as a source to `histosynth tiles prepare`, or import them one by one.",
        )
    table = pd.DataFrame(sorted(rows, key=lambda row: (row[1], row[0])), columns=COLUMNS)
    table.attrs["empty"] = sorted(set(folders) - labels)
    return table


def from_csv(data: bytes, where: str) -> pd.DataFrame:
    """The table in the bytes of a CSV.

    Raises:
        DataError: no CSV, or see `checked`.
    """
    try:
        table = pd.read_csv(
            io.BytesIO(data), dtype=str, keep_default_na=False, encoding="utf-8-sig", skipinitialspace=True
        )
    except (OSError, ValueError, OverflowError) as error:
        raise DataError(f"The table {where} cannot be read: {error}.", "Save it as UTF-8 CSV.") from error
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes the surplus fields for row names
        raise DataError(f"The table {where} has more fields in its rows than in its head.", "Mend or quote the commas.")
    return checked(table, where)


def from_parquet(source: Any, where: str) -> pd.DataFrame:
    """The table in a parquet file (a path or a file object); rows that say kept = False are left out.

    Raises:
        DataError: no parquet, or see `checked`.
    """
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(source) as file:
            names = {c: c.strip().lower() for c in file.schema_arrow.names}
            wanted = [c for c, clean in names.items() if clean in {*COLUMNS, "kept"}]
            usable = {"path", "label"} <= set(names.values())
            content = file.read(columns=wanted) if usable else file.schema_arrow.empty_table()
        content.validate(full=True)  # text that is none would fail later, and not as an error of pandas
        table = content.to_pandas(ignore_metadata=True)
    except PARQUET_DAMAGE as error:
        raise DataError(f"The table {where} cannot be read: {error}.", "Save it as parquet again.") from error
    table.columns = [str(c).strip().lower() for c in table.columns]
    if "kept" in table and table.kept.dtype == bool:
        table = table[table.kept].reset_index(drop=True)
    return checked(table, where)


def checked(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """The four columns as clean text.

    Raises:
        DataError: a missing column, no row, no label, an unknown split, or patients in some rows only.
    """
    table = table.reset_index(drop=True)
    table.columns = [str(c).strip().lower() for c in table.columns]
    for column in ("path", "label"):
        if column not in table:
            raise DataError(
                f"The table {where} has no column {column!r} (it has: {', '.join(table.columns)}).",
                f"{did_you_mean(column, table.columns)} Rename it; the columns are path, label, patient, split.",
            )
    if table.empty:
        raise DataError(f"The table {where} has no row.", "Add a row a tile: path, label, patient.")
    if table.columns.duplicated().any():
        name = table.columns[table.columns.duplicated()][0]
        raise DataError(f"The table {where} has two columns {name!r}.", "Remove one of them.")
    clean = {c: _text(table[c]) if c in table else "" for c in COLUMNS}
    table = pd.DataFrame(clean, index=pd.RangeIndex(len(table)), columns=COLUMNS)
    unlabelled = table.label == ""
    if unlabelled.any():
        first = table.path[unlabelled].iloc[0]
        raise DataError(
            f"The table {where} has {unlabelled.sum()} row(s) without a label (first: {first}).",
            "Fill the column label in every row.",
        )
    table["split"] = table.split.str.lower().replace(SPLIT_ALIASES)
    unknown = sorted(set(table.split) - {*SPLITS, ""})
    if unknown:
        raise DataError(f"The table {where} has the split {unknown[0]!r}.", did_you_mean(unknown[0], SPLITS))
    missing = (table.patient == "").sum()
    if 0 < missing < len(table):
        raise DataError(
            f"The table {where} has {missing} row(s) without a patient.",
            "Fill the column patient in every row, or leave it out altogether.",
        )
    return table


def _text(column: pd.Series) -> pd.Series:
    """Any column as text: empty for missing, and 7 rather than 7.0 where a gap made integers floats."""
    if column.dtype.kind == "f" and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    filled = column.astype(object).where(column.notna(), "")
    return filled.map(lambda v: v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v)).str.strip()


def labels_of(data: bytes, where: str) -> dict[str, Any] | None:
    """What a dataset.json of NVIDIA's dataset_tool says, or None for one that knows no labels.

    Raises:
        DataError: no JSON.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}/dataset.json cannot be read: {error}.", "Mend or remove that file.") from error
    return content if isinstance(content, dict) and "labels" in content else None


def from_labels(content: dict[str, Any], where: str, class_names: Sequence[str] = ()) -> pd.DataFrame:
    """The table of a dataset.json, {"labels": [[name, class index], ...]}.

    Args:
        content: the JSON; the keys "class_names" (a list) and "tiles" (patient and split, a dictionary a
            label) are additions of `write_dataset_zip`.
        where: the source, for messages.
        class_names: labels by class index, before those of the file; class-0, class-1, ... without either.

    Raises:
        DataError: no labels, or labels that are not class indices.
    """
    labels = content["labels"]
    if not labels:
        raise DataError(f"{where}/dataset.json has no labels.", "Make it with labels, or give class folders.")
    if not isinstance(labels, list) or not all(
        isinstance(e, list) and len(e) == 2 and isinstance(e[0], str) and type(e[1]) is int and e[1] >= 0
        for e in labels
    ):
        raise DataError(f"{where}/dataset.json has labels other than [name, class index].", "Mend that file.")
    own = content.get("class_names")
    own = own if isinstance(own, list) and all(isinstance(n, str) and n.strip() for n in own) else []
    names = [*class_names] or own
    if class_names and (top := max(index for _, index in labels)) >= len(names):
        raise DataError(
            f"{where} has the class index {top}, but {len(names)} class name(s) are given.", "Name all classes."
        )
    table = pd.DataFrame({"path": [name.replace("\\", "/") for name, _ in labels]})
    table["label"] = [names[i] if i < len(names) else f"class-{i}" for _, i in labels]
    notes = content.get("tiles")
    if isinstance(notes, list) and len(notes) == len(labels) and all(isinstance(n, dict) for n in notes):
        for column in ("patient", "split"):
            table[column] = [str(n.get(column, "")) for n in notes]
    return checked(table, f"{where}/dataset.json")
