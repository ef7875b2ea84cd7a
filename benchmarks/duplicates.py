"""Near-duplicates among 100,000 tiles: recall of planted copies, false joins, and time against brute force.

    python benchmarks/duplicates.py [OUT]

100,000 thumbnails: textures with the spectrum of natural images, 10,000 exactly blank and 5,000 almost blank tiles,
1,000 textures and 400 simulated tissue tiles of 224 px, and a changed copy of each of these 1,400 (JPEG, shift by
1 or 2 px, brightness, flip or turn, and all at once). The peer is the usual all-pairs search: Hamming distances of
64-bit hashes with the eight symmetries, by NumPy in blocks; it ends with candidates, while ours proves them too.
Prints a table; writes OUT/duplicates.json and OUT/duplicates.png (OUT is benchmarks/results by default).
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from histosynth.tiles.split.duplicates import _hashes, _low_frequencies, near_duplicate_groups, thumbnails

TILES = 100_000
COUNTS = (6_250, 12_500, 25_000, 50_000, 100_000)
BRUTE = (6_250, 12_500, 25_000)
TEXTURES, TISSUE, SIZE = 1_000, 400, 224


def textures(count: int, size: int, seed: int) -> np.ndarray:
    """Grey textures, uint8 [N, size, size], whose amplitudes fall as 1 / frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    found = np.empty((count, size, size), np.uint8)
    for start in range(0, count, 500):
        shape = (min(500, count - start), size, frequency.shape[1])
        field = np.fft.irfft2((rng.normal(size=shape) + 1j * rng.normal(size=shape)) / frequency)
        field *= 28 / field.std(axis=(1, 2), keepdims=True)
        found[start : start + 500] = np.clip(165 + field, 0, 255)
    return found


def tissue(count: int) -> np.ndarray:
    """Simulated tissue, uint8 [N, 3, 224, 224]; every tile has its own seed, ten patients."""
    from histosynth.tiles.phantom import CLASSES, make_hospital, make_patient, render

    patients = [make_patient(i, make_hospital(i % 3)) for i in range(10)]
    classes = [c for c in CLASSES if c != "BACK"]
    tiles = [render(classes[i % 8], patient=patients[i % 10], seed=i, size=112).image for i in range(count)]
    large = [np.asarray(Image.fromarray(t).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for t in tiles]
    return np.stack(large).transpose(0, 3, 1, 2)


def jpeg(tile: np.ndarray, quality: int) -> np.ndarray:
    """The tile after a JPEG file."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0))).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream)).transpose(2, 0, 1)


def shifted(tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The tile moved by one or two pixels each way; new pixels are mirrored ones."""
    down, across = rng.choice([-2, -1, 1, 2], 2)
    padded = np.pad(tile, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    return padded[:, 2 + down : 2 + down + SIZE, 2 + across : 2 + across + SIZE]


def brighter(tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another gain and offset."""
    return np.clip(tile * rng.uniform(0.8, 1.15) + rng.uniform(-15, 15), 0, 255).astype(np.uint8)


def turned(tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the seven flips and turns that are not the identity."""
    which = int(rng.integers(1, 8))
    tile = np.rot90(tile, which % 4, (1, 2))
    return np.ascontiguousarray(tile[:, :, ::-1] if which >= 4 else tile)


CHANGES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "JPEG": lambda tile, rng: jpeg(tile, int(rng.integers(30, 80))),
    "shift": shifted,
    "brightness": brighter,
    "flip or turn": turned,
    "all at once": lambda tile, rng: jpeg(shifted(brighter(turned(tile, rng), rng), rng), int(rng.integers(30, 80))),
}


def planted(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(thumbnails of the originals, of their copies, the change of each)."""
    names = list(CHANGES)
    first, second, changes = [], [], []
    for start in range(0, TEXTURES + TISSUE, 100):
        if start < TEXTURES:
            grey = textures(100, SIZE, 10 + start)
            tiles = np.stack([grey, np.clip(grey * 0.7, 0, 255).astype(np.uint8), grey], axis=1)
        elif start == TEXTURES:
            tiles = tissue(TISSUE)
        else:
            break
        chosen = [names[i % len(names)] for i in range(len(tiles))]
        copies = np.stack([CHANGES[c](t, rng) for c, t in zip(chosen, tiles, strict=True)])
        first.append(thumbnails(tiles))
        second.append(thumbnails(copies))
        changes += chosen
    return np.concatenate(first), np.concatenate(second), changes


def brute_force(small: np.ndarray, radius: int = 12) -> int:
    """Candidates by comparing every hash with every other, in blocks."""
    hashes = _hashes(_low_frequencies(small), symmetries=True)
    found = 0
    for start in range(0, len(small), 64):
        for variant in hashes:
            block = variant[start : start + 64, None] ^ hashes[0][None, start:]
            found += int((np.bitwise_count(block) <= radius).sum())
    return found


def main(out: Path) -> None:
    """Run all, print, write."""
    rng = np.random.default_rng(0)
    originals, copies, changes = planted(rng)
    special = np.concatenate([originals, copies])
    blank = np.full((TILES // 10, 32, 32), 241, np.uint8)
    almost = np.clip(rng.normal(240, 0.8, (TILES // 20, 32, 32)), 0, 255).astype(np.uint8)
    plain = textures(TILES - len(special) - len(blank) - len(almost), 32, 1)
    small = np.concatenate([special, blank, almost, plain])
    # what each tile truly is: a copy is its original, and blank tiles are all one
    truth = np.arange(TILES)
    truth[len(originals) : len(special)] = np.arange(len(originals))
    truth[len(special) : len(special) + len(blank)] = len(special)

    start = time.perf_counter()
    groups = np.array(near_duplicate_groups(small))
    whole = time.perf_counter() - start
    pairs = groups[: len(originals)] == groups[len(originals) : len(special)]
    recall = {name: float(pairs[[c == name for c in changes]].mean()) for name in CHANGES}
    tissue_recall = float(pairs[TEXTURES:].mean())
    _, numbers = np.unique(groups, return_inverse=True)
    joined = np.unique(np.stack([numbers, truth], axis=1), axis=0)
    false_joins = len(joined) - len(set(numbers.tolist()))

    print(f"{TILES} tiles in {whole:.1f} s; {false_joins} false joins")
    for name, value in recall.items():
        print(f"  {name:<14} {100 * value:.1f} % of copies found")
    print(f"  of simulated tissue, all changes: {100 * tissue_recall:.1f} %")
    rows = []
    for count in COUNTS:
        part = rng.permutation(small)[:count]
        start = time.perf_counter()
        near_duplicate_groups(part)
        rows.append({"tiles": count, "ours_s": time.perf_counter() - start})
        if count in BRUTE:
            start = time.perf_counter()
            brute_force(part)
            rows[-1]["brute_force_s"] = time.perf_counter() - start
        print("  ".join(f"{k} {v:.2f}" if k != "tiles" else f"{v:>7} tiles" for k, v in rows[-1].items()), flush=True)
    last = [r for r in rows if "brute_force_s" in r][-1]
    expected = last["brute_force_s"] * (TILES / last["tiles"]) ** 2
    print(
        f"brute force at {TILES} tiles, by its square law: {expected:.0f} s, {expected / rows[-1]['ours_s']:.0f}x ours"
    )
    out.mkdir(parents=True, exist_ok=True)
    figures = {"tiles": TILES, "seconds": whole, "recall": recall, "recall_tissue": tissue_recall}
    figures |= {"false_joins": false_joins, "brute_force_expected_s": expected, "scaling": rows}
    (out / "duplicates.json").write_text(json.dumps(figures, indent=1) + "\n")
    plot(rows, out / "duplicates.png")


def plot(rows: list[dict], path: Path) -> None:
    """Seconds against the number of tiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for key, name in (("brute_force_s", "all pairs, candidates only"), ("ours_s", "ours, with proof")):
        mine = [r for r in rows if key in r]
        axis.plot([r["tiles"] for r in mine], [r[key] for r in mine], marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="tiles", ylabel="seconds", title="Finding near-duplicates")
    axis.grid(alpha=0.3, which="both")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results")
