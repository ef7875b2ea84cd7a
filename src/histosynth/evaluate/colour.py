"""Are the synthetic tiles stained like the real ones?

Optical density of each channel, of haematoxylin and of eosin (fixed reference vectors: Ruifrok & Johnston
2001), and CIE lightness and colour (L*, a*, b*, D65), each as mean, deviation, and the Wasserstein-1 distance
between the histograms of the two sets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError

# name, lowest and highest value of its histogram, in its own unit
CHANNELS = (
    ("od_red", 0.0, 2.5), ("od_green", 0.0, 2.5), ("od_blue", 0.0, 2.5),
    ("haematoxylin", -0.5, 2.5), ("eosin", -0.5, 2.5),
    ("lightness", 0.0, 100.0), ("green_red", -60.0, 100.0), ("blue_yellow", -100.0, 60.0),
)  # fmt: skip
_BINS = 256
_CHUNK = 128
_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]], np.float32)
_UNMIX = np.linalg.inv(_STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True)).astype(np.float32)
# sRGB (IEC 61966-2-1) to CIE XYZ, over the white point D65
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
_TO_XYZ = _TO_XYZ / _TO_XYZ.sum(1, keepdims=True)


def colour(reference: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Colour of `other` beside `reference`, both uint8 [N, 3, H, W].

    Returns:
        For every channel of `CHANNELS`: `<channel>_mean` and `<channel>_std` of `other`, `<channel>_mean_shift`
        (other less reference) and `<channel>_w1`; and colour_distance, the mean over the channels of w1 over
        the reference's deviation.

    Raises:
        DataError: not uint8 [N, 3, H, W], or no tile.
    """
    ours, theirs = histograms(reference), histograms(other)
    result: dict[str, float] = {}
    shares = []
    for i, (name, low, high) in enumerate(CHANNELS):
        centres = low + (np.arange(_BINS) + 0.5) * (high - low) / _BINS
        means = [float(h[i] @ centres) for h in (ours, theirs)]
        stds = [float(np.sqrt(max(h[i] @ (centres - m) ** 2, 0))) for h, m in zip((ours, theirs), means, strict=True)]
        w1 = wasserstein(ours[i], theirs[i], (high - low) / _BINS)
        result |= {
            f"{name}_mean": means[1],
            f"{name}_std": stds[1],
            f"{name}_mean_shift": means[1] - means[0],
            f"{name}_w1": w1,
        }
        shares.append(w1 / max(stds[0], (high - low) / _BINS))
    return result | {"colour_distance": float(np.mean(shares))}


def wasserstein(first: np.ndarray, second: np.ndarray, width: float) -> float:
    """Wasserstein-1 distance of two histograms (each of sum 1) on the same bins of this width."""
    return float(np.abs(np.cumsum(first - second)).sum() * width)


def histograms(images: np.ndarray) -> NDArray[np.float64]:
    """Histogram of each channel over all pixels: uint8 [N, 3, H, W] -> float64 [8, 256], each of sum 1.

    Raises:
        DataError: another type or shape, or no tile.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or images.size == 0:
        raise DataError(f"Images for colour are {images.dtype} {images.shape}.", "Give uint8 [N, 3, H, W], N > 0.")
    counts = np.zeros((len(CHANNELS), _BINS), np.int64)
    for start in range(0, len(images), _CHUNK):
        values = channels(images[start : start + _CHUNK])
        for i, (_, low, high) in enumerate(CHANNELS):
            place = ((values[i] - low) * (_BINS / (high - low))).astype(np.int64).clip(0, _BINS - 1)
            counts[i] += np.bincount(place.ravel(), minlength=_BINS)
    return counts / counts.sum(1, keepdims=True)


def channels(images: np.ndarray) -> NDArray[np.float32]:
    """The eight channels of every pixel: uint8 [N, 3, H, W] -> float32 [8, N * H * W]."""
    rgb = np.asarray(images).transpose(1, 0, 2, 3).reshape(3, -1)
    levels = np.arange(256, dtype=np.float32)
    density = (-np.log((levels + 1) / 256)).astype(np.float32)[rgb]
    stains = np.tensordot(_UNMIX.T[:2], density, 1)
    share = levels / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4).astype(np.float32)[rgb]
    xyz = _TO_XYZ @ linear
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    lab = np.stack([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])
    return np.concatenate([density, stains, lab]).astype(np.float32)
