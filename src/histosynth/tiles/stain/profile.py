"""Stain profiles: what a normaliser learned from its reference, as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from histosynth.core.errors import DataError, SettingError
from histosynth.core.files import read_json, write_json

FORMAT = 1
_REMEDY = "Save the profile again from its reference."
_Config = TypeVar("_Config")


@dataclass(frozen=True)
class Profile:
    """The appearance of a reference."""

    method: str
    """The name of the method in `STAINS`."""
    settings: dict[str, Any]
    """The settings that it was made with."""
    white: tuple[float, ...] = ()
    """[3] white point of the reference, grey levels."""
    stain_matrix: tuple[tuple[float, ...], ...] = ()
    """[2, 3] unit optical densities, haematoxylin first (not Reinhard)."""
    strength: tuple[float, ...] = ()
    """[2] high percentile of the concentrations (not Reinhard)."""
    mean: tuple[float, ...] = ()
    """[3] mean of L, a, b of the tissue (Reinhard)."""
    deviation: tuple[float, ...] = ()
    """[3] standard deviation of L, a, b of the tissue (Reinhard)."""
    tiles: int = 0
    """Tiles that the profile was made from; tiles without enough tissue are not counted."""
    version: str = ""
    """Version of histosynth that made it."""

    def save(self, path: Path | str) -> None:
        """Write JSON."""
        write_json(path, {"format": FORMAT, "kind": "stain profile"} | asdict(self))

    def config(self, kind: type[_Config], path: Path | str) -> _Config:
        """The settings as a `kind`. Raises DataError, naming `path`, when they are not settings of that kind."""
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in self.settings.items()}
        try:
            return kind(**settings)
        except (TypeError, SettingError) as error:
            raise DataError(f"{path}: its settings cannot be used: {error}", _REMEDY) from error


_SHAPES = {"white": (3,), "stain_matrix": (2, 3), "strength": (2,), "mean": (3,), "deviation": (3,)}


def load_profile(path: Path | str) -> Profile:
    """Read a profile.

    Raises:
        DataError: the file is missing, is no stain profile, or holds values that cannot be one.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.get("kind") != "stain profile":
        raise DataError(f"{path} is not a stain profile.", _REMEDY)
    if value.get("format") != FORMAT:
        raise DataError(f"{path} has the stain profile format {value.get('format')!r}, not {FORMAT}.", _REMEDY)
    known = {k: value[k] for k in Profile.__dataclass_fields__ if k in value}
    if not isinstance(known.get("method"), str) or not isinstance(known.get("settings"), dict):
        raise DataError(f"{path} names no method or no settings.", _REMEDY)
    for name, shape in _SHAPES.items():
        known[name] = _numbers(known.get(name, ()), shape, f"{path}: {name}")
    profile = Profile(**known)
    rows = np.linalg.norm(profile.stain_matrix or [[1.0]], axis=1)
    if not np.allclose(rows, 1, atol=1e-3) or np.min(profile.stain_matrix or 0) < 0:
        raise DataError(f"{path}: stain_matrix does not hold unit vectors.", _REMEDY)
    if min(profile.strength, default=1) <= 0 or min(profile.deviation, default=1) <= 0:
        raise DataError(f"{path}: strength and deviation must be above 0.", _REMEDY)
    if not all(1 <= w <= 255 for w in profile.white):
        raise DataError(f"{path}: white is not three grey levels from 1 to 255.", _REMEDY)
    return profile


def _numbers(value: Any, shape: tuple[int, ...], what: str) -> tuple:
    if value in ((), []):
        return ()
    try:
        array = np.array(value, np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} is not {list(shape)} numbers.", _REMEDY) from error
    if array.shape != shape or not np.isfinite(array).all() or np.abs(array).max() > 1e4:
        raise DataError(f"{what} is not {list(shape)} usable numbers.", _REMEDY)
    return tuple(tuple(row) if isinstance(row, list) else row for row in array.tolist())
