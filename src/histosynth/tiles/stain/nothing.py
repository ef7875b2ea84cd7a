"""No stain normalisation, behind the same interface."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from histosynth import __version__
from histosynth.core.errors import DataError
from histosynth.tiles.stain.light import check_images
from histosynth.tiles.stain.profile import Profile, load_profile


class Nothing:
    """Leaves every tile as it is."""

    name: ClassVar[str] = "none"

    def __init__(self) -> None:
        self.profile = Profile(method=self.name, settings={}, version=__version__)

    def fit(self, images: NDArray[np.uint8]) -> Self:
        """Needs no reference; refuses what is no uint8 [N, 3, H, W], as the others do."""
        check_images(images)
        return self

    def transform(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """(a copy of uint8 [N, 3, H, W]; bool [N], all True)."""
        images = check_images(images)
        return images.copy(), np.ones(len(images), bool)

    def save(self, path: Path | str) -> None:
        """Write a profile that asks for nothing."""
        self.profile.save(path)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read such a profile. Raises DataError for any other file."""
        if load_profile(path).method != cls.name:
            raise DataError(f"{path} is not a profile of {cls.name}.", "Load it with load_normaliser.")
        return cls()
