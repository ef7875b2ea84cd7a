"""Measures on the 8 x 8 blocks of JPEG: block edges, energy of low frequencies, quality of the compression, noise."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

EDGE = 8
NEVER = 100.0  # the quality of tiles that show no trace of JPEG
_QUALITIES = np.arange(97, 2, -1)
_BINS = 256
_CLIPPED = 4  # of a block's 64 pixels
_LOW = 6  # the first six frequencies of either axis, where coefficients survive the quantisation
# ITU T.81 annex K.1: the table of luminance steps, that libjpeg scales by the quality
_STEPS = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)


@lru_cache(maxsize=1)
def dct_basis() -> np.ndarray:
    """The orthonormal DCT-II of eight points, float32 [frequency, position]."""
    k, x = np.arange(EDGE)[:, None], np.arange(EDGE)[None]
    basis = np.sqrt(2 / EDGE) * np.cos(np.pi * (x + 0.5) * k / EDGE)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)


def block_dct(grey: np.ndarray, frequencies: slice) -> np.ndarray:
    """DCT of whole 8 x 8 blocks: [N, H, W] to [N, H // 8, K, W // 8, K] for K frequencies of either axis."""
    n, height, width = grey.shape
    rows, columns = height // EDGE, width // EDGE
    basis = dct_basis()[frequencies]
    whole = np.ascontiguousarray(grey[:, : rows * EDGE, : columns * EDGE])
    # matmul works tile by tile, so that a tile's result does not depend on its neighbours in the batch
    down = np.matmul(basis, whole.reshape(n, rows, EDGE, columns * EDGE))
    across = np.matmul(down.reshape(n, -1, EDGE), basis.T)
    return across.reshape(n, rows, len(basis), columns, len(basis))


def low_energy(luminance: np.ndarray) -> np.ndarray:
    """Mean over blocks of the share of energy in the 2 x 2 lowest frequencies (`block_dct`); [N].

    A block without any energy (black) counts as 1, like every other block of one colour.
    """
    n, height, width = luminance.shape
    rows, columns = height // EDGE, width // EDGE
    low = block_dct(luminance, slice(0, 2))
    low = np.square(low).sum(axis=(2, 4))
    square = np.square(luminance[:, : rows * EDGE, : columns * EDGE])
    # the transform is orthonormal, so the energy of all 64 frequencies is that of the pixels (Parseval)
    total = square.reshape(n, rows, EDGE, columns * EDGE).sum(2).reshape(n, rows, columns, EDGE).sum(3)
    share = np.where(total > 0, low / np.maximum(total, 1e-12), 1.0)
    return np.minimum(share, 1).reshape(n, -1).mean(1, dtype=np.float64)


def edge_steps(luminance: np.ndarray) -> np.ndarray:
    """Mean absolute step across block edges less the mean inside blocks, at least 0 (`block_spatial`); [N]."""
    n = len(luminance)
    across, edges, rest = np.zeros(n), 0, 0
    inside = np.zeros(n)
    for axis in (1, 2):
        step = np.abs(np.diff(luminance, axis=axis))
        profile = step.mean(3 - axis, dtype=np.float64)  # [N, positions]: a mean a line
        lines = luminance.shape[3 - axis]
        at_edge = np.arange(1, profile.shape[1] + 1) % EDGE == 0
        # zeros in place of a selection, whose order in memory, and so its rounding, changes with the batch
        across += np.where(at_edge, profile, 0).sum(1) * lines
        inside += np.where(at_edge, 0, profile).sum(1) * lines
        edges, rest = edges + at_edge.sum() * lines, rest + (~at_edge).sum() * lines
    if not edges:
        return np.zeros(n)
    return np.maximum(0, across / edges - inside / max(rest, 1))


def noise_sigma(green: np.ndarray) -> np.ndarray:
    """Standard deviation of the noise in grey levels of the green channel, [N].

    From the highest frequency of each 8 x 8 block, where the lens leaves no detail; the median over the blocks
    leaves out those with the sharpest tissue (Donoho and Johnstone 1994, Biometrika 81:425, for wavelets).
    """
    highest = np.abs(block_dct(green, slice(EDGE - 1, EDGE))).reshape(len(green), -1)
    return np.median(highest, axis=1) / 0.6745


def jpeg_quality(grey: np.ndarray, clipped: np.ndarray) -> np.ndarray:
    """Quality (libjpeg scale, 3 to 97) of the JPEG compression that a tile has been through; 100 for none; [N].

    Decoded pixels keep the comb of multiples of the quantiser's step in their DCT coefficients, in whatever
    format they are saved later (Fan and de Queiroz 2003, IEEE TIP 12:230). The quality with the largest
    likelihood ratio of comb against smooth histogram wins. The grid is looked for at offset 0 and where the
    block edges are strongest. After resizing or a change of colours there is no comb left to be found.

    Args:
        grey: float32 [N, H, W], the luma of JPEG (.299, .587, .114), 0 to 255.
        clipped: bool [N, H, W], pixels with a channel at 0 or 255: rounding is no longer the only change there,
            so blocks with more than a few are left out.
    """
    gain = _likelihood(grey, clipped)
    start = _grid(grey)
    if start is not None:
        gain = np.maximum(gain, _likelihood(_moved(grey, *start), _moved(clipped, *start)))
    best = gain.argmax(1)
    found = gain[np.arange(len(gain)), best] > 8  # a tile without JPEG reaches x with a chance of e^-x at most
    return np.where(found, _QUALITIES[best], NEVER).astype(np.float64)


def _likelihood(grey: np.ndarray, clipped: np.ndarray) -> np.ndarray:
    coefficients = block_dct(grey, slice(0, _LOW)).transpose(2, 4, 0, 1, 3)
    chosen = [coefficients[u, v] for u, v in _chosen()]
    n = len(grey)
    size = np.minimum(np.rint(np.abs(np.stack(chosen, 1).reshape(n, len(chosen), -1))), _BINS - 1).astype(np.int32)
    height, width = grey.shape[1] // EDGE, grey.shape[2] // EDGE
    whole = clipped[:, : height * EDGE, : width * EDGE].view(np.uint8)
    lines = np.add.reduce(whole.reshape(n, height, EDGE, -1), axis=2, dtype=np.uint8)
    spoilt = np.add.reduce(lines.reshape(n, height, width, EDGE), axis=3, dtype=np.uint8) > _CLIPPED
    size[np.broadcast_to(spoilt.reshape(n, 1, -1), size.shape)] = 0  # says nothing
    place = size + (np.arange(n * len(chosen), dtype=np.int32) * _BINS).reshape(n, len(chosen), 1)
    counts = np.bincount(place.ravel(), minlength=n * len(chosen) * _BINS).astype(np.float32)
    return np.matmul(counts.reshape(n, 1, -1), _gains())[:, 0]


@lru_cache(maxsize=1)
def _chosen() -> tuple[tuple[int, int], ...]:
    return tuple((u, v) for u in range(_LOW) for v in range(_LOW) if 0 < u + v < _LOW)


@lru_cache(maxsize=1)
def _gains() -> np.ndarray:
    """float32 [frequencies * bins, qualities]: log likelihood ratio of a coefficient of this size."""
    sizes = np.arange(_BINS)
    columns = []
    for quality in _QUALITIES:
        scale = 5000 / quality if quality < 50 else 200 - 2 * quality
        steps = np.clip((_STEPS * scale + 50) // 100, 1, 255).astype(int)
        columns.append(np.concatenate([_comb(sizes, steps[u, v]) for u, v in _chosen()]))
    return np.stack(columns, 1).astype(np.float32)


def _comb(sizes: np.ndarray, step: int) -> np.ndarray:
    if step <= 2:  # too fine to tell from a histogram that merely falls off steeply
        return np.zeros(len(sizes))
    off = np.abs(sizes - np.rint(sizes / step) * step)
    # rounding of the decoded pixels moves a coefficient by about 0.35: it stays in its bin four times in five
    gain = np.select([off == 0, off == 1], [np.log(0.8 * step), np.log(0.1 * step)], -2.5)
    in_zero = sizes <= step / 2  # small coefficients are common in any tile: they can only speak against
    gain[in_zero] = np.where(sizes[in_zero] > 1, -2.5, 0)
    gain[sizes == _BINS - 1] = 0  # clipped
    return gain


def _grid(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Row and column, [N] each, at which the lines with the strongest block edges start; None when too small."""
    n, height, width = grey.shape
    if min(height, width) < 3 * EDGE:
        return None
    starts = []
    for axis in (1, 2):
        # a third difference answers to a step between smooth sides more than to tissue
        profile = np.abs(np.diff(grey, n=3, axis=axis)).mean(3 - axis)
        whole = (profile.shape[1] // EDGE) * EDGE
        folded = profile[:, :whole].reshape(n, -1, EDGE).mean(1)
        starts.append((folded.argmax(1) + 2) % EDGE)  # difference k lies between pixels k+1 and k+2
    return starts[0], starts[1]


def _moved(plane: np.ndarray, top: np.ndarray, left: np.ndarray) -> np.ndarray:
    shape = (plane.shape[1] - EDGE, plane.shape[2] - EDGE)
    return np.lib.stride_tricks.sliding_window_view(plane, shape, axis=(1, 2))[np.arange(len(plane)), top, left]
