"""Curves, distances and density for the controlled degradations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import ndimage


@dataclass(frozen=True)
class Shape:
    """The pixel grid of one tile.

    Attributes:
        y, x: float32 [H, W] coordinates of the pixels.
    """

    y: np.ndarray
    x: np.ndarray

    @classmethod
    def of(cls, tile: np.ndarray) -> Self:
        """The grid of a [3, H, W] tile."""
        y, x = np.mgrid[: tile.shape[1], : tile.shape[2]].astype(np.float32)
        return cls(y, x)

    @property
    def side(self) -> int:
        """The shorter side in pixels."""
        return min(self.y.shape)

    def line(self, rng: np.random.Generator, spread: float, bend: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
        """Signed distance to a bent line through the middle part of the tile, and the way along it; pixels."""
        angle = rng.uniform(0, np.pi)
        middle = np.array(self.y.shape) * (0.5 + rng.uniform(-spread, spread, 2))
        dy, dx = self.y - middle[0], self.x - middle[1]
        along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        return across + bend * rng.uniform(-1, 1) * along**2 / self.side, along

    def sample(self, tile: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """A [3, H, W] tile at other coordinates, the border mirrored."""
        where = np.stack([y, x])
        return np.stack([ndimage.map_coordinates(c, where, order=1, mode="mirror") for c in tile])

    def clouds(self, rng: np.random.Generator, size: float) -> np.ndarray:
        """Smooth noise of unit variance with spots of `size` times the side; float32 [H, W]."""
        values = ndimage.gaussian_filter(rng.normal(size=self.y.shape), size * self.side, mode="wrap")
        return (values / max(values.std(), 1e-6)).astype(np.float32)


def to_density(tile: np.ndarray) -> np.ndarray:
    """Optical density (natural logarithm) of light from 0 to 255."""
    return -np.log(np.maximum(tile, 0.5) / 255)


def from_density(values: np.ndarray) -> np.ndarray:
    """Light from 0 to 255 of an optical density."""
    return 255 * np.exp(-values)


def disc(radius: float) -> np.ndarray:
    """Disc of a radius in pixels with a soft rim of one pixel."""
    half = int(np.ceil(radius + 0.5))
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    return np.clip(radius + 0.5 - np.hypot(y, x), 0, 1)


def blend(outside: np.ndarray, inside: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Two pictures mixed by a share in 0 to 1."""
    return outside + (inside - outside) * share


def ripple(position: np.ndarray, rng: np.random.Generator, height: float) -> np.ndarray:
    """A smooth wave of three random sines over a position in units of one wave or so."""
    wave = np.zeros_like(position)
    for octave in (1.0, 2.3, 4.1):
        wave += np.sin(2 * np.pi * octave * position * rng.uniform(0.8, 1.2) + rng.uniform(0, 6.3)) / octave
    return height * wave


def distance_to_path(
    shape: Shape, start: np.ndarray, angle: float, length: float, bend: float, steps: int = 40
) -> np.ndarray:
    """Distance of every pixel to a curl that starts at `start` (shares of the tile); pixels."""
    y, x = start * np.array(shape.y.shape)
    best = np.full(shape.y.shape, np.inf, np.float32)
    for _ in range(steps):
        y, x = y + np.sin(angle) * length * shape.side / steps, x + np.cos(angle) * length * shape.side / steps
        angle += bend * 2 * np.pi / steps
        best = np.minimum(best, np.hypot(shape.y - y, shape.x - x))
    return best
