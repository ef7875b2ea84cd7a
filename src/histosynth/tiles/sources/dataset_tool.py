"""Write a tile set as the zip that NVIDIA's StyleGAN training reads, as its dataset_tool makes it.

The layout: an uncompressed zip of uncompressed PNGs, 00000/img00000000.png and so on, all of one square size, and
dataset.json with {"labels": [[name, class index], ...]}. `sources.open_source` reads it back.
"""

from __future__ import annotations

import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from histosynth.core.errors import DataError, SettingError
from histosynth.core.files import atomic_path
from histosynth.core.progress import bar, say
from histosynth.tiles.images import read_rgb, square
from histosynth.tiles.tileset import TileSet

if TYPE_CHECKING:
    import pandas as pd

MIN_SIZE, MAX_SIZE = 16, 4096
_READERS = 4
_AHEAD = 64  # tiles decoded before they are written, so that memory does not grow with their number
_DATE = (1980, 1, 1, 0, 0, 0)  # the same tiles give the same file


def write_dataset_zip(tileset: TileSet, out: Path | str, *, size: int | None = None, split: str | None = None) -> Path:
    """Write the usable tiles of a tile set as a dataset_tool zip.

    Two keys are added to dataset.json, which StyleGAN's reader passes over: "class_names", by class index, and
    "tiles", the id, patient and split of each label, so that a later import splits by patient again.

    Args:
        tileset: which tiles.
        out: the zip; it must not exist.
        size: edge of the tiles in pixels, made from the central square; by default they stay as they are.
        split: one side only; all by default.

    Returns:
        The zip.

    Raises:
        SettingError: a size that cannot be used.
        DataError: no tile, tiles of several sizes without `size`, an unknown split.
        RunError: the zip exists already, or cannot be written.
    """
    out, rows = Path(out), tileset.rows(split)
    if out.suffix.lower() != ".zip":
        raise SettingError(f"The file to write is {out.name!r}.", "Give a name that ends in .zip.")
    if out.exists():
        raise SettingError(f"{out} exists already.", "Choose a new name, or remove it.")
    if rows.empty:
        raise DataError(
            f"{tileset.folder} has no tile{f' in the split {split!r}' if split else ''}.", "Choose another."
        )
    edge = _edge(tileset, rows, size)
    if edge & (edge - 1):
        say(f"The tiles have {edge} px; StyleGAN trains on powers of two. Choose one with --size.")
    index = {label: i for i, label in enumerate(tileset.classes)}
    names = [f"{k // 1000:05d}/img{k:08d}.png" for k in range(len(rows))]
    paths = rows.path.tolist()

    def encoded(position: int) -> bytes:
        pixels, _ = read_rgb(tileset.folder / paths[position])
        stream = io.BytesIO()
        Image.fromarray(square(pixels, edge)).save(stream, format="PNG", compress_level=0)
        return stream.getvalue()

    labels = [[name, index[label]] for name, label in zip(names, rows.label, strict=True)]
    notes = rows[["id", "patient", "split"]].astype(str).to_dict("records")
    content = {"labels": labels, "class_names": list(tileset.classes), "tiles": notes}
    with (
        atomic_path(out) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        ThreadPoolExecutor(_READERS) as pool,
        bar("Export tiles", len(rows)) as tick,
    ):
        for start in range(0, len(rows), _AHEAD):
            part = range(start, min(start + _AHEAD, len(rows)))
            for position, data in zip(part, pool.map(encoded, part), strict=True):
                archive.writestr(zipfile.ZipInfo(names[position], _DATE), data)
                tick()
        archive.writestr(zipfile.ZipInfo("dataset.json", _DATE), json.dumps(content, ensure_ascii=False))
    return out


def _edge(tileset: TileSet, rows: pd.DataFrame, size: int | None) -> int:
    """The edge that all tiles shall have."""
    if size is not None:
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise SettingError(f"size is {size}.", f"It must be from {MIN_SIZE} to {MAX_SIZE} pixels.")
        return size
    sizes = sorted(set(zip(rows.width.tolist(), rows.height.tolist(), strict=True)))
    if len(sizes) > 1 or sizes[0][0] != sizes[0][1]:
        found = ", ".join(f"{w} x {h}" for w, h in sizes[:3]) + (" ..." if len(sizes) > 3 else "")
        raise DataError(f"The tiles of {tileset.folder} are of {found} pixels.", "Choose one edge with --size.")
    return int(sizes[0][0])
