"""Conformal sets: the classes that a tile may be of, with a stated chance that the true one is among them.

A score says how badly a class fits a tile. Its quantile over validation tiles is the limit for others: if validation
and test tiles can be exchanged, the true class is in the set with probability 1 - alpha or more, whatever the network.
Tiles of a patient are alike, and other hospitals stain differently: neither can be exchanged, so coverage is
measured, for each class and with intervals by patient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from histosynth.classify.calibration.arrays import checked, checked_groups
from histosynth.classify.calibration.bootstrap import draws, notes_on
from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.core.seeds import derive

Method = Literal["lac", "aps", "raps"]
PENALTIES = (0.001, 0.01, 0.1, 0.2, 0.5)
"""The penalties of RAPS that `tune_raps` chooses from (Angelopoulos et al. 2021, appendix E)."""


def lac_scores(probs: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Least ambiguous classes: 1 - p, float64 [N, K] (Sadinle, Lei and Wasserman 2019, JASA 114). `u` is not used."""
    return 1 - np.asarray(probs, dtype=np.float64)


def aps_scores(probs: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Adaptive sets: the probability of all classes that rank higher, plus u times its own, float64 [N, K].

    (Romano, Sesia and Candès 2020, arXiv:2006.02544, with the randomisation u in [0, 1), which makes the coverage
    exact.) Of equal probabilities the class that comes first ranks higher.
    """
    probs = np.asarray(probs, dtype=np.float64)
    order = np.argsort(-probs, axis=1, kind="stable")
    ranked = np.take_along_axis(probs, order, axis=1)
    scores = ranked.cumsum(axis=1) - ranked + np.asarray(u)[:, None] * ranked
    found = np.empty_like(probs)
    np.put_along_axis(found, order, scores, axis=1)
    return found


def raps_scores(probs: np.ndarray, u: np.ndarray, *, penalty: float, rank: int) -> np.ndarray:
    """Regularised adaptive sets: those of APS plus `penalty` for every place below `rank`, float64 [N, K].

    (Angelopoulos et al. 2021, arXiv:2009.14193: lambda is `penalty`, k_reg is `rank`, 1 the first place.)
    """
    probs = np.asarray(probs, dtype=np.float64)
    return aps_scores(probs, u) + penalty * np.maximum(_ranks(probs) - rank, 0)


SCORES: dict[str, Callable[..., np.ndarray]] = {"lac": lac_scores, "aps": aps_scores, "raps": raps_scores}


def quantile(scores: np.ndarray, alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n scores, infinite when that is more than n.

    The + 1 is the new tile: the rank of its score among n + 1 is even, and so it lies at or below with probability
    1 - alpha or more (Vovk, Gammerman and Shafer 2005).
    """
    # (n + 1)(1 - alpha) may come out a rounding above a whole number
    place = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    return float(np.sort(scores)[place - 1]) if place <= len(scores) else math.inf


def dice(seed: int, keys: Sequence[str]) -> np.ndarray:
    """float64 [N] in [0, 1), one a tile from its own name: the order of tiles does not matter."""
    return np.array([derive(seed, "conformal", key) / 2**63 for key in keys])


@dataclass(frozen=True, eq=False)
class Conformal:
    """Limits for the scores, fitted on validation.

    Attributes:
        method: lac, aps or raps.
        alpha: the share of sets that may miss the true class.
        limits: float64 [K]; K equal ones, or one for each class (class-conditional, "Mondrian"). Infinite where
            there were too few tiles: that class is then in every set.
        conditional: whether the limits are by class.
        options: penalty and rank of raps.
        notes: what was unusual in fitting them.
    """

    method: Method
    alpha: float
    limits: np.ndarray
    conditional: bool = False
    options: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def sets(self, probs: np.ndarray, u: np.ndarray) -> np.ndarray:
        """bool [N, K]: which classes each tile may be of. A set may be empty: no class fits well enough.

        Args:
            probs: float [N, K].
            u: float [N] in [0, 1), from `dice`.

        Raises:
            DataError: another number of classes, or not one u a tile.
        """
        probs, u = np.asarray(probs, dtype=np.float64), np.asarray(u)
        if probs.ndim != 2 or probs.shape[1] != len(self.limits) or u.shape != (len(probs),):
            raise DataError(
                f"probs have shape {probs.shape} and u has shape {u.shape}.", f"Give [N, {len(self.limits)}] and [N]."
            )
        return SCORES[self.method](probs, u, **self.options) <= self.limits

    def to_json(self) -> dict[str, Any]:
        limits = [float(v) if math.isfinite(v) else None for v in self.limits]
        return {
            "method": self.method,
            "alpha": self.alpha,
            "conditional": self.conditional,
            "limits": limits,
            "options": dict(self.options),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Conformal:
        """What `to_json` gave; a limit of null is infinite."""
        limits = np.array([math.inf if v is None else float(v) for v in value["limits"]])
        _check(value["method"], value["alpha"])
        return cls(
            value["method"], value["alpha"], limits, value["conditional"], dict(value["options"]), tuple(value["notes"])
        )


def fit_conformal(
    probs: np.ndarray,
    y: np.ndarray,
    u: np.ndarray,
    *,
    method: Method = "aps",
    alpha: float = 0.1,
    conditional: bool = False,
    penalty: float = 0.01,
    rank: int = 1,
) -> Conformal:
    """Split conformal prediction: limits from validation tiles that the network was not trained on.

    Args:
        probs: float [N, K].
        y: int [N].
        u: float [N] in [0, 1), from `dice`; independent of those of the tiles that are predicted.
        method: lac gives the smallest sets on average and may fail hard tiles, aps adapts to how hard a tile is, raps
            does so with smaller sets.
        conditional: one limit for each class, from its own tiles: each class is then covered, the rare as well.
        penalty: of raps, and `rank`: places that cost nothing. From `tune_raps`, or these.

    Raises:
        DataError: no tile, or arrays that do not fit together.
        SettingError: an unknown method, alpha outside (0, 1), a negative penalty, or rank below 1.
    """
    _check(method, alpha)
    if penalty < 0 or rank < 1:
        raise SettingError(f"penalty is {penalty} and rank is {rank}.", "Use penalty >= 0 and rank >= 1.")
    probs, y = checked(probs, y)
    options: dict[str, float] = {"penalty": penalty, "rank": rank} if method == "raps" else {}
    own = SCORES[method](probs, np.asarray(u), **options)[np.arange(len(y)), y]
    classes = probs.shape[1]
    if conditional:
        limits = np.array([quantile(own[y == k], alpha) for k in range(classes)])
    else:
        limits = np.full(classes, quantile(own, alpha))
    notes = []
    endless = int(np.isinf(limits).sum())
    if endless and not conditional:
        notes.append(f"{len(y)} validation tiles are too few for alpha {alpha:g}: every set holds all classes.")
    elif endless:
        needed = math.ceil(1 / alpha - 1e-9) - 1
        notes.append(
            f"{endless} of {classes} classes have too few validation tiles for alpha {alpha:g} "
            f"(needed: {needed}): they are in every set."
        )
    return Conformal(method, alpha, limits, conditional, options, tuple(notes))


def tune_raps(probs: np.ndarray, y: np.ndarray, u: np.ndarray, *, alpha: float) -> dict[str, Any]:
    """Penalty and rank of RAPS for small sets, from tiles that the limits are then not fitted on.

    The rank is the (1 - alpha) quantile of the place of the true class; the penalty that of `PENALTIES` with the
    smallest sets on these tiles (Angelopoulos et al. 2021, algorithms 4 and 5).

    Returns:
        {"penalty": float, "rank": int}, the options of `fit_conformal`.

    Raises:
        DataError, SettingError: as `fit_conformal`.
    """
    _check("raps", alpha)
    probs, y = checked(probs, y)
    places = _ranks(probs)[np.arange(len(y)), y]
    found = quantile(places, alpha)
    rank = int(min(found, probs.shape[1]))
    sizes = []
    for penalty in PENALTIES:
        fitted = fit_conformal(probs, y, u, method="raps", alpha=alpha, penalty=penalty, rank=rank)
        sizes.append(fitted.sets(probs, u).sum(axis=1).mean())
    return {"penalty": PENALTIES[int(np.argmin(sizes))], "rank": rank}


def coverage(
    sets: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray | None = None,
    *,
    seed: int,
    replicates: int = 1000,
    level: float = 0.95,
) -> dict[str, Any]:
    """How often sets hold the true class, and how large they are.

    Intervals are percentile intervals with patients drawn with replacement, one less than there are.

    Args:
        sets: bool [N, K].
        y: int [N].
        groups: [N], the patient of every tile; None takes each tile for a patient.

    Returns:
        JSON-ready. coverage and size, each {value, low, high}; per_class: K dicts of coverage {value, low, high},
        size and tiles (None without tiles of the class); sizes: K + 1 shares of sets with 0, 1, ... K classes; notes.

    Raises:
        DataError: arrays that do not fit together.
    """
    sets, y = np.asarray(sets, dtype=bool), np.asarray(y)
    checked(sets.astype(float), y, "sets")
    classes = sets.shape[1]
    member = checked_groups(groups, len(y))
    patients = int(member.max()) + 1
    hit, size = sets[np.arange(len(y)), y], sets.sum(axis=1)
    # by patient: tiles, hits, sizes of all, then tiles and hits of each class
    cell = member * classes + y
    table = np.concatenate(
        [
            np.stack([np.bincount(member, w, minlength=patients) for w in (np.ones(len(y)), hit, size)], axis=1),
            np.bincount(cell, minlength=patients * classes).reshape(patients, classes),
            np.bincount(cell, hit, minlength=patients * classes).reshape(patients, classes),
        ],
        axis=1,
    )
    whole = table.sum(axis=0)
    drawn = np.empty((0, table.shape[1]))
    if patients > 1:
        drawn = np.concatenate([w @ table for w in draws(seed, replicates, patients, table.shape[1])])

    def interval(above: int, below: int) -> dict[str, float | None]:
        if not whole[below]:
            return {"value": None, "low": None, "high": None}
        shares = drawn[drawn[:, below] > 0]
        owners = int((table[:, below] > 0).sum())
        ends: list[float | None] = [None, None]
        if owners > 1:
            ratios = shares[:, above] / shares[:, below]
            ends = [float(q) for q in np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])]
        return {"value": float(whole[above] / whole[below]), "low": ends[0], "high": ends[1]}

    per_class = []
    for k in range(classes):
        own = size[y == k]
        per_class.append(
            {
                "coverage": interval(3 + classes + k, 3 + k),
                "size": float(own.mean()) if len(own) else None,
                "tiles": len(own),
            }
        )
    return {
        "coverage": interval(1, 0),
        "size": interval(2, 0),
        "sizes": (np.bincount(size, minlength=classes + 1) / len(y)).tolist(),
        "per_class": per_class,
        "tiles": len(y),
        "notes": notes_on(groups, patients),
    }


def _ranks(probs: np.ndarray) -> np.ndarray:
    """The place of every class in its row, 1 for the most probable: int [N, K]."""
    return np.argsort(np.argsort(-probs, axis=1, kind="stable"), axis=1, kind="stable") + 1


def _check(method: str, alpha: float) -> None:
    if method not in SCORES:
        raise SettingError(f"The conformal method is {method!r}.", did_you_mean(str(method), SCORES))
    if not 0 < alpha < 1:
        raise SettingError(f"alpha is {alpha}.", "Use a share between 0 and 1, such as 0.1.")
