"""Colour transfer by the mean and the spread of L, a and b of the tissue.

Reinhard et al. 2001, "Color transfer between images", IEEE Comput Graph Appl 21(5):34, in CIE Lab as is usual for
tissue, with the statistics of tissue only: glass would shift them with the share of the tile that it fills.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from histosynth import __version__
from histosynth.core.errors import DataError, SettingError
from histosynth.core.threads import on_one_thread
from histosynth.tiles.stain.colour import lab_to_rgb, rgb_to_lab
from histosynth.tiles.stain.light import LightConfig, Scene, check_images
from histosynth.tiles.stain.profile import Profile, load_profile

_LEAST_SPREAD = 0.5
_MOST_GAIN = 10.0


def statistics(values: NDArray[np.float32], where: NDArray[np.bool_]) -> tuple[NDArray, NDArray]:
    """Mean and standard deviation, float64 [3] each, of [3, P] at the pixels `where`, of which there are some."""
    weight = where.astype(np.float32)
    count = max(1, np.count_nonzero(where))
    mean = (values @ weight).astype(np.float64) / count
    centred = values - mean[:, None].astype(np.float32)
    centred *= weight
    variance = np.array([row @ row for row in centred], np.float64) / count
    return mean, np.sqrt(variance)


class Reinhard:
    """Gives the tissue of a tile the mean and the spread of the reference's in CIE Lab."""

    name: ClassVar[str] = "reinhard"

    def __init__(self, config: LightConfig = LightConfig()) -> None:
        self.config = config
        self.profile: Profile | None = None

    @on_one_thread
    def fit(self, images: NDArray[np.uint8]) -> Self:
        """Take the reference from uint8 [N, 3, H, W]: one tile, or the median over a set.

        Raises:
            DataError: no tile has enough stained tissue.
        """
        images = check_images(images)
        scene = Scene(images.shape[2] * images.shape[3], self.config)
        pixels = images.reshape(len(images), 3, images.shape[2] * images.shape[3])
        measured = [(*statistics(rgb_to_lab(p), scene.stained), scene.white) for p in pixels if scene.read(p).enough]
        found = [m for m in measured if m[1].max() >= _LEAST_SPREAD]
        if not found:
            raise DataError(
                f"None of the {len(images)} reference tiles has enough stained tissue.", "Choose another reference."
            )
        mean, deviation, white = (tuple(np.median(v, axis=0).tolist()) for v in zip(*found, strict=True))
        self.profile = Profile(
            method=self.name,
            settings=asdict(self.config),
            white=white,
            mean=mean,
            deviation=deviation,
            tiles=len(found),
            version=__version__,
        )
        return self

    @on_one_thread
    def transform(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Give tiles uint8 [N, 3, H, W] the colours of the reference.

        Returns:
            (uint8 [N, 3, H, W]; bool [N], True for tiles that passed through unchanged because they hold too
            little stained tissue, or one colour only). Pixels that are not tissue keep their bytes.

        Raises:
            SettingError: there is no reference yet.
        """
        target = self._fitted()
        images = check_images(images)
        out = images.copy()
        unchanged = np.ones(len(images), bool)
        size = images.shape[2] * images.shape[3]
        scene = Scene(size, self.config)
        for i, (p, o) in enumerate(zip(images.reshape(-1, 3, size), out.reshape(-1, 3, size), strict=True)):
            if not scene.read(p).enough:
                continue
            lab = rgb_to_lab(p)
            mean, deviation = statistics(lab, scene.stained)
            if deviation.max() < _LEAST_SPREAD:
                continue
            gain = np.minimum(np.array(target.deviation) / np.maximum(deviation, 1e-6), _MOST_GAIN)
            lab *= gain[:, None].astype(np.float32)
            lab += (np.array(target.mean) - gain * mean)[:, None].astype(np.float32)
            scene.blend(lab_to_rgb(lab), o)
            unchanged[i] = False
        return out, unchanged

    def save(self, path: Path | str) -> None:
        """Write the profile as JSON. Raises SettingError when there is no reference yet."""
        self._fitted().save(path)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """A normaliser with the reference of a saved profile. Raises DataError for any other file."""
        profile = load_profile(path)
        if profile.method != cls.name or not (profile.mean and profile.deviation):
            raise DataError(f"{path} is not a whole profile of {cls.name}.", "Save it again from its reference.")
        normaliser = cls(profile.config(LightConfig, path))
        normaliser.profile = profile
        return normaliser

    def _fitted(self) -> Profile:
        if self.profile is None:
            raise SettingError("The reinhard normaliser has no reference.", "Fit it, or load a saved profile.")
        return self.profile
