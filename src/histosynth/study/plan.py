"""A budget of minutes as numbers of steps and tiles, and a record of where the time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.core.files import read_json, write_json
from histosynth.core.types import GeneratorFamily

# how the budget is shared: every generator trains equally long and makes equally many tiles
_SHARES = {"train": 0.42, "generate": 0.16, "classifiers": 0.34}
_SLACK = 1.35  # a stage may exceed its share by this much before the clock cuts it
_CLASSIFIER_STEPS_PER_SECOND = 23.0  # of two processes, a cell each
_STEPS = (60, 1500)  # a classifier's fewest and most steps
_TILES = (16, 256)  # synthetic tiles a class, fewest and most


@dataclass(frozen=True)
class Plan:
    """Numbers of steps and tiles, and how long a stage may take at most (seconds)."""

    generator_steps: dict[str, int]
    synthetic_per_class: int
    classifier_steps: int
    train_seconds: float


def make_plan(
    minutes: float,
    families: Sequence[GeneratorFamily],
    *,
    size: int,
    classes: int,
    seeds: int,
    generator_steps: Mapping[str, int],
    classifier_steps: int | None,
    synthetic_per_class: int | None,
) -> Plan:
    """Turn minutes into steps and tiles, by the fixed rates of the families.

    Args:
        minutes: the budget, on two CPU cores.
        size: edge length in pixels; the cost of everything grows with its square.
        classes: number of classes that have training tiles.
        seeds: classifiers an arm.
        generator_steps, classifier_steps, synthetic_per_class: what the user set; these are kept.
    """
    cost = (size / 64) ** 2
    budget = minutes * 60
    train = budget * _SHARES["train"] / len(families)
    steps = {f.name: max(20, _round(train * f.steps_per_second / cost)) for f in families}
    seconds_a_tile = sum(cost / f.tiles_per_second for f in families)
    tiles = budget * _SHARES["generate"] / seconds_a_tile / max(classes, 1)
    cells = seeds * (2 + 2 * len(families))
    return Plan(
        generator_steps=steps | dict(generator_steps),
        synthetic_per_class=synthetic_per_class
        if synthetic_per_class is not None
        else int(np.clip(_round(tiles), *_TILES)),
        classifier_steps=classifier_steps
        if classifier_steps is not None
        else steps_a_classifier(budget * _SHARES["classifiers"], cells, size),
        train_seconds=train * _SLACK,
    )


def steps_a_classifier(seconds: float, cells: int, size: int) -> int:
    """Training steps of each of so many classifiers, from a budget on two CPU cores, by a fixed rate.

    Args:
        size: edge length in pixels; the cost grows with its square.
    """
    steps = seconds / max(cells, 1) * _CLASSIFIER_STEPS_PER_SECOND / (size / 64) ** 2
    return int(np.clip(_round(steps), *_STEPS))


class Clock:
    """Seconds spent in each stage, kept on disk so that a resumed run reports all of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 2)
        write_json(self._path, self.seconds)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, time.monotonic() - start)

    def report(self, described: dict[str, Any], device: str) -> dict[str, Any]:
        """The section "costs" of the report."""
        generators = {n: d.pop("cost") for n, d in described.items() if "cost" in d}
        stages = [{"name": n, "seconds": s} for n, s in self.seconds.items()]
        return {
            "stages": stages,
            "generators": generators,
            "device": device,
            "total_seconds": round(sum(self.seconds.values()), 2),
        }


def _round(value: float) -> int:
    """Two significant digits, so that plans read well."""
    return int(float(f"{max(value, 0):.2g}"))
