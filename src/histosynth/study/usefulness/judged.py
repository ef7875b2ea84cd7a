"""What classifiers that were trained on real tiles say of synthetic ones.

Train on real, test on synthetic (TRTS): does a classifier of real tiles see in a synthetic tile the class that it was
made for? Pair consistency: does it give a real tile and the synthetic tile that was made from it one class? Both are
taken with the baseline classifiers on all real training tiles, one a seed, and averaged over the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.classify.calibration import softmax
from histosynth.evaluate.consistency import label_consistency, pair_consistency
from histosynth.study.usefulness.cells import TEST, Material, judged_path
from histosynth.study.usefulness.plan import ALL, BASELINE


def judge(out: Path, material: Material, seeds: Sequence[int]) -> dict[str, Any]:
    """The content of extra.json.

    Returns:
        trts: for each generator tiles, seeds, label_consistency with _low and _high, label_probability, per_class and
        confusion (rows: the class that was asked for; columns: the class that is seen; all seeds together), and the
        same of real test tiles as "real", which is the ceiling. pairs: for each generator that names parents among
        the training tiles pairs, seeds, pair_consistency with _low, _high, _chance and _kappa, and per_class.
    """
    runs = []
    for seed in seeds:
        with np.load(judged_path(out, seed), allow_pickle=False) as archive:
            runs.append(dict(archive))
    for run, seed in zip(runs, seeds, strict=True):
        with np.load(out / "cells" / f"{BASELINE}-n{ALL}-s0-r{seed}.npz", allow_pickle=False) as archive:
            run[TEST] = archive[TEST]
    test = material.sets[TEST]
    trts = {name: _trts(runs, name, made.labels, made.classes) for name, made in material.synthetic.items()}
    trts["real"] = _trts(runs, TEST, test.labels, test.classes)
    pairs = {name: found for name in material.synthetic if (found := _pairs(runs, name, material))}
    return {"trts": trts, "pairs": pairs}


def _trts(
    runs: Sequence[Mapping[str, np.ndarray]], name: str, labels: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
    found = []
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    for run in runs:
        logits = run[name].astype(np.float64)
        found.append(label_consistency(softmax(logits / float(run["temperature"])), labels, classes))
        np.add.at(confusion, (labels, logits.argmax(1)), 1)
    return {"tiles": len(labels), "seeds": len(runs), **_mean(found, "label_consistency_", classes)} | {
        "confusion": confusion.tolist()
    }


def _pairs(runs: Sequence[Mapping[str, np.ndarray]], name: str, material: Material) -> dict[str, Any] | None:
    """Of the tiles whose parents are among the training tiles."""
    if f"{name} parents" not in runs[0]:
        return None
    parents = material.parents[name]
    wanted = set(parents) - {""}
    place = {one: row for row, one in enumerate(i for i in material.train.ids if i in wanted)}
    rows = [i for i, parent in enumerate(parents) if parent in place]
    theirs = [place[parents[i]] for i in rows]
    classes = material.train.classes
    found = [
        pair_consistency(run[f"{name} parents"].argmax(1)[theirs], run[name].argmax(1)[rows], classes) for run in runs
    ]
    return {"pairs": len(rows), "seeds": len(runs), **_mean(found, "pair_consistency_", classes)}


def _mean(found: Sequence[Mapping[str, float]], prefix: str, classes: Sequence[str]) -> dict[str, Any]:
    """Scores averaged over the seeds that have them, those of the classes apart."""
    names = {f"{prefix}{label}": label for label in classes}
    whole: dict[str, float | None] = {}
    single: dict[str, float | None] = {}
    for key in dict.fromkeys(key for one in found for key in one):
        values = [one[key] for one in found if key in one and np.isfinite(one[key])]
        mean = float(np.mean(values)) if values else None
        if key in names:
            single[names[key]] = mean
        else:
            whole[key] = mean
    return whole | {"per_class": single}
