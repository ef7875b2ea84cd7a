"""Selected synthetic tiles: those that look like real tiles of their class and that show their class.

Selective augmentation (Xue et al. 2021, "Selective synthetic augmentation with HistoGAN for improved histopathology
image classification", Medical Image Analysis 67, 101816) keeps tiles by the confidence of their label and by how near
their features lie to the real ones. Here both limits are what real tiles themselves reach:

- realism: the mean distance to the three nearest real tiles of the class is no larger than that of 95 % of these real
  tiles to the three nearest ones of other patients;
- label consistency: a linear probe gives the asked class at least the probability that it gives to 90 % of the
  validation tiles of that class.

Everything is learned from the real training tiles of the very cell, and the limits of the probe from validation; a
selection never sees a test tile, nor real tiles that its classifier is not given.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from histosynth.evaluate.neighbours import distance_rows
from histosynth.study.usefulness.plan import SelectionConfig

if TYPE_CHECKING:
    from histosynth.study.usefulness.cells import Material

_NEAREST = 3
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the probe; the best on validation is taken
_FEW_VAL = 10  # with fewer validation tiles of a class its limit comes from all classes


@dataclass(frozen=True)
class Kept:
    """Which synthetic tiles were kept.

    Attributes:
        mask: bool [M].
        shares: kept share of each class that has synthetic tiles.
        notes: sentences about classes that could not be selected as asked.
    """

    mask: np.ndarray
    shares: dict[str, float]
    notes: tuple[str, ...]


def choose(material: Material, picked: np.ndarray, generator: str, config: SelectionConfig = SelectionConfig()) -> Kept:
    """Select the tiles of a generator by the real training tiles at positions `picked`."""
    train, made = material.train, material.synthetic[generator]
    groups = np.array(train.groups if train.groups is not None else train.ids, dtype=object)
    return select(
        np.asarray(material.features["train"])[picked],
        train.labels[picked],
        groups[picked],
        np.asarray(material.features["val"]),
        material.val.labels,
        np.asarray(material.features[generator]),
        made.labels,
        train.classes,
        config,
    )


def select(
    real: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    val: np.ndarray,
    val_labels: np.ndarray,
    made: np.ndarray,
    made_labels: np.ndarray,
    classes: tuple[str, ...],
    config: SelectionConfig = SelectionConfig(),
) -> Kept:
    """Which synthetic tiles look like real tiles of their class, and show it.

    Args:
        real, val, made: features float [N, D] of real training, validation and synthetic tiles.
        labels, val_labels, made_labels: int [N], indices into `classes`.
        groups: [N], the patients of the real training tiles.

    A class that keeps less than `config.least` keeps the best of it instead: those that miss the worse of their two
    limits by the smallest factor. A class without real tiles keeps nothing, because nothing can be said of it.
    """
    centre, scale = real.mean(0, dtype=np.float64), real.std(0, dtype=np.float64)
    scale = np.where(scale > 1e-8, scale, 1.0)
    real, val, made = ((x - centre) / scale for x in (real, val, made))
    shown = probe(real, labels, val, val_labels, made, len(classes))
    mask = np.zeros(len(made), bool)
    shares: dict[str, float] = {}
    notes: list[str] = []
    reach, limits = _realism(real, labels, groups, made, made_labels, config.realism)
    floors = _floors(shown.val, val_labels, config.consistency)
    for label, name in enumerate(classes):
        own = np.flatnonzero(made_labels == label)
        if not len(own):
            continue
        if not (labels == label).any():
            shares[name] = 0.0
            notes.append(f"No synthetic tile of {name} was selected: there is no real one to compare with.")
            continue
        far, sure = reach[own], shown.made[own, label]
        good = (far <= limits[label]) & (sure >= floors[label])
        wanted = int(np.ceil(config.least * len(own)))
        if good.sum() < wanted:
            over = np.maximum(far / max(limits[label], 1e-12), floors[label] / np.maximum(sure, 1e-12))
            notes.append(
                f"Fewer than {100 * config.least:g} % of the synthetic tiles of {name} passed the selection; the best "
                f"{100 * config.least:g} % were kept."
            )
            good = np.zeros(len(own), bool)
            good[np.argsort(over, kind="stable")[:wanted]] = True
        mask[own[good]] = True
        shares[name] = round(float(good.mean()), 4)
    return Kept(mask, shares, tuple(notes))


@dataclass(frozen=True)
class Shown:
    """What a probe says: probabilities float64 [N, K] of validation and of synthetic tiles."""

    val: np.ndarray
    made: np.ndarray


def probe(
    real: np.ndarray, labels: np.ndarray, val: np.ndarray, val_labels: np.ndarray, made: np.ndarray, classes: int
) -> Shown:
    """A linear probe (multinomial logistic regression, classes weighted equally) on standardised features.

    Its strength is the one with the best log likelihood on validation, the weakest where there is none.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    known = np.unique(labels)

    def full(model: LogisticRegression, rows: np.ndarray) -> np.ndarray:
        found = np.zeros((len(rows), classes))
        if len(rows):
            found[:, known] = model.predict_proba(rows)
        return found

    if len(known) < 2:  # nothing to tell apart: every tile shows the one class
        certain = np.zeros((1, classes))
        certain[0, known] = 1.0
        return Shown(np.repeat(certain, len(val), 0), np.repeat(certain, len(made), 0))
    told = np.isin(val_labels, known)
    best, chosen = np.inf, None
    for strength in _STRENGTHS if told.any() else _STRENGTHS[:1]:
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=200)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # an unfinished fit is judged by validation like others
            model.fit(real, labels)
        given = full(model, val)[np.arange(len(val)), val_labels][told]
        cost = float(-np.log(np.maximum(given, 1e-12)).mean()) if told.any() else 0.0
        if cost < best:
            best, chosen = cost, model
    assert chosen is not None
    return Shown(full(chosen, val), full(chosen, made))


def _floors(probabilities: np.ndarray, labels: np.ndarray, share: float) -> np.ndarray:
    """For each class the probability that `share` of its validation tiles reach, float64 [K]."""
    given = probabilities[np.arange(len(labels)), labels]
    usual = float(np.quantile(given, 1 - share)) if len(given) else 0.0
    found = np.full(probabilities.shape[1], usual)
    for label in range(len(found)):
        own = given[labels == label]
        if len(own) >= _FEW_VAL:
            found[label] = np.quantile(own, 1 - share)
    return found


def _realism(
    real: np.ndarray, labels: np.ndarray, groups: np.ndarray, made: np.ndarray, made_labels: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """How far each synthetic tile lies from the real tiles of its class, [M], and the limit of each class, [K]."""
    reach = np.full(len(made), np.inf)
    count = int(max(labels.max(initial=0), made_labels.max(initial=0))) + 1
    limits = np.full(count, np.nan)
    for label in range(count):
        own, theirs = np.flatnonzero(labels == label), np.flatnonzero(made_labels == label)
        if not len(own):
            continue
        for part, squares in distance_rows(made[theirs], real[own]):
            reach[theirs[part]] = _mean_nearest(squares)
        between = []
        for tile in own:  # to the tiles of other patients; a class of one patient: to its other tiles
            others = own[groups[own] != groups[tile]]
            others = others if len(others) else own[own != tile]
            if len(others):
                between.append(_mean_nearest(((real[others] - real[tile]) ** 2).sum(1)[None])[0])
        if between:
            limits[label] = np.quantile(between, share)
    # a class of a single tile has no distance of its own
    limits[np.isnan(limits)] = np.nanmax(limits) if np.isfinite(limits).any() else np.inf
    return reach, limits


def _mean_nearest(squares: np.ndarray) -> np.ndarray:
    """Mean distance to the nearest columns, [rows]."""
    k = min(_NEAREST, squares.shape[1])
    return np.sqrt(np.partition(squares, k - 1, axis=1)[:, :k]).mean(1)
