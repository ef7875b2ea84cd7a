"""From the cells on disk to what may be said: scores, paired differences, verdicts.

One comparison a generator decides its verdict, and it is fixed before anything is run: balanced accuracy on the
first test set, all real tiles, the share of synthetic tiles nearest to a half, against the baseline. Every other
comparison is secondary. It belongs to a family of questions, and its p-value is adjusted for the size of that family.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.core.errors import DataError, SettingError
from histosynth.core.seeds import numpy_rng
from histosynth.study.replicates import Draws, Replicated, draw, replicate
from histosynth.study.statistics import FEW_PATIENTS, compare_replicates, holm, one_arm, verdict
from histosynth.study.usefulness.cautions import cautions
from histosynth.study.usefulness.curves import readable, worth
from histosynth.study.usefulness.results import Condition, Results, TestSet, read_results

PRIMARY = "balanced_accuracy"
RARE = "rare_recall"
METRICS = ("balanced_accuracy", "macro_f1", "accuracy", "auroc", "ece", "brier", "nll")
COMPARED = ("balanced_accuracy", RARE, "macro_f1", "auroc", "ece")
LIMITS = {"brier": (0.0, 2.0), "nll": (0.0, np.inf)}
FAMILIES = {
    "conditions": "balanced accuracy of the other arms, numbers of tiles and shares",
    "classes": "recall of each class where the verdict is taken",
    "scores": "recall of the rare classes together, macro F1, AUROC and calibration error where the verdict is taken",
    "sets": "balanced accuracy on the other test sets",
}
BINS = 10  # of the reliability diagrams


@dataclass(frozen=True)
class Primary:
    """Where the verdict is taken."""

    test: str
    n: int
    share: float
    baseline: str


def assess(
    out: Path, *, seed: int, replicates: int = 2000, level: float = 0.95, margin: float = 0.02
) -> dict[str, Any]:
    """Everything that the experiment in the folder `out` says, JSON-ready.

    Args:
        replicates: of the bootstrap over patients and seeds.
        margin: a difference smaller than this does not matter, as a share: 0.02 is two points.

    Returns:
        plan, settings, primary (where the verdict is taken), scores (a row a condition and test set), differences
        (a row a comparison), verdicts (one a generator), gains (classes, by generator), worth (what synthetic tiles
        are worth in real ones), reliability, costs, cautions, extra.

    Raises:
        DataError: an experiment that is not finished, or damaged.
        SettingError: a number of replicates, a level or a margin that makes no sense.
    """
    if replicates < 1 or not 0 < level < 1 or not margin >= 0:
        raise SettingError(
            f"replicates is {replicates}, level is {level} and margin is {margin}.",
            "Use at least 1 replicate, a level between 0 and 1, and a margin from 0.",
        )
    results = read_results(out)
    primary = _primary(results)
    scores: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    tiles_worth: dict[str, Any] = {}
    for test in results.sets:
        draws = draw(test.groups, len(results.seeds), replicates, numpy_rng(seed, "usefulness", test.name))
        kept: dict[Condition, Replicated] = {}
        for n in dict.fromkeys(c.n for c in results.cells):
            found = {c: _replicated(results, c, test, draws) for c in results.cells if c.n == n}
            scores += [_scores(results, c, test, values, draws, level) for c, values in found.items()]
            for against in dict.fromkeys((primary.baseline, "real")):
                differences += _differences(results, found, test, draws, against, primary, level)
            kept |= {c: values[PRIMARY] for c, values in found.items()}
        if test.name == primary.test:
            tiles_worth = _worth(results, kept, draws, primary, margin, level)
    _adjust(differences)
    verdicts = [v for g in results.plan["generators"] if (v := _verdict(results, g, differences, margin)) is not None]
    found = {
        "plan": results.plan,
        "settings": {"seed": seed, "replicates": replicates, "level": level, "margin": margin},
        "seeds": list(results.seeds),
        "primary": vars(primary) | {"metric": PRIMARY},
        "scores": scores,
        "differences": differences,
        "families": FAMILIES,
        "verdicts": verdicts,
        "gains": {v["generator"]: _gains(v["arm"], differences, level) for v in verdicts},
        "worth": tiles_worth,
        "reliability": _reliability(results, primary),
        "initialisation": sorted({cell["initialisation"] for cells in results.cells.values() for cell in cells}),
        "costs": _costs(results),
        "extra": results.extra,
    }
    return found | {"cautions": cautions(results, found)}


def whole(arm: dict[str, Any]) -> bool:
    """Whether an arm takes all tiles of its generators: neither a selection nor some classes alone."""
    return not arm["selected"] and not arm.get("classes")


def decides(arm: dict[str, Any]) -> bool:
    """Whether an arm decides a generator's verdict: real tiles and those of one generator, all of them."""
    return arm["real"] and arm["classical"] and len(arm["generators"]) == 1 and whole(arm)


def at_primary(arm: dict[str, Any], row: Condition, primary: Primary) -> bool:
    """Whether a condition is where the verdict is taken; an arm that mixes nothing has no share to agree on."""
    mixes = arm["real"] and bool(arm["generators"])
    return row.n == primary.n and (row.share == primary.share or not mixes)


def _primary(results: Results) -> Primary:
    baseline = results.plan["baseline"]
    mixed = [c for c in results.cells if results.arms[c.arm]["real"] and results.arms[c.arm]["generators"]]
    n = max((c.n or np.inf for c in results.cells if c.arm == baseline), default=None)
    if n is None:
        raise DataError(f"The baseline {baseline!r} has no finished cell.", "Name it among the arms, and run again.")
    n = 0 if n == np.inf else int(n)
    share = min((c.share for c in mixed if c.n == n), key=lambda s: (abs(s - 0.5), s), default=0.5)
    return Primary(results.sets[0].name, n, share, baseline)


def _replicated(results: Results, condition: Condition, test: TestSet, draws: Draws) -> dict[str, Replicated]:
    present = np.unique(test.y)
    recalls = [f"recall:{k}" for k in present]
    rare = "+".join(str(k) for k in present if results.plan["classes"][k] in results.plan["rare"])
    found = replicate(
        [*METRICS, *recalls, *([f"recall:{rare}"] if rare else [])],
        test.y,
        results.probabilities(condition, test),
        draws,
    )
    return (
        {m: found[m] for m in METRICS}
        | ({RARE: found[f"recall:{rare}"]} if rare else {})
        | {m: found[m] for m in recalls}
    )


def _scores(
    results: Results,
    condition: Condition,
    test: TestSet,
    values: dict[str, Replicated],
    draws: Draws,
    level: float,
) -> dict[str, Any]:
    cells = results.cells[condition]

    def summed(metric: str) -> dict[str, Any]:
        found = one_arm(values[metric], draws, level=level)
        low, high = LIMITS.get(metric, (0.0, 1.0))
        return found | {k: None if found[k] is None else float(np.clip(found[k], low, high)) for k in ("low", "high")}

    classes = results.plan["classes"]
    return {
        **vars(condition), "set": test.name,
        "scores": {m: summed(m) for m in values if not m.startswith("recall:")},
        "recall": {c: summed(f"recall:{k}") if f"recall:{k}" in values else None for k, c in enumerate(classes)},
        "per_seed": {m: [float(v) if np.isfinite(v) else None for v in values[m].whole] for m in METRICS},
        "train_tiles": {c: np.mean([cell["train_tiles"][c] for cell in cells], axis=0).tolist() for c in classes},
        "kept": _kept(cells),
        "generator_saw_more": any(cell["generator_saw_more"] for cell in cells),
        "seconds": float(np.mean([cell["seconds"] for cell in cells])),
    }  # fmt: skip


def _kept(cells: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """The share of synthetic tiles that the selection kept, by class; None where nothing was selected."""
    known = [cell["kept"] for cell in cells if cell.get("kept")]
    return {c: float(np.mean([k[c] for k in known if c in k])) for c in known[0]} if known else None


def _differences(
    results: Results,
    found: dict[Condition, dict[str, Replicated]],
    test: TestSet,
    draws: Draws,
    against: str,
    primary: Primary,
    level: float,
) -> list[dict[str, Any]]:
    """Every condition of one number of tiles against an arm of the same number."""
    reference = next((values for c, values in found.items() if c.arm == against), None)
    if reference is None:
        return []
    rows = []
    for condition, values in found.items():
        if condition.arm in (against, "real" if against == primary.baseline else against):
            continue
        for metric in [m for m in values if m in COMPARED or m.startswith("recall:")]:
            if not np.isfinite([reference[metric].whole, values[metric].whole]).all():
                continue  # such as the area under the ROC curve of tiles of one class
            family = _family(results.arms[condition.arm], condition, test, metric, against, primary)
            row = compare_replicates(reference[metric], values[metric], draws, level=level, test=family is not None)
            row |= {k: None if row[k] is None else float(np.clip(row[k], -1, 1)) for k in ("low", "high")}
            k = metric.removeprefix("recall:")
            if k != metric and test.patients_of(int(k)) < FEW_PATIENTS:
                row["p"] = None  # the recall of a class of two patients is described; chance cannot be judged by them
            rows.append({
                **vars(condition), "set": test.name, "against": against, "metric": metric,
                "class": results.plan["classes"][int(k)] if k != metric else None, "tiles": len(test.y), **row,
                "family": family,
            })  # fmt: skip
    return rows


def _family(
    arm: dict[str, Any], condition: Condition, test: TestSet, metric: str, against: str, primary: Primary
) -> str | None:
    """The question that a comparison belongs to; None for one that is only described."""
    if against != primary.baseline or not arm["generators"]:
        return None
    here, first = at_primary(arm, condition, primary), test.name == primary.test
    if first and metric == PRIMARY:
        return "primary" if here and decides(arm) else "conditions"
    if not here or not decides(arm):
        return None
    if not first:
        return "sets" if metric == PRIMARY else None
    return "classes" if metric.startswith("recall:") else "scores"


def _adjust(differences: list[dict[str, Any]]) -> None:
    """Add `p_adjusted` and `looks`, how many comparisons of the family have a p-value."""
    for row in differences:
        row["p_adjusted"], row["looks"] = row["p"] if row["family"] == "primary" else None, 1
    for family in FAMILIES:
        rows = [row for row in differences if row["family"] == family]
        for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
            row["p_adjusted"], row["looks"] = p, sum(one["p"] is not None for one in rows)


def _verdict(
    results: Results, generator: dict[str, Any], differences: list[dict[str, Any]], margin: float
) -> dict[str, Any] | None:
    for row in differences:
        arm = results.arms[row["arm"]]
        if row["family"] == "primary" and arm["generators"] == [generator["name"]]:
            spoken = verdict(row, name=generator["title"], margin=margin)
            kept = {k: row[k] for k in ("arm", "n", "share", "mean", "low", "high", "p", "tiles", "patients", "seeds")}
            cells = results.cells[Condition(row["arm"], row["n"], row["share"])]
            saw_more = any(cell["generator_saw_more"] for cell in cells)
            return {
                "generator": generator["name"], "title": generator["title"], "word": spoken.word,
                "sentence": spoken.sentence, "generator_saw_more": saw_more, **kept,
            }  # fmt: skip
    return None


def _gains(arm: str, differences: Sequence[dict[str, Any]], level: float) -> dict[str, Any]:
    """Which classes an arm finds better or worse where the verdict is taken, after adjustment."""
    rows = [row for row in differences if row["family"] == "classes" and row["arm"] == arm]
    sure = [row for row in rows if row["p_adjusted"] is not None and row["p_adjusted"] < 1 - level]
    return {
        "better": [row["class"] for row in sure if row["mean"] > 0],
        "worse": [row["class"] for row in sure if row["mean"] < 0],
        "looks": rows[0]["looks"] if rows else 0,
    }


def _worth(
    results: Results, kept: dict[Condition, Replicated], draws: Draws, primary: Primary, margin: float, level: float
) -> dict[str, Any]:
    """Synthetic tiles in real ones: reason why not, or rows."""
    baseline = sorted((c for c in kept if c.arm == primary.baseline), key=lambda c: c.n or np.inf)
    at = {c.n: real_per_class(results.cells[c]) for c in baseline}
    if len(set(at.values())) < len(at):
        baseline = [c for i, c in enumerate(baseline) if i == 0 or at[c.n] > at[baseline[i - 1].n]]
    means = [float(kept[c].whole.mean()) for c in baseline]
    curve = {"baseline": [{"n": c.n, "tiles": at[c.n], "score": m} for c, m in zip(baseline, means, strict=True)]}
    if reason := readable(means, margin):
        return curve | {"reason": f"The baseline's curve cannot be read off: {reason}.", "rows": []}
    asked = {
        c: (at[c.n], kept[c])
        for c in kept
        if results.arms[c.arm]["real"] and results.arms[c.arm]["generators"] and c.share == primary.share
        and c.n != baseline[-1].n and c.n in at
    }  # fmt: skip
    rows = worth([at[c.n] for c in baseline], [kept[c] for c in baseline], asked, draws, level=level)
    return curve | {"reason": "", "rows": [vars(row.pop("key")) | row for row in rows]}


def real_per_class(cells: Sequence[dict[str, Any]]) -> float:
    """Real tiles a class, the mean over classes and seeds."""
    return float(np.mean([[real for real, _ in cell["train_tiles"].values()] for cell in cells]))


def _reliability(results: Results, primary: Primary) -> list[dict[str, Any]]:
    """Bins of the reliability diagram of the baseline and of the arms that decide, all seeds together."""
    test = results.sets[0]
    rows = []
    for condition in results.cells:
        arm = results.arms[condition.arm]
        if at_primary(arm, condition, primary) and (condition.arm == primary.baseline or decides(arm)):
            probs = results.probabilities(condition, test)
            sure, right = probs.max(axis=2).ravel(), (probs.argmax(axis=2) == test.y).ravel()
            edges = np.linspace(0, 1, BINS + 1)
            place = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, BINS - 1)
            count, total, hits = (np.bincount(place, w, minlength=BINS) for w in (None, sure, right))
            bins = [
                {"low": edges[b], "high": edges[b + 1], "count": int(count[b]),
                 "confidence": float(total[b] / count[b]), "accuracy": float(hits[b] / count[b])}
                for b in np.flatnonzero(count)
            ]  # fmt: skip
            rows.append({"arm": condition.arm, "title": arm["title"], "bins": bins})
    return rows


def _costs(results: Results) -> dict[str, Any]:
    every = [cell["seconds"] for cells in results.cells.values() for cell in cells]
    by_arm: dict[str, list[float]] = {}
    for condition, cells in results.cells.items():
        by_arm.setdefault(condition.arm, []).extend(cell["seconds"] for cell in cells)
    return {
        "cells": len(every),
        "seconds": float(sum(every)),
        "arms": {arm: {"cells": len(times), "seconds": float(np.mean(times))} for arm, times in by_arm.items()},
        "generators": {g["name"]: g["cost"] for g in results.plan["generators"] if g.get("cost")},
    }
