"""Quality metrics: speed on one core against scipy and scikit-image, and what the filter notices.

    python benchmarks/quality.py [FOLDER] [OUT] [--strength 0.5] [--tiles 300]

Speed: tiles of 224 px a second, all our metrics against the eight classical ones computed tile by tile with scipy
and scikit-image, in the same process on one core.

Detection: half of the tiles teach the limits, the other half is measured as it is and with each degradation.
Area under the ROC curve of the metric that is meant for it and of the filter's overall score, and precision and
recall of the filter at its learned limits (as many damaged as sound tiles). On simulated tissue, and on FOLDER of
class folders or a CSV if given; --tiles caps how many are read. Writes OUT/quality.json (benchmarks/results).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from histosynth.core.files import write_json
from histosynth.core.seeds import derive, numpy_rng
from histosynth.tiles.phantom import CLASSES, make_hospital, make_patient, render
from histosynth.tiles.quality.degrade import degrade
from histosynth.tiles.quality.metrics import METRICS, measure
from histosynth.tiles.quality.thresholds import learn
from histosynth.tiles.sources.source import open_source

CLASSICAL = METRICS[:8]
# the metric that is meant for each, and the side on which damage lies
MEANT = {
    "defocus": ("focus_tissue", -1),
    "motion": ("focus_tissue", -1),
    "jpeg": ("jpeg_quality", -1),
    "noise": ("noise", 1),
    "fold": ("fold_ratio", 1),
    "ink": ("ink_ratio", 1),
    "bubble": ("bubble_ratio", 1),
}


def classical(image: np.ndarray) -> list[float]:
    """The eight classical metrics of one uint8 [H, W, 3] tile, with scipy and scikit-image."""
    from scipy import fft, ndimage
    from skimage import color

    grey = image @ np.array([0.2126, 0.7152, 0.0722])
    laplacian = ndimage.convolve(grey, [[0, 1, 0], [1, -4, 1], [0, 1, 0]], mode="reflect")
    share = np.histogram(grey, bins=256, range=(0, 255))[0] / grey.size
    share = share[share > 0]
    gradient = ndimage.sobel(grey, 0) ** 2 + ndimage.sobel(grey, 1) ** 2
    hsv = color.rgb2hsv(image)
    value, saturation = hsv[..., 2], hsv[..., 1]
    across, inside = [], []
    for axis in (0, 1):
        steps = np.abs(np.diff(grey, axis=axis))
        edge = np.arange(1, steps.shape[axis] + 1) % 8 == 0
        across.append(np.compress(edge, steps, axis=axis).ravel())
        inside.append(np.compress(~edge, steps, axis=axis).ravel())
    rows, columns = grey.shape[0] // 8, grey.shape[1] // 8
    blocks = grey[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8).transpose(0, 2, 1, 3)
    energy = fft.dctn(blocks, axes=(2, 3), norm="ortho") ** 2
    return [
        laplacian.var(),
        -(share * np.log2(share)).sum(),
        gradient.mean(),
        ((value > 0.95) & (saturation < 0.10)).mean(),
        (saturation > 0.90).mean(),
        ((value < 0.98) | (saturation > 0.20)).mean(),
        max(0.0, np.concatenate(across).mean() - np.concatenate(inside).mean()),
        (energy[..., :2, :2].sum((2, 3)) / np.maximum(energy.sum((2, 3)), 1e-12)).mean(),
    ]


def simulated(per_class: int, size: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """Tiles uint8 [N, 3, size, size] of three hospitals with four patients each, and their labels."""
    images, labels = [], []
    for k in range(per_class):
        hospital = make_hospital(derive(0, "hospital", k % 3), shift=0.6)
        patient = make_patient(derive(0, "patient", k % 12), hospital)
        for label in CLASSES:
            tile = render(label, patient=patient, seed=derive(0, label, k), size=size, field_um=112.0)
            images.append(tile.image.transpose(2, 0, 1))
            labels.append(label)
    return np.stack(images), np.array(labels, object)


def real(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `count` tiles of the commonest size, evenly over a source, and their labels."""
    source = open_source(folder)
    rows = source.table.iloc[np.unique(np.linspace(0, len(source.table) - 1, count).astype(int))]
    images = [source.rgb(path)[0] for path in rows.path]
    shapes = pd.Series([i.shape for i in images])
    usual = np.flatnonzero(shapes == shapes.mode()[0])
    return np.stack([images[i].transpose(2, 0, 1) for i in usual]), rows.label.to_numpy(object)[usual]


def speed(images: np.ndarray) -> dict[str, float]:
    """Tiles a second of processor time of both on one thread, the best of three."""

    def best(work: Any) -> float:
        times = []
        for _ in range(3):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return len(images) / min(times)

    measure(images[:8])
    theirs = [classical(i.transpose(1, 2, 0)) for i in images[:20]]
    ours = measure(images[:20])
    values = np.array(theirs).T
    apart = [np.abs(ours[n] - v).max() / max(np.abs(v).max(), 1e-9) for n, v in zip(CLASSICAL, values, strict=True)]
    return {
        "ours_tiles_a_second": best(lambda: measure(images)),
        "classical_tiles_a_second": best(lambda: [classical(i.transpose(1, 2, 0)) for i in images]),
        "largest_relative_difference": float(max(apart)),
    }


def detection(images: np.ndarray, labels: np.ndarray, strength: float) -> dict[str, Any]:
    """What the filter notices; classes that it leaves alone are left out."""
    from sklearn.metrics import roc_auc_score

    teach = np.zeros(len(images), bool)
    teach[numpy_rng(0, "half").permutation(len(images))[: len(images) // 2]] = True
    clean = pd.DataFrame(measure(images))
    limits = learn(clean[teach], labels[teach])
    kept = ~teach & np.array([limits.of(c).accept == "" for c in labels])
    sound, own = clean[kept], labels[kept]
    verdicts = np.array(limits.verdicts(sound, own, warn=False), object)
    false = verdicts != ""
    found: dict[str, Any] = {
        "tiles": int(kept.sum()),
        "sound_rejected": float(false.mean()),
        "sound_rejected_by_class": {str(c): float(false[own == c].mean()) for c in sorted(set(own))},
        "sound_rejected_for": pd.Series([v.split()[1] for v in verdicts[false]], dtype=object).value_counts().to_dict(),
    }
    truth = np.repeat([0, 1], kept.sum())
    for name, (metric, side) in MEANT.items():
        damaged = pd.DataFrame(measure(degrade(name, images[kept], strength, range(int(kept.sum())))))
        hit = np.array(limits.verdicts(damaged, own, warn=False), object) != ""
        score = np.concatenate([limits.score(sound, own), limits.score(damaged, own)])
        found[name] = {
            "metric": metric,
            "auc_metric": float(roc_auc_score(truth, side * np.concatenate([sound[metric], damaged[metric]]))),
            "auc_filter": float(roc_auc_score(truth, score)),
            "precision": float(hit.sum() / max(hit.sum() + false.sum(), 1)),
            "recall": float(hit.mean()),
        }
    return found


def show(title: str, found: dict[str, Any]) -> None:
    """Print one table."""
    print(f"\n{title}: {found['tiles']} tiles; sound tiles rejected {found['sound_rejected']:.1%}", end=" ")
    print(found["sound_rejected_for"] or "")
    print("  by class: " + ", ".join(f"{c} {v:.1%}" for c, v in found["sound_rejected_by_class"].items()))
    print(f"  {'damage':<10}{'metric':<16}{'AUC metric':>11}{'AUC filter':>11}{'precision':>11}{'recall':>8}")
    for name in MEANT:
        row = found[name]
        figures = "".join(f"{row[k]:>11.3f}" for k in ("auc_metric", "auc_filter", "precision", "recall"))
        print(f"  {name:<10}{row['metric']:<16}{figures}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--strength", type=float, default=0.5)
    parser.add_argument("--tiles", type=int, default=300)
    parser.add_argument("--per-class", type=int, default=30)
    given = parser.parse_args()
    images, labels = simulated(given.per_class)
    with threadpool_limits(1):
        rates = speed(images[:100])
    report: dict[str, Any] = {"strength": given.strength, "speed": rates}
    print(f"224 px, one core: all metrics {rates['ours_tiles_a_second']:.0f} tiles/s; the eight classical ones with")
    print(f"scipy and scikit-image {rates['classical_tiles_a_second']:.0f} tiles/s", end=" ")
    print(f"(values differ by {rates['largest_relative_difference']:.1e} at the most)")
    report["simulated"] = detection(images, labels, given.strength)
    show(f"Simulated tissue, strength {given.strength:g}", report["simulated"])
    if given.folder:
        report["real"] = detection(*real(given.folder, given.tiles), given.strength)
        show(f"{given.folder.name}, strength {given.strength:g}", report["real"])
    write_json(given.out / "quality.json", report)


if __name__ == "__main__":
    main()
