"""Calibration: does a confidence of 80 % mean right in 80 of 100 cases? Pure functions on numpy arrays.

Throughout, `probs` is float [N, K] with rows that sum to 1, and `y` is int [N], the true classes.
"""

from histosynth.classify.calibration.arrays import softmax
from histosynth.classify.calibration.bootstrap import MEASURES, measure, reliability_intervals
from histosynth.classify.calibration.calibrators import (
    CALIBRATORS,
    Calibrator,
    choose_calibrator,
    fit_calibrator,
    load_calibrator,
    save_calibrator,
)
from histosynth.classify.calibration.conformal import Conformal, coverage, dice, fit_conformal, tune_raps
from histosynth.classify.calibration.errors import (
    BINS,
    Scheme,
    classwise_ece,
    ece,
    ece_debiased,
    mce,
    reliability_bins,
)
from histosynth.classify.calibration.isotonic import Isotonic
from histosynth.classify.calibration.proper import brier, brier_decomposition, nll
from histosynth.classify.calibration.temperature import Temperature, TemperatureFit, fit_temperature
from histosynth.classify.calibration.vector import Vector

__all__ = [
    "BINS",
    "CALIBRATORS",
    "MEASURES",
    "Calibrator",
    "Conformal",
    "Isotonic",
    "Scheme",
    "Temperature",
    "TemperatureFit",
    "Vector",
    "brier",
    "brier_decomposition",
    "choose_calibrator",
    "classwise_ece",
    "coverage",
    "dice",
    "ece",
    "ece_debiased",
    "fit_calibrator",
    "fit_conformal",
    "fit_temperature",
    "load_calibrator",
    "mce",
    "measure",
    "nll",
    "reliability_bins",
    "reliability_intervals",
    "save_calibrator",
    "softmax",
    "tune_raps",
]
