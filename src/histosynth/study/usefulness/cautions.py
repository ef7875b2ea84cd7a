"""What a reader must know before relying on the experiment, the gravest first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from histosynth.study.statistics import FEW_PATIENTS
from histosynth.study.usefulness.results import Results

SEVERITIES = {
    "strong": "Misleading unless you know it",
    "warning": "Weaker than it looks",
    "note": "For the record",
}
_PATIENTS, _SEEDS, _TILES = 10, 5, 10


def cautions(results: Results, found: Mapping[str, Any]) -> list[dict[str, str]]:
    """severity (a key of `SEVERITIES`) and text of each caution.

    Args:
        found: what `assess` has found so far.
    """
    rows = [*_origin(results, found), *_size(results), *_classifier(results)]
    rows += [("warning", note) for note in results.plan.get("notes", [])]
    order = list(SEVERITIES)
    unique = dict.fromkeys(sorted(rows, key=lambda row: order.index(row[0])))
    return [{"severity": severity, "text": text} for severity, text in unique]


def _origin(results: Results, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the generators may have seen."""
    rows = [
        (
            "strong",
            f"The origin of {generator['title']} is not known ({generator['origin']['words']}). If it saw test "
            "patients, its gain may be a leak.",
        )
        for generator in results.plan["generators"]
        if generator["origin"]["kind"] == "unknown"
    ]
    flattered = [v["title"] for v in found["verdicts"] if v["generator_saw_more"]]
    if flattered:
        rows.append((
            "strong",
            f"{_and(flattered)} learned from more real tiles than the classifiers of the verdict were given: part "
            "of the gain may come from those tiles.",
        ))  # fmt: skip
    elif any(row["generator_saw_more"] for row in found["scores"]):
        rows.append((
            "warning",
            "Where fewer than all real tiles are used, the generators had learned from more real tiles than the "
            "classifiers were given. Those points (†) say what the generator's knowledge is worth, and part of it "
            "may be those tiles; the verdicts are taken where both had the same.",
        ))  # fmt: skip
    return rows


def _size(results: Results) -> list[tuple[str, str]]:
    """Few patients, tiles or seeds; of the first test set the plan's notes tell already what is weak."""
    rows = []
    for number, test in enumerate(results.sets):
        patients = len(np.unique(test.groups))
        if patients < (_PATIENTS if number else FEW_PATIENTS):
            severity = "strong" if patients < FEW_PATIENTS else "warning"
            few = "1 patient" if patients == 1 else f"{patients} patients"
            rows.append((severity, f"{test.title} has {few} only: intervals over so few are uncertain themselves."))
        for k, label in enumerate(results.plan["classes"]):
            if 0 < (people := test.patients_of(k)) < FEW_PATIENTS:
                few = "1 patient" if people == 1 else f"{people} patients"
                rows.append((
                    "warning",
                    f"{test.title}: the tiles of class {label} are of {few} only. A change of its recall is shown, and "
                    "never counted as beyond chance.",
                ))  # fmt: skip
        if number == 0:
            continue
        counts = np.bincount(test.y, minlength=len(results.plan["classes"]))
        for label, count in zip(results.plan["classes"], counts, strict=True):
            if count == 0:
                rows.append(("warning", f"{test.title} has no tile of class {label}: no score speaks of it."))
            elif count < _TILES:
                rows.append(("warning", f"{test.title} has {count} tiles of class {label}: its recall is uncertain."))
    seeds = len(results.seeds)
    if seeds < 3:
        runs = "One seed" if seeds == 1 else f"{seeds} seeds"
        rows.append(("warning", f"{runs} an arm: what another training would give is hardly known."))
    elif seeds < _SEEDS:
        rows.append((
            "warning",
            f"{seeds} seeds an arm: where trainings differ more than patients do, a 95 % interval from so few covers "
            "nearer to 90 %. Five seeds or more mend that.",
        ))  # fmt: skip
    if results.left_out:
        named = _and([str(s) for s in results.left_out])
        rows.append(("warning", f"Cells are missing with seed {named}, which is left out of everything below."))
    return rows


def _classifier(results: Results) -> list[tuple[str, str]]:
    cells = [cell for by_seed in results.cells.values() for cell in by_seed]
    rows = []
    starts = {cell["initialisation"] for cell in cells}
    if any("tissue" in start for start in starts):
        rows.append(("note", "The classifier rests on weights trained on simulated tissue."))
        if results.plan.get("simulated"):
            rows.append((
                "warning",
                "These tiles come from the simulator that the classifier's weights were trained on: it knows such "
                "tissue already, so that synthetic tiles have less to add than elsewhere.",
            ))  # fmt: skip
    if len(starts) > 1:
        rows.append(("warning", f"Not all classifiers start from the same weights: {_and(sorted(starts))}."))
    said = Counter(note for cell in cells for note in set(cell["notes"]))
    rows += [("note", f"{note} ({times} of {len(cells)} classifiers)") for note, times in said.most_common(8)]
    return rows


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
