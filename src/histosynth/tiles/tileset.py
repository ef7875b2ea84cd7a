"""The tile set: a folder that holds real or synthetic tiles in one format.

tiles.parquet          a row a tile (see COLUMNS)
tileset.json           classes with names and colours, microns per pixel, licence, how it was made, digest
images/<CLASS>/<id>.png
cache/                 decoded pixels; can be deleted
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError, RunError, did_you_mean
from histosynth.core.files import atomic_path, ensure_folder, new_array, read_json, write_json
from histosynth.core.progress import bar
from histosynth.tiles.batches import TileArray
from histosynth.tiles.classes import class_entry as class_entry
from histosynth.tiles.images import read_rgb, square

SPLITS = ("train", "val", "test")
COLUMNS = {
    "id": "", "path": "", "label": "", "patient": "", "split": "", "source": "", "sha256": "", "format": "",
    "width": 0, "height": 0, "kept": True, "reason": "",
    "generator": "", "checkpoint": "", "seed": -1, "reference": "",
}  # fmt: skip
_DECODERS = 4
# what may lie in the folder of a tile set that is not finished
_PARTS = {
    "images", "tiles.parquet", "cache", "making.json", "cutting", "slides", "slides.csv",
    "preparing", "thresholds.yaml", "stain.json",
}  # fmt: skip


@dataclass(frozen=True)
class TileSet:
    """A tile set that is on disk.

    Attributes:
        folder: where it is.
        table: a row a tile with the columns of `COLUMNS`, rejected tiles (kept = False) included.
        meta: what tileset.json holds.
    """

    folder: Path
    table: pd.DataFrame
    meta: dict[str, Any]

    @classmethod
    def is_tileset(cls, folder: Path | str) -> bool:
        """Whether a folder is a tile set."""
        return (Path(folder) / "tileset.json").is_file()

    @classmethod
    def open(cls, folder: Path | str) -> Self:
        """Open a tile set.

        Raises:
            DataError: the folder is no tile set, or its table is damaged.
        """
        folder = Path(folder)
        if not cls.is_tileset(folder):
            raise DataError(
                f"{folder} is not a tile set (it has no tileset.json).",
                "Make one with `histosynth tiles import SOURCE OUT`.",
            )
        path = folder / "tiles.parquet"
        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise DataError(f"The table {path} cannot be read: {error}.", "Import the tiles again.") from error
        return cls(folder, complete(table), read_json(folder / "tileset.json"))

    @classmethod
    def create(cls, folder: Path | str, table: pd.DataFrame, classes: Sequence[str], **meta: Any) -> Self:
        """Write the table and the description of tiles whose images are already in `folder`.

        tileset.json is written last: a folder without it is an unfinished tile set.
        """
        folder = Path(folder)
        table = complete(table)
        described = [class_entry(c, i, len(classes)) for i, c in enumerate(classes)]
        with atomic_path(folder / "tiles.parquet") as temporary:
            table.to_parquet(temporary, index=False)
        given = meta.pop("classes_info", {})
        described = [entry | given.get(entry["label"], {}) for entry in described]
        write_json(
            folder / "tileset.json",
            {
                "format": 1,
                "classes": described,
                "digest": digest(table),
                "tiles": int(table.kept.sum()),
                **meta,
            },
        )
        return cls.open(folder)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class labels; their order is the class index."""
        return tuple(entry["label"] for entry in self.meta["classes"])

    @property
    def colours(self) -> dict[str, str]:
        """A colour (#RRGGBB) a class, for figures."""
        return {entry["label"]: entry["colour"] for entry in self.meta["classes"]}

    @property
    def digest(self) -> str:
        """Hexadecimal digest of which tiles there are, with labels and splits."""
        return self.meta["digest"]

    @cached_property
    def kept(self) -> pd.DataFrame:
        """The rows of usable tiles."""
        return self.table[self.table.kept].reset_index(drop=True)

    def rows(self, split: str | None = None) -> pd.DataFrame:
        """The rows of usable tiles of one split, or of all.

        Raises:
            DataError: an unknown split.
        """
        if split is None:
            return self.kept
        if split not in SPLITS:
            raise DataError(f"There is no split {split!r}.", did_you_mean(split, SPLITS))
        return self.kept[self.kept.split == split].reset_index(drop=True)

    def array(self, split: str | None = None, *, size: int, cache: Path | None = None) -> TileArray:
        """The tiles of a split, decoded to `size` pixels; decoded once, then read from a memory map.

        Args:
            cache: where the decoded pixels are kept; the tile set's own cache folder by default.
        """
        pixels = self._pixels(size, cache or self.folder / "cache")
        rows = self.kept
        where = np.arange(len(rows)) if split is None else np.flatnonzero(rows.split == split)
        if split is not None and split not in SPLITS:
            raise DataError(f"There is no split {split!r}.", did_you_mean(split, SPLITS))
        index = {label: i for i, label in enumerate(self.classes)}
        chosen = rows.iloc[where]
        return TileArray(
            pixels if split is None else pixels[where],
            chosen.label.map(index).to_numpy(np.int64),
            chosen.id.tolist(),
            self.classes,
            chosen.patient.tolist(),
        )

    def _pixels(self, size: int, cache: Path) -> np.ndarray:
        key = hashlib.sha256(json.dumps([self.digest, size, self.kept.id.tolist()]).encode()).hexdigest()[:16]
        path = cache / f"pixels-{size}-{key}.npy"
        shape = (len(self.kept), 3, size, size)
        if path.exists():
            try:
                found = np.load(path, mmap_mode="r")
                if found.shape == shape and found.dtype == np.uint8:
                    return found
            except (OSError, ValueError):
                pass  # a damaged cache is made anew
        with atomic_path(path) as temporary:
            pixels = new_array(temporary, shape, np.uint8)

            def decode(position: int) -> None:
                image, _ = read_rgb(self.folder / self.kept.path[position])
                pixels[position] = square(image, size).transpose(2, 0, 1)

            with (
                ThreadPoolExecutor(_DECODERS) as pool,
                bar(f"Decode tiles to {size} px", len(self.kept)) as tick,
            ):
                for _ in pool.map(decode, range(len(self.kept))):
                    tick()
            pixels.flush()
        return np.load(path, mmap_mode="r")


def claim(folder: Path | str) -> Path:
    """Make a folder for a new tile set; one that an interrupted call left half-filled is taken up again.

    Raises:
        RunError: the folder holds a tile set or other files, or cannot be written.
    """
    folder = Path(folder)
    remedy = "Choose a new or empty folder."
    if TileSet.is_tileset(folder):
        raise RunError(f"The folder {folder} already holds a tile set.", remedy)
    if folder.is_dir() and (other := sorted(p.name for p in folder.iterdir() if p.name not in _PARTS)):
        raise RunError(f"The folder {folder} holds other files ({', '.join(other[:3])}).", remedy)
    return ensure_folder(folder)


def complete(table: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that are missing, with their empty values, and fix the types."""
    table = table.copy()
    for name, empty in COLUMNS.items():
        table[name] = table[name].fillna(empty) if name in table else empty
        table[name] = table[name].astype(type(empty) if not isinstance(empty, str) else object)
    return table[[*COLUMNS, *(c for c in table.columns if c not in COLUMNS)]].reset_index(drop=True)


def digest(table: pd.DataFrame) -> str:
    """Digest of ids, contents, labels, patients, splits and which tiles are kept; not of the row order."""
    rows = table[["id", "sha256", "label", "patient", "split", "kept"]].astype(str)
    lines = sorted("\x1f".join(row) for row in rows.itertuples(index=False))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def safe_name(text: str) -> str:
    """A file name made of a label or an id: letters, digits, dot, dash and underscore only."""
    cleaned = re.sub(r"[^\w.-]+", "_", text).strip("._") or "tile"
    if cleaned == text and len(text) <= 80:
        return text
    # two names that clean to the same text must not share a file
    return f"{cleaned[:64]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def set_aside(table: pd.DataFrame) -> dict[str, int]:
    """How many tiles were set aside, for each reason."""
    rejected = table[~table.kept]
    reasons: Iterable[str] = rejected.reason.str.split(":").str[0]
    return {str(k): int(v) for k, v in pd.Series(list(reasons), dtype=object).value_counts().items()}
