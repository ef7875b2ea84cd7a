"""Nuclei of synthetic tiles beside those of real ones: how many, how large, how dark.

Nuclei are the blobs of the haematoxylin image: local maxima of the scale-normalised Laplacian of Gaussian
(Lindeberg 1998) where there is enough haematoxylin. It is no segmentation for a diagnosis: threshold and scale
are taken from the real tiles and are the same for both sides, so that the comparison is fair even where the
absolute count is rough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from histosynth.core.errors import DataError
from histosynth.evaluate.colour import CHANNELS, channels, histograms

MEASURES = ("count", "area", "density", "share")
_NUCLEUS_MICRONS = 3.5  # radius of a typical epithelial nucleus
_RADII = (1.5, 2.0, 2.8, 4.0, 5.6, 8.0)  # pixels
_HAEMATOXYLIN = [name for name, _, _ in CHANNELS].index("haematoxylin")
_LEAST_BLOB = 0.05  # optical density; stain noise of flat tissue stays below
_SCALE_TILES = 24
_CHUNK = 64


@dataclass(frozen=True)
class NucleusModel:
    """What counts as a nucleus.

    Attributes:
        threshold: haematoxylin (optical density) above which a pixel can belong to one.
        radius: typical radius in pixels.
    """

    threshold: float
    radius: float


def fit_nuclei(images: np.ndarray, microns_per_pixel: float | None = None) -> NucleusModel:
    """Threshold (Otsu 1979, over all pixels) and radius from real tiles, uint8 [N, 3, H, W].

    Args:
        microns_per_pixel: gives the radius; without it, the scale is taken at which the haematoxylin image of
            the tiles has the strongest blobs.

    Raises:
        DataError: not uint8 [N, 3, H, W], or no tile.
    """
    _, low, high = CHANNELS[_HAEMATOXYLIN]
    shares = histograms(images)[_HAEMATOXYLIN]
    centres = low + (np.arange(len(shares)) + 0.5) * (high - low) / len(shares)
    below = np.cumsum(shares)
    mass = np.cumsum(shares * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mass[-1] * below - mass) ** 2 / (below * (1 - below))
    between = np.nan_to_num(between, posinf=0.0)
    # between two clear modes the criterion is flat: the middle of its plateau, not its first place
    threshold = float(centres[between >= 0.99 * between.max()].mean())
    if microns_per_pixel:
        return NucleusModel(threshold, max(_NUCLEUS_MICRONS / microns_per_pixel, _RADII[0]))
    stain = _haematoxylin(images[:: max(1, len(images) // _SCALE_TILES)][:_SCALE_TILES])
    responses = []
    for radius in _RADII:
        blobs = _blobs(stain, radius)
        peaks = blobs[_peaks(blobs, radius) & (stain > threshold)]
        responses.append(float(peaks.mean()) if len(peaks) else 0.0)
    return NucleusModel(threshold, _RADII[int(np.argmax(responses))])


def measure_nuclei(images: np.ndarray, model: NucleusModel) -> dict[str, NDArray[np.float64]]:
    """Nuclei of each tile, uint8 [N, 3, H, W].

    Returns:
        For each of `MEASURES` float64 [N]: count (nuclei in 10,000 pixels), area (pixels of nuclear stain a
        nucleus; NaN where there is none), density (mean haematoxylin of those pixels; NaN likewise), share
        (of the tile's pixels).
    """
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in MEASURES}
    for start in range(0, len(images), _CHUNK):
        stain = _haematoxylin(images[start : start + _CHUNK])
        smooth = ndimage.gaussian_filter(stain, (0, model.radius / 3, model.radius / 3))
        inside = smooth > model.threshold
        blobs = _blobs(stain, model.radius)
        count = (_peaks(blobs, model.radius) & inside).sum((1, 2)).astype(float)
        pixels = inside.sum((1, 2)).astype(float)
        with np.errstate(divide="ignore", invalid="ignore"):
            found["area"].append(np.where(count > 0, pixels / count, np.nan))
            found["density"].append(np.where(pixels > 0, (stain * inside).sum((1, 2)) / pixels, np.nan))
        size = stain[0].size
        found["count"].append(count * 1e4 / size)
        found["share"].append(pixels / size)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def nuclei(
    reference: np.ndarray, other: np.ndarray, microns_per_pixel: float | None = None, model: NucleusModel | None = None
) -> dict[str, float]:
    """Nuclei of `other` beside `reference`, both uint8 [N, 3, H, W] of the same size.

    Args:
        model: what counts as a nucleus; fitted to `reference` when absent.

    Returns:
        For every measure: `nuclei_<measure>_mean` of `other`, `_shift` (other less reference, in standard
        deviations of the reference's tiles) and `_w1` (Wasserstein-1 distance in those); nuclei_distance, the
        mean of the four w1; nuclei_radius and nuclei_threshold of the model. NaN where a side has no nucleus.

    Raises:
        DataError: not uint8 [N, 3, H, W], no tile, or two sizes.
    """
    if reference.shape[2:] != other.shape[2:]:
        raise DataError(
            f"The tiles are {reference.shape[2:]} and {other.shape[2:]} pixels.", "Compare tiles of one size."
        )
    model = model or fit_nuclei(reference, microns_per_pixel)
    ours, theirs = measure_nuclei(reference, model), measure_nuclei(other, model)
    result: dict[str, float] = {}
    for name in MEASURES:
        first, second = (side[name][np.isfinite(side[name])] for side in (ours, theirs))
        if not (len(first) and len(second)):
            result |= dict.fromkeys((f"nuclei_{name}_mean", f"nuclei_{name}_shift", f"nuclei_{name}_w1"), float("nan"))
            continue
        spread = max(float(first.std()), 1e-6 * max(abs(float(first.mean())), 1.0))
        result |= {
            f"nuclei_{name}_mean": float(second.mean()),
            f"nuclei_{name}_shift": float((second.mean() - first.mean()) / spread),
            f"nuclei_{name}_w1": float(stats.wasserstein_distance(first, second) / spread),
        }
    distance = float(np.mean([result[f"nuclei_{name}_w1"] for name in MEASURES]))
    return result | {
        "nuclei_distance": distance,
        "nuclei_radius": model.radius,
        "nuclei_threshold": model.threshold,
    }


def _haematoxylin(images: np.ndarray) -> NDArray[np.float32]:
    n, _, height, width = images.shape
    return channels(images)[_HAEMATOXYLIN].reshape(n, height, width)


def _blobs(stain: np.ndarray, radius: float) -> np.ndarray:
    """How much each place looks like a dark disc of that radius: -sigma^2 times the Laplacian of Gaussian."""
    sigma = radius / np.sqrt(2)  # where a disc of this radius answers most
    steps = [ndimage.gaussian_filter(stain, (0, sigma, sigma), order=order) for order in ((0, 2, 0), (0, 0, 2))]
    return -(sigma**2) * (steps[0] + steps[1])


def _peaks(blobs: np.ndarray, radius: float) -> np.ndarray:
    """Local maxima that rise above the ripple of stain noise, at least a radius apart."""
    edge = 2 * max(1, round(radius * 0.8)) + 1
    return (blobs == ndimage.maximum_filter(blobs, (1, edge, edge))) & (blobs > _LEAST_BLOB)
