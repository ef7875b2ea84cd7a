"""The calibrators: fitted on validation tiles, measured on others. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from histosynth.classify.calibration.arrays import checked, checked_groups, softmax
from histosynth.classify.calibration.isotonic import Isotonic
from histosynth.classify.calibration.proper import surprise
from histosynth.classify.calibration.temperature import Temperature
from histosynth.classify.calibration.vector import Vector
from histosynth.core.errors import DataError, HistosynthError, SettingError, did_you_mean
from histosynth.core.files import read_json, write_json
from histosynth.core.seeds import numpy_rng


class Calibrator(Protocol):
    """From logits to probabilities that mean what they say."""

    notes: tuple[str, ...]
    """What was unusual in fitting it."""

    @classmethod
    def fit(cls, logits: np.ndarray, y: np.ndarray) -> Self:
        """From logits, float [N, K], and true classes, int [N], of tiles that nothing was trained on."""
        ...

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """float [N, K] -> float64 [N, K], rows that sum to 1."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        ...

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """What `to_json` gave."""
        ...


CALIBRATORS: dict[str, type[Calibrator]] = {"temperature": Temperature, "vector": Vector, "isotonic": Isotonic}


def fit_calibrator(kind: str, logits: np.ndarray, y: np.ndarray) -> Calibrator:
    """Fit one of `CALIBRATORS`.

    Raises:
        SettingError: an unknown kind.
        DataError: no tile, or arrays that do not fit together.
    """
    if kind not in CALIBRATORS:
        raise SettingError(f"The calibrator is {kind!r}.", did_you_mean(kind, CALIBRATORS))
    return CALIBRATORS[kind].fit(logits, y)


def choose_calibrator(
    logits: np.ndarray, y: np.ndarray, groups: np.ndarray | None = None, *, seed: int, folds: int = 5
) -> tuple[str, dict[str, float]]:
    """The simplest calibrator that is about as good as the best, from validation alone.

    Patients are dealt into `folds` parts; each part is judged by calibrators of the others. Of "none" (the plain
    softmax) and `CALIBRATORS`, in this order, the first is taken whose negative log-likelihood is within one
    standard error (by patient) of the lowest (Breiman et al. 1984, section 3.4.3).

    Returns:
        The name, and the negative log-likelihood of each, nats; ("none", that of the softmax alone) when there are
        fewer than two patients.

    Raises:
        DataError: arrays that do not fit together.
        SettingError: fewer than two folds.
    """
    if folds < 2:
        raise SettingError(f"folds is {folds}.", "Use 2 or more.")
    logits, y = checked(logits, y, "logits")
    member = checked_groups(groups, len(y))
    losses = {"none": surprise(softmax(logits), y)}
    patients = int(member.max()) + 1
    if patients < 2:
        return "none", {"none": float(losses["none"].mean())}
    part = np.arange(patients) % min(folds, patients)
    fold = numpy_rng(seed, "calibrator folds").permutation(part)[member]
    for kind in CALIBRATORS:
        losses[kind] = np.empty(len(y))
        for held_out in np.unique(fold):
            own = fold == held_out
            losses[kind][own] = surprise(CALIBRATORS[kind].fit(logits[~own], y[~own])(logits[own]), y[own])
    worth = {kind: float(each.mean()) for kind, each in losses.items()}
    best = min(worth, key=lambda kind: worth[kind])

    def about_as_good(kind: str) -> bool:
        excess = losses[kind] - losses[best]
        by_patient = np.bincount(member, excess - excess.mean())
        error = np.sqrt((by_patient**2).sum() * patients / (patients - 1)) / len(y)
        return bool(excess.mean() <= error)

    return next(kind for kind in worth if about_as_good(kind)), worth


def save_calibrator(path: Path | str, calibrator: Calibrator, classes: Sequence[str]) -> None:
    """Write a calibrator to a JSON file, with the classes that its logits are of, in order."""
    kind = next(name for name, one in CALIBRATORS.items() if isinstance(calibrator, one))
    write_json(path, {"kind": kind, "classes": list(classes), **calibrator.to_json()})


def load_calibrator(path: Path | str) -> tuple[Calibrator, tuple[str, ...]]:
    """Read a calibrator and its classes.

    Raises:
        DataError: the file is missing, no JSON, of an unknown kind, or its numbers cannot be used.
    """
    value = read_json(path)
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in CALIBRATORS:
        raise DataError(f"{path} has the kind {kind!r}.", did_you_mean(str(kind), CALIBRATORS))
    try:
        return CALIBRATORS[kind].from_json(value), tuple(str(name) for name in value["classes"])
    except (HistosynthError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not a whole {kind} calibrator: {error}.", "Fit the calibrators again.") from error
