"""Training tiles a second at 128 px: our epochs from a memory map against torch's DataLoader over PNG files.

    python benchmarks/loader.py [OUT]

Both give float batches of 64 with random flips and quarter turns. The peer is torchvision's ImageFolder with
transforms, decoding each PNG every epoch, in this process and with two workers. `batch_at`, which the trainings
here use, is timed too. Ours is repeated with more tiles, to show that the cost of a tile stays the same.
Prints a table; writes OUT/loader.json and OUT/loader.png (OUT is benchmarks/results by default).
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import histosynth  # noqa: F401  (lets torchvision import beside a CPU-only torch)
from histosynth.core.files import new_array
from histosynth.tiles.batches import TileArray, batch_at
from histosynth.tiles.epochs import EpochConfig, loader

SIZE, CLASSES, BATCH, SECONDS = 128, 9, 64, 4.0
COUNTS = (900, 3_600, 14_400)


def tiles(pool: np.ndarray, count: int, path: Path) -> TileArray:
    """A memory map of tiles, each four pieces of a pool of simulated ones."""
    rng = np.random.default_rng(0)
    images = new_array(path, (count, 3, SIZE, SIZE), np.uint8)
    half = SIZE // 2
    for i in range(count):
        for y, x in itertools.product((0, half), repeat=2):
            top, left = rng.integers(0, half + 1, 2)
            images[i, :, y : y + half, x : x + half] = pool[rng.integers(len(pool))][
                :, top : top + half, left : left + half
            ]
    images.flush()
    labels = np.arange(count) % CLASSES
    return TileArray(
        np.load(path, mmap_mode="r"), labels, [f"t{i:06d}" for i in range(count)], tuple("ABCDEFGHI"[:CLASSES])
    )


def pool_of_tissue() -> np.ndarray:
    """Simulated tiles, uint8 [N, 3, 128, 128]."""
    from histosynth.tiles.phantom import CLASSES as KINDS
    from histosynth.tiles.phantom import make_hospital, make_patient, render

    patients = [make_patient(i, make_hospital(0)) for i in range(4)]
    found = [render(k, patient=p, seed=1, size=SIZE).image for k in KINDS for p in patients]
    return np.stack(found).transpose(0, 3, 1, 2)


def rate(batches: Iterator[Any]) -> float:
    """Tiles a second, after a few batches to warm up."""
    for _ in range(3):
        next(batches)
    start, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < SECONDS:
        done += len(next(batches)[0])
    return done / passed


def our_epochs(array: TileArray, workers: int = 0) -> Iterator[Any]:
    """Batches of epoch after epoch, balanced, with flips and turns."""
    batches = loader(array, config=EpochConfig(batch=BATCH, pixel_range="-1_1"), workers=workers)
    for epoch in itertools.count():
        batches.set_epoch(epoch)
        yield from batches


def our_steps(array: TileArray) -> Iterator[Any]:
    """Batches by number, as floats."""
    for step in itertools.count():
        batch = batch_at(array, step, batch_size=BATCH)
        yield batch.images.float().div_(127.5).sub_(1), batch.labels, batch.ids


class QuarterTurn:
    """A random quarter turn, as the peer's transform."""

    def __call__(self, image: Image.Image) -> Image.Image:
        turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
        chosen = random.choice(turns)
        return image if chosen is None else image.transpose(chosen)


def image_folder(folder: Path, workers: int) -> Iterator[Any]:
    """The usual loader over class folders of PNG files."""
    from torch.utils.data import DataLoader
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [
        transforms.RandomHorizontalFlip(),
        QuarterTurn(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.5] * 3),
    ]
    data = ImageFolder(str(folder), transforms.Compose(steps))
    batches = DataLoader(data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from batches


def main(out: Path) -> None:
    """Run all, print, write."""
    import torch

    rows = []
    pool = pool_of_tissue()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arrays = [tiles(pool, count, folder / f"{count}.npy") for count in COUNTS]
        for i, image in enumerate(arrays[0].images):
            path = folder / "png" / arrays[0].classes[arrays[0].labels[i]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(path)
        runs = [("our epochs", a, our_epochs(a)) for a in arrays]
        runs += [("our epochs, 2 workers", arrays[0], our_epochs(arrays[0], 2))]
        runs += [("batch_at", a, our_steps(a)) for a in arrays]
        runs += [("DataLoader of PNG", arrays[0], image_folder(folder / "png", 0))]
        runs += [("DataLoader of PNG, 2 workers", arrays[0], image_folder(folder / "png", 2))]
        print(f"{torch.get_num_threads()} torch thread(s)")
        for kind, array, batches in runs:
            found = rate(batches)
            rows.append({"kind": kind, "tiles": len(array), "tiles_per_second": found})
            print(f"{kind:<30}{len(array):>8} tiles{found:>10.0f} tiles/s", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "loader.json").write_text(json.dumps({"tile_px": SIZE, "batch": BATCH, "runs": rows}, indent=1) + "\n")
    plot(rows, out / "loader.png")


def plot(rows: list[dict], path: Path) -> None:
    """Milliseconds a tile against the number of tiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for kind in dict.fromkeys(r["kind"] for r in rows):
        mine = [r for r in rows if r["kind"] == kind]
        axis.plot([r["tiles"] for r in mine], [1000 / r["tiles_per_second"] for r in mine], marker="o", label=kind)
    axis.axhline(1, color="grey", linewidth=1, linestyle="--", label="1,000 tiles a second")
    axis.set(xscale="log", yscale="log", xlabel="tiles", ylabel="ms a tile", title=f"Training loader, {SIZE} px")
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results")
