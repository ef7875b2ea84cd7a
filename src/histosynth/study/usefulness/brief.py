"""The experiment as `compare` runs it: all real tiles, half of them synthetic in the mixed arms, and as a section of
its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.classify.calibration import reliability_bins, softmax
from histosynth.classify.config import ClassifierConfig
from histosynth.classify.scores import scores
from histosynth.study.usefulness.cells import Places, Settings, open_material
from histosynth.study.usefulness.grid import run_grid
from histosynth.study.usefulness.nested import Origin
from histosynth.study.usefulness.plan import ALL, SelectionConfig, all_arms, cells_of, rare_classes
from histosynth.study.usefulness.results import Condition, Results, TestSet, read_results
from histosynth.study.usefulness.run import Sets, plan_of, write_contract
from histosynth.tiles.tileset import TileSet

SHARE = 0.5
KIND = "mobilenet-v2"

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
_SPREAD = {"ece": None, "brier": None, "ece_calibrated": "ece", "brier_calibrated": "brier"}
"""Scores whose interval `assess` has under another name, or has not: it looks at calibrated probabilities only."""
_COMPARED = ("balanced_accuracy", "macro_f1")


def train_all(
    real: TileSet,
    synthetic: Mapping[str, Path],
    titles: Mapping[str, str],
    out: Path,
    config: ClassifierConfig,
    seeds: Sequence[int],
    *,
    size: int,
    cache: Path,
    workers: int | None,
    device: str,
) -> None:
    """Train and test every arm with every seed; what is on disk already is kept.

    Args:
        synthetic: tile sets that were made by generators of the training tiles of `real`.
        titles: of the generators.
        out: folder of the cells.
        cache: folder of decoded tiles.
    """
    places = Places(real.folder, dict(synthetic), {}, size, out / "features", cache)
    material = open_material(places)
    arms = [a for a in all_arms(titles, selected=False) if len(a.generators) < 2]
    nested = Origin("nested", "trained on the training tiles by this very run")
    sets = Sets(real, {name: TileSet.open(path) for name, path in synthetic.items()}, {}, dict(titles))
    plan = {
        **plan_of(sets, material, dict.fromkeys(synthetic, nested), arms, []),
        "per_class": [ALL],
        "shares": [SHARE],
        "seeds": list(seeds),
        "rare": rare_classes(material.train.counts()),
        "classifier": KIND,
        "steps": config.steps,
    }
    write_contract(out, plan, material)
    settings = Settings(KIND, config, SelectionConfig(), tuple(synthetic), out, device, judge=False)
    cells = cells_of(arms, [ALL], [SHARE], seeds)
    run_grid(cells, places, settings, workers=workers, material=material)


def section(out: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """What the report says of the classifiers.

    Args:
        out: folder of the experiment.
        found: what `assess` made of it.

    Returns:
        arms (scores and recalls with intervals, confusion, reliability, every seed) and differences to the baseline.
    """
    results = read_results(out)
    test = results.sets[0]
    rows = {(r["arm"], r["n"], r["share"]): r for r in found["scores"] if r["set"] == test.name}
    return {
        "arms": [_arm(results, c, test, rows[c.arm, c.n, c.share]) for c in results.cells],
        "differences": [
            {
                "arm": row["arm"],
                "baseline": row["against"],
                **{k: row[k] for k in ("mean", "low", "high", "p", "level", "metric", "value_a", "value_b")},
                **{f"n_{k}": row[k] for k in ("tiles", "patients", "seeds")},
                **{k: row[k] for k in ("replicates", "notes")},
            }
            for row in found["differences"]
            if row["set"] == test.name and row["against"] == found["primary"]["baseline"] and row["metric"] in _COMPARED
        ],
    }


def _arm(results: Results, condition: Condition, test: TestSet, row: Mapping[str, Any]) -> dict[str, Any]:
    classes = results.plan["classes"]
    cells = results.cells[condition]
    scaled = results.probabilities(condition, test)
    per_seed = []
    for cell, calibrated in zip(cells, scaled, strict=True):
        with np.load(results.folder / "cells" / f"{cell['key']}.npz", allow_pickle=False) as archive:
            raw = scores(softmax(archive[test.name].astype(np.float64)), test.y, classes)
        after = scores(calibrated, test.y, classes)
        raw["ece_calibrated"], raw["brier_calibrated"] = after["ece"], after["brier"]
        per_seed.append(raw)
    return {
        "name": condition.arm,
        "title": results.arms[condition.arm]["title"],
        "train_tiles": {label: sum(counts) for label, counts in cells[0]["train_tiles"].items()},
        "scores": {m: _summary([s[m] for s in per_seed], row["scores"].get(_SPREAD.get(m, m))) for m in _SCORES},
        "recall": {c: _summary([s["per_class"][c]["recall"] for s in per_seed], row["recall"][c]) for c in classes},
        "confusion": np.sum([s["confusion"] for s in per_seed], axis=0).tolist(),
        "reliability": [
            {"count" if k == "tiles" else k: v for k, v in one.items()}
            for one in reliability_bins(scaled.reshape(-1, len(classes)), np.tile(test.y, len(scaled)))
        ],
        "per_seed": [{"seed": c["seed"], **{m: s[m] for m in _SCORES}} for c, s in zip(cells, per_seed, strict=True)],
        "notes": sorted({note for cell in cells for note in cell["notes"]}),
        "initialisation": cells[0]["initialisation"],
        "seconds": round(sum(cell["seconds"] for cell in cells), 2),
    }


def _summary(values: Sequence[float | None], interval: Mapping[str, Any] | None) -> dict[str, float | None]:
    known = [v for v in values if v is not None]
    low, high = (interval or {}).get("low"), (interval or {}).get("high")
    return {"mean": float(np.mean(known)) if known else None, "low": low, "high": high}
