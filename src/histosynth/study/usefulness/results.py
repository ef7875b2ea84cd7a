"""What the experiment left on disk: the plan, the test sets, and the logits of every cell.

OUT/plan.json, OUT/sets/<set>.npz (y, groups, ids), OUT/cells/<key>.json with <key>.npz (logits of each set), and
OUT/extra.json. A cell without its JSON is not whole and counts as missing.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.core.errors import DataError
from histosynth.core.files import read_json

_REMEDY = "Repeat the command: whole cells are kept, and what is missing is made."


@dataclass(frozen=True, order=True)
class Condition:
    """A row of the grid: an arm at `n` real tiles a class (0 for all) and a share of synthetic tiles."""

    arm: str
    n: int
    share: float


@dataclass(frozen=True)
class TestSet:
    """Tiles that no classifier was trained on: y int [N], groups [N] (patients)."""

    __test__ = False  # for pytest, which takes the name for a test

    name: str
    title: str
    y: np.ndarray
    groups: np.ndarray

    def patients_of(self, label: int) -> int:
        """How many patients have tiles of the class with this index."""
        return len(np.unique(self.groups[self.y == label]))


@dataclass(frozen=True)
class Results:
    """The whole experiment.

    Attributes:
        plan: what plan.json holds.
        seeds: those with which every condition was run, ascending.
        left_out: seeds with which some cell is missing.
        sets: the first decides.
        cells: for every condition, what its cells' JSON says, in the order of `seeds`.
        extra: what extra.json holds.
    """

    folder: Path
    plan: dict[str, Any]
    seeds: tuple[int, ...]
    left_out: tuple[int, ...]
    sets: tuple[TestSet, ...]
    cells: dict[Condition, list[dict[str, Any]]]
    extra: dict[str, Any]

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The arms by name, in the order of the plan."""
        return {arm["name"]: arm for arm in self.plan["arms"]}

    def probabilities(self, condition: Condition, test: TestSet) -> np.ndarray:
        """float64 [S, N, C]: what each seed's classifier says of the tiles, at its own temperature.

        Raises:
            DataError: logits that are missing, damaged, not finite, or of another number of tiles or classes.
        """
        shape = (len(test.y), len(self.plan["classes"]))
        runs = []
        for cell in self.cells[condition]:
            path = self.folder / "cells" / f"{cell['key']}.npz"
            logits = _array(path, test.name)
            if logits.shape != shape or not np.isfinite(logits).all():
                raise DataError(
                    f"{path} has logits {logits.shape} of {test.name}, where {shape} are needed, all finite.",
                    f"Delete it with its .json. {_REMEDY}",
                )
            scaled = logits.astype(np.float64) / float(cell["temperature"])
            powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
            runs.append(powers / powers.sum(axis=1, keepdims=True))
        return np.stack(runs)


def read_results(out: Path) -> Results:
    """Read the experiment in the folder `out`.

    Raises:
        DataError: files that are missing or damaged, or no seed with which every condition was run.
    """
    plan = read_json(out / "plan.json")
    cells: dict[Condition, dict[int, dict[str, Any]]] = {}
    for path in sorted((out / "cells").glob("*.json")):
        cell = read_json(path)
        condition = Condition(cell["arm"], int(cell["n"]), float(cell["share"]))
        cells.setdefault(condition, {})[int(cell["seed"])] = cell | {"key": path.stem}
    if not cells:
        raise DataError(f"{out} has no finished cell.", _REMEDY)
    counted = Counter(seed for by_seed in cells.values() for seed in by_seed)
    seeds = tuple(sorted(seed for seed, times in counted.items() if times == len(cells)))
    if not seeds:
        raise DataError(f"In {out} no seed has run in every condition.", _REMEDY)
    named = [arm["name"] for arm in plan["arms"]]
    if strange := sorted({c.arm for c in cells} - set(named)):
        raise DataError(f"{out} has cells of {strange[0]!r}, which plan.json does not name.", "Use another folder.")
    return Results(
        out,
        plan,
        seeds,
        tuple(sorted(set(map(int, plan["seeds"])) - set(seeds))),
        tuple(_test_set(out, one) for one in plan["sets"]),
        {
            condition: [cells[condition][seed] for seed in seeds]
            for condition in sorted(cells, key=lambda c: (named.index(c.arm), c.n or np.inf, c.share))
        },
        read_json(out / "extra.json") if (out / "extra.json").is_file() else {},
    )


def _test_set(out: Path, described: dict[str, Any]) -> TestSet:
    path = out / "sets" / f"{described['name']}.npz"
    y, groups = _array(path, "y"), _array(path, "groups")
    if y.ndim != 1 or not len(y) or groups.shape != y.shape:
        raise DataError(f"{path} has y {y.shape} and groups {groups.shape}.", "Delete it, and repeat the command.")
    return TestSet(described["name"], described["title"], y.astype(np.int64), groups)


def _array(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({name}): {error}.", f"Delete it. {_REMEDY}") from error
