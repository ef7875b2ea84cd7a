"""Calibration with intervals: patients are drawn with replacement, and all measures follow from sums over them.

A measure of calibration is a function of sums over tiles (tiles, confidence and hits a bin; losses). So the sums are
taken once for every patient, and a replicate is a weighted sum of patients: a thousand replicates are one product of
two matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import ndtri, stdtrit

from histosynth.classify.calibration import errors, proper
from histosynth.classify.calibration.arrays import checked, checked_groups
from histosynth.core.errors import DataError, SettingError
from histosynth.core.seeds import numpy_rng

MEASURES = {
    "accuracy": "share of tiles that are right",
    "nll": "negative log-likelihood, nats",
    "brier": "Brier score, 0 to 2",
    "brier_reliability": "part of the Brier score that calibration could remove",
    "brier_resolution": "part of the Brier score that telling tiles apart has removed",
    "ece": "expected calibration error, equal width",
    "ece_debiased": "the same less what few tiles alone would cause",
    "ece_mass": "expected calibration error, equal mass",
    "ece_mass_debiased": "the same less what few tiles alone would cause",
    "ece_debiased_l2": "root mean square calibration error, equal mass, debiased",
    "classwise_ece": "calibration error of every class's probability, mean, equal width",
    "classwise_ece_debiased": "the same less what few tiles alone would cause",
    "mce": "largest calibration error of a bin, equal width",
}
"""What `measure` gives. All but accuracy and brier_resolution are better when lower."""

_TWINS = {
    "ece": "ece_debiased",
    "ece_mass": "ece_mass_debiased",
    "classwise_ece": "classwise_ece_debiased",
}
_BIASED = (*_TWINS, *_TWINS.values(), "ece_debiased_l2", "mce", "brier_reliability", "brier_resolution")
_SHARES = ("accuracy", *(m for m in _BIASED if not m.startswith("brier")))
_CHUNK = 8_000_000  # numbers held at once
_FEW_PATIENTS = 5


@dataclass
class _Sums:
    """Sums over the tiles of every patient, side by side in the columns of one sparse matrix [G, C]."""

    blocks: dict[str, tuple[int, int]] = field(default_factory=dict)
    rows: list[np.ndarray] = field(default_factory=list)
    columns: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    width: int = 0

    def add(self, name: str, member: np.ndarray, where: np.ndarray, size: int, values: tuple[np.ndarray, ...]) -> None:
        """Sum every array of `values` [N] by patient and by bin `where` in [0, size)."""
        self.blocks[name] = (self.width, size)
        for value in values:
            self.rows.append(member)
            self.columns.append(self.width + where)
            self.values.append(np.asarray(value, dtype=np.float64))
            self.width += size

    def matrix(self, patients: int) -> sparse.csr_matrix:
        entries = (np.concatenate(self.values), (np.concatenate(self.rows), np.concatenate(self.columns)))
        return sparse.coo_matrix(entries, shape=(patients, self.width)).tocsr()

    def part(self, sums: np.ndarray, name: str, arrays: int) -> np.ndarray:
        """[R, C] -> [R, arrays, size] of the block `name`."""
        start, size = self.blocks[name]
        return sums[:, start : start + arrays * size].reshape(len(sums), arrays, size)


def measure(
    probs: np.ndarray | Mapping[str, np.ndarray],
    y: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    seed: int,
    replicates: int = 1000,
    level: float = 0.95,
    bins: int = errors.BINS,
) -> dict[str, Any]:
    """The `MEASURES` of one or several sets of probabilities for the same tiles, with intervals.

    A replicate draws one patient less than there are, which makes its variance right when they are few (Rao and Wu
    1988, JASA 83, 231-241), and the width follows Student's t for so many patients. Bins are those of all tiles, in
    every replicate.

    A calibration error that is measured on few tiles is too large, and a replicate's is too large twice, so that a
    percentile interval can miss the true error always. For these measures the replicates are moved once so that
    their mean is the estimate, and once mirrored at the estimate (the reverse percentile); the interval
    spans both and ends at 0. That of a plain error is the one of its debiased twin, widened to hold the
    estimate. `mce` is decided by the emptiest bin, and its interval is too narrow. A difference between plain errors
    is drawn towards 0 by their bias; that of the debiased ones hardly is.

    Args:
        probs: float [N, K]; or name -> float [N, K], and the first is what the others are compared with.
        y: int [N].
        groups: [N], the patient of every tile; None takes each tile for a patient.
        level: of the intervals.

    Returns:
        JSON-ready. measures {name: {measure: {value, low, high}}}, differences {name: {measure: {value, low,
        high}}} to the first (paired: the same draws), tiles, patients, replicates, level, notes. `name` is "probs"
        when one array was given. low and high are None when there is one patient only.

    Raises:
        DataError: arrays that do not fit together.
        SettingError: replicates below 2, level outside (0, 1), bins below 1.
    """
    if replicates < 2 or not 0 < level < 1:
        raise SettingError(
            f"replicates is {replicates} and level is {level}.", "Use replicates >= 2 and 0 < level < 1."
        )
    named = dict(probs) if isinstance(probs, Mapping) else {"probs": probs}
    if not named:
        raise DataError("No probabilities were given.", "Give at least one array.")
    member = checked_groups(groups, len(np.asarray(y)))
    patients = int(member.max()) + 1 if len(member) else 0
    values, drawn = {}, {}
    for name, rows in named.items():
        sums = _summed(*checked(rows, y), member, bins)
        table = sums.matrix(patients)
        ones = np.asarray(table.sum(axis=0)).reshape(1, -1)
        values[name] = {m: float(v[0]) for m, v in _measures(sums, ones).items()}
        if patients > 1:
            parts = [_measures(sums, weights @ table) for weights in draws(seed, replicates, patients, sums.width)]
            drawn[name] = {m: np.concatenate([part[m] for part in parts]) for m in parts[0]}
    first = next(iter(named))
    return {
        "measures": {name: _intervals(found, drawn.get(name), level, patients) for name, found in values.items()},
        "differences": {
            name: _intervals(
                {m: v - values[first][m] for m, v in values[name].items()},
                {m: d - drawn[first][m] for m, d in drawn[name].items()} if drawn else None,
                level,
                patients,
                signed=True,
            )
            for name in named
            if name != first
        },
        "tiles": len(member),
        "patients": patients if groups is not None else None,
        "replicates": replicates,
        "level": level,
        "notes": notes_on(groups, patients),
    }


def reliability_intervals(
    probs: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    seed: int,
    replicates: int = 1000,
    level: float = 0.95,
    bins: int = errors.BINS,
    scheme: errors.Scheme = "width",
) -> list[dict[str, float | int | None]]:
    """`reliability_bins` with accuracy_low and accuracy_high, by patients drawn with replacement.

    A bin whose tiles are all of one patient has no interval (None).

    Raises:
        DataError, SettingError: as `measure`.
    """
    found = errors.reliability_bins(probs, y, bins=bins, scheme=scheme)
    probs, y = checked(probs, y)
    confidence, right = errors.top_label(probs, y)
    member = checked_groups(groups, len(y))
    patients = int(member.max()) + 1
    edges = errors.edges_of(confidence, bins, scheme)
    where, size = errors.place(confidence, edges), len(edges) - 1
    sums = _Sums()
    sums.add("bins", member, where, size, (np.ones(len(y)), right))
    table = sums.matrix(patients)
    owners = [len(np.unique(member[where == b])) for b in range(size)]
    shares = np.empty((0, size))
    if patients > 1:
        both = np.concatenate([weights @ table for weights in draws(seed, replicates, patients, sums.width)])
        count, hits = np.moveaxis(sums.part(both, "bins", 2), 1, 0)
        shares = np.divide(hits, count, out=np.full(hits.shape, np.nan), where=count > 0)
    for b, row in enumerate(found):
        row["accuracy_low"] = row["accuracy_high"] = None
        if owners[b] > 1:
            low, high = np.nanquantile(shares[:, b], [(1 - level) / 2, (1 + level) / 2])
            row["accuracy_low"], row["accuracy_high"] = float(low), float(high)
    return found


def _summed(probs: np.ndarray, y: np.ndarray, member: np.ndarray, bins: int) -> _Sums:
    sums = _Sums()
    confidence, right = errors.top_label(probs, y)
    one, nowhere = np.ones(len(y)), np.zeros(len(y), dtype=int)
    losses = (one, right, proper.surprise(probs, y), proper.squares(probs, y))
    sums.add("losses", member, nowhere, 1, losses)
    for scheme in ("width", "mass"):
        edges = errors.edges_of(confidence, bins, scheme)
        sums.add(scheme, member, errors.place(confidence, edges), len(edges) - 1, (one, confidence, right))
    edges = errors.edges_of(confidence, bins, "width")
    for k in range(probs.shape[1]):
        p, hit = probs[:, k], y == k
        sums.add(f"class {k}", member, errors.place(p, edges), bins, (one, p, hit, p**2, p * hit))
    return sums


def _measures(sums: _Sums, table: np.ndarray) -> dict[str, np.ndarray]:
    """[R, C] -> every measure [R]."""
    tiles, right, surprise, squares = sums.part(table, "losses", 4)[:, :, 0].T
    width = np.moveaxis(sums.part(table, "width", 3), 1, 0)
    mass = np.moveaxis(sums.part(table, "mass", 3), 1, 0)
    classes = [sums.part(table, name, 5) for name in sums.blocks if name.startswith("class ")]
    parts = [proper.brier_parts(one) for one in classes]
    columns = [np.moveaxis(one[:, :3], 1, 0) for one in classes]
    return {
        "accuracy": right / tiles,
        "nll": surprise / tiles,
        "brier": squares / tiles,
        "brier_reliability": np.sum([part["reliability"] for part in parts], axis=0),
        "brier_resolution": np.sum([part["resolution"] for part in parts], axis=0),
        "ece": errors.gap(*width),
        "ece_debiased": errors.debiased_l1(*width),
        "ece_mass": errors.gap(*mass),
        "ece_mass_debiased": errors.debiased_l1(*mass),
        "ece_debiased_l2": errors.debiased_l2(*mass),
        "classwise_ece": np.mean([errors.gap(*one) for one in columns], axis=0),
        "classwise_ece_debiased": np.mean([errors.debiased_l1(*one) for one in columns], axis=0),
        "mce": errors.largest_gap(*width),
    }


def draws(seed: int, replicates: int, patients: int, width: int = 1) -> Iterator[np.ndarray]:
    """How often each patient is drawn, float64 [r, G] at a time: the same draws whatever the width of the tables."""
    rng = numpy_rng(seed, "calibration bootstrap")
    even = np.full(patients, 1 / patients)
    size = max(1, _CHUNK // max(patients, width))
    for start in range(0, replicates, size):
        yield rng.multinomial(patients - 1, even, size=min(size, replicates - start)).astype(np.float64)


def _intervals(
    values: Mapping[str, float],
    drawn: Mapping[str, np.ndarray] | None,
    level: float,
    patients: int,
    *,
    signed: bool = False,
) -> dict[str, dict[str, float | None]]:
    """{measure: {value, low, high}}; differences (`signed`) may lie below 0."""
    if drawn is None:
        return {m: {"value": v, "low": None, "high": None} for m, v in values.items()}
    # few patients say little about the spread of patients: Student's t in the place of the normal
    wider = float(stdtrit(patients - 1, (1 + level) / 2) / ndtri((1 + level) / 2))
    found: dict[str, dict[str, float | None]] = {}
    for m, value in values.items():
        source = m if signed else _TWINS.get(m, m)
        centre = values[source]
        low, high = (float(q) for q in np.quantile(drawn[source], [(1 - level) / 2, (1 + level) / 2]))
        if m in _BIASED:
            bias = float(drawn[source].mean()) - centre
            low, high = min(low - bias, 2 * centre - high), max(high - bias, 2 * centre - low)
        low, high = centre + wider * (low - centre), centre + wider * (high - centre)
        if not signed:
            low, high = max(min(low, value), 0.0), max(high, value)
        if not signed and m in _SHARES:
            high = min(high, 1.0)
        found[m] = {"value": value, "low": low, "high": high}
    return found


def notes_on(groups: np.ndarray | None, patients: int) -> list[str]:
    """What weakens intervals by patient."""
    if groups is None:
        return ["No patients are given: each tile is taken for one, and the intervals are too narrow."]
    if patients < 2:
        return ["All tiles are of one patient: no interval can be had."]
    if patients < _FEW_PATIENTS:
        return [f"Only {patients} patients: the intervals are uncertain themselves."]
    return []
