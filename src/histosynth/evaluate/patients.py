"""Is the staining of synthetic tiles one that a patient could have?

Staining differs from patient to patient, so a shift of the mean colour says little by itself: it is measured in
units of how far real patients lie from one another. Colour is the mean optical density of a tile's R, G and B; the
stains are the haematoxylin and eosin vectors of each tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.stain import stain_matrix

_CHUNK = 256
_STAIN_TILES = 400  # stain vectors of more tiles change the mean by less than a degree
_OUTSIDE = 0.99


def patient_colour(
    reference: np.ndarray, patients: Sequence[str], other: np.ndarray, seed: int = 0
) -> dict[str, float]:
    """Colour of `other` beside the spread between the real patients of `reference`.

    Args:
        reference: real tiles, uint8 [N, 3, H, W].
        patients: N names of the patients that they are of.
        other: uint8 [M, 3, H, W].
        seed: which tiles give the stain vectors.

    Returns:
        patients_shift: Mahalanobis distance of the mean colour of `other` from the mean of the real patients,
        under the covariance between patients; patients_shift_typical: the median of the same for one real
        patient against the rest; patients_outside: share of tiles whose colour lies farther out than 99 % of
        the tiles of a patient lie from those of all others (about 0.01 is expected); haematoxylin_angle and
        eosin_angle: degrees between the mean stain vectors of the two; haematoxylin_angle_typical and
        eosin_angle_typical: median degrees between one real patient's vector and the mean of all. NaN for what
        leaves a patient out when there are only three.

    Raises:
        DataError: not uint8 [N, 3, H, W], a name missing, or fewer than three patients.
    """
    names = np.asarray(patients, dtype=object).astype(str)
    if len(names) != len(reference):
        raise DataError(f"{len(reference)} tiles came with {len(names)} patients.", "Give one patient a tile.")
    known = np.unique(names)
    if len(known) < 3:
        raise DataError(f"The real tiles are of {len(known)} patient(s).", "The spread between them needs three.")
    ours, theirs = tile_density(reference), tile_density(other)
    means = np.stack([ours[names == name].mean(0) for name in known])
    between = _ridge(np.cov(means, rowvar=False))
    within = _ridge(np.cov(ours, rowvar=False))
    # a patient never seen lies farther out than the tiles that made the covariance: leave each one out in turn
    shifts, distances = [], []
    for i, name in enumerate(known if len(known) > 3 else ()):
        rest, own = np.delete(means, i, 0), names == name
        shifts.append(_mahalanobis(means[[i]], rest.mean(0), _ridge(np.cov(rest, rowvar=False)))[0])
        others = ours[~own]
        distances.append(_mahalanobis(ours[own], others.mean(0), _ridge(np.cov(others, rowvar=False))))
    limit = np.quantile(np.concatenate(distances), _OUTSIDE) if distances else float("nan")
    outside = (_mahalanobis(theirs, ours.mean(0), within) > limit).mean() if distances else float("nan")
    return {
        "patients_shift": float(_mahalanobis(theirs.mean(0, keepdims=True), means.mean(0), between)[0]),
        "patients_shift_typical": float(np.median(shifts)) if shifts else float("nan"),
        "patients_outside": float(outside),
        **_stain_angles(reference, names, other, seed),
    }


def tile_density(images: np.ndarray) -> NDArray[np.float64]:
    """Mean optical density (natural logarithm, white = 255) of R, G and B of each tile: float64 [N, 3].

    Raises:
        DataError: not uint8 [N, 3, H, W], or no tile.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8 or images.size == 0:
        raise DataError(f"Images for colour are {images.dtype} {images.shape}.", "Give uint8 [N, 3, H, W], N > 0.")
    density = -np.log((np.arange(256) + 1) / 256)
    parts = [density[images[start : start + _CHUNK]].mean((2, 3)) for start in range(0, len(images), _CHUNK)]
    return np.concatenate(parts)


def _stain_angles(reference: np.ndarray, names: np.ndarray, other: np.ndarray, seed: int) -> dict[str, float]:
    picked = [
        np.sort(numpy_rng(seed, "stain tiles", side).permutation(len(x))[:_STAIN_TILES])
        for side, x in (("reference", reference), ("other", other))
    ]
    ours, found = stain_matrix(np.ascontiguousarray(reference[picked[0]]), "macenko")
    theirs, other_found = stain_matrix(np.ascontiguousarray(other[picked[1]]), "macenko")
    ours, owners, theirs = ours[found], names[picked[0]][found], theirs[other_found]
    result: dict[str, float] = {}
    for stain, name in enumerate(("haematoxylin", "eosin")):
        if not (len(ours) and len(theirs)):  # tiles without tissue have no stain
            result |= {f"{name}_angle": float("nan"), f"{name}_angle_typical": float("nan")}
            continue
        mean = ours[:, stain].mean(0)
        single = [_angle(ours[owners == owner, stain].mean(0), mean) for owner in np.unique(owners)]
        result[f"{name}_angle"] = _angle(theirs[:, stain].mean(0), mean)
        result[f"{name}_angle_typical"] = float(np.median(single))
    return result


def _angle(first: np.ndarray, second: np.ndarray) -> float:
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.degrees(np.arccos(np.clip(cosine, -1, 1))))


def _ridge(covariance: np.ndarray) -> np.ndarray:
    """A covariance that can be inverted: few patients, or one colour, leave a direction without spread."""
    return covariance + np.eye(len(covariance)) * (1e-3 * np.trace(covariance) / len(covariance) + 1e-9)


def _mahalanobis(rows: np.ndarray, centre: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    away = rows - centre
    return np.sqrt((away * np.linalg.solve(covariance, away.T).T).sum(1))
