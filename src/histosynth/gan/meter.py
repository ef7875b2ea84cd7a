"""What the steps measure between two rows of the log. Numbers stay on the device until they are asked for, since
asking a GPU for a number holds it up; so a loss that is not finite is found at the next row, with its step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Values by name and step. A row of the log has their means; the smallest for `..._min`, the largest for
    `..._max`."""

    def __init__(self) -> None:
        self._steps: dict[str, list[int]] = {}
        self._values: dict[str, list[float]] = {}
        self._waiting: list[tuple[str, Tensor]] = []

    def add(self, step: int, **values: Tensor) -> None:
        """Take in scalars of step `step`."""
        for name, value in values.items():
            self._steps.setdefault(name, []).append(step)
            self._waiting.append((name, value.detach()))

    def add_images(self, step: int, name: str, images: Tensor) -> None:
        """Take in mean, smallest and largest value of a batch; of pixels, what is beyond [-1, 1] counts as the end."""
        images = images.detach()
        images = images.clamp(-1, 1) if images.shape[1] == 3 else images
        self.add(step, **{f"{name}_mu": images.mean(), f"{name}_min": images.amin(), f"{name}_max": images.amax()})

    def not_finite(self) -> tuple[str, int, float] | None:
        """Name, step and value of the first value that is not finite."""
        self._fetch()
        bad = [
            (step, name, value)
            for name, values in self._values.items()
            for step, value in zip(self._steps[name], values, strict=True)
            if not math.isfinite(value)
        ]
        if not bad:
            return None
        step, name, value = min(bad, key=lambda found: found[0])
        return name, step, value

    def row(self) -> dict[str, float]:
        """One value a name; forgets them."""
        self._fetch()
        row = {name: _reduced(name, values) for name, values in self._values.items()}
        self._steps, self._values = {}, {}
        return row

    def state(self) -> dict[str, Any]:
        """What a resumed training needs to write the same row."""
        self._fetch()
        return {"steps": self._steps, "values": self._values}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._steps, self._values = state["steps"], state["values"]

    def _fetch(self) -> None:
        if not self._waiting:
            return
        numbers = torch.stack([value.float().reshape(()) for _, value in self._waiting])
        for (name, _), number in zip(self._waiting, numbers.tolist(), strict=True):
            self._values.setdefault(name, []).append(number)
        self._waiting = []


def _reduced(name: str, values: list[float]) -> float:
    if name.endswith("_min"):
        return min(values)
    return max(values) if name.endswith("_max") else sum(values) / len(values)
