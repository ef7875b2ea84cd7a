"""Calibration: does a confidence of 80 % mean right in 80 of 100 cases? Pure functions on numpy arrays.

Throughout, `probs` is float [N, K] with rows that sum to 1, and `y` is int [N], the true classes.
"""

from histosynth.classify.calibration.arrays import softmax
from histosynth.classify.calibration.errors import BINS, Scheme, classwise_ece, ece, reliability_bins
from histosynth.classify.calibration.proper import brier, nll
from histosynth.classify.calibration.temperature import TemperatureFit, fit_temperature

__all__ = [
    "BINS",
    "Scheme",
    "TemperatureFit",
    "brier",
    "classwise_ece",
    "ece",
    "fit_temperature",
    "nll",
    "reliability_bins",
    "softmax",
]
