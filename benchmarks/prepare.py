"""`tiles prepare` against the number of tiles: peak memory of all its processes, and tiles a second.

    python benchmarks/prepare.py [OUT]

Prepares 1,000, 5,000 and 20,000 simulated tiles of 64 px with every step on (quality, near-duplicates, split,
Vahadane, resize), and the 1,000 also by the plain loop that most projects write: Pillow, scikit-image metrics,
Macenko by eigenvectors, one tile after the other. Prints a table; writes OUT/prepare.json and OUT/prepare.png
(OUT is benchmarks/results by default).
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

COUNTS = (1_000, 5_000, 20_000)
SIZE = 64


def make_source(path: Path, count: int) -> None:
    """A zip of class folders. Each tile is four pieces of a pool of simulated tiles, so none repeats another."""
    from histosynth.tiles.phantom import CLASSES, make_hospital, make_patient, render

    classes = [c for c in CLASSES if c not in ("BACK", "ADI")]
    hospital = make_hospital(0, shift=0.3)
    patients = [make_patient(i, hospital) for i in range(4)]
    pools = {
        c: np.stack([render(c, patient=p, seed=k, size=SIZE, field_um=64.0).image for p in patients for k in range(3)])
        for c in classes
    }
    rng = np.random.default_rng(0)
    half = SIZE // 2
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            label = classes[i % len(classes)]
            tile = np.empty((SIZE, SIZE, 3), np.uint8)
            for y in (0, half):
                for x in (0, half):
                    piece = pools[label][rng.integers(len(pools[label]))]
                    top, left = rng.integers(0, half + 1, 2)
                    tile[y : y + half, x : x + half] = piece[top : top + half, left : left + half]
            stream = io.BytesIO()
            Image.fromarray(tile).save(stream, "PNG", compress_level=1)
            archive.writestr(f"tiles/{label}/{i:06d}.png", stream.getvalue())


def ours(source: Path, out: Path, workers: int) -> None:
    """Every step of `tiles prepare`."""
    from histosynth.tiles.prepare.pipeline import PrepareConfig, prepare

    prepare(source, out, PrepareConfig(stain="vahadane", size=48), workers)


def plain_loop(source: Path, out: Path) -> None:
    """The same steps as a loop over tiles with the usual libraries."""
    from scipy import ndimage
    from skimage.color import rgb2gray, rgb2hsv
    from skimage.filters import sobel
    from skimage.measure import blur_effect, shannon_entropy

    reference = None
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            image = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            grey, hsv = rgb2gray(image), rgb2hsv(image)
            metrics = [
                ndimage.laplace(grey * 255).var(),
                shannon_entropy((grey * 255).astype(np.uint8)),
                (sobel(grey) ** 2).mean(),
                ((hsv[..., 2] > 0.95) & (hsv[..., 1] < 0.1)).mean(),
                blur_effect(grey),
            ]
            if not np.isfinite(metrics).all():
                continue
            stains, strength = macenko(image)
            reference = reference or (stains, strength)
            od = -np.log((image.reshape(-1, 3).astype(float) + 1) / 240)
            amounts = np.linalg.lstsq(stains.T, od.T, rcond=None)[0] * (reference[1] / strength)[:, None]
            new = np.clip(240 * np.exp(-(reference[0].T @ amounts).T), 0, 255).reshape(image.shape).astype(np.uint8)
            target = out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(new).resize((48, 48), Image.Resampling.LANCZOS).save(target)


def macenko(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stain vectors [2, 3] and the 99th percentile of their concentrations [2] (Macenko et al. 2009)."""
    od = -np.log((image.reshape(-1, 3).astype(float) + 1) / 240)
    tissue = od[(od > 0.15).all(1)]
    if len(tissue) < 32:
        return np.array([[0.65, 0.7, 0.29], [0.07, 0.99, 0.11]]), np.ones(2)
    _, vectors = np.linalg.eigh(np.cov(tissue.T))
    plane = vectors[:, 1:]
    plane *= np.where(plane.sum(0) < 0, -1, 1)
    angle = np.arctan2(*(tissue @ plane).T)
    ends = np.percentile(angle, [1, 99])
    stains = np.stack([plane @ [np.sin(a), np.cos(a)] for a in ends])
    amounts = np.linalg.lstsq(stains.T, tissue.T, rcond=None)[0]
    return stains, np.maximum(np.percentile(amounts, 99, axis=1), 1e-3)


def measured(command: list[str]) -> tuple[float, float]:
    """(seconds, peak memory in MiB) of a command and its children; pages that they share count once."""
    import psutil

    peak, done = 0, threading.Event()
    start = time.perf_counter()
    with subprocess.Popen(command, env={**os.environ, "HISTOSYNTH_QUIET": "1"}) as process:

        def watch() -> None:
            nonlocal peak
            while not done.wait(0.1):
                total = 0
                try:
                    top = psutil.Process(process.pid)
                    for one in (top, *top.children(recursive=True)):
                        memory = one.memory_full_info()
                        total += getattr(memory, "pss", memory.rss)
                except psutil.Error:
                    continue
                peak = max(peak, total)

        watcher = threading.Thread(target=watch)
        watcher.start()
        status = process.wait()
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    return seconds, peak / 2**20


def main(out: Path) -> None:
    """Run all, print, write."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    runs = [("ours", n, w) for n in COUNTS for w in sorted({1, workers})] + [("plain loop", COUNTS[0], 1)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for count in COUNTS:
            make_source(base / f"{count}.zip", count)
        print(f"{'':<12}{'tiles':>8}{'workers':>9}{'seconds':>10}{'tiles/s':>10}{'peak MiB':>10}")
        for kind, count, used in runs:
            target = base / "out"
            command = [sys.executable, __file__, "--one", kind, str(base / f"{count}.zip"), str(target), str(used)]
            seconds, peak = measured(command)
            shutil.rmtree(target)
            row = {"kind": kind, "tiles": count, "workers": used, "seconds": seconds, "peak_mib": peak}
            rows.append(row | {"tiles_per_second": count / seconds})
            print(f"{kind:<12}{count:>8}{used:>9}{seconds:>10.1f}{count / seconds:>10.0f}{peak:>10.0f}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "prepare.json").write_text(json.dumps({"tile_px": SIZE, "runs": rows}, indent=1) + "\n")
    plot(rows, out / "prepare.png")


def plot(rows: list[dict], path: Path) -> None:
    """Memory and speed against the number of tiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, key, title in zip(
        axes, ("peak_mib", "tiles_per_second"), ("peak memory, all processes (MiB)", "tiles a second"), strict=True
    ):
        for kind, used in sorted({(r["kind"], r["workers"]) for r in rows}):
            mine = [r for r in rows if (r["kind"], r["workers"]) == (kind, used)]
            name = f"{kind}, {used} process{'es' if used > 1 else ''}"
            axis.plot([r["tiles"] for r in mine], [r[key] for r in mine], marker="o", label=name)
        axis.set(xscale="log", xlabel="tiles", title=title, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        _, _, kind, source, target, used = sys.argv
        if kind == "ours":
            ours(Path(source), Path(target), int(used))
        else:
            plain_loop(Path(source), Path(target))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results")
