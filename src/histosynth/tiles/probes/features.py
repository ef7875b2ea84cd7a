"""What a probe may see of a tile: its mean colour, its colour histogram, the traces of JPEG. Never its shapes."""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histosynth.core.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

HISTOGRAM_BINS = 5
"""Bins a channel of the joint colour histogram."""
MIN_EDGE = 40
"""Smallest edge in pixels with enough 8 x 8 blocks to show traces of JPEG."""
QUALITIES = (95, 90, 75, 60, 45, 30)
"""Settings of JPEG, as Pillow counts them, of which the control uses the one that fits best."""
_BANDS = ((3, 5), (5, 7), (7, 10), (10, 15))  # of u + v: lower middle to highest frequencies of a block
_ROUNDING = 1 / 12  # energy of a coefficient that is only the rounding of pixels to whole numbers
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)
COMPRESSION_DIM = 2 * len(_BANDS) + 4


def mean_colour(images: np.ndarray) -> NDArray[np.float64]:
    """Mean of each channel and the products of two: uint8 [N, 3, H, W] -> float64 [N, 9].

    With the products a linear rule can draw curved borders through the three numbers.
    """
    means = _checked(images).reshape(len(images), 3, -1).mean(2, dtype=np.float64) / 255 - 0.5
    first, second = np.triu_indices(3)
    return np.concatenate([means, means[:, first] * means[:, second]], axis=1)


def colour_histogram(images: np.ndarray) -> NDArray[np.float64]:
    """Square root of the joint colour histogram: uint8 [N, 3, H, W] -> float64 [N, 125], a unit vector a tile."""
    images = _checked(images)
    place = (np.arange(256) * HISTOGRAM_BINS // 256).astype(np.uint8)[images].reshape(len(images), 3, -1)
    cell = (place[:, 0] * HISTOGRAM_BINS + place[:, 1]) * HISTOGRAM_BINS + place[:, 2]
    counts = np.stack([np.bincount(row, minlength=HISTOGRAM_BINS**3) for row in cell])
    return np.sqrt(counts / cell.shape[1])


def compression(images: np.ndarray) -> NDArray[np.float64]:
    """Traces of JPEG and nothing else: uint8 [N, 3, H, W] -> float64 [N, 12].

    Every number compares the tile with itself, so that a class of smooth tissue does not differ from one of
    rough tissue: all are near 0 for any tile that was never compressed.

    - For luma and for blue chroma, in four bands of frequencies: log of the energy of the 8 x 8 cosine
      coefficients on the grid of JPEG, over that on grids shifted by half a block (calibration by shifting:
      Fridrich, Goljan & Hogea 2002). Quantisation zeroes coefficients on its own grid only.
    - Across and down: the wave with a period of 8 pixels, as cosine and sine, in the log of the mean jump of luma
      over the places of a block's border. This finds the grid of a tile that was cut from a JPEG image anywhere,
      and is blind to the finer lattices that enlarging a picture leaves.

    Raises:
        DataError: not uint8 [N, 3, H, W], or tiles below `MIN_EDGE` pixels.
    """
    images = _checked(images)
    if min(images.shape[2:]) < MIN_EDGE * 7 // 8:
        raise DataError(
            f"Tiles of {images.shape[3]} x {images.shape[2]} pixels show no traces of JPEG.",
            f"Give tiles of {MIN_EDGE} pixels or more.",
        )
    return np.stack([_traces(image) for image in images])


def compressed_alike(images: np.ndarray, quality: int) -> NDArray[np.uint8]:
    """All tiles with one and the same compression: uint8 [N, 3, H, W] -> uint8 [N, 3, 7H/8, 7W/8].

    The tiles are shrunk first, which takes the grid of an earlier compression away.
    """
    done = []
    for image in _checked(images):
        picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
        picture = picture.resize((picture.width * 7 // 8, picture.height * 7 // 8), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality)
        done.append(np.asarray(Image.open(stream)).transpose(2, 0, 1))
    return np.stack(done)


def alike_quality(images: np.ndarray, traces: np.ndarray) -> int:
    """The setting of `QUALITIES` at which the tiles, compressed alike, would show most nearly these traces."""
    spread = traces.var(0) + 1e-12
    errors = []
    for quality in QUALITIES:
        left = beyond_texture(traces, compression(compressed_alike(images, quality)))
        errors.append(float((left**2 / spread).sum()))
    return QUALITIES[int(np.argmin(errors))]


def beyond_texture(traces: np.ndarray, alike: np.ndarray) -> NDArray[np.float64]:
    """Traces of JPEG less those that a compression common to all tiles explains: float64 [N, D].

    Rough tissue shows stronger traces than smooth tissue of the same compression, so raw traces tell classes
    apart although nothing is wrong. Here each trace less its multiple, the best for all tiles together, of the
    trace that the same tile shows after `compressed_alike`. The multiple is 0 for tiles never compressed.
    """
    share = (traces * alike).sum(0) / np.maximum((alike**2).sum(0), 1e-12)
    return traces - share * alike


def unexplained_share(traces: np.ndarray, left: np.ndarray, labels: np.ndarray) -> float:
    """Share of the differences between class means of traces that `beyond_texture` leaves, 0 to 1.

    Each trace counts in units of its spread within classes; what chance adds to means of so many tiles is taken
    off both sides. 1 when there are no differences beyond chance.
    """
    _, own, sizes = np.unique(labels, return_inverse=True, return_counts=True)

    def spread_of_means(values: np.ndarray) -> float:
        sums = np.zeros((len(sizes), values.shape[1]))
        np.add.at(sums, own, values / scale)
        means = sums / sizes[:, None]
        return float(((means - means.mean(0)) ** 2).sum() - chance)

    sums = np.zeros((len(sizes), traces.shape[1]))
    np.add.at(sums, own, traces)
    scale = (traces - (sums / sizes[:, None])[own]).std(0) + 1e-9
    chance = traces.shape[1] * (1 / sizes).sum() * (1 - 1 / len(sizes))
    whole = spread_of_means(traces)
    return float(np.clip(spread_of_means(left) / whole, 0, 1)) if whole > 0 else 1.0


def file_facts(table: pd.DataFrame) -> NDArray[np.float64]:
    """Format, width, height and shape of the source files, from the columns of a tile set: float64 [N, 3 + formats]."""
    sides = np.log2(table[["width", "height"]].to_numpy(np.float64).clip(1))
    formats = table.format.astype(str).to_numpy()
    flags = [formats == name for name in np.unique(formats)]
    return np.column_stack([sides, sides[:, 0] - sides[:, 1], *flags]).astype(np.float64)


def _traces(image: np.ndarray) -> NDArray[np.float64]:
    planes = np.tensordot(_YCC[:2], image.astype(np.float32), 1)
    parts = []
    for plane in planes:
        aligned = _band_energies(plane)
        shifted = np.mean([_band_energies(plane[y:, x:]) for y, x in ((4, 4), (0, 4), (4, 0))], axis=0)
        parts.append(np.log(aligned + _ROUNDING) - np.log(shifted + _ROUNDING))
    for plane in (planes[0], planes[0].T):
        wave = np.fft.rfft(_jumps(plane))[1]
        parts.append([wave.real, wave.imag])
    return np.concatenate(parts).astype(np.float64)


def _band_energies(plane: np.ndarray) -> NDArray[np.float32]:
    """Mean squared cosine coefficient of 8 x 8 blocks in each band."""
    height, width = (edge // 8 for edge in plane.shape)
    blocks = plane[: 8 * height, : 8 * width].reshape(height, 8, width, 8)
    basis, bands = _basis()
    # two matrix products for all blocks at once
    rows = np.tensordot(blocks, basis, ((3,), (1,)))  # [h, 8, w, v]
    energy = (np.tensordot(rows, basis, ((1,), (1,))) ** 2).mean((0, 1))  # [v, u]
    return bands @ energy.ravel()


def _jumps(plane: np.ndarray) -> NDArray[np.float32]:
    """Log of the mean absolute jump over the column borders at each of the eight places of a block [8].

    A jump is what the step over the border has beyond the mean of the steps before and after it.
    """
    steps = np.diff(plane, axis=1)
    jumps = np.abs(steps[:, 1:-1] - (steps[:, :-2] + steps[:, 2:]) / 2).mean(0)
    return np.log(np.array([jumps[place::8].mean() for place in range(8)]) + 0.1)


@cache
def _basis() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The orthonormal 8-point cosine basis [frequency, place], and the averages over bands [bands, 64]."""
    frequency, place = np.mgrid[:8, :8]
    basis = np.cos(np.pi * (2 * place + 1) * frequency / 16) * np.where(frequency == 0, np.sqrt(1 / 8), 0.5)
    total = (frequency + place).ravel()  # as a pair of frequencies
    bands = np.array([(low <= total) & (total < high) for low, high in _BANDS], np.float32)
    return basis.astype(np.float32), bands / bands.sum(1, keepdims=True)


def _checked(images: np.ndarray) -> np.ndarray:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8:
        raise DataError(f"Tiles are {images.dtype} {images.shape}.", "Give uint8 [N, 3, H, W].")
    return images
