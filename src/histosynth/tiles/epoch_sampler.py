"""Which tiles are in an epoch: balanced or not, repeated or not, with synthetic ones mixed in.

How many tiles of a class are in an epoch:

    case  balance  samples_per_class   training                           evaluation
    A     yes      N                   N; a tile comes again only when    N, never seen in another epoch
                                       all of its class have come         (`no_repeat_eval`)
    B     yes      none                as many as the smallest class has, as in training, the same ones
                                       others every epoch                 every epoch
    C     no       N                   up to N, others every epoch        up to N, the same ones
    D     no       none                all                                all

In A and B the classes take turns, so every batch is as balanced as its size allows. What is in epoch e, its order
and the flips and turns are a pure function of (seed, e): nothing is remembered between epochs, and a resumed
training asks for its epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.batches import walk

PixelRange = Literal["0_1", "-1_1", "imagenet"]


@dataclass(frozen=True)
class EpochConfig:
    """What an epoch holds, and in what form."""

    balance: bool = True
    """Whether every class has the same number of tiles in an epoch."""
    samples_per_class: int | None = None
    """Tiles of a class in an epoch; by default the size of the smallest class, or all tiles without balance."""
    evaluation: bool = False
    """Whether the tiles are for validation or test: no flips and turns, and no synthetic tiles."""
    no_repeat_eval: bool = True
    """Whether balanced evaluation epochs of samples_per_class tiles never show a tile again."""
    gan_ratio: float = 0.0
    """Share of the tiles of each class that are synthetic, 0 to 1. Where an epoch holds all real tiles (neither
    balance nor samples_per_class) so many are added; otherwise they replace real ones."""
    pixel_range: PixelRange = "0_1"
    """Scale of the pixels: 0_1, -1_1, or imagenet (mean 0 and deviation 1 on that collection)."""
    augment: bool = True
    """Whether training tiles are flipped and turned at random."""
    batch: int = 64
    """Tiles in a batch of the loader."""
    seed: int = 0
    """Seed of choice, order, flips and turns."""

    def __post_init__(self) -> None:
        if self.samples_per_class is not None and self.samples_per_class < 1:
            raise SettingError(f"samples_per_class is {self.samples_per_class}.", "Use at least 1, or leave it out.")
        if not 0 <= self.gan_ratio <= 1:
            raise SettingError(f"gan_ratio is {self.gan_ratio}.", "Use a share from 0 to 1.")
        if self.evaluation and self.gan_ratio:
            raise SettingError(
                f"gan_ratio is {self.gan_ratio} for evaluation.", "Evaluate on real tiles alone: leave it at 0."
            )
        if self.gan_ratio == 1 and not self.balance and self.samples_per_class is None:
            raise SettingError(
                "gan_ratio is 1 in epochs that hold all real tiles.",
                "Use a smaller one, balance, or samples_per_class.",
            )
        if self.pixel_range not in get_args(PixelRange):
            remedy = did_you_mean(self.pixel_range, get_args(PixelRange))
            raise SettingError(f"pixel_range is {self.pixel_range!r}.", remedy)
        if self.batch < 1:
            raise SettingError(f"batch is {self.batch}.", "Use at least 1.")


class EpochSampler:
    """Positions of the tiles of an epoch; an iterable of int for `torch.utils.data.DataLoader(sampler=...)`.

    Synthetic tiles are numbered after the real ones. With `turns` a position p stands for tile p % T under the
    symmetry p // T (T tiles in all), as `EpochDataset` reads it, so that flips need no state in worker processes.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray,
        config: EpochConfig = EpochConfig(),
        *,
        synthetic: Sequence[int] | np.ndarray | None = None,
        classes: Sequence[str] = (),
        turns: bool = False,
    ) -> None:
        """Sample from tiles of these classes.

        Args:
            labels: class indices of the N real tiles.
            synthetic: class indices of the M synthetic tiles.
            classes: names for messages.

        Raises:
            DataError: no tile, a class that has too few real tiles for the evaluation, or synthetic tiles are
                wanted of a class that has none.
            SettingError: `gan_ratio` without synthetic tiles.
        """
        self.config, self.epoch, self.turns = config, 0, turns
        self._classes = tuple(classes)
        self._real = _members(np.asarray(labels), 0)
        self._made = _members(np.asarray([] if synthetic is None else synthetic, dtype=np.int64), len(labels))
        self.tiles = len(labels) + (0 if synthetic is None else len(synthetic))
        if not self._real:
            raise DataError("The set has no tile.", "Check the split and the quality filter.")
        if config.gan_ratio and not self._made:
            raise SettingError(f"gan_ratio is {config.gan_ratio}, but no synthetic tiles are given.", "Give them too.")
        self._check_supply()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated next.

        Raises:
            SettingError: a negative epoch.
            DataError: evaluation has shown all its tiles before that epoch.
        """
        self._check_epoch(epoch)
        self.epoch = epoch

    @property
    def epochs(self) -> int | None:
        """How many epochs there are before evaluation would repeat a tile; None: no limit."""
        config = self.config
        if not (config.evaluation and config.no_repeat_eval and config.balance and config.samples_per_class):
            return None
        return min(len(m) for m in self._real.values()) // config.samples_per_class

    def indices(self, epoch: int) -> np.ndarray:
        """int64 positions of the tiles of an epoch, in their order, without symmetries.

        Raises:
            SettingError: a negative epoch.
            DataError: evaluation has shown all its tiles before that epoch.
        """
        self._check_epoch(epoch)
        parts = [self._of_class(label, epoch) for label in self._real]
        rng = numpy_rng(self.config.seed, "epoch order", epoch)
        parts = [rng.permutation(part) for part in parts]
        if not self.config.balance:
            return rng.permutation(np.concatenate(parts))
        return rng.permuted(np.stack(parts, axis=1), axis=1).ravel()  # a row has each class once

    def keys(self, epoch: int) -> np.ndarray:
        """`indices`, with a random symmetry for each where flips and turns are wanted."""
        found = self.indices(epoch)
        if self.turns and self.config.augment and not self.config.evaluation:
            found += self.tiles * numpy_rng(self.config.seed, "epoch symmetry", epoch).integers(0, 8, len(found))
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self.keys(self.epoch).tolist())

    def __len__(self) -> int:
        return sum(sum(self._sizes(label, 0)) for label in self._real)

    def _sizes(self, label: int, epoch: int) -> tuple[int, int]:
        """Real and synthetic tiles of a class in an epoch."""
        total = self._total(label)
        if not self.config.balance and self.config.samples_per_class is None:
            return total, round(total * self.config.gan_ratio / (1 - self.config.gan_ratio))
        made = self._made_before(total, epoch + 1) - self._made_before(total, epoch)
        return total - made, made

    def _total(self, label: int) -> int:
        wanted, held = self.config.samples_per_class, len(self._real[label])
        if self.config.balance:
            return wanted or min(len(m) for m in self._real.values())
        return min(wanted or held, held)

    def _made_before(self, total: int, epoch: int) -> int:
        """Synthetic tiles in the epochs before this one: what an epoch loses by rounding, a later one gets."""
        return int(np.floor(epoch * total * self.config.gan_ratio + 1e-9))

    def _of_class(self, label: int, epoch: int) -> np.ndarray:
        config, tiles = self.config, self._real[label]
        real, made = self._sizes(label, epoch)
        if config.evaluation:
            again = config.balance and config.samples_per_class and not config.no_repeat_eval
            order = numpy_rng(config.seed, "evaluation", label, epoch if again else 0).permutation(tiles)
            start = epoch * real if self.epochs is not None else 0
            return order[start : start + real]
        if config.balance and config.samples_per_class:
            start = epoch * (real + made) - self._made_before(real + made, epoch)
            chosen = tiles[walk(len(tiles), start + np.arange(real), config.seed, f"epoch class {label}")]
        else:
            chosen = numpy_rng(config.seed, "epoch class", label, epoch).permutation(tiles)[:real]
        if not made:
            return chosen
        pool, total = self._made[label], self._total(label)
        everything = not config.balance and config.samples_per_class is None
        start = epoch * made if everything else self._made_before(total, epoch)
        picked = walk(len(pool), start + np.arange(made), config.seed, f"epoch synthetic {label}")
        return np.concatenate([chosen, pool[picked]])

    def _check_supply(self) -> None:
        config = self.config
        for label, tiles in self._real.items():
            if config.gan_ratio and label not in self._made:
                raise DataError(
                    f"gan_ratio is {config.gan_ratio}, but class {self._name(label)} has no synthetic tile.",
                    "Make some, or leave the class out.",
                )
            wanted = config.samples_per_class
            if config.evaluation and config.balance and wanted and len(tiles) < wanted:
                raise DataError(
                    f"Class {self._name(label)} has {len(tiles)} tiles for evaluation, and samples_per_class is "
                    f"{wanted}.",
                    f"Use at most {min(len(m) for m in self._real.values())}: evaluation never counts a tile twice.",
                )

    def _check_epoch(self, epoch: int) -> None:
        if epoch < 0:
            raise SettingError(f"epoch is {epoch}.", "Epochs count from 0.")
        if self.epochs is None or epoch < self.epochs:
            return
        label = min(self._real, key=lambda k: len(self._real[k]))
        wanted = int(self.config.samples_per_class or 0)
        raise DataError(
            f"Evaluation epoch {epoch} has too few unseen tiles: class {self._name(label)} has "
            f"{len(self._real[label])}, {self.epochs} epoch(s) of {wanted}.",
            "Lower samples_per_class, evaluate fewer times, or set no_repeat_eval to false.",
        )

    def _name(self, label: int) -> str:
        return repr(self._classes[label]) if label < len(self._classes) else str(label)


def _members(labels: np.ndarray, first: int) -> dict[int, np.ndarray]:
    return {int(k): first + np.flatnonzero(labels == k) for k in np.unique(labels)}
