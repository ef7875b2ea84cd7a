"""Usefulness: does a classifier trained with synthetic tiles do better on real patients it never saw?

Every arm trains the same classifier for the same number of steps from the same seeds; only the training
tiles differ. Test tiles are predicted once, by the finished classifier. A cell (arm, seed) is a file on
disk, so an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.classify.calibration import reliability_bins, softmax
from histosynth.classify.scores import scores
from histosynth.classify.train import ClassifierConfig, train_classifier
from histosynth.core.files import atomic_path, read_json, write_json
from histosynth.core.progress import bar
from histosynth.core.seeds import derive
from histosynth.study.statistics import intervals, paired_bootstrap, verdict
from histosynth.tiles.batches import TileArray

BASELINE = "real_classical"
PRIMARY = "balanced_accuracy"
_SCORES = (
    "balanced_accuracy",
    "macro_f1",
    "accuracy",
    "auroc",
    "ece",
    "ece_calibrated",
    "brier",
    "brier_calibrated",
)
_REPLICATES = 1000


@dataclass(frozen=True)
class Arm:
    """One way to make up the training set."""

    name: str
    title: str
    real: bool
    generator: str | None = None
    classical: bool = True


def arms(generators: Mapping[str, str]) -> list[Arm]:
    """The arms for these generators (name -> title); the baseline of the verdict is `BASELINE`.

    The synthetic arms use the same classical augmentation as the baseline: the question is what
    synthetic tiles add to what is free.
    """
    return [
        Arm("real", "Real", True, classical=False),
        Arm("real_classical", "Real + classical augmentation", True),
        *(Arm(f"real_{n}", f"Real + classical + {t}", True, n) for n, t in generators.items()),
        *(Arm(f"{n}_only", f"{t} only", False, n) for n, t in generators.items()),
    ]


def run_cells(
    chosen: Sequence[Arm],
    train: TileArray,
    val: TileArray,
    test: TileArray,
    synthetic: Mapping[str, TileArray],
    config: ClassifierConfig,
    seeds: Sequence[int],
    folder: Path,
    device: str = "auto",
) -> None:
    """Train and test every (arm, seed) that has no file in `folder` yet."""
    cells = [(arm, seed) for seed in seeds for arm in chosen]
    todo = [(arm, seed) for arm, seed in cells if not _cell_path(folder, arm.name, seed).exists()]
    steps = config.steps
    with bar("Classifiers", len(cells) * steps, (len(cells) - len(todo)) * steps) as tick:
        for arm, seed in todo:
            started = time.monotonic()
            tiles = training_set(arm, train, synthetic)
            settings = replace(config, augment="classical" if arm.classical else "none")
            model = train_classifier(
                tiles, val, settings, seed=seed, device=device, tick=lambda name=arm.title: tick(1, name)
            )
            logits = model.logits(test.tensor()).numpy()
            path = _cell_path(folder, arm.name, seed)
            with atomic_path(path.with_suffix(".npy")) as temporary, open(temporary, "wb") as stream:
                np.save(stream, logits.astype(np.float32))
            cell = {
                "arm": arm.name,
                "seed": seed,
                "temperature": float(model.temperature),
                "initialisation": model.initialisation,
                "notes": list(model.notes),
                "train_tiles": tiles.counts(),
                "seconds": round(time.monotonic() - started, 2),
            }
            write_json(path, cell)  # last: its presence says that the cell is whole


def training_set(arm: Arm, train: TileArray, synthetic: Mapping[str, TileArray]) -> TileArray:
    """The training tiles of an arm."""
    if arm.generator is None:
        return train
    made = synthetic[arm.generator]
    return train.joined(made) if arm.real else made


def assess(chosen: Sequence[Arm], test: TileArray, seeds: Sequence[int], folder: Path, seed: int) -> dict[str, Any]:
    """Scores of every arm with intervals, and differences to the baseline, from the cells in `folder`."""
    groups = np.array(test.groups if test.groups is not None else test.ids)
    logits = {a.name: np.stack([_logits(folder, a.name, s) for s in seeds]) for a in chosen}
    cells = {a.name: [read_json(_cell_path(folder, a.name, s)) for s in seeds] for a in chosen}
    predictions = {name: values.argmax(2) for name, values in logits.items()}
    rows = [_assess_arm(a, logits[a.name], cells[a.name], test, groups, seed) for a in chosen]
    differences = []
    for arm in chosen:
        if arm.name == BASELINE:
            continue
        for metric in ("balanced_accuracy", "macro_f1"):
            found = paired_bootstrap(
                test.labels,
                predictions[BASELINE],
                predictions[arm.name],
                groups,
                metric,
                seed=derive(seed, "difference", arm.name, metric),
            )
            counts = {f"n_{k}": found.pop(k) for k in ("tiles", "patients", "seeds")}
            differences.append({"arm": arm.name, "baseline": BASELINE} | found | counts)
    return {"arms": rows, "differences": differences}


def verdicts(chosen: Sequence[Arm], differences: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A verdict for each generator, from the interval of its primary difference to the baseline."""
    found = []
    for arm in chosen:
        if arm.generator is None or not arm.real:
            continue
        row = next(d for d in differences if d["arm"] == arm.name and d["metric"] == PRIMARY)
        counted = {k: row[f"n_{k}"] for k in ("tiles", "patients", "seeds")}
        spoken = verdict(row | counted, name=arm.title.rsplit(" + ", 1)[-1])
        found.append(
            {
                "generator": arm.generator,
                "word": spoken.word,
                "sentence": spoken.sentence,
                "mean": row["mean"],
                "low": row["low"],
                "high": row["high"],
            }
        )
    return found


def _assess_arm(
    arm: Arm,
    logits: np.ndarray,
    cells: list[dict[str, Any]],
    test: TileArray,
    groups: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    per_seed = []
    for values, cell in zip(logits, cells, strict=True):
        raw = scores(softmax(values), test.labels, test.classes)
        calibrated = scores(softmax(values / cell["temperature"]), test.labels, test.classes)
        raw["ece_calibrated"], raw["brier_calibrated"] = calibrated["ece"], calibrated["brier"]
        per_seed.append(raw)
    present = [i for i, n in enumerate(test.counts().values()) if n]
    metrics = ["accuracy", "balanced_accuracy", "macro_f1", *(f"recall:{i}" for i in present)]
    spread = intervals(test.labels, logits.argmax(2), groups, metrics, seed=derive(seed, "scores"), n=_REPLICATES)
    recall = {
        c: _summary([s["per_class"][c]["recall"] for s in per_seed], spread.get(f"recall:{i}"))
        for i, c in enumerate(test.classes)
    }
    temperatures = np.array([c["temperature"] for c in cells])[:, None, None]
    pooled = softmax((logits / temperatures).reshape(-1, logits.shape[2]))
    return {
        "name": arm.name,
        "title": arm.title,
        "train_tiles": cells[0]["train_tiles"],
        "scores": {m: _summary([s[m] for s in per_seed], spread.get(m)) for m in _SCORES},
        "recall": recall,
        "confusion": np.sum([s["confusion"] for s in per_seed], axis=0).tolist(),
        "reliability": [
            {"count" if k == "tiles" else k: v for k, v in row.items()}
            for row in reliability_bins(pooled, np.tile(test.labels, len(logits)))
        ],
        "per_seed": [{"seed": c["seed"], **{m: s[m] for m in _SCORES}} for c, s in zip(cells, per_seed, strict=True)],
        "notes": sorted({n for c in cells for n in c["notes"]}),
        "initialisation": cells[0]["initialisation"],
        "seconds": round(sum(c["seconds"] for c in cells), 2),
    }


def _summary(
    values: Sequence[float | None], interval: tuple[float | None, float | None] | None
) -> dict[str, float | None]:
    known = [v for v in values if v is not None]
    low, high = interval or (None, None)
    return {"mean": float(np.mean(known)) if known else None, "low": low, "high": high}


def _cell_path(folder: Path, arm: str, seed: int) -> Path:
    return folder / f"{arm}-{seed}.json"


def _logits(folder: Path, arm: str, seed: int) -> np.ndarray:
    return np.load(_cell_path(folder, arm, seed).with_suffix(".npy")).astype(np.float64)
