"""The random numbers of a batch: one row a sample, the same columns for the same change in every pipe."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# change -> how many numbers it takes beside its switch
_TAKES = {
    "flip": 1, "quarter": 1, "shift": 2, "scale": 1, "turn": 1, "stretch": 1, "turn again": 1, "drift": 2,
    "brightness": 1, "contrast": 1, "luma": 1, "hue": 1, "saturation": 1, "stain": 2, "channels": 3,
    "band 0": 1, "band 1": 1, "band 2": 1, "band 3": 1, "noise": 1, "cutout": 2,
}  # fmt: skip
_FIRST: dict[str, int] = {}
for _name in _TAKES:
    _FIRST[_name] = sum(1 + _TAKES[earlier] for earlier in _FIRST)
COLUMNS = sum(1 + count for count in _TAKES.values())
_TINY = 2.0**-25  # half the step of float32 uniforms: keeps the inverse of the normal distribution finite


class Draws:
    """What chance decides for every sample.

    Args:
        uniform: float32 [N, COLUMNS] in [0, 1).
        p: the probability of every change.
    """

    def __init__(self, uniform: Tensor, p: float) -> None:
        self.numbers, self.p = uniform, p
        # normal by inversion: a row of uniforms is all that a sample needs, at any batch size
        self.normals = torch.special.ndtri(uniform.clamp(_TINY, 1 - _TINY))

    @classmethod
    def new(cls, count: int, p: float, generator: torch.Generator) -> Draws:
        """Fresh numbers from `generator`, on its device."""
        return cls(torch.rand(count, COLUMNS, generator=generator, device=generator.device), p)

    def __len__(self) -> int:
        return len(self.numbers)

    def on(self, name: str, p: float | None = None) -> Tensor:
        """bool [N]: which samples the change happens to, with probability `p` (that of the pipe unless given)."""
        return self.numbers[:, _FIRST[name]] < (self.p if p is None else p)

    def uniform(self, name: str) -> Tensor:
        """[N] or [N, k] in [0, 1)."""
        return self._columns(self.numbers, name)

    def sign(self, name: str) -> Tensor:
        """[N] or [N, k] in [-1, 1)."""
        return self._columns(self.numbers, name) * 2 - 1

    def normal(self, name: str) -> Tensor:
        """[N] or [N, k], mean 0, variance 1."""
        return self._columns(self.normals, name)

    def _columns(self, table: Tensor, name: str) -> Tensor:
        first, count = _FIRST[name] + 1, _TAKES[name]
        return table[:, first] if count == 1 else table[:, first : first + count]

    def angle(self, name: str, degrees: float) -> Tensor:
        """[N] radians, uniform in plus or minus `degrees`."""
        return self.sign(name) * math.radians(degrees)
