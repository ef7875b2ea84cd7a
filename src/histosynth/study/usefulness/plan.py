"""The plan of the experiment: its settings, its arms, and the cells of its grid.

Every cell trains one classifier: an arm, a number of real tiles a class, a share of synthetic tiles, a seed. All cells
take the same number of steps, so that more tiles do not mean more training; cells of one seed share the first weights,
the real tiles and the order in which these come, so that arms are compared in pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from histosynth.core.errors import SettingError, did_you_mean
from histosynth.core.seeds import derive
from histosynth.study.plan import steps_a_classifier

BASELINE = "real_classical"
"""The verdict's baseline: flips, turns, stain jitter and blur are free, so the question is what tiles add to them."""
ALL = 0
"""Stands for every real training tile among the numbers of tiles a class."""
_RARE = 2 / 3


@dataclass(frozen=True)
class SelectionConfig:
    """Which synthetic tiles the selected arms keep (after Xue et al. 2021, Medical Image Analysis 67, 101816)."""

    encoder: str = "tissue-tiny"
    """Encoder whose features are compared."""
    realism: float = 0.95
    """A tile is kept if it lies no farther from the real tiles of its class than this share of them lie from those of
    other patients."""
    consistency: float = 0.9
    """... and if a linear probe gives its class at least the probability that this share of validation tiles get."""
    least: float = 0.1
    """At least this share of a class is kept, the best of it, and the page says where that was needed."""

    def __post_init__(self) -> None:
        for name in ("realism", "consistency", "least"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise SettingError(f"selection.{name} is {value}.", "Use a share above 0, up to 1.")


@dataclass(frozen=True)
class UtilityConfig:
    """Do synthetic tiles help a classifier?"""

    out: Path = Path("runs/utility")
    """Folder of the experiment and its page. Repeat the command to go on."""
    per_class: tuple[int | Literal["all"], ...] = (5, 10, 20, 50, "all")
    """Real training tiles a class, such as --per-class 5 --per-class all; a class that has fewer gives what it has."""
    shares: tuple[float, ...] = (0.5,)
    """Share of synthetic tiles in what a classifier sees of a class that has both."""
    seeds: int = 5
    """Repetitions of the grid, each with its own first weights, order of tiles and choice of real tiles."""
    steps: int | None = None
    """Training steps, the same in every cell; 300 by default."""
    minutes: float | None = None
    """Instead of steps: a budget on two CPU cores, turned into steps by a fixed rate."""
    classifier: str = "mobilenet-v2"
    """A network, or a probe on an encoder such as linear:tissue-tiny."""
    weights: Literal["auto", "imagenet", "tissue", "none"] = "auto"
    """Where a network begins (see `histosynth train classifier`)."""
    arms: tuple[str, ...] = ()
    """Only these, such as real_gan or gan_only; all by default. real_classical, the baseline, is always among them."""
    external: tuple[Path, ...] = ()
    """Tile sets of other hospitals, on which every classifier is tested too."""
    rare: tuple[str, ...] = ()
    """Classes whose recall the page shows first, and which alone get synthetic tiles in some arms; by default those
    with fewer than two thirds of the training tiles of the class in the middle."""
    selection: SelectionConfig = SelectionConfig()
    """How the selected arms choose their synthetic tiles."""
    allow_unknown_origin: bool = False
    """Take synthetic tiles of which nobody can say whether their generator saw test patients. The page says so."""
    size: int = 64
    """Edge length of the tiles in pixels."""
    seed: int = 0
    """Seed of everything random."""
    margin: float = 0.02
    """A difference smaller than this does not matter: 0.02 is two points of balanced accuracy."""
    replicates: int = 2000
    """Bootstrap replicates of the intervals."""
    workers: int | None = None
    """Processes; every cell has one thread, so results do not depend on it. All processors by default, 1 on a GPU."""
    ray: bool = False
    """Hand the cells to Ray (pip install 'histosynth[ray]'), on the cluster of RAY_ADDRESS if that is set."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        for name in ("per_class", "shares"):
            if not getattr(self, name):
                raise SettingError(f"{name} is empty.", "Give at least one number.")
        for number in self.per_class:
            if number != "all" and number < 0:
                raise SettingError(f"per_class has {number}.", "Use 1 or more tiles a class, or all.")
        for share in self.shares:
            if not 0 < share < 1:
                raise SettingError(f"shares has {share}.", "Use numbers between 0 and 1, such as 0.5.")
        if len({round(100 * s) for s in self.shares}) < len(set(self.shares)):
            raise SettingError(f"shares has {self.shares}.", "Use whole percents, each once.")
        for name, least in (("seeds", 1), ("steps", 1), ("size", 8), ("replicates", 100), ("workers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"{name} is {value}.", f"Use at least {least}.")
        if not 0 <= self.margin < 1:
            raise SettingError(f"margin is {self.margin}.", "Use a share from 0 to 1, such as 0.02.")
        if self.minutes is not None and not 0 < self.minutes < np.inf:
            raise SettingError(f"minutes is {self.minutes}.", "Give a positive number of minutes.")
        if self.minutes is not None and self.steps is not None:
            raise SettingError(f"minutes is {self.minutes} and steps is {self.steps}.", "Give one of the two.")

    @property
    def numbers(self) -> tuple[int, ...]:
        """Real tiles a class, ascending, with `ALL` last."""
        given = {ALL if n == "all" else int(n) for n in self.per_class}
        return tuple(sorted(given, key=lambda n: (n == ALL, n)))

    def cell_seeds(self) -> list[int]:
        """One seed for each repetition."""
        return [derive(self.seed, "classifier", k) % 100_000 for k in range(self.seeds)]


@dataclass(frozen=True)
class Arm:
    """One way to make up the training set.

    Attributes:
        real: real tiles take part.
        generators: whose tiles take part.
        classical: flips, turns, stain jitter and blur.
        selected: only the synthetic tiles that pass the selection.
        classes: only the synthetic tiles of these classes; none: of all.
    """

    name: str
    title: str
    real: bool
    generators: tuple[str, ...] = ()
    classical: bool = True
    selected: bool = False
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One classifier of the grid.

    Attributes:
        n: real tiles a class; `ALL` for all of them.
        share: of synthetic tiles in what is seen of a class: 0 without them, 1 without real ones.
    """

    arm: Arm
    n: int
    share: float
    seed: int

    @property
    def key(self) -> str:
        """Name of its files."""
        return f"{self.arm.name}-n{self.n}-s{round(100 * self.share)}-r{self.seed}"


def all_arms(generators: Mapping[str, str], *, selected: bool = True, rare: Sequence[str] = ()) -> list[Arm]:
    """Every arm for these generators (name -> title); with `rare`, also such that get synthetic tiles of these classes
    alone, since classes with many real tiles have little to gain and may lose."""
    titles = list(generators.items())
    found = [
        Arm("real", "Real", True, classical=False),
        Arm(BASELINE, "Real + classical augmentation", True),
        *(Arm(f"real_{n}", f"Real + classical + {t}", True, (n,)) for n, t in titles),
    ]
    if len(titles) > 1:
        both = " + ".join(t for _, t in titles)
        found.append(Arm("real_all", f"Real + classical + {both}", True, tuple(generators)))
    if selected:
        found += [
            Arm(f"real_{n}_selected", f"Real + classical + selected {t}", True, (n,), selected=True) for n, t in titles
        ]
    if rare:
        title = "Real + classical + {} for rare classes"
        found += [Arm(f"real_{n}_rare", title.format(t), True, (n,), classes=tuple(rare)) for n, t in titles]
    return [*found, *(Arm(f"{n}_only", f"{t} only", False, (n,)) for n, t in titles)]


def choose_arms(known: Sequence[Arm], wanted: Iterable[str]) -> list[Arm]:
    """The arms with these names, or all, and always the baseline.

    Raises:
        SettingError: an arm that does not exist.
    """
    wanted, names = list(wanted), [a.name for a in known]
    for name in wanted:
        if name not in names:
            raise SettingError(f"arms has {name!r}.", did_you_mean(name, names))
    return [a for a in known if not wanted or a.name in wanted or a.name == BASELINE]


def cells_of(arms: Sequence[Arm], numbers: Sequence[int], shares: Sequence[float], seeds: Sequence[int]) -> list[Cell]:
    """The grid, seed by seed, so that a grid that is cut short has whole repetitions.

    Arms without real tiles do not depend on their number and stand at `ALL` alone.
    """
    found = []
    for seed in seeds:
        for n in numbers:
            for arm in arms:
                if not arm.real:
                    found += [Cell(arm, ALL, 1.0, seed)] if n == numbers[-1] else []
                else:
                    found += [Cell(arm, n, share, seed) for share in (shares if arm.generators else (0.0,))]
    return found


def steps_of(config: UtilityConfig, cells: int) -> int:
    """Training steps of every cell."""
    if config.minutes is None:
        return config.steps or 300
    return steps_a_classifier(config.minutes * 60, cells, config.size)


def rare_classes(counts: Mapping[str, int], wanted: Sequence[str] = ()) -> list[str]:
    """The classes that were asked for, or those with fewer than two thirds of the training tiles of the middle class.

    Args:
        counts: training tiles a class.

    Raises:
        SettingError: a class that does not exist.
    """
    for label in wanted:
        if label not in counts:
            raise SettingError(f"rare names the class {label!r}.", did_you_mean(label, counts))
    if wanted:
        return list(dict.fromkeys(wanted))
    middle = float(np.median([n for n in counts.values() if n])) if any(counts.values()) else 0.0
    return [label for label, n in counts.items() if n < _RARE * middle]


def short_name(text: str, taken: Iterable[str]) -> str:
    """A name for arms and files that is not taken: lower case, digits and dashes."""
    base = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "set"
    used = {*taken, "all", "classical"}  # real_all and real_classical are arms of their own
    number = 1
    while (name := base if number == 1 else f"{base}-{number}") in used:
        number += 1
    return name
