"""Near-duplicate tiles: found by a perceptual hash, confirmed by correlation, at any flip or turn.

1. Hash: the signs of the 63 lowest cosine coefficients of a grey 32 px thumbnail (after Zauner 2010). The
   eight symmetries of a tile permute and negate these coefficients, so one transform gives all eight hashes.
2. Search: multi-index hashing (Norouzi, Punjani and Fleet, CVPR 2012). The bits are cut into four chunks;
   tiles that share a chunk up to one bit are candidates. Any two hashes within 7 bits are found, and most of
   those within 12. (From 131,072 tiles on there are five longer chunks that overlap, for 4 bits and most of 12.)
3. Proof: the correlation of the thumbnails' low frequencies, at the best shift of up to three quarters of a
   thumbnail pixel (5 px of a 224 px tile). The hash alone joins strangers in large sets; this does not.

A tile without contrast has a hash of noise and would chain to others, so it is joined only to tiles whose
thumbnail is exactly the same. Equal thumbnails and equal hashes are collapsed before the search: thousands of
blank tiles cost no more than one.

Groups depend on the tiles alone, not on the order in which they come.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from histosynth.core.errors import DataError, SettingError

EDGE = 32
_LOW = 8  # an 8 x 8 corner of the cosine coefficients is hashed
_BAND = 8  # frequencies (cycles a thumbnail edge) that the correlation looks at
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's mode L
_MANY = 1 << 17  # from here on longer chunks, so that buckets stay small
_BLOCK = 1 << 17  # candidates looked at together
_PROOFS = 1 << 12  # pairs correlated together


@dataclass(frozen=True)
class DuplicateConfig:
    """When two tiles count as near-duplicates."""

    bits: int = 12
    """Most bits of 63 by which the hashes may differ."""
    correlation: float = 0.9
    """Least correlation of the thumbnails after alignment. On biopsies of 262 patients strangers stay below 0.85."""
    symmetries: bool = True
    """Whether a flipped or turned copy counts."""
    contrast: float = 3.0
    """Tiles whose thumbnail has a smaller standard deviation (grey levels of 256) are blank: joined only if equal."""


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Grey 32 px thumbnails, uint8 [N, 32, 32], by area averaging.

    Args:
        images: uint8 [N, 3, H, W].

    Raises:
        DataError: another shape or type.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8:
        raise DataError(f"Tiles have shape {images.shape} and type {images.dtype}.", "They must be uint8 [N, 3, H, W].")
    rows, columns = _averaging(images.shape[2]), _averaging(images.shape[3])
    found = np.empty((len(images), EDGE, EDGE), dtype=np.uint8)
    for start in range(0, len(images), 256):  # floats of a few tiles at a time
        part = slice(start, start + 256)
        grey = np.einsum("nchw,c->nhw", images[part].astype(np.float32), _LUMA)
        found[part] = np.clip(np.rint(rows @ grey @ columns.T), 0, 255)
    return found


def tile_hash(images: np.ndarray, *, invariant: bool = False) -> np.ndarray:
    """Perceptual hashes, uint64 [N].

    Args:
        images: uint8 [N, 3, H, W] tiles, or uint8 [N, 32, 32] thumbnails.
        invariant: give the smallest of the hashes of the eight flips and turns, which is the same for all eight.
    """
    small = images if images.ndim == 3 else thumbnails(images)
    _checked(small)
    hashes = _hashes(_low_frequencies(small), symmetries=invariant)
    return hashes.min(axis=0)


def near_duplicate_groups(thumbnails: np.ndarray, config: DuplicateConfig = DuplicateConfig()) -> list[str]:
    """Group tiles that look the same, directly or through others.

    Args:
        thumbnails: uint8 [N, 32, 32], grey.

    Returns:
        N group names, made of the tiles' content: another order of rows gives the same names.

    Raises:
        DataError: another shape or type.
        SettingError: a threshold out of range.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    contents, member = _distinct(thumbnails)
    pairs = _pairs(contents, config)
    edges = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(contents),) * 2)
    count, component = connected_components(edges, directed=False)
    first = np.full(count, len(contents))
    np.minimum.at(first, component, np.arange(len(contents)))
    names = [f"group-{hashlib.blake2b(contents[i].tobytes(), digest_size=6).hexdigest()}" for i in first]
    return [names[c] for c in component[member]]


def near_duplicate_pairs(thumbnails: np.ndarray, config: DuplicateConfig = DuplicateConfig()) -> np.ndarray:
    """Pairs of near-duplicate tiles, int64 [P, 2], each row ascending.

    Every group is connected by its pairs, but of many tiles with the same hash only those with one of them are
    listed: a thousand copies of a tile give 999 pairs.

    Args:
        thumbnails: uint8 [N, 32, 32], grey.

    Raises:
        DataError: another shape or type.
        SettingError: a threshold out of range.
    """
    contents, member = _distinct(thumbnails)
    first = np.full(len(contents), len(member))
    np.minimum.at(first, member, np.arange(len(member)))
    copies = np.flatnonzero(first[member] != np.arange(len(member)))
    equal = np.stack([first[member[copies]], copies], axis=1)
    found = np.sort(np.concatenate([equal, first[_pairs(contents, config)]]), axis=1)
    return found[np.lexsort(found.T[::-1])].astype(np.int64)


def aligned_correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlation of thumbnails, float64 [N] in [-1, 1], at the best shift of each pair.

    The thumbnails are windowed, low-passed, and compared by their Fourier coefficients; a shift multiplies these
    by a phase, so shifts of a quarter of a pixel need no resampling. Brightness and contrast cancel out.

    Args:
        first, second: uint8 [N, 32, 32].
    """
    product = np.conj(_spectrum(first)) * _spectrum(second)
    return (product @ _phases()).real.max(axis=1)


def _checked(small: np.ndarray) -> None:
    if small.ndim != 3 or small.shape[1:] != (EDGE, EDGE) or small.dtype != np.uint8:
        raise DataError(
            f"Thumbnails have shape {small.shape} and type {small.dtype}.", f"They must be uint8 [N, {EDGE}, {EDGE}]."
        )


def _averaging(size: int) -> np.ndarray:
    """The matrix [32, size] that averages `size` pixels to 32, splitting pixels on borders."""
    edges = np.linspace(0, size, EDGE + 1)
    pixel = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    weights = np.clip(overlap, 0, None)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _distinct(small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different thumbnails, in an order that only their content decides, and which of them each tile has."""
    _checked(small)
    if len(small) == 0:
        return small, np.zeros(0, dtype=np.int64)
    # digests and not the thumbnails themselves: sorting would copy these twice
    digests = np.array([hashlib.blake2b(tile.tobytes(), digest_size=16).digest() for tile in small], dtype="V16")
    _, first, member = np.unique(digests, return_index=True, return_inverse=True)
    return small[first], member.ravel()


def _contrast(small: np.ndarray) -> np.ndarray:
    """Standard deviation of each thumbnail, float64 [N]."""
    parts = [small[start : start + 8192].reshape(-1, EDGE * EDGE) for start in range(0, len(small), 8192)]
    return np.concatenate([np.zeros(0), *(part.std(axis=1, dtype=np.float32) for part in parts)])


def _low_frequencies(small: np.ndarray) -> np.ndarray:
    """Cosine coefficients float32 [N, 8, 8], the mean brightness set to zero."""
    from scipy.fft import dct

    basis = dct(np.eye(EDGE), axis=0, norm="ortho")[:_LOW].astype(np.float32)
    low = np.empty((len(small), _LOW, _LOW), dtype=np.float32)
    for start in range(0, len(small), 8192):
        part = slice(start, start + 8192)
        low[part] = basis @ small[part].astype(np.float32) @ basis.T
    low[:, 0, 0] = 0
    return low


def _variants(symmetries: bool) -> list[tuple[bool, bool, bool]]:
    """Symmetries as (transpose, then flip rows, then flip columns); the identity comes first."""
    choices = (False, True) if symmetries else (False,)
    return [(t, r, c) for t in choices for r in choices for c in choices]


def _hashes(low: np.ndarray, symmetries: bool) -> np.ndarray:
    """uint64 [1 or 8, N]: the hash of every variant of every tile."""
    u, v = np.mgrid[:_LOW, :_LOW]
    # low frequencies first: these bits survive a shift of the tile, so the first chunks stay equal
    order = np.lexsort((v.ravel(), u.ravel(), (u**2 + v**2).ravel()))
    found = np.empty((8 if symmetries else 1, len(low)), dtype=np.uint64)
    for i, (transpose, rows, columns) in enumerate(_variants(symmetries)):
        turned = low.transpose(0, 2, 1) if transpose else low
        sign = (-1.0) ** (rows * u + columns * v)
        bits = (turned * sign.astype(np.float32)).reshape(len(low), -1)[:, order] > 1e-3
        found[i] = np.packbits(np.ascontiguousarray(bits), axis=1).view(">u8").ravel()
    return found


def _pairs(contents: np.ndarray, config: DuplicateConfig) -> np.ndarray:
    """Proven pairs among different thumbnails, int64 [P, 2]."""
    if not 0 <= config.bits <= 20:
        raise SettingError(f"bits is {config.bits}.", "Use 0 to 20 bits of 63.")
    if not 0 < config.correlation <= 1:
        raise SettingError(f"correlation is {config.correlation}.", "Use a value above 0 and at most 1.")
    textured = np.flatnonzero(_contrast(contents) >= config.contrast)
    if len(textured) == 0:
        return np.zeros((0, 2), dtype=np.int64)
    hashes = _hashes(_low_frequencies(contents[textured]), config.symmetries)
    inside, alone = _collapse(contents, textured, hashes[0], config.correlation)
    across = _search(hashes[:, alone], config.bits)
    proven = _prove(contents, textured[alone], across, config)
    return np.concatenate([inside, proven])


def _collapse(
    contents: np.ndarray, textured: np.ndarray, hashes: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Join tiles of equal hash to the first of them; return the pairs and the positions that still stand alone."""
    pairs, alone = [np.zeros((0, 2), dtype=np.int64)], []
    left = np.argsort(hashes, kind="stable")
    while len(left):
        fresh = np.r_[True, hashes[left][1:] != hashes[left][:-1]]
        leader = left[np.flatnonzero(fresh)][np.cumsum(fresh) - 1]
        alone.append(left[fresh])
        others, leaders = left[~fresh], leader[~fresh]
        same = np.zeros(len(others), dtype=bool)
        for start in range(0, len(others), _PROOFS):
            part = slice(start, start + _PROOFS)
            a, b = contents[textured[leaders[part]]], contents[textured[others[part]]]
            same[part] = aligned_correlation(a, b) >= threshold
        pairs.append(np.stack([textured[leaders[same]], textured[others[same]]], axis=1))
        left = others[~same]
    return np.concatenate(pairs), np.sort(np.concatenate(alone))


def _search(hashes: np.ndarray, radius: int) -> np.ndarray:
    """Candidates int64 [K, 3]: variant g, i and j > i, where hash g of i is within `radius` bits of hash 0 of j."""
    count = hashes.shape[1]
    found = [np.zeros(0, dtype=np.int64)]
    chunks, width = (4, 16) if count < _MANY else (5, 20)
    for shift in np.linspace(64 - width, 0, chunks).round().astype(np.uint64):
        keys = ((hashes >> shift) & np.uint64((1 << width) - 1)).astype(np.int32)
        order = np.argsort(keys[0], kind="stable")
        ordered = hashes[0, order]
        size = np.bincount(keys[0], minlength=1 << width)
        first = np.cumsum(size) - size  # where the bucket of a key begins in `order`
        for variant, own in enumerate(keys):
            for flip in (0, *(1 << np.arange(width, dtype=np.int32))):
                probe = own ^ flip
                sizes = size[probe]
                ends = np.cumsum(sizes)
                offset = first[probe] - (ends - sizes)  # from the running number of a candidate to its place
                begin = 0
                while begin < count:  # a block of queries with about _BLOCK candidates
                    before = int(ends[begin - 1]) if begin else 0
                    end = max(begin + 1, int(np.searchsorted(ends, before + _BLOCK, side="right")))
                    block = slice(begin, end)
                    place = np.arange(before, ends[end - 1]) + np.repeat(offset[block], sizes[block])
                    query = np.repeat(hashes[variant, block], sizes[block])
                    near = np.flatnonzero(_ones(query ^ ordered[place]) <= radius)
                    i, j = np.searchsorted(ends, before + near, side="right"), order[place[near]]
                    later = j > i  # the other order is found with the inverse symmetry
                    found.append((variant * count + i[later]) * count + j[later])
                    begin = end
    keys = np.unique(np.concatenate(found))
    return np.stack([keys // count**2, keys // count % count, keys % count], axis=1)


def _ones(words: np.ndarray) -> np.ndarray:
    """How many bits of each uint64 are set."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(words)
    return np.unpackbits(words.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)  # NumPy before 2.0


def _prove(contents: np.ndarray, node: np.ndarray, candidates: np.ndarray, config: DuplicateConfig) -> np.ndarray:
    pairs = [np.zeros((0, 2), dtype=np.int64)]
    for variant, (transpose, rows, columns) in enumerate(_variants(config.symmetries)):
        here = node[candidates[candidates[:, 0] == variant, 1:]]
        for start in range(0, len(here), _PROOFS):
            part = here[start : start + _PROOFS]
            turned = contents[part[:, 0]]
            turned = turned.transpose(0, 2, 1) if transpose else turned
            turned = turned[:, :: -1 if rows else 1, :: -1 if columns else 1]
            pairs.append(part[aligned_correlation(turned, contents[part[:, 1]]) >= config.correlation])
    return np.concatenate(pairs)


def _spectrum(small: np.ndarray) -> np.ndarray:
    """Low Fourier coefficients complex [N, K] of windowed thumbnails, of unit length (zeros where there is none)."""
    window = np.hanning(EDGE + 2)[1:-1]
    weights = np.sqrt(np.outer(window, window)).astype(np.float32)
    mean = np.einsum("nhw,hw->n", small.astype(np.float32), weights) / weights.sum()
    flat = (small - mean[:, None, None].astype(np.float32)) * weights
    rows = np.r_[0 : _BAND + 1, EDGE - _BAND : EDGE]
    low = np.fft.rfft2(flat)[:, rows, : _BAND + 1]
    low[:, :, 0] /= np.sqrt(2)  # the other columns stand for two coefficients each
    low = low.reshape(len(small), -1)
    return low / np.maximum(np.linalg.norm(low, axis=1, keepdims=True), 1.0)  # 1: a deviation of 0.03 grey levels


def _phases() -> np.ndarray:
    """Phase factors [K, 49] of shifts by up to 0.75 px both ways, in steps of a quarter."""
    down, across = np.r_[0 : _BAND + 1, -_BAND:0], np.arange(_BAND + 1)
    shifts = np.arange(-0.75, 0.76, 0.25)
    turns = [down[:, None] * a + across[None] * b for a in shifts for b in shifts]
    return np.exp(2j * np.pi / EDGE * np.stack([t.ravel() for t in turns], axis=1))
