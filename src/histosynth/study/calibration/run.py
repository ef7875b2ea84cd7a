"""Fit every calibrator and conformal set on one split of a CSV, and measure them on the others."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import histosynth
from histosynth.classify.calibration import (
    BINS,
    CALIBRATORS,
    brier_decomposition,
    choose_calibrator,
    coverage,
    dice,
    fit_calibrator,
    fit_conformal,
    measure,
    reliability_intervals,
    save_calibrator,
    softmax,
    tune_raps,
)
from histosynth.classify.calibration.conformal import SCORES, Conformal
from histosynth.classify.predictions import Predictions
from histosynth.core.errors import DataError, SettingError
from histosynth.core.files import ensure_folder, write_json
from histosynth.core.seeds import derive, numpy_rng

_LEAST = 20
_ENOUGH_TO_TUNE = 200
_NAMED = 5


@dataclass(frozen=True)
class CalibrateConfig:
    """How predictions are calibrated."""

    fit: str = "val"
    """The split that calibrators and sets are fitted on; all other splits are measured."""
    alpha: float = 0.1
    """Share of conformal sets that may miss the true class."""
    bins: int = BINS
    """Bins of the calibration errors and the reliability diagrams."""
    replicates: int = 1000
    """Of the bootstrap over patients."""
    level: float = 0.95
    """Of the intervals."""
    seed: int = 0
    """Of the bootstrap, the folds and the randomised sets."""

    def __post_init__(self) -> None:
        for name, good, remedy in (
            ("fit", self.fit != "train", "The network has seen these tiles and is too sure of them; use val."),
            ("alpha", 0 < self.alpha < 1, "Use a share between 0 and 1, such as 0.1."),
            ("bins", self.bins >= 1, "Use 1 or more."),
            ("replicates", self.replicates >= 2, "Use 2 or more; 1000 is usual."),
            ("level", 0 < self.level < 1, "Use a share between 0 and 1, such as 0.95."),
        ):
            if not good:
                raise SettingError(f"{name} is {getattr(self, name)}.", remedy)


def calibrate_predictions(
    predictions: Predictions, out: Path, config: CalibrateConfig = CalibrateConfig(), command: str = ""
) -> Path:
    """Write calibration.json, calibrators/*.json, conformal.json, reliability-*.png and calibration.html.

    Returns:
        The page.

    Raises:
        DataError: the split to fit on is missing, has fewer than 20 tiles or one class, or no other split is there;
            a patient is in the split to fit on and in another.
        RunError: the folder cannot be written.
    """
    from histosynth.study.calibration.view import write_calibration

    fitted, measured, left = _parted(predictions, config.fit)
    folder = ensure_folder(out)
    calibrators = {kind: fit_calibrator(kind, fitted.logits, fitted.y) for kind in CALIBRATORS}
    chosen, worth = choose_calibrator(fitted.logits, fitted.y, fitted.patients, seed=config.seed)

    def probabilities(part: Predictions) -> dict[str, np.ndarray]:
        return {"none": softmax(part.logits), **{kind: one(part.logits) for kind, one in calibrators.items()}}

    rules, base, notes = _rules(fitted, probabilities(fitted), chosen, config)
    report: dict[str, Any] = {
        "title": "Calibration of a classifier",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": histosynth.__version__,
        "command": command,
        "settings": {name: getattr(config, name) for name in ("alpha", "bins", "replicates", "level", "seed")},
        "classes": list(predictions.classes),
        "fit": {
            "split": config.fit,
            "tiles": len(fitted),
            "patients": None if fitted.patients is None else len(set(fitted.patients)),
            "counts": _counts(fitted),
            "cross_validated_nll": worth,
        },
        "chosen": chosen,
        "calibrators": {kind: one.to_json() for kind, one in calibrators.items()},
        "conformal": {"probabilities": base, "rules": {name: rule.to_json() for name, rule in rules.items()}},
        "splits": {
            name: _measured(part, probabilities(part), rules, base, config) | {"fitted": name == config.fit}
            for name, part in {**measured, config.fit: fitted}.items()
        },
        "notes": [*predictions.notes, *left, *notes, *(note for one in calibrators.values() for note in one.notes)],
    }
    report["notes"] = list(dict.fromkeys(report["notes"]))
    for kind, one in calibrators.items():
        save_calibrator(folder / "calibrators" / f"{kind}.json", one, predictions.classes)
    write_json(folder / "conformal.json", {"classes": list(predictions.classes), **report["conformal"]})
    return write_calibration(folder, report)


def _parted(predictions: Predictions, fit: str) -> tuple[Predictions, dict[str, Predictions], list[str]]:
    """The split to fit on, those to measure, and a note where training tiles were left out."""
    fitted = predictions.of(fit)
    measured = {name: predictions.of(name) for name in predictions.splits if name not in (fit, "train")}
    if not measured:
        raise DataError(
            f"No split is there to measure beside {fit!r}.",
            "Add those of another split: a calibration is not measured on what it was fitted on.",
        )
    classes = len(np.unique(fitted.y))
    if len(fitted) < _LEAST or classes < 2:
        raise DataError(
            f"The split {fit!r} has {len(fitted)} tiles of {classes} classes.",
            f"A calibration needs {_LEAST} tiles of two classes.",
        )
    if predictions.patients is not None:
        for name, part in measured.items():
            both = sorted(set(fitted.patients) & set(part.patients))
            if both:
                more = f" and {len(both) - _NAMED} more" if len(both) > _NAMED else ""
                raise DataError(
                    f"{fit!r} and {name!r} share {len(both)} of their patients: {', '.join(both[:_NAMED])}{more}.",
                    "Split by patient, or the calibration is measured on what it was fitted on.",
                )
    left = ["The split train is left out: the network has seen these tiles."] if "train" in predictions.splits else []
    return fitted, measured, left


def _rules(
    fitted: Predictions, probs: dict[str, np.ndarray], chosen: str, config: CalibrateConfig
) -> tuple[dict[str, Conformal], str, list[str]]:
    """Every method, marginal and by class; on temperature-scaled probabilities unless none is better.

    A calibrator with many parameters would have seen the validation tiles too well for their scores to be like those
    of new tiles; one temperature has not.
    """
    base = "none" if chosen == "none" else "temperature"
    p, u = probs[base], dice(derive(config.seed, "fit"), fitted.paths.tolist())
    options: dict[str, Any] = {}
    notes = []
    rest = np.ones(len(fitted), dtype=bool)
    owners = fitted.paths if fitted.patients is None else fitted.patients
    names, member = np.unique(owners, return_inverse=True)
    if len(fitted) >= _ENOUGH_TO_TUNE and len(names) >= 6:
        rest = (numpy_rng(config.seed, "raps").permutation(len(names)) % 3 != 0)[member]
        options = tune_raps(p[~rest], fitted.y[~rest], u[~rest], alpha=config.alpha)
    else:
        notes.append(f"{config.fit} is too small to choose penalty and rank of RAPS; it uses 0.01 and 1.")
    rules = {}
    for method in SCORES:
        own, more = (rest, options) if method == "raps" else (np.ones(len(fitted), dtype=bool), {})
        for conditional in (False, True):
            rule = fit_conformal(
                p[own], fitted.y[own], u[own], method=method, alpha=config.alpha, conditional=conditional, **more
            )
            rules[f"{method}-by-class" if conditional else method] = rule
            notes += [f"{method.upper()}: {note}" for note in rule.notes]
    return rules, base, notes


def _measured(
    part: Predictions,
    probs: dict[str, np.ndarray],
    rules: dict[str, Conformal],
    base: str,
    config: CalibrateConfig,
) -> dict[str, Any]:
    drawn: dict[str, Any] = {"seed": config.seed, "replicates": config.replicates, "level": config.level}
    u = dice(derive(config.seed, "use"), part.paths.tolist())
    return {
        "counts": _counts(part),
        **measure(probs, part.y, part.patients, bins=config.bins, **drawn),
        "decomposition": {name: brier_decomposition(p, part.y, bins=config.bins) for name, p in probs.items()},
        "reliability": {
            name: reliability_intervals(p, part.y, part.patients, bins=config.bins, **drawn)
            for name, p in probs.items()
        },
        "conformal": {
            name: coverage(rule.sets(probs[base], u), part.y, part.patients, **drawn) for name, rule in rules.items()
        },
    }


def _counts(part: Predictions) -> dict[str, int]:
    return {name: int((part.y == k).sum()) for k, name in enumerate(part.classes)}
