"""Leakage probes: can something that is no morphology name the class of a tile, or the side of the split?

A classifier takes whatever works. Where three colour numbers, or traces of JPEG, are enough to name the class,
a high score does not show that it has learnt tissue. On the public colorectal tiles the mean colour alone names
more than half of nine classes, a colour histogram four tiles in five (Ignatov & Malivenko, arXiv 2409.11546).

A probe is a linear discriminant with equal priors (Fisher 1936), judged on patients that it has not seen
(grouped cross-validation). Its scores under chance come from the same probe after whole patients have exchanged
their labels, so that many tiles of few patients do not pass for much evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.probes.features import beyond_texture, unexplained_share

FOLDS = 10
PERMUTATIONS = 99
REPLICATES = 1000
ALPHA = 0.01
"""A probe is only reported when at most this share of permutations does as well; above the usual 5 %, because
eight probes are run on every set."""
MIN_GROUPS = 3
"""Patients that a class, or a side of the split, needs before a probe can be judged on it."""
Statistic = Literal["skill", "area"]
Target = Literal["class", "split"]
LEVELS: dict[tuple[Target, str], tuple[Statistic, float, float]] = {
    ("class", "mean colour"): ("skill", 0.10, 0.25),
    ("class", "colour histogram"): ("skill", 0.10, 0.30),
    ("class", "JPEG traces"): ("area", 0.78, 0.85),
    ("class", "file facts"): ("area", 0.70, 0.85),
    ("split", "mean colour"): ("skill", 0.20, 0.40),
    ("split", "colour histogram"): ("skill", 0.20, 0.40),
    ("split", "JPEG traces"): ("skill", 0.20, 0.40),
    ("split", "file facts"): ("skill", 0.20, 0.40),
}
"""(target, probe) -> the statistic, and its values from which the probe is a note, and a warning.

"skill" is the share of the way from chance to perfect. "area" is that of the class which stands out most against
all others: one class of nine that was compressed differently moves the balanced accuracy by a ninth, and is a leak.
Some colour belongs to a class, so colour is allowed more than compression and files, which never do. Classes
of biopsy tiles that were all compressed alike stay below an area of 0.75."""

UNEXPLAINED = 0.2
"""Share of the classes' differences in traces of JPEG that must be left when texture under one common compression
is accounted for. On biopsies and simulated textures of 50 to 95 % quality, tiles compressed alike leave less, unless
the classes hardly differ at all; a class compressed otherwise leaves 0.3 to 1."""
TRACE = 0.04
"""Smallest difference of the class that stands out from the others in a trace of JPEG, a natural logarithm. JPEG of
90 % quality leaves 0.08; the lattices of enlarged or simulated pictures 0.03."""


@dataclass(frozen=True)
class Probe:
    """What one probe reached. A probe that could not be judged has `reason` and no score."""

    name: str
    """Such as "mean colour"; see `LEVELS`."""
    target: Target
    """Whether it names the class (balanced accuracy) or tells train from test (area under the ROC curve)."""
    chance: float
    """The score of guessing."""
    score: float | None = None
    low: float | None = None
    """Lower end of the 95 % interval, by bootstrap over patients."""
    high: float | None = None
    null_high: float | None = None
    """What chance reaches: the 99th percentile of the score after patients have exchanged labels."""
    p: float | None = None
    """Share of the permutations, this one included, that do at least as well."""
    level: Literal["none", "note", "warning"] = "none"
    recall: tuple[float | None, ...] = ()
    """Recall a class, for target "class"; None for a class that took no part."""
    area: tuple[float | None, ...] = ()
    """Area under the ROC curve of each class against all others, for target "class"."""
    unexplained: float | None = None
    """For traces of JPEG: share of the differences between classes that texture does not explain."""
    tiles: int = 0
    groups: int = 0
    reason: str = ""
    """Why there is no score."""

    @property
    def skill(self) -> float:
        """Share of the way from chance to perfect; 0 without a score."""
        return 0.0 if self.score is None else (self.score - self.chance) / (1 - self.chance)


def probe_class(
    name: str,
    features: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    count: int,
    seed: int = 0,
) -> Probe:
    """How well `features` name the class of tiles of unseen patients.

    Args:
        features: float [N, D]; give tiles of training and validation only.
        labels: int [N], 0 to `count` - 1. Classes of fewer than `MIN_GROUPS` patients take no part.
        groups: N patients; "" is a patient of its own.

    Raises:
        DataError: shapes that do not fit, or features that are not finite.
    """
    features, labels, group = _checked(features, labels, groups)
    spread = np.array([len(np.unique(group[labels == k])) for k in range(count)])
    usable = np.flatnonzero(spread >= MIN_GROUPS)
    rows = np.isin(labels, usable)
    if len(usable) < 2:
        return Probe(name, "class", 0.5, reason=f"fewer than two classes have {MIN_GROUPS} patients")
    found = Probe(name, "class", 1 / len(usable), tiles=int(rows.sum()), groups=len(np.unique(group[rows])))
    own = np.searchsorted(usable, labels[rows])
    outcome = _judge(features[rows], own, group[rows], len(usable), seed)
    if outcome is None:
        return replace(found, reason="the same for all tiles")
    margins, fake, shuffled = outcome
    hits = np.zeros((found.groups, len(usable)))
    totals = np.zeros_like(hits)
    _, place = np.unique(group[rows], return_inverse=True)
    np.add.at(hits, (place, own), margins.argmax(1) == own)
    np.add.at(totals, (place, own), 1)
    recalls, areas = hits.sum(0) / totals.sum(0), _class_areas(margins, own)
    weights = _resamples(found.groups, seed)
    sums = weights @ totals
    shares = np.divide(weights @ hits, sums, out=np.full_like(sums, np.nan), where=sums > 0)
    null = [_balanced(m.argmax(1), s, len(usable)) for m, s in zip(fake, shuffled, strict=True)]
    null_areas = [np.nanmax(_class_areas(m, s)) for m, s in zip(fake, shuffled, strict=True)]
    found = replace(found, recall=_spread(recalls, usable, count), area=_spread(areas, usable, count))
    return _rated(found, float(recalls.mean()), np.nanmean(shares, 1), null, (float(np.nanmax(areas)), null_areas))


def probe_compression(
    traces: np.ndarray, alike: np.ndarray, labels: np.ndarray, groups: Sequence[str], count: int, seed: int = 0
) -> Probe:
    """How well traces of JPEG name the class, beyond what texture explains when all tiles are compressed alike.

    Args:
        traces: `compression` of the tiles, float64 [N, D].
        alike: the same of `compressed_alike`.
        labels, groups, count, seed: as for `probe_class`.
    """
    left = beyond_texture(traces, alike)
    found = probe_class("JPEG traces", left, labels, groups, count, seed)
    if found.score is None:
        return found
    found = replace(found, unexplained=unexplained_share(traces, left, labels))
    judged = [k for k, area in enumerate(found.area) if area is not None]
    best = max(judged, key=lambda k: found.area[k])
    means = {k: left[labels == k].mean(0) for k in judged}
    others = np.median([means[k] for k in judged if k != best], axis=0)
    if found.unexplained < UNEXPLAINED or np.abs(means[best] - others).max() < TRACE:
        return replace(found, level="none")
    return found


def probe_split(
    name: str, features: np.ndarray, labels: np.ndarray, test: np.ndarray, groups: Sequence[str], seed: int = 0
) -> Probe:
    """How well `features` tell test tiles from training tiles, beyond what the mix of classes tells.

    Args:
        features: float [N, D] of the tiles of train and test.
        labels: int [N] classes; each class is centred, since another mix of classes is no shift.
        test: bool [N].
        groups: N patients; "" is a patient of its own.

    Raises:
        DataError: shapes that do not fit, or features that are not finite.
    """
    features, labels, group = _checked(features, labels, groups)
    side = np.asarray(test, dtype=bool)
    found = Probe(name, "split", 0.5, tiles=len(features), groups=len(np.unique(group)))
    if min(len(np.unique(group[side])), len(np.unique(group[~side]))) < MIN_GROUPS:
        return replace(found, reason=f"train or test has fewer than {MIN_GROUPS} patients")
    _, kind = np.unique(labels, return_inverse=True)
    sums = np.zeros((kind.max() + 1, features.shape[1]))
    np.add.at(sums, kind, features)
    outcome = _judge(features - (sums / np.bincount(kind)[:, None])[kind], side.astype(int), group, 2, seed)
    if outcome is None:
        return replace(found, reason="the same for all tiles")
    margins, fake, shuffled = outcome
    _, place = np.unique(group, return_inverse=True)
    scores = margins[:, 1] - margins[:, 0]
    areas = _areas(scores, side, _resamples(found.groups, seed)[:, place])
    null = [_areas(m[:, 1] - m[:, 0], s == 1)[0] for m, s in zip(fake, shuffled, strict=True)]
    return _rated(found, float(_areas(scores, side)[0]), areas, [v for v in null if np.isfinite(v)])


def _judge(
    features: np.ndarray, labels: np.ndarray, group: np.ndarray, count: int, seed: int
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]], list[NDArray[np.int64]]] | None:
    """Held-out scores [N, K], the same for each permutation, and the permuted labels; None for constant features."""
    spread = features.std(0)
    features = features[:, spread > 1e-9 * max(1.0, float(np.abs(features).max()))]
    if not features.shape[1]:
        return None
    folds = _folds(group, seed)
    rng = numpy_rng(seed, "probe permutations")
    members = [np.flatnonzero(group == g) for g in np.unique(group)]
    shuffled = [_exchanged(labels, members, rng) for _ in range(PERMUTATIONS)]
    versions = [labels, *shuffled]
    held_out = [np.empty((len(labels), count)) for _ in versions]
    for fold in range(folds.max() + 1):
        rows, others = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        centre, scale = features[rows].mean(0), features[rows].std(0)
        scale[scale == 0] = 1
        known, new = (features[rows] - centre) / scale, (features[others] - centre) / scale
        scatter = known.T @ known
        for version, margins in zip(versions, held_out, strict=True):
            margins[others] = _discriminant(known, scatter, version[rows], new, count)
    return held_out[0], held_out[1:], shuffled


def _discriminant(
    known: np.ndarray, scatter: np.ndarray, labels: np.ndarray, new: np.ndarray, count: int
) -> NDArray[np.float64]:
    """Linear discriminant scores with equal priors [M, K]; minus infinity for classes that were not trained on.

    The scatter within classes is what is left of all scatter, so that a permutation costs no second pass over the
    squares. It is shrunk towards its mean variance with the weight of one tile a dimension.
    """
    total, dims = known.shape
    sizes = np.bincount(labels, minlength=count)
    sums = np.eye(count)[labels].T @ known
    seen = sizes > 0
    centres = sums[seen] / sizes[seen, None]
    within = (scatter - centres.T @ (centres * sizes[seen, None])) / max(total - seen.sum(), 1)
    share = dims / (dims + total)
    level = max(float(np.trace(within)) / dims, 1e-9)
    within = (1 - share) * within + (share * level + 1e-9) * np.eye(dims)
    weights = np.linalg.solve(within, centres.T)
    margins = np.full((len(new), count), -np.inf)
    margins[:, seen] = new @ weights - (centres * weights.T).sum(1) / 2
    return margins


def _folds(group: np.ndarray, seed: int) -> NDArray[np.int64]:
    """A fold for each tile, no patient in two, folds of about the same size.

    Blind to the labels: folds that were stratified by the true labels, and not by the exchanged ones, would give
    the true ones an advantage that is no evidence.
    """
    sizes = np.bincount(group)
    order = numpy_rng(seed, "probe folds").permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    number = min(FOLDS, len(sizes))
    fold = np.empty(len(sizes), np.int64)
    # forth and back, so that no fold gets the largest patient of every round
    turn = np.arange(len(sizes)) % (2 * number)
    fold[order] = np.minimum(turn, 2 * number - 1 - turn)
    return fold[group]


def _exchanged(labels: np.ndarray, members: list[np.ndarray], rng: np.random.Generator) -> NDArray[np.int64]:
    """Every patient gets the labels of another one, stretched or cut to its number of tiles."""
    found = np.empty_like(labels)
    for own, giver in zip(members, rng.permutation(len(members)), strict=True):
        given = rng.permutation(labels[members[giver]])
        found[own] = given[np.arange(len(own)) * len(given) // len(own)]
    return found


def _rated(
    found: Probe,
    score: float,
    draws: np.ndarray,
    null: Sequence[float],
    area: tuple[float, Sequence[float]] = (0.0, ()),
) -> Probe:
    """The probe with its score and interval, and with the level that `LEVELS` gives it."""
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    rated = replace(found, score=score, low=float(low), high=float(high), null_high=float(np.percentile(null, 99)))
    statistic, note, warning = LEVELS.get((found.target, found.name), ("skill", 0.10, 0.25))
    value, compared, under_chance = (rated.skill, score, null) if statistic == "skill" else (area[0], *area)
    p = (1 + sum(other >= compared for other in under_chance)) / (1 + len(under_chance))
    if p > ALPHA or value < note:
        return replace(rated, p=p)
    return replace(rated, p=p, level="warning" if value >= warning else "note")


def _class_areas(margins: np.ndarray, labels: np.ndarray) -> NDArray[np.float64]:
    """Area under the ROC curve of each class against all others [K], by its share of the posterior."""
    shares = np.exp(margins - margins.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return np.array([_areas(column, labels == k)[0] for k, column in enumerate(shares.T)])


def _spread(values: np.ndarray, usable: np.ndarray, count: int) -> tuple[float | None, ...]:
    named: list[float | None] = [None] * count
    for k, value in zip(usable, values, strict=True):
        named[k] = float(value)
    return tuple(named)


def _balanced(predicted: np.ndarray, labels: np.ndarray, count: int) -> float:
    totals = np.bincount(labels, minlength=count)
    right = np.bincount(labels[predicted == labels], minlength=count)
    return float((right[totals > 0] / totals[totals > 0]).mean())


def _areas(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> NDArray[np.float64]:
    """Area under the ROC curve for each row of tile weights [B, N]; ties count half, NaN with one side empty."""
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(scores[order]) > 0))
    ups = np.add.reduceat(weights[:, order] * positive[order], starts, axis=1)
    downs = np.add.reduceat(weights[:, order] * ~positive[order], starts, axis=1)
    below = np.cumsum(downs, 1) - downs / 2
    pairs = ups.sum(1) * downs.sum(1)
    return np.divide((ups * below).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _resamples(groups: int, seed: int) -> NDArray[np.float64]:
    """How often each patient is drawn in each bootstrap replicate [B, G]."""
    rng = numpy_rng(seed, "probe bootstrap")
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=REPLICATES).astype(np.float64)


def _checked(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if features.ndim != 2 or labels.shape != (len(features),) or len(groups) != len(features):
        raise DataError(f"Features have shape {features.shape}, with {len(labels)} labels and {len(groups)} groups.",
                        "Give [N, D], N labels and N groups.")  # fmt: skip
    if not np.isfinite(features).all():
        raise DataError("Some features are not finite.", "Leave those tiles out.")
    _, group = np.unique([g or f"\x1f{i}" for i, g in enumerate(groups)], return_inverse=True)
    return features, labels.astype(np.int64), group.astype(np.int64)
