"""A small hospital of coloured noise with patients, and synthetic tile sets of several origins."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histosynth.core.files import sha256_file
from histosynth.tiles.tileset import TileSet

CLASSES = ("A", "B", "C")
SIZE = 16


def draw(label: str, rng: np.random.Generator) -> np.ndarray:
    """A tile whose colour and texture tell its class, not perfectly."""
    base = {"A": (200, 120, 160), "B": (170, 110, 190), "C": (215, 160, 150)}[label]
    step = {"A": 1, "B": 2, "C": 4}[label]
    grid = np.kron(rng.normal(0, 25, (SIZE // step, SIZE // step)), np.ones((step, step)))
    return np.clip(np.array(base) + grid[..., None] + rng.normal(0, 12, 3), 0, 255).astype(np.uint8)


def write_set(folder: Path, rows: list[dict], tiles: list[np.ndarray], classes=CLASSES, **meta) -> TileSet:
    """A tile set of these rows (label, and whatever else is known) and pixels uint8 [H, W, 3]."""
    for k, (row, tile) in enumerate(zip(rows, tiles, strict=True)):
        row.setdefault("id", f"{folder.name}-{k:04d}")
        row["path"] = f"images/{row['label']}/{row['id']}.png"
        path = folder / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tile).save(path)
        row |= {"sha256": sha256_file(path), "format": "PNG", "width": tile.shape[1], "height": tile.shape[0]}
    return TileSet.create(folder, pd.DataFrame(rows), classes, **meta)


def hospital(folder: Path, seed: int = 0, patients=(9, 4, 6), per_patient=3, prefix="p") -> TileSet:
    """Real tiles: every patient has tiles of all classes."""
    rng = np.random.default_rng(seed)
    sides = [split for split, n in zip(("train", "val", "test"), patients, strict=True) for _ in range(n)]
    rows = [
        {"label": label, "patient": f"{prefix}{who:02d}", "split": split}
        for who, split in enumerate(sides)
        for label in CLASSES
        for _ in range(per_patient if label != "C" or split != "train" else 1)
    ]
    return write_set(folder, rows, [draw(row["label"], rng) for row in rows], source=folder.name)


def made(folder: Path, real: TileSet | None, count=12, seed=1, generator="gan", split="train", **meta) -> TileSet:
    """Synthetic tiles of a generator that was trained on a split of `real`, or nobody knows on what."""
    rng = np.random.default_rng(seed)
    rows = [{"label": label, "generator": generator, "seed": k} for label in CLASSES for k in range(count)]
    known = {"training_data": real.array(split, size=SIZE).digest()} if real is not None else {}
    return write_set(
        folder,
        rows,
        [draw(row["label"], rng) for row in rows],
        synthetic=True,
        generator=generator,
        size=SIZE,
        **(known | meta),
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict[str, TileSet]:
    """real, gan, diffusion, external."""
    root = tmp_path_factory.mktemp("world")
    real = hospital(root / "real")
    return {
        "real": real,
        "gan": made(root / "gan", real),
        "diffusion": made(root / "diffusion", real, count=8, seed=2, generator="diffusion"),
        "external": hospital(root / "elsewhere", seed=5, patients=(0, 0, 5), prefix="other"),
    }
