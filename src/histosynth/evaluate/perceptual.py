"""How different do the tiles of one class look from one another?

The mean perceptual distance between two tiles of one class is a measure of diversity: a generator that makes one
tile again and again has none. It is no measure of fidelity, and is never taken between a real and a synthetic tile:
those show other tissue anyway. It is read as a share of the same number for real tiles, at as many pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.core.seeds import numpy_rng

if TYPE_CHECKING:
    from torch import Tensor

Measure = Callable[[Any, Any], Any]

DISTANCES = ("lpips-alex", "lpips-vgg", "lpips-squeeze", "ms-ssim", "tissue-tiny")
"""Distances that `pair_distance` knows; the last two need no weights beyond what is shipped."""
_LEVEL = 0.95
_CHUNK = 64
# Wang, Simoncelli & Bovik 2003: weights of the scales, finest first; constants and window of Wang et al. 2004
_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_WINDOW, _SIGMA = 11, 1.5


@dataclass(frozen=True)
class PairDistance:
    """A distance between tiles with the name under which its scores are reported.

    Attributes:
        name: such as "lpips_alex".
        measure: two torch.uint8 [N, 3, H, W] -> float [N].
    """

    name: str
    measure: Callable[[Tensor, Tensor], Any]

    def __call__(self, one: np.ndarray, two: np.ndarray) -> NDArray[np.float64]:
        """uint8 [N, 3, H, W] twice -> float64 [N]."""
        import torch

        tensors = (torch.from_numpy(np.ascontiguousarray(x)) for x in (one, two))
        return np.asarray(self.measure(*tensors), np.float64)


def pair_distance(name: str = "lpips-alex", weights: Path | None = None, device: str = "cpu") -> PairDistance:
    """The distance called `name`, one of `DISTANCES`.

    Args:
        weights: of the network under LPIPS; None looks where `encoders.lpips.load_lpips` looks.

    Raises:
        SettingError: an unknown name.
        CheckpointError: the weights are missing, or not those of this network.
    """
    if name not in DISTANCES:
        raise SettingError(f"The distance between tiles is {name!r}.", did_you_mean(name, DISTANCES))
    key = name.replace("-", "_")
    if name == "ms-ssim":
        return PairDistance(key, ms_ssim_distance)
    if name == "tissue-tiny":
        from histosynth import encoders

        return PairDistance(key, _between_features(encoders.load(name, device)))
    from histosynth.encoders.lpips import load_lpips

    net: Any = name.removeprefix("lpips-")
    return PairDistance(key, load_lpips(net, weights, device))


def lpips_diversity(
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    distance: PairDistance | Measure,
    pairs: int = 200,
    seed: int = 0,
) -> dict[str, float]:
    """Mean distance between two tiles of one class.

    Args:
        images: uint8 [N, 3, H, W]; an array or a memory map.
        labels: int [N], index into `classes`.
        distance: of `pair_distance`, or any callable (uint8 [N, 3, H, W] twice -> float [N]); a torch module gets
            tensors, anything else arrays.
        pairs: at most so many a class. No tile is in two of them, so that they are independent; n tiles make
            n // 2. Tiles of one patient are still alike.

    Returns:
        With D the name of the distance: diversity_D, the mean over classes; diversity_D_low and _high;
        diversity_D_pairs, pairs a class at the least; and the same four with `_<class>` behind for every class.
        A class with fewer than four tiles is left out.

    Raises:
        DataError: images or labels of another type or shape, no class with four tiles, or a distance that is not
            one finite number, zero or more, a pair.
        SettingError: fewer than two pairs.
    """
    labels = np.asarray(labels)
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8:
        raise DataError(f"Images for diversity are {images.dtype} {images.shape}.", "Give uint8 [N, 3, H, W].")
    if labels.shape != (len(images),) or (len(labels) and not 0 <= labels.min() <= labels.max() < len(classes)):
        raise DataError(
            f"{len(images)} tiles came with labels {labels.shape} for {len(classes)} classes.",
            "Give one index into the classes a tile.",
        )
    if pairs < 2:
        raise SettingError(f"pairs is {pairs}.", "Two are the least from which an interval can be had.")
    z = NormalDist().inv_cdf((1 + _LEVEL) / 2)
    key = f"diversity_{_name(distance)}"
    means, errors, counts, per_class = [], [], [], {}
    for index, name in enumerate(classes):
        where = np.flatnonzero(labels == index)
        if len(where) < 4:
            continue
        order = numpy_rng(seed, "diversity pairs", name).permutation(where)[: 2 * min(pairs, len(where) // 2)]
        values = _measured(images, order[0::2], order[1::2], distance)
        mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
        per_class |= {
            f"{key}_{name}": mean,
            f"{key}_{name}_low": max(mean - z * error, 0.0),
            f"{key}_{name}_high": mean + z * error,
            f"{key}_{name}_pairs": float(len(values)),
        }
        means.append(mean)
        errors.append(error)
        counts.append(len(values))
    if not means:
        raise DataError("No class has four tiles.", "Two pairs of different tiles are the least for a diversity.")
    mean, half = float(np.mean(means)), z * float(np.sqrt(np.square(errors).sum())) / len(means)
    return {
        key: mean,
        f"{key}_low": max(mean - half, 0.0),
        f"{key}_high": mean + half,
        f"{key}_pairs": float(min(counts)),
        **per_class,
    }


def ms_ssim_distance(one: Tensor, two: Tensor) -> Tensor:
    """1 - MS-SSIM of the three channels' mean (Wang, Simoncelli & Bovik 2003): uint8 [N, 3, H, W] twice -> [N].

    The paper's five scales need 176 px; smaller tiles get as many as fit, with their weights scaled to sum to 1.
    Where structure is opposite (a negative mean), the term counts as 0, so that the value stays within 0 and 1.

    Raises:
        DataError: two shapes, or tiles smaller than the window of 11 px.
    """
    import torch
    import torch.nn.functional as F

    side = min(one.shape[-2:])
    if one.shape != two.shape or side < _WINDOW:
        raise DataError(
            f"MS-SSIM got tiles {tuple(one.shape)} and {tuple(two.shape)}.",
            f"Give two batches of one shape, at least {_WINDOW} px a side.",
        )
    scales = min(len(_SCALES), 1 + int(math.log2(side / _WINDOW)))
    weights = [w / sum(_SCALES[:scales]) for w in _SCALES[:scales]]
    x, y = one.double(), two.double()
    result = torch.ones(x.shape[:2], dtype=torch.float64)
    for scale, weight in enumerate(weights):
        if scale:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        light, structure = ssim_terms(x, y)
        # the mean of the light only counts on the coarsest scale
        term = (light * structure if scale == scales - 1 else structure).mean((2, 3))
        result = result * term.clamp_min(0) ** weight
    return 1 - result.mean(1)


def ssim_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast times structure, at each place where the Gaussian window fits: float [N, C, H, W]
    on the scale 0 to 255 twice -> [N, C, H - 10, W - 10] twice (Wang et al. 2004, eq. 6, 9 and 10)."""
    import torch
    import torch.nn.functional as F

    place = torch.arange(_WINDOW, dtype=x.dtype) - _WINDOW // 2
    weights = torch.exp(-(place**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    channels = x.shape[1]

    def local(values: Tensor) -> Tensor:
        rows = F.conv2d(values, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(rows, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return light, (2 * covariance + _C2) / (var_x + var_y + _C2)


def _between_features(encoder: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Root mean square difference of two tiles' features."""

    def measure(one: Tensor, two: Tensor) -> Tensor:
        return (encoder.encode(one) - encoder.encode(two)).square().mean(1).sqrt()

    return measure


def _measured(images: np.ndarray, first: np.ndarray, second: np.ndarray, distance: Measure) -> NDArray[np.float64]:
    from torch.nn import Module

    if isinstance(distance, Module):
        distance = PairDistance(_name(distance), distance)
    found = []
    for start in range(0, len(first), _CHUNK):
        one, two = (np.ascontiguousarray(images[w[start : start + _CHUNK]]) for w in (first, second))
        values = np.asarray(distance(one, two), np.float64)
        usable = values.shape == (len(one),) and bool(np.isfinite(values).all()) and values.min() >= -1e-6
        if not usable:
            raise DataError(
                f"The distance {_name(distance)} gave {values.shape} numbers for {len(one)} pairs, or some that are "
                "not finite or below zero.",
                "It must give one number, zero or more, a pair.",
            )
        found.append(values)
    return np.concatenate(found)


def _name(distance: Any) -> str:
    """What a result is called after: a name of its own, LPIPS with its network, or the name of the function."""
    if hasattr(distance, "net"):
        return f"lpips_{distance.net}"
    return str(getattr(distance, "name", None) or getattr(distance, "__name__", type(distance).__name__)).strip("<>")
