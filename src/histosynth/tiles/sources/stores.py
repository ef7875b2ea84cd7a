"""Where the bytes of a source's tiles come from. Every store can be pickled and holds no open file."""

from __future__ import annotations

import io
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError
from histosynth.tiles.images import read_bytes
from histosynth.tiles.sources.archives import Archive
from histosynth.tiles.sources.tables import SPLIT_ALIASES, checked
from histosynth.tiles.tileset import PARQUET_DAMAGE, SPLITS

_MAX_GROUP = 8 << 30  # bytes of a row group, which is read whole


class Store(Protocol):
    """Gives the bytes of a tile."""

    def read(self, path: str) -> bytes: ...

    def name(self, path: str) -> str:
        """What messages call it."""
        ...


@dataclass(frozen=True)
class FolderStore:
    """Files below a folder (absolute paths are taken as they are)."""

    base: Path

    def read(self, path: str) -> bytes:
        target = self.base / path
        if "\\" in path and not target.exists():  # a table that was written on Windows
            target = self.base / path.replace("\\", "/")
        return read_bytes(target)

    def name(self, path: str) -> str:
        return str(self.base / path)


@dataclass(frozen=True)
class ArchiveStore:
    """Members of an archive, below one of its folders."""

    archive: Archive
    prefix: str = ""

    def read(self, path: str) -> bytes:
        clean = "/".join(p for p in path.replace("\\", "/").split("/") if p not in ("", "."))
        below = self.prefix + clean
        return self.archive.read(below if below in self.archive.members else clean)

    def name(self, path: str) -> str:
        return f"{path} in {self.archive.path}"


@dataclass
class ParquetStore:
    """Images inside parquet files, as HuggingFace data sets keep them: a column {bytes, path} or of bytes."""

    files: tuple[Path, ...]
    column: str
    rows: dict[str, tuple[int, int]]
    """(file, row) of each path."""
    _held: dict[tuple[int, int], Any] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "column": self.column, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def name(self, path: str) -> str:
        return f"{path} in {self.files[self.rows[path][0]] if path in self.rows else self.files[0]}"

    def read(self, path: str) -> bytes:
        if path not in self.rows:
            raise DataError(f"{self.files[0]} holds no image {path!r}.", "Check the path.")
        place, row = self.rows[path]
        try:
            with self._lock:
                group, start = self._group(place, row)
            value = group[row - start].as_py()
        except PARQUET_DAMAGE as error:
            raise DataError(f"{self.name(path)} cannot be read: {error}.", "Get the file again.") from error
        if not value:
            raise DataError(f"{self.name(path)} is empty.", "Replace or remove it.")
        return value

    def _group(self, place: int, row: int) -> tuple[Any, int]:
        """The column of the row group that holds a row, and its first row; the last two groups are kept."""
        import pyarrow.parquet as pq

        for (file, start), group in self._held.items():
            if file == place and start <= row < start + len(group):
                return group, start
        with pq.ParquetFile(self.files[place]) as file:
            ends = np.cumsum([file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
            number = int(np.searchsorted(ends, row, side="right"))
            if file.metadata.row_group(number).total_byte_size > _MAX_GROUP:
                raise ValueError(f"its row group {number} has more than {_MAX_GROUP} bytes")
            table = file.read_row_group(number, columns=[self.column])
        group = table.column(0).combine_chunks()
        if self.column.endswith(".bytes"):
            group = group.field("bytes")
        start = int(ends[number]) - table.num_rows
        while len(self._held) > 1:
            del self._held[next(iter(self._held))]
        self._held[(place, start)] = group
        return group, start


def has_images(path: Path) -> bool:
    """Whether a parquet file holds images and not only their paths."""
    import pyarrow.parquet as pq

    try:
        return _image_column(pq.read_schema(path)) is not None
    except PARQUET_DAMAGE as error:
        raise DataError(f"The table {path} cannot be read: {error}.", "Get the file again.") from error


def _image_column(schema: Any) -> str | None:
    import pyarrow.types as kinds

    for name in ("image", "img", "bytes"):
        index = schema.get_field_index(name)
        if index < 0:
            continue
        kind = schema.field(index).type
        if kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return f"{name}.bytes"
        if kinds.is_binary(kind) or kinds.is_large_binary(kind):
            return name
    return None


def parquet_images(files: tuple[Path, ...]) -> tuple[pd.DataFrame, ParquetStore]:
    """The table and the store of parquet files that hold images.

    Class names of integer labels come from the schema, as HuggingFace writes it, else they are class-0, ...
    Several files called train-..., test-... give the split, if both are there.

    Raises:
        DataError: a damaged file, or no column `label`.
    """
    import pyarrow.parquet as pq

    parts = []
    for place, path in enumerate(files):
        try:
            schema = pq.read_schema(path)
            image = _image_column(schema)
            wanted = [c for c in ("path", "label", "patient", "split") if c in schema.names]
            inner = image and image.endswith(".bytes") and schema.field(image[:-6]).type.get_field_index("path") >= 0
            extra = [f"{image[:-6]}.path"] if inner and "path" not in wanted else []
            with pq.ParquetFile(path) as file:
                columns = file.read(columns=[*wanted, *extra])
            columns.validate(full=True)
            part = columns.select(wanted).to_pandas(ignore_metadata=True)
            if extra:
                part["path"] = [(v or {}).get("path") or "" for v in columns.column(image[:-6]).to_pylist()]
        except PARQUET_DAMAGE as error:
            raise DataError(f"The table {path} cannot be read: {error}.", "Get the file again.") from error
        if image is None:
            raise DataError(f"The table {path} has no images.", "Give one parquet file with a column path.")
        if "label" in part and part.label.dtype.kind in "iu":
            names = _class_names(schema)
            part["label"] = [names[i] if 0 <= i < len(names) else f"class-{i}" for i in part.label]
        part["path"] = _unique_paths(part.get("path", pd.Series([""] * len(part))), path.stem)
        if "split" not in part:
            side = path.name.partition("-")[0].lower()
            part["split"] = SPLIT_ALIASES.get(side, side) if len(files) > 1 else ""
        parts.append(part.assign(_file=place, _row=range(len(part))))
    table = pd.concat(parts, ignore_index=True)
    if len(files) > 1 and not {"train", "test"} <= set(table.split) <= set(SPLITS):
        table["split"] = ""
    rows = dict(zip(table.path, zip(table._file, table._row, strict=True), strict=True))
    if len(rows) < len(table):
        table["path"] = [f"{files[f].stem}/{p}" for f, p in zip(table._file, table.path, strict=True)]
        rows = dict(zip(table.path, zip(table._file, table._row, strict=True), strict=True))
    return checked(table, str(files[0])), ParquetStore(files, image, rows)


def _unique_paths(paths: pd.Series, stem: str) -> list[str]:
    paths = paths.fillna("").astype(str).str.strip()
    again = paths.duplicated(keep=False) | (paths == "")
    return [f"{stem}/{row:08d}" if odd else path for row, (path, odd) in enumerate(zip(paths, again, strict=True))]


def _class_names(schema: Any) -> list[str]:
    """The names of the labels in the schema's HuggingFace description, if there is one."""
    try:
        content = json.load(io.BytesIO((schema.metadata or {})[b"huggingface"]))
        names = content["info"]["features"]["label"]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return []
    return [str(n) for n in names] if isinstance(names, list) else []
