"""Which measure sees which fault? Real (simulated) tiles are spoilt in known amounts, and every measure is taken.

    python benchmarks/sensitivity.py [--tiles 400] [--out docs/sensitivity.png]

Three sets of tiles of one simulated hospital, each of other patients: training tiles, reference tiles, and the tiles
that play the synthetic set. Untouched, these last give the floor: what a perfect generator would get, with its spread
over random halves of them. Then they are spoilt, a grade at a time, and each measure is drawn over the grade.
A measure sees a fault when no grade is better than the one before by more than two spreads of the floor, and the last
is worse than the untouched tiles by at least three. Prints that table; writes the figure and
benchmarks/results/sensitivity.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from histosynth import encoders
from histosynth.core.seeds import derive, numpy_rng
from histosynth.evaluate.colour import colour
from histosynth.evaluate.consistency import label_consistency
from histosynth.evaluate.copies import copies
from histosynth.evaluate.coverage import prdc
from histosynth.evaluate.diversity import vendi
from histosynth.evaluate.frechet import frechet_distance
from histosynth.evaluate.kernel import gaussian, mmd2, squared_distances
from histosynth.evaluate.nuclei import fit_nuclei, nuclei
from histosynth.evaluate.patients import patient_colour
from histosynth.evaluate.perceptual import lpips_diversity, pair_distance
from histosynth.tiles.phantom import CLASSES, make_hospital, make_patient, render
from histosynth.tiles.quality.degrade import degrade

TISSUES = tuple(c for c in CLASSES if c != "BACK")  # empty glass has nothing to spoil
SIZE = 64
K = 5


@dataclass
class Tiles:
    """images uint8 [N, 3, S, S], labels int [N], patients: N names; and features by encoder, made when asked for."""

    images: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    features: dict[str, np.ndarray] = field(default_factory=dict)

    def pick(self, where: np.ndarray) -> Tiles:
        known = {name: values[where] for name, values in self.features.items()}
        return Tiles(self.images[where], self.labels[where], self.patients[where], known)

    def looking(self, images: np.ndarray) -> Tiles:
        """The same tiles with other pixels."""
        return Tiles(images, self.labels, self.patients)


def simulate(hospital: int, patients: Sequence[int], per_class: int, classes: Sequence[str]) -> Tiles:
    """As many tiles of every class, of these patients in turn."""
    where = make_hospital(hospital, shift=0.4)
    people = {i: make_patient(derive(hospital, "patient", i), where) for i in patients}
    images, labels, names = [], [], []
    for label, name in enumerate(classes):
        for k in range(per_class):
            who = patients[k % len(patients)]
            seed = derive(hospital, name, who, k)
            images.append(render(name, patient=people[who], seed=seed, size=SIZE, field_um=112.0).image)
            labels.append(label)
            names.append(f"patient-{who:02d}")
    return Tiles(np.stack(images).transpose(0, 3, 1, 2).copy(), np.array(labels), np.array(names))


class World:
    """The three sets, and what is fitted to the first two of them once."""

    def __init__(self, tiles: int, patients: int = 10, classes: Sequence[str] = TISSUES, seed: int = 5) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        self.classes, self.seed = tuple(classes), seed
        self.encoders = {name: encoders.load(name, "cpu") for name in ("tissue-tiny", "colour")}
        sides = [list(range(i * patients, (i + 1) * patients)) for i in range(3)]
        each = tiles // len(self.classes)
        self.train, self.reference, self.pool = (
            self.encoded(simulate(seed, side, count, self.classes))
            for side, count in zip(sides, (each, each, 2 * each), strict=True)
        )
        train = self.train.features["tissue-tiny"]
        self.classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        self.classifier.fit(train, self.train.labels)
        self.nucleus = fit_nuclei(self.reference.images)
        self.look = pair_distance("ms-ssim")
        self.own_look = self.diversity(self.reference)
        self.widths = {}
        for name, values in self.reference.features.items():
            squares = squared_distances(values, values)[np.triu_indices(len(values), 1)]
            self.widths[name] = float(np.sqrt(np.median(squares)))

    def encoded(self, tiles: Tiles) -> Tiles:
        """The same tiles with features of every encoder, float64."""
        for name, encoder in self.encoders.items():
            if name not in tiles.features:
                tiles.features[name] = encoder.encode(torch.from_numpy(tiles.images)).numpy().astype(np.float64)
        return tiles

    def draw(self, number: int) -> np.ndarray:
        """A random half of the pool, as many tiles of every class: positions."""
        picked = []
        for label in range(len(self.classes)):
            where = np.flatnonzero(self.pool.labels == label)
            rng = numpy_rng(self.seed, "half", number, label)
            picked.append(np.sort(rng.permutation(where)[: len(where) // 2]))
        return np.concatenate(picked)

    def diversity(self, tiles: Tiles) -> float:
        return lpips_diversity(tiles.images, tiles.labels, self.classes, self.look, pairs=30)["diversity_ms_ssim"]


def defocused(world: World, grade: float) -> Tiles:
    return _degraded(world, "defocus", grade)


def compressed(world: World, grade: float) -> Tiles:
    return _degraded(world, "jpeg", grade)


def noisy(world: World, grade: float) -> Tiles:
    return _degraded(world, "noise", grade)


def restained(world: World, grade: float) -> Tiles:
    """Every tile gets the same shift, as from another laboratory."""
    tiles = world.pool.pick(world.draw(0))
    return tiles.looking(degrade("stain_shift", tiles.images, grade, [3] * len(tiles.images)))


def mislabelled(world: World, grade: float) -> Tiles:
    """A share of the tiles shows another class than it was asked for."""
    tiles = world.pool.pick(world.draw(0))
    rng = numpy_rng(world.seed, "mislabel")
    wrong = rng.permutation(len(tiles.labels))[: round(grade * len(tiles.labels))]
    labels = tiles.labels.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, len(world.classes), len(labels))[: len(wrong)]) % len(
        world.classes
    )
    return Tiles(tiles.images, labels, tiles.patients, tiles.features)


def without_classes(world: World, grade: float) -> Tiles:
    """The last classes are missing; others fill their place with tiles of their own, none of them twice."""
    missing = round(grade * len(world.classes))
    return _refilled(world, world.pool.labels < len(world.classes) - missing)


def without_patients(world: World, grade: float) -> Tiles:
    """The tiles show ever fewer patients; none of them twice."""
    names = np.unique(world.pool.patients)
    return _refilled(world, np.isin(world.pool.patients, names[round(grade * len(names)) :]))


def repeated(world: World, grade: float) -> Tiles:
    """A share of the set is one tile of each class over and over."""
    where = world.draw(0)
    rng = numpy_rng(world.seed, "repeat")
    replaced = rng.permutation(len(where))[: round(grade * len(where))]
    labels = world.pool.labels[where]
    first = np.array([where[np.flatnonzero(labels == label)[0]] for label in range(len(world.classes))])
    where[replaced] = first[labels[replaced]]
    return world.pool.pick(where)


def copied(world: World, grade: float) -> Tiles:
    """A share of the set is training tiles, mirrored."""
    tiles = world.pool.pick(world.draw(0))
    rng = numpy_rng(world.seed, "copy")
    replaced = rng.permutation(len(tiles.labels))[: round(grade * len(tiles.labels))]
    images = tiles.images.copy()
    for label in range(len(world.classes)):
        mine = replaced[tiles.labels[replaced] == label]
        images[mine] = world.train.images[world.train.labels == label][: len(mine), :, :, ::-1]
    return tiles.looking(images)


CORRUPTIONS: dict[str, tuple[Callable[[World, float], Tiles], tuple[float, ...]]] = {
    "blur": (defocused, (0.25, 0.5, 0.75, 1.0)),
    "stain shift": (restained, (0.15, 0.3, 0.6, 1.0)),
    "JPEG": (compressed, (0.25, 0.5, 0.75, 1.0)),
    "noise": (noisy, (0.15, 0.3, 0.6, 1.0)),
    "wrong classes": (mislabelled, (0.1, 0.25, 0.5, 0.9)),
    "missing classes": (without_classes, (0.125, 0.25, 0.375, 0.5)),
    "missing patients": (without_patients, (0.125, 0.25, 0.375, 0.5)),
    "repeats": (repeated, (0.1, 0.25, 0.5, 0.9)),
    "training copies": (copied, (0.05, 0.15, 0.4, 0.8)),
}

WORSE: dict[str, int] = {
    "frechet": 1, "kid": 1, "cmmd": 1, "precision": -1, "recall": -1, "density": -1, "coverage": -1,
    "vendi_ratio": -1, "frechet colour": 1, "kid in class": 1, "label_consistency": -1, "ms-ssim diversity": -1,
    "nn_below_5pct": 1, "pixel_alarms": 1, "colour_distance": 1, "patients_shift": 1, "nuclei_distance": 1,
}  # fmt: skip
"""Every measure, and whether more (1) or less (-1) of it is worse."""


def feature_measures(world: World, tiles: Tiles) -> dict[str, float]:
    """What needs features and labels only."""
    x, y = world.reference.features["tissue-tiny"], tiles.features["tissue-tiny"]
    centre = x.mean(0)
    found = {
        "frechet": frechet_distance(x, y),
        "kid": mmd2(x, y),
        "cmmd": mmd2(x, y, gaussian(world.widths["tissue-tiny"])),
        **prdc(x, y, K),
        "vendi_ratio": vendi(y, centre) / vendi(x, centre),
        "frechet colour": frechet_distance(world.reference.features["colour"], tiles.features["colour"]),
        "kid in class": _in_class(x, world.reference.labels, y, tiles.labels),
    }
    given = label_consistency(world.classifier.predict_proba(y), tiles.labels, world.classes)
    return found | {"label_consistency": given["label_consistency"]}


def image_measures(world: World, tiles: Tiles) -> dict[str, float]:
    """What needs pixels."""
    sides = (world.train, world.reference, tiles)
    copying, _ = copies(*(s.features["tissue-tiny"] for s in sides), *(s.images for s in sides))
    real = world.reference
    return {
        "ms-ssim diversity": world.diversity(tiles) / world.own_look,
        **{name: copying[name] for name in ("nn_below_5pct", "pixel_alarms")},
        "colour_distance": colour(real.images, tiles.images)["colour_distance"],
        "patients_shift": patient_colour(real.images, list(real.patients), tiles.images)["patients_shift"],
        "nuclei_distance": nuclei(real.images, tiles.images, model=world.nucleus)["nuclei_distance"],
    }


def measure(world: World, tiles: Tiles, images: bool = True) -> dict[str, float]:
    """Every measure of one set of tiles."""
    tiles = world.encoded(tiles)
    return feature_measures(world, tiles) | (image_measures(world, tiles) if images else {})


def floor(world: World, draws: int, images: bool = True) -> list[dict[str, float]]:
    """The measures of random halves of the untouched tiles; the first is what the corruptions start from."""
    return [measure(world, world.pool.pick(world.draw(i)), images) for i in range(draws)]


def seen(grades: Sequence[float], values: Sequence[float], worse: int, spread: float) -> dict[str, Any]:
    """rho: rank correlation of grade and badness; steps: how many spreads of the floor each value is worse than the
    first (negative: better); z: the last of them; sees: whether the measure sees the fault."""
    badness = worse * np.asarray(values, float)
    rho = float(stats.spearmanr(grades, badness).statistic) if np.ptp(badness) > 0 else 0.0
    # a share that is always 0 on the floor has no spread: a thousand steps are the most that is told apart
    steps = (badness - badness[0]) / max(spread, 1e-3 * float(np.abs(badness).max()), 1e-12)
    sees = bool(np.diff(steps).min() >= -2 and steps[-1] >= 3)
    return {"rho": rho, "steps": steps.tolist(), "z": float(steps[-1]), "sees": sees}


def _degraded(world: World, name: str, grade: float) -> Tiles:
    tiles = world.pool.pick(world.draw(0))
    return tiles.looking(degrade(name, tiles.images, grade, range(len(tiles.images))))


def _refilled(world: World, allowed: np.ndarray) -> Tiles:
    """The first draw with what is not allowed replaced by other allowed tiles of the pool."""
    where = world.draw(0)
    spare = np.setdiff1d(np.flatnonzero(allowed), where)
    kept = where[allowed[where]]
    return world.pool.pick(
        np.append(kept, numpy_rng(world.seed, "refill").permutation(spare)[: len(where) - len(kept)])
    )


def _in_class(x: np.ndarray, ours: np.ndarray, y: np.ndarray, theirs: np.ndarray) -> float:
    """Kernel distance of each class by itself, the mean over classes that both sides have."""
    counts = (np.bincount(ours), np.bincount(theirs, minlength=ours.max() + 1))
    shared = [c for c in range(len(counts[0])) if min(counts[0][c], counts[1][c]) >= 4]
    return float(np.mean([mmd2(x[ours == c], y[theirs == c]) for c in shared]))


def figure(report: dict[str, Any], path: Path) -> None:
    """Rows faults, columns measures; one scale for all, so that the measures compare."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = list(CORRUPTIONS), list(WORSE)
    grid, axes = plt.subplots(
        len(rows), len(columns), figsize=(0.95 * len(columns) + 1.5, 0.95 * len(rows) + 1.1), sharey=True
    )
    for r, corruption in enumerate(rows):
        grades = report["grades"][corruption]
        for c, name in enumerate(columns):
            axis, cell = axes[r, c], report["cells"][corruption][name]
            axis.axhspan(-2, 2, color="#e2e2e2", lw=0)
            ink = "#1b5e9b" if cell["sees"] else "#d9822b" if cell["z"] < -3 else "#808080"
            heights = np.clip(cell["steps"], -999, 999)
            axis.plot(range(len(grades)), heights, "-o", color=ink, ms=2.5, lw=1.5 if cell["sees"] else 0.9)
            axis.set_yscale("symlog", linthresh=3, linscale=0.5)
            axis.set_ylim(-60, 1500)
            axis.set_yticks([-10, 0, 10, 100, 1000], ["-10", "0", "10", "100", "1000"])
            axis.minorticks_off()
            axis.set_xticks(range(len(grades)), [f"{g:g}".lstrip("0") or "0" for g in grades])
            axis.tick_params(labelsize=5.5, length=2, pad=1)
            axis.spines[["top", "right"]].set_visible(False)
            if r == 0:
                axis.set_title(name.replace("_", "\n").replace(" ", "\n"), fontsize=7.5, pad=4)
            if c == 0:
                axis.set_ylabel(corruption, fontsize=8.5, rotation=0, ha="right", va="center", labelpad=6)
    grid.text(
        0.5, 0.01,
        "From left to right: grade of the fault, 0 untouched. Upwards: worse, in spreads of the floor (grey: two).  "
        "Blue: the measure sees the fault.  Orange: it is fooled, the score gets better.",
        ha="center", fontsize=8.5,
    )  # fmt: skip
    grid.subplots_adjust(left=0.095, right=0.995, top=0.925, bottom=0.06, wspace=0.22, hspace=0.42)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.savefig(path, dpi=110)
    plt.close(grid)


def run(tiles: int, draws: int) -> dict[str, Any]:
    """All cells."""
    world = World(tiles)
    floors = floor(world, draws)
    report: dict[str, Any] = {
        "tiles": len(world.reference.labels), "classes": list(world.classes), "draws": draws,
        "floor": {
            name: {"mean": float(np.mean([f[name] for f in floors])), "spread": float(np.std([f[name] for f in floors],
                   ddof=1))}
            for name in WORSE
        },
        "grades": {}, "cells": {},
    }  # fmt: skip
    for corruption, (spoil, grades) in CORRUPTIONS.items():
        found = [floors[0], *(measure(world, spoil(world, grade)) for grade in grades)]
        report["grades"][corruption] = [0.0, *grades]
        report["cells"][corruption] = {}
        for name, worse in WORSE.items():
            values = [f[name] for f in found]
            verdict = seen((0.0, *grades), values, worse, report["floor"][name]["spread"])
            report["cells"][corruption][name] = {"values": values} | verdict
    return report


def table(report: dict[str, Any]) -> str:
    """Spreads of the floor by which the worst grade is worse; in brackets where the fault is not seen."""
    width = max(map(len, CORRUPTIONS)) + 2
    lines = []
    for name in WORSE:
        cells = []
        for corruption in CORRUPTIONS:
            cell = report["cells"][corruption][name]
            text = f"{cell['z']:.0f}"
            cells.append(f"{text if cell['sees'] else f'({text})':>{width}}")
        lines.append(f"{name:20}" + "".join(cells))
    return f"{'':20}" + "".join(f"{c:>{width}}" for c in CORRUPTIONS) + "\n" + "\n".join(lines)


def main() -> None:
    """Measure, draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=400, help="tiles in each set")
    parser.add_argument("--draws", type=int, default=8, help="random halves behind the floor's spread")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "sensitivity.png")
    arguments = parser.parse_args()
    start = time.perf_counter()
    report = run(arguments.tiles, arguments.draws)
    report["seconds"] = time.perf_counter() - start
    figure(report, arguments.out)
    results = Path(__file__).parent / "results" / "sensitivity.json"
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    print(f"{report['tiles']} tiles a set, {report['seconds']:.0f} s; {arguments.out} and {results}")


if __name__ == "__main__":
    main()
