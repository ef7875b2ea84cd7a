"""Filters from orthogonal wavelets, as matrices that act on the rows or the columns of a square image.

A product of matrices is the fastest separable filter on a CPU for the sizes that are trained there, it takes any
behaviour at the edges, and it is differentiable as often as one likes. Beyond its edges an image is its mirror image.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# symlet 6, the least asymmetric orthogonal wavelet with 6 vanishing moments (Daubechies, Ten Lectures, table 6.3)
SYMLET_6 = np.array([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
])  # fmt: skip
_ROOT_3 = math.sqrt(3.0)
# symlet 2 in closed form
SYMLET_2 = np.array([1 + _ROOT_3, 3 + _ROOT_3, 3 - _ROOT_3, 1 - _ROOT_3]) / (4 * math.sqrt(2.0))
# places by which symlet 6 moves a slow signal, from the middle of its taps
DELAY = (len(SYMLET_6) - 1) / 2 - float(SYMLET_6 @ np.arange(len(SYMLET_6)) / SYMLET_6.sum())
MARGIN = len(SYMLET_6) // 2 - 1  # samples that `halve` needs on either side


def mirror(index: np.ndarray, size: int) -> np.ndarray:
    """Indices of any integers in an array that goes on as its mirror image: ... 1 0 | 0 1 2 | 2 1 ..."""
    folded = index % (2 * size)
    return np.minimum(folded, 2 * size - 1 - folded)


def _double(size: int) -> np.ndarray:
    """[2 size, size]: zeros between the samples, then symlet 6."""
    taps = SYMLET_6 * math.sqrt(2.0)
    matrix = np.zeros((2 * size, size))
    for row in range(2 * size):
        for tap, value in enumerate(taps):
            source, odd = divmod(row + MARGIN - tap, 2)
            if not odd:
                matrix[row, mirror(np.array(source), size)] += value
    return matrix


def _halve(size: int) -> np.ndarray:
    """[size, 2 size + 2 MARGIN]: the reversed symlet 6, then every second sample; undoes `_double` exactly."""
    taps = SYMLET_6 / math.sqrt(2.0)
    matrix = np.zeros((size, 2 * size + 2 * MARGIN))
    for row in range(size):
        matrix[row, 2 * row : 2 * row + len(taps)] = taps
    return matrix


def band_taps() -> np.ndarray:
    """[4, 43]: symmetric filters for the octaves from coarse to fine, which add up to no filter at all.

    Symlet 2 and its mirror, each times its own reverse, split a signal into halves without a shift of phase; the
    lower half is split again with filters stretched by 2 and by 4 (2006.06676, appendix B).
    """
    low = np.convolve(SYMLET_2, SYMLET_2[::-1]) / 2
    high = -low
    high[len(low) // 2] += 1.0
    bands, rest = [], np.ones(1)
    for level in range(3):
        stretched = np.zeros((2, (len(low) - 1) * 2**level + 1))
        stretched[:, :: 2**level] = low, high
        bands.insert(0, np.convolve(rest, stretched[1]))
        rest = np.convolve(rest, stretched[0])
    bands.insert(0, rest)
    reach = len(rest) // 2
    return np.stack([np.pad(b, reach - len(b) // 2) for b in bands])


def _bands(size: int) -> np.ndarray:
    """[4, size, size]: the four filters with mirrored edges."""
    bank = band_taps()
    reach = bank.shape[1] // 2
    matrices = np.zeros((len(bank), size, size))
    for row in range(size):
        columns = mirror(np.arange(row - reach, row + reach + 1), size)
        for matrix, taps in zip(matrices, bank, strict=True):
            np.add.at(matrix[row], columns, taps)
    return matrices


@lru_cache(maxsize=32)
def filters(kind: str, size: int, device: torch.device) -> Tensor:
    """float32 matrices "double", "halve" or "bands" for images of `size` pixels."""
    build = {"double": _double, "halve": _halve, "bands": _bands}[kind]
    with torch.inference_mode(False):  # they outlive the call, and training needs ordinary tensors
        return torch.from_numpy(build(size)).float().to(device)
