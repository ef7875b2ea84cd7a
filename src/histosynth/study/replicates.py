"""Scores of one arm in every replicate of a bootstrap over patients.

A replicate says how often each patient is drawn. All scores here are functions of sums over patients, or of
pairs of patients, so that thousands of replicates are a few products of matrices and no tile is touched twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from histosynth.classify import scores
from histosynth.core.errors import DataError, SettingError, did_you_mean

Measure = Callable[[np.ndarray], np.ndarray]

BINS = 15
"""Bins of equal width of the calibration error, as in Guo et al. 2017."""

_COUNTED: dict[str, Measure] = {
    "accuracy": scores.accuracy,
    "balanced_accuracy": scores.balanced_accuracy,
    "macro_f1": scores.macro_f1,
}
_CHUNK = 4_000_000  # numbers held at once


@dataclass(frozen=True)
class Draws:
    """What every replicate draws; the same draws for two arms make their difference a paired one.

    Attributes:
        member: int [N], which patient a tile is of, 0 to G - 1.
        people: int [n, G], how often each patient is drawn.
        runs: int [n, S], how often each run is drawn.
    """

    member: np.ndarray
    people: np.ndarray
    runs: np.ndarray

    @property
    def patients(self) -> int:
        """Number of patients, G."""
        return self.people.shape[1]


@dataclass(frozen=True)
class Replicated:
    """A score of an arm's runs: `whole` float [S] on all patients, `drawn` float [n, S] in each replicate.

    NaN where a replicate drew no tile that the score needs.
    """

    whole: np.ndarray
    drawn: np.ndarray

    def __sub__(self, other: Replicated) -> Replicated:
        return Replicated(self.whole - other.whole, self.drawn - other.drawn)


def draw(groups: Any, runs: int, replicates: int, rng: np.random.Generator) -> Draws:
    """Draw patients and, independently, runs with replacement; one less than all of each (Rao and Wu 1988).

    Args:
        groups: [N], the patient of every tile.
        runs: number of runs, S.
    """
    names, member = np.unique(groups, return_inverse=True)
    patients = len(names)
    people = rng.multinomial(max(patients - 1, 1), np.full(patients, 1 / patients), size=replicates)
    return Draws(member, people, rng.multinomial(max(runs - 1, 1), np.full(runs, 1 / runs), size=replicates))


def replicate(metrics: Sequence[str], y: np.ndarray, output: np.ndarray, draws: Draws) -> dict[str, Replicated]:
    """Every metric of every run, on all patients and in every replicate.

    Args:
        metrics: accuracy, balanced_accuracy, macro_f1, recall:K for the class with index K; and, from
            probabilities, auroc (macro, one class against the rest), ece (see `BINS`), brier and nll (nats).
            Classes without tiles in a replicate are left out of its mean.
        y: int [N], true classes.
        output: int [S, N] predicted classes, or float [S, N, C] probabilities.

    Raises:
        SettingError: an unknown metric, or one that needs probabilities.
        DataError: a recall asked of a class that has no tile.
    """
    counted = {m: measure for m in metrics if (measure := _measure(m, y)) is not None}
    predicted = output.argmax(axis=2) if output.ndim == 3 else output
    found = dict(zip(counted, _from_counts(list(counted.values()), y, predicted, draws), strict=True))
    for metric in metrics:
        if metric not in found:
            if output.ndim != 3:
                raise SettingError(f"metric is {metric!r}, which needs probabilities.", "Give float [S, N, C].")
            found[metric] = _FROM_PROBABILITIES[metric](y, output, draws)
    return found


def _measure(metric: str, y: np.ndarray) -> Measure | None:
    """The metric as a function of confusion matrices [..., C, C]; None for one of probabilities."""
    if metric in _FROM_PROBABILITIES:
        return None
    if metric in _COUNTED:
        return _COUNTED[metric]
    kind, _, indices = metric.partition(":")
    if kind == "recall" and all(index.isdecimal() for index in indices.split("+")):
        classes = [int(index) for index in indices.split("+")]
        for k in classes:
            if not (y == k).any():
                raise DataError(f"metric is {metric!r}, but no tile is of class {k}.", "Leave this class out.")
        return lambda confusion: _known_mean(scores.recalls(confusion)[..., classes])
    raise SettingError(f"metric is {metric!r}.", did_you_mean(metric, [*_COUNTED, *_FROM_PROBABILITIES, "recall:0"]))


def _from_counts(measures: Sequence[Measure], y: np.ndarray, predicted: np.ndarray, draws: Draws) -> list[Replicated]:
    """Measures of confusion matrices: those of the patients are added up, each as often as it is drawn."""
    if not measures:
        return []
    runs, classes = len(predicted), int(max(y.max(), predicted.max())) + 1
    cell = (draws.member * classes + y) * classes + predicted
    cells = draws.patients * classes**2
    tables = np.stack([np.bincount(row, minlength=cells) for row in cell])
    tables = tables.reshape(runs, draws.patients, classes, classes)
    flat = tables.transpose(1, 0, 2, 3).reshape(draws.patients, -1).astype(np.float64)
    size = max(1, _CHUNK // flat.shape[1])
    parts: list[list[np.ndarray]] = [[] for _ in measures]
    for start in range(0, len(draws.people), size):
        drawn = draws.people[start : start + size].astype(np.float64) @ flat
        for measure, kept in zip(measures, parts, strict=True):
            kept.append(measure(drawn.reshape(-1, runs, classes, classes)))
    whole = tables.sum(axis=1)
    return [Replicated(m(whole), np.concatenate(kept)) for m, kept in zip(measures, parts, strict=True)]


def _brier(y: np.ndarray, probs: np.ndarray, draws: Draws) -> Replicated:
    return _mean(((probs - np.eye(probs.shape[2])[y]) ** 2).sum(axis=2), draws)


def _nll(y: np.ndarray, probs: np.ndarray, draws: Draws) -> Replicated:
    # a probability that float64 rounded to 0 would make the mean infinite for one tile
    return _mean(-np.log(np.maximum(probs[:, np.arange(len(y)), y], np.finfo(np.float64).tiny)), draws)


def _mean(losses: np.ndarray, draws: Draws) -> Replicated:
    """A mean over tiles, from the sums of each patient; losses are float [S, N]."""
    sums = np.stack([np.bincount(draws.member, row, minlength=draws.patients) for row in losses])
    tiles = np.bincount(draws.member, minlength=draws.patients)
    return Replicated(losses.mean(axis=1), _share(draws.people @ sums.T, (draws.people @ tiles)[:, None]))


def _ece(y: np.ndarray, probs: np.ndarray, draws: Draws) -> Replicated:
    """The expected calibration error: the gaps of the bins are sums over patients, and so is their number of tiles.

    Resampling adds noise to every bin, which moves the error of all replicates upwards, as the error of few
    tiles lies above that of many. The interval is for the error at this number of tiles, so that shift, the mean
    of the replicates minus the value on all patients, is taken out (Efron and Tibshirani 1993, chapter 10).
    """
    confidence, right = probs.max(axis=2), probs.argmax(axis=2) == y
    edges = np.linspace(0, 1, BINS + 1)  # bins are (low, high]
    where = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)
    cells = draws.patients * BINS
    gaps = np.stack([
        np.bincount(draws.member * BINS + place, hit - sure, minlength=cells)
        for place, hit, sure in zip(where, right, confidence, strict=True)
    ]).reshape(len(probs), draws.patients, BINS)  # fmt: skip
    tiles = np.bincount(draws.member, minlength=draws.patients)
    whole = np.abs(gaps.sum(axis=1)).sum(axis=1) / len(y)
    summed = draws.people @ gaps.transpose(1, 0, 2).reshape(draws.patients, -1)
    drawn = _share(np.abs(summed.reshape(-1, len(probs), BINS)).sum(axis=2), (draws.people @ tiles)[:, None])
    return Replicated(whole, drawn - (drawn.mean(axis=0) - whole))


def _auroc(y: np.ndarray, probs: np.ndarray, draws: Draws) -> Replicated:
    """The macro area under the ROC curve, from how often the positives of a patient beat the negatives of another.

    With that table U, a replicate with counts w has w' U w won pairs (Mann and Whitney 1947).
    """
    runs, n = len(probs), len(draws.people)
    whole, drawn = np.full((runs, probs.shape[2]), np.nan), np.full((n, runs, probs.shape[2]), np.nan)
    people = draws.people.astype(np.float64)
    for k in range(probs.shape[2]):
        sides = [_by_patient(np.flatnonzero(mask), draws.member) for mask in (y == k, y != k)]
        (positive, rows, of_rows), (negative, columns, of_columns) = sides
        if not len(positive) or not len(negative):
            continue
        tiles = [np.diff(np.append(starts, len(side))) for side, starts in ((positive, rows), (negative, columns))]
        pairs = (people[:, of_rows] @ tiles[0]) * (people[:, of_columns] @ tiles[1])
        for s in range(runs):
            won = _won(probs[s, positive, k], probs[s, negative, k], rows, columns)
            whole[s, k] = won.sum() / (len(positive) * len(negative))
            beaten = ((people[:, of_rows] @ won) * people[:, of_columns]).sum(axis=1)
            drawn[:, s, k] = _share(beaten, pairs)
    return Replicated(_known_mean(whole), _known_mean(drawn))


def _by_patient(tiles: np.ndarray, member: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tiles in the order of their patients, where each patient begins, and which patients these are."""
    ordered = tiles[np.argsort(member[tiles], kind="stable")]
    patients, starts = np.unique(member[ordered], return_index=True)
    return ordered, starts, patients


def _won(positive: np.ndarray, negative: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """float [R, C]: pairs won, ties counting half, by the positives of each patient against the negatives of each."""
    by_tile = np.empty((len(positive), len(columns)))
    size = max(1, _CHUNK // len(negative))
    for start in range(0, len(positive), size):
        ours = positive[start : start + size, None]
        wins = (ours > negative) + 0.5 * (ours == negative)
        by_tile[start : start + size] = np.add.reduceat(wins, columns, axis=1)
    return np.add.reduceat(by_tile, rows, axis=0)


def _known_mean(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis of what is not NaN; NaN without any."""
    known = np.isfinite(values)
    return _share(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1))


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.broadcast_arrays(np.asarray(part, np.float64), np.asarray(whole, np.float64))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


_FROM_PROBABILITIES: dict[str, Callable[[np.ndarray, np.ndarray, Draws], Replicated]] = {
    "auroc": _auroc,
    "ece": _ece,
    "brier": _brier,
    "nll": _nll,
}
