"""Stain augmentation: other laboratories' staining, drawn anew for every tile from the tile's own seed.

Both kinds change tissue only (`Scene.blend`), and a tile's result follows from its pixels and its seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from histosynth import __version__
from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.core.files import read_json, write_json
from histosynth.core.seeds import numpy_rng
from histosynth.core.threads import on_one_thread
from histosynth.tiles.stain.codes import STANDARD, check_matrices, code_matrix, codes
from histosynth.tiles.stain.colour import hsv_to_rgb, lab_to_rgb, rgb_to_hsv, rgb_to_lab
from histosynth.tiles.stain.light import LightConfig, Scene, check_images
from histosynth.tiles.stain.reinhard import statistics

SPACES = ("lab", "hsv", "od")
_MOST_GAIN = 3.0
_HUE_CUT = 0.25  # the circle of hues is cut at green-yellow, where no stain of H&E lies


@on_one_thread
def stain_augment(
    images: NDArray[np.uint8],
    seeds: Sequence[int],
    *,
    matrices: NDArray[np.floating] | None = None,
    strength: float = 0.2,
    shift: float = 0.02,
    config: LightConfig = LightConfig(),
) -> NDArray[np.uint8]:
    """Make each tile's haematoxylin and eosin stronger or weaker.

    A concentration c becomes a c + b with a ~ U(1 - strength, 1 + strength) and b ~ U(-shift, shift) for each tile
    and stain (Tellez et al. 2018, IEEE TMI 37:2126; 2019, Med Image Anal 58:101544). Only the change of the two
    stains is laid on the tile, so what they do not explain stays as it is.

    Args:
        images: uint8 [N, 3, H, W].
        seeds: [N] one seed a tile.
        matrices: [N, 2, 3] or [2, 3] unit stain vectors, such as `stain_matrix` gives; none takes published ones.
        strength: 0 to 1.
        shift: optical density, 0 or more.

    Returns:
        uint8 [N, 3, H, W]; tiles without enough tissue come back as they are.

    Raises:
        SettingError: strength or shift is out of range.
        DataError: images, seeds or matrices have another shape.
    """
    if not 0 <= strength <= 1 or not 0 <= shift <= 1:
        raise SettingError(f"strength is {strength} and shift {shift}.", "Use 0 to 1.")
    images = _check(images, seeds)
    n, size = len(images), images.shape[2] * images.shape[3]
    matrices = check_matrices(STANDARD if matrices is None else matrices, n)
    scene = Scene(size, config)
    out = images.copy()
    for i, (p, o) in enumerate(zip(images.reshape(n, 3, size), out.reshape(n, 3, size), strict=True)):
        if not scene.read(p).enough:
            continue
        rng = numpy_rng(int(seeds[i]), "stain augment")
        gain, offset = 1 + strength * rng.uniform(-1, 1, 2), shift * rng.uniform(-1, 1, 2)
        c = codes(scene.od, code_matrix(matrices[i], 0.0), scene.work)
        change = c * (gain - 1)[:, None].astype(np.float32)
        change += offset[:, None].astype(np.float32)
        colours = np.exp(-(matrices[i].T.astype(np.float32) @ change))
        colours *= p
        scene.blend(colours, o)
    return out


@dataclass(frozen=True)
class Spread:
    """How the tiles of a data set differ in one colour space: of each channel's mean and deviation in a tile."""

    mean: tuple[float, ...]
    """[3] average of the tiles' means."""
    mean_spread: tuple[float, ...]
    """[3] standard deviation of the tiles' means."""
    deviation: tuple[float, ...]
    """[3] average of the tiles' standard deviations."""
    deviation_spread: tuple[float, ...]
    """[3] standard deviation of the tiles' standard deviations."""


class RandStainNA:
    """Normalises every tile to a virtual template, drawn from how the tiles of a data set differ.

    Shen et al. 2022, "RandStainNA: learning stain-agnostic features from histology slides by bridging stain
    augmentation and normalization", MICCAI. A tile's seed picks one colour space (Lab, HSV, or optical density in
    place of the paper's HED) and draws the template's means and deviations from normal distributions there.
    """

    def __init__(
        self, *, spaces: Sequence[str] = SPACES, spread: float = 1.0, config: LightConfig = LightConfig()
    ) -> None:
        """spaces: which colour spaces to draw from; spread: multiplies how far templates lie from the average.

        Raises:
            SettingError: an unknown space, none at all, or a negative spread.
        """
        for space in spaces:
            if space not in SPACES:
                raise SettingError(f"spaces names {space!r}.", did_you_mean(str(space), SPACES))
        if not spaces or spread < 0:
            raise SettingError(
                f"spaces is {list(spaces)}, spread is {spread}.", "Name a space, and a spread of 0 or more."
            )
        self.spaces, self.spread, self.config = tuple(spaces), float(spread), config
        self.statistics: dict[str, Spread] = {}

    @on_one_thread
    def fit(self, images: NDArray[np.uint8]) -> Self:
        """Measure the data set, uint8 [N, 3, H, W]. Raises DataError if fewer than two tiles hold tissue."""
        images = check_images(images)
        scene = Scene(images.shape[2] * images.shape[3], self.config)
        found: dict[str, list[NDArray]] = {space: [] for space in self.spaces}
        for p in images.reshape(len(images), 3, images.shape[2] * images.shape[3]):
            if scene.read(p).enough:
                for space in self.spaces:
                    found[space].append(np.stack(statistics(_forward(space, p, scene), scene.stained)))
        if len(found[self.spaces[0]]) < 2:
            raise DataError("Fewer than two tiles have enough stained tissue.", "Give more tiles of the data set.")
        self.statistics = {}
        for space, values in found.items():
            average, spread = np.mean(values, axis=0), np.std(values, axis=0)
            self.statistics[space] = Spread(
                *(tuple(v.tolist()) for v in (average[0], spread[0], average[1], spread[1]))
            )
        return self

    @on_one_thread
    def __call__(self, images: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.uint8]:
        """Each tile of uint8 [N, 3, H, W] after the template of its seed; tiles without tissue come back as they are.

        Raises:
            SettingError: nothing was measured yet.
            DataError: images or seeds have another shape.
        """
        if not self.statistics:
            raise SettingError("RandStainNA has not seen a data set.", "Fit it, or load saved statistics.")
        images = _check(images, seeds)
        n, size = len(images), images.shape[2] * images.shape[3]
        scene = Scene(size, self.config)
        out = images.copy()
        for i, (p, o) in enumerate(zip(images.reshape(n, 3, size), out.reshape(n, 3, size), strict=True)):
            if scene.read(p).enough:
                space, mean, deviation = self._template(int(seeds[i]))
                values = _forward(space, p, scene)
                own_mean, own_deviation = statistics(values, scene.stained)
                gain = np.clip(deviation / np.maximum(own_deviation, 1e-6), 1 / _MOST_GAIN, _MOST_GAIN)
                values *= gain[:, None].astype(np.float32)
                values += (mean - gain * own_mean)[:, None].astype(np.float32)
                scene.blend(_backward(space, values, scene), o)
        return out

    def save(self, path: Path | str) -> None:
        """Write the statistics as JSON. Raises SettingError when nothing was measured yet."""
        if not self.statistics:
            raise SettingError("RandStainNA has not seen a data set.", "Fit it before saving.")
        settings = {"spread": self.spread, "config": asdict(self.config)}
        values = {space: asdict(spread) for space, spread in self.statistics.items()}
        write_json(path, {"kind": "stain spread", "version": __version__, **settings, "statistics": values})

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read saved statistics. Raises DataError if the file holds none."""
        value = read_json(path)
        remedy = "Fit RandStainNA to the data set again."
        if not isinstance(value, dict) or value.get("kind") != "stain spread":
            raise DataError(f"{path} holds no stain statistics.", remedy)
        try:
            settings = {k: tuple(v) if isinstance(v, list) else v for k, v in value["config"].items()}
            made = cls(spaces=tuple(value["statistics"]), spread=value["spread"], config=LightConfig(**settings))
            made.statistics = {
                k: Spread(**{n: _three(x) for n, x in v.items()}) for k, v in value["statistics"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError, SettingError) as error:
            raise DataError(f"{path} holds stain statistics that cannot be used: {error}.", remedy) from error
        return made

    def _template(self, seed: int) -> tuple[str, NDArray[np.float64], NDArray[np.float64]]:
        rng = numpy_rng(seed, "stain template")
        space = self.spaces[int(rng.integers(len(self.spaces)))]
        s = self.statistics[space]
        mean = np.array(s.mean) + self.spread * np.array(s.mean_spread) * rng.standard_normal(3)
        deviation = np.array(s.deviation) + self.spread * np.array(s.deviation_spread) * rng.standard_normal(3)
        return space, mean, np.maximum(deviation, 0)


def _three(values: Any) -> tuple[float, ...]:
    array = np.array(values, np.float64)
    if array.shape != (3,) or not np.isfinite(array).all():
        raise ValueError(f"{values!r} is not three numbers")
    return tuple(array.tolist())


def _forward(space: str, pixels: NDArray[np.uint8], scene: Scene) -> NDArray[np.float32]:
    if space == "lab":
        return rgb_to_lab(pixels)
    if space == "od":
        return scene.od[:3].copy()
    hsv = rgb_to_hsv(pixels)
    hsv[0] = (hsv[0] - _HUE_CUT) % 1
    return hsv


def _backward(space: str, values: NDArray[np.float32], scene: Scene) -> NDArray[np.float32]:
    if space == "lab":
        return lab_to_rgb(values)
    if space == "od":
        light = scene.white[:, None].astype(np.float32)
        return light * np.exp(-np.maximum(values, 0))
    values[0] += _HUE_CUT
    return hsv_to_rgb(values)


def _check(images: NDArray[np.uint8], seeds: Sequence[int]) -> NDArray[np.uint8]:
    images = check_images(images)
    if len(seeds) != len(images):
        raise DataError(f"There are {len(seeds)} seeds for {len(images)} tiles.", "Give one seed a tile.")
    return images
