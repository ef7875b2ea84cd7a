"""The methods of stain normalisation, their common interface, and how to get one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError
from histosynth.core.registry import Registry
from histosynth.tiles.stain.profile import Profile, load_profile

STAINS = Registry(
    "stain method",
    {
        "vahadane": "histosynth.tiles.stain.separating:Vahadane",
        "macenko": "histosynth.tiles.stain.separating:Macenko",
        "anchored": "histosynth.tiles.stain.separating:Anchored",
        "reinhard": "histosynth.tiles.stain.reinhard:Reinhard",
        "none": "histosynth.tiles.stain.nothing:Nothing",
    },
    group="histosynth.stains",
)


class StainNormaliser(Protocol):
    """Gives tiles the stains of a reference."""

    name: str
    profile: Profile | None
    """What was learned from the reference; None before `fit`."""

    def fit(self, images: NDArray[np.uint8]) -> Self:
        """Take the reference from uint8 [N, 3, H, W]: one tile or a set."""

    def transform(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """(uint8 [N, 3, H, W]; bool [N], which tiles passed through unchanged). A tile's result is its own."""

    def save(self, path: Path | str) -> None:
        """Write the reference as a JSON profile."""

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """A normaliser with the reference of a JSON profile."""


def load_normaliser(name_or_path: Path | str) -> StainNormaliser:
    """A method by its name, still to be fitted, or a fitted one from a saved profile (a path that ends in .json).

    Raises:
        SettingError: there is no such method.
        DataError: the profile cannot be used.
    """
    if str(name_or_path).lower().endswith(".json"):
        method = load_profile(name_or_path).method
        if method not in STAINS.names():
            raise DataError(
                f"{name_or_path} is a profile of {method!r}, an unknown method.", f"Known: {', '.join(STAINS.names())}."
            )
        return STAINS.load(method).load(name_or_path)
    return STAINS.load(str(name_or_path))()
