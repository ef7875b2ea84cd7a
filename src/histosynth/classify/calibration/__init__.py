"""Calibration: does a confidence of 80 % mean right in 80 of 100 cases? Pure functions on numpy arrays.

Throughout, `probs` is float [N, K] with rows that sum to 1, and `y` is int [N], the true classes.
"""

from histosynth.classify.calibration.arrays import softmax
from histosynth.classify.calibration.bootstrap import MEASURES, measure, reliability_intervals
from histosynth.classify.calibration.errors import (
    BINS,
    Scheme,
    classwise_ece,
    ece,
    ece_debiased,
    mce,
    reliability_bins,
)
from histosynth.classify.calibration.proper import brier, brier_decomposition, nll
from histosynth.classify.calibration.temperature import TemperatureFit, fit_temperature

__all__ = [
    "BINS",
    "MEASURES",
    "Scheme",
    "TemperatureFit",
    "brier",
    "brier_decomposition",
    "classwise_ece",
    "ece",
    "ece_debiased",
    "fit_temperature",
    "mce",
    "measure",
    "nll",
    "reliability_bins",
    "reliability_intervals",
    "softmax",
]
