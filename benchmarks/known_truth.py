"""Can the experiment tell? Three sets of tiles whose use is known are put to `histosynth utility`.

    python benchmarks/known_truth.py [--hospitals 5] [--seeds 5] [--out docs/known-truth.png]
    python benchmarks/known_truth.py --small    # one hospital, small tiles: under three minutes of one core

Each simulated hospital has few training tiles and many test patients. To its training tiles are added
fresh      tiles of other patients of the same hospital, the true distribution: they must be found to help,
shuffled   the same tiles, their labels shuffled: they must be found to hurt,
copies     its own training tiles once more: they must be found to add nothing.
Prints what was found; writes the figure and benchmarks/results/known-truth.json (beside the figure with --small).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histosynth.core.seeds import derive, numpy_rng
from histosynth.study.usefulness.assess import assess
from histosynth.study.usefulness.plan import UtilityConfig
from histosynth.study.usefulness.run import run_experiment
from histosynth.tiles.images import read_rgb, write_png
from histosynth.tiles.phantom import CLASSES, make_hospital, make_patient, render
from histosynth.tiles.simulate import PhantomConfig, simulate
from histosynth.tiles.tileset import TileSet

TRUTH = {
    "fresh": ("fresh tiles of other patients", ("helps",)),
    "shuffled": ("fresh tiles, labels shuffled", ("hurts",)),
    "copies": ("copies of the training tiles", ("no evidence", "no relevant difference")),
}
"""Case -> title, and the words that are right."""
COLOURS = {"fresh": "#1a6e46", "shuffled": "#a82a22", "copies": "#56616b"}
STRANGERS = 1000  # number of the first patient who is not in the real set


@dataclass(frozen=True)
class World:
    """The size of a trial."""

    train: int = 4
    """Training tiles a class, and as many for validation."""
    test: int = 60
    """Test tiles a class."""
    made: int = 60
    """Added tiles a class; of the copies, as many as there are training tiles."""
    patients: int = 80
    """Patients of the hospital, over all splits."""
    size: int = 64
    shift: float = 0.4
    """How far its staining lies from the common centre."""
    classifier: str = "mobilenet-v2"
    steps: int = 200
    seeds: int = 5
    replicates: int = 2000
    workers: int | None = None


SMALL = World(test=30, patients=60, size=32, steps=100, seeds=5, replicates=1000, workers=1)


def hospital(folder: Path, seed: int, world: World) -> list[Path]:
    """Write the tile sets of one hospital: real, and one for each case; those of an earlier call stay."""
    cases = [folder / case for case in TRUTH]
    if all(TileSet.is_tileset(place) for place in (folder / "real", *cases)):
        return cases
    for place in (folder / "real", *cases):
        shutil.rmtree(place, ignore_errors=True)
    every = world.train + world.test + world.train
    config = PhantomConfig(
        per_class=every, patients=world.patients, size=world.size, shift=world.shift, seed=seed,
        val=world.train / every, test=world.test / every,
    )  # fmt: skip
    real = simulate(folder / "real", config)
    place = make_hospital(seed, shift=world.shift)
    rows, images = [], []
    for label in CLASSES:
        for k in range(world.made):
            who = STRANGERS + k
            patient = make_patient(derive(seed, "patient", who), place)
            tile = render(label, patient=patient, seed=derive(seed, "fresh", label, k), size=world.size,
                          field_um=config.field_um)  # fmt: skip
            rows.append({"label": label, "patient": f"patient-{who}"})
            images.append(tile.image)
    write_set(folder / "fresh", rows, images)
    labels = numpy_rng(seed, "shuffled").permutation([row["label"] for row in rows])
    write_set(folder / "shuffled", [row | {"label": str(new)} for row, new in zip(rows, labels, strict=True)], images)
    train = real.rows("train")
    copies = [{"label": row.label, "patient": row.patient} for row in train.itertuples()]
    write_set(folder / "copies", copies, [read_rgb(real.folder / path)[0] for path in train.path])
    return cases


def write_set(folder: Path, rows: Sequence[dict[str, Any]], images: Sequence[np.ndarray]) -> None:
    """A tile set of these rows (label, patient) and pixels uint8 [S, S, 3]."""
    table = []
    for number, (row, image) in enumerate(zip(rows, images, strict=True)):
        name = f"{folder.name}-{number:05d}"
        path = f"images/{row['label']}/{name}.png"
        write_png(folder / path, image)
        table.append({
            **row, "id": name, "path": path, "source": folder.name, "format": "PNG", "width": image.shape[1],
            "height": image.shape[0], "kept": True, "sha256": hashlib.sha256(image.tobytes()).hexdigest(),
        })  # fmt: skip
    TileSet.create(folder, pd.DataFrame(table), CLASSES, made_by="benchmark", simulated=True, source=folder.name,
                   licence="Apache-2.0 (simulated)")  # fmt: skip


def trial(folder: Path, seed: int, world: World) -> dict[str, dict[str, Any]]:
    """Ask one hospital: case -> what the verdict says, and whether it is right."""
    sets = hospital(folder, seed, world)
    config = UtilityConfig(
        out=folder / "utility", per_class=("all",), seeds=world.seeds, steps=world.steps, size=world.size, seed=seed,
        classifier=world.classifier, arms=tuple(f"real_{case}" for case in TRUTH), workers=world.workers,
        weights="none",  # the shipped ones have seen this simulator's tissue, and would need no more tiles
    )  # fmt: skip
    run_experiment(folder / "real", sets, config)
    found = assess(config.out, seed=seed, replicates=world.replicates)
    kept = ("word", "sentence", "mean", "low", "high", "tiles", "patients", "seeds")
    return {
        spoken["generator"]: {k: spoken[k] for k in kept} | {"right": spoken["word"] in TRUTH[spoken["generator"]][1]}
        for spoken in found["verdicts"]
    }


def run(hospitals: Sequence[int], world: World, folder: Path) -> dict[str, Any]:
    """All hospitals, each in its own folder of `folder`."""
    trials = {str(seed): trial(folder / f"hospital-{seed}", seed, world) for seed in hospitals}
    return {
        "world": vars(world),
        "trials": trials,
        "right": {case: sum(t[case]["right"] for t in trials.values()) for case in TRUTH},
        "hospitals": len(trials),
    }


def figure(report: dict[str, Any], path: Path) -> None:
    """Differences with intervals, a row a hospital and case."""
    from matplotlib.figure import Figure

    hospitals = list(report["trials"])
    rows = [(case, seed) for case in TRUTH for seed in hospitals]
    drawing = Figure(figsize=(8.6, 0.9 + 0.27 * len(rows) + 0.35 * len(TRUTH)), layout="constrained")
    axes = drawing.subplots()
    axes.axvline(0, color="#1f2933", linewidth=1.1)
    place, ticks, names = 0.0, [], []
    for case, (title, words) in TRUTH.items():
        must = "helps" if "helps" in words else "hurts" if "hurts" in words else "adds nothing"
        axes.text(0.0, place, f"{title}: {must}", transform=axes.get_yaxis_transform(), fontweight="bold",
                  va="center", color=COLOURS[case], fontsize=9.5)  # fmt: skip
        for seed in hospitals:
            place += 1
            row = report["trials"][seed][case]
            axes.plot((100 * row["low"], 100 * row["high"]), (place, place), color=COLOURS[case], linewidth=2)
            axes.plot(100 * row["mean"], place, "o", color=COLOURS[case], markersize=6,
                      markerfacecolor=COLOURS[case] if row["right"] else "white")  # fmt: skip
            axes.text(1.01, place, row["word"], transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
            ticks.append(place)
            names.append(f"hospital {seed}")
        place += 1.3
    axes.set_yticks(ticks, names, fontsize=8.5)
    axes.set_ylim(place - 0.7, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#eef1f3")
    axes.set_axisbelow(True)
    axes.set_xlabel("difference in balanced accuracy to real tiles alone, percentage points, 95 % intervals")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)


def table(report: dict[str, Any]) -> str:
    """What was found, a line a case and hospital."""
    lines = []
    for case, (title, _) in TRUTH.items():
        lines.append(f"{title}: right in {report['right'][case]} of {report['hospitals']} hospitals")
        for seed, found in report["trials"].items():
            row = found[case]
            span = f"{100 * row['mean']:+6.1f}  ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
            lines.append(f"  hospital {seed:>3}  {span:28}  {row['word']}")
    return "\n".join(lines)


def main() -> None:
    """Run, draw, print."""
    root = Path(__file__).parents[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hospitals", type=int, default=5, help="simulated hospitals")
    parser.add_argument("--first", type=int, default=1, help="seed of the first hospital")
    parser.add_argument("--seeds", type=int, help="classifiers an arm and hospital")
    parser.add_argument("--steps", type=int, help="training steps of a classifier")
    parser.add_argument("--classifier", help="such as mobilenet-v2 or linear:tissue-tiny")
    parser.add_argument("--workers", type=int, help="processes")
    parser.add_argument("--folder", type=Path, help="where the runs are kept, to go on after a stop; else they are not")
    parser.add_argument("--small", action="store_true", help="one hospital, small tiles, few seeds")
    parser.add_argument("--out", type=Path, help="the figure; docs/known-truth.png by default")
    given = parser.parse_args()
    settings = {k: v for k in ("seeds", "steps", "classifier", "workers") if (v := getattr(given, k)) is not None}
    world = replace(SMALL if given.small else World(), **settings)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="known-truth-"))
    out = given.out or (folder / "known-truth.png" if given.small else root / "docs" / "known-truth.png")
    results = out.with_suffix(".json") if given.small else root / "benchmarks" / "results" / "known-truth.json"
    start = time.perf_counter()
    report = run(range(given.first, given.first + (1 if given.small else given.hospitals)), world, folder)
    report["seconds"] = round(time.perf_counter() - start, 1)
    figure(report, out)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    print(f"{report['seconds']:.0f} s; {out} and {results}")
    if given.folder is None and not given.small:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
