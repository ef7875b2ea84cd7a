"""What a tile is told: which of the class's training embeddings, by its seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from histosynth.core.errors import SettingError, did_you_mean
from histosynth.core.seeds import torch_generator
from histosynth.diffusion.model import Bank

Condition = Literal["bank", "tile", "prototype", "interpolate"]
CONDITIONS: tuple[str, ...] = get_args(Condition)


@dataclass(frozen=True)
class Told:
    """What one tile is told.

    Attributes:
        embedding: standardised float32 [dim]; None: the class alone.
        reference: id of the training tile, where it is one alone (or the first of two between which it lies).
        second_reference: id of the second of two.
        other, share: a second class, and its share of the class token; -1 and 0 without.
    """

    embedding: Tensor | None
    reference: str = ""
    second_reference: str = ""
    other: int = -1
    share: float = 0.0


class Teller:
    """Draws what tiles are told from the bank of training embeddings.

    Args:
        bank: of a checkpoint.
        classes: its classes.
        condition: "bank": two embeddings of the class, mixed so that its spread is kept; "tile": one tile's;
            "prototype": the class's mean; "interpolate": on the way from one tile to another.
        like: with "tile" and "interpolate", the id of the (first) tile, instead of one drawn by the seed.
        towards: with "interpolate", the class of the other tile; its own class by default.
        share: with "interpolate", how far towards the other tile, 0 to 1.

    Raises:
        SettingError: an unknown condition, tile or class, or a share out of range.
    """

    def __init__(
        self, bank: Bank, classes: Sequence[str], condition: str, like: str = "", towards: str = "", share: float = 0.5
    ) -> None:
        self.bank, self.classes, self.condition = bank, tuple(classes), condition
        self.like, self.towards, self.share = like, towards, share
        if condition not in CONDITIONS:
            raise SettingError(f"condition is {condition!r}.", did_you_mean(condition, CONDITIONS))
        if not 0 <= share <= 1:
            raise SettingError(f"share is {share}.", "Give 0 to 1.")
        if like and condition not in ("tile", "interpolate"):
            raise SettingError(f"like is {like!r} with condition {condition!r}.", "Set condition to tile.")
        if towards and condition != "interpolate":
            raise SettingError(f"towards is {towards!r} with condition {condition!r}.", "Set condition to interpolate.")
        if towards and towards not in self.classes:
            raise SettingError(f"towards is {towards!r}, no class here.", did_you_mean(towards, self.classes))
        self._chosen = self._place(like) if like else None
        if towards:
            self.check(self.classes.index(towards))

    def check(self, label: int) -> None:
        """Refuse a class without training tiles where the condition needs one.

        Raises:
            SettingError: names the class.
        """
        if self.condition == "bank" or len(self._values(label)) or (self._chosen and not self._needs_own()):
            return
        if not any(len(values) for values in self.bank.values):
            raise SettingError(
                f"condition is {self.condition!r}, but the checkpoint has no bank of training embeddings.",
                "Use condition bank (the class alone), or train the checkpoint again.",
            )
        raise SettingError(
            f"condition is {self.condition!r}, but the checkpoint's training had no tile of {self.classes[label]}.",
            "Leave that class out, or use condition bank (the class alone).",
        )

    def __call__(self, label: int, seed: int) -> Told:
        """What the tile of a class and a seed is told.

        Raises:
            SettingError: as `check`.
        """
        self.check(label)
        values = self._values(label)
        if self.condition == "bank":
            i, j = _pair(values, label, seed)
            alone = self.bank.ids[label][i] if len(values) and i == j else ""
            return Told(draw_condition(self.bank, label, seed), alone)
        if self.condition == "prototype":
            alone = self.bank.ids[label][0] if len(values) == 1 else ""
            return Told(values.mean(dim=0), alone)
        generator = torch_generator(seed, "reference", label)
        first = self._chosen or (label, int(torch.randint(len(values), (), generator=generator)))
        if self.condition == "tile":
            return Told(*self._tile(first))
        other = self.classes.index(self.towards) if self.towards else label
        count = len(self._values(other))
        second = other, int(torch.randint(count, (), generator=generator))
        if second == first and count > 1:  # the way to itself is no way
            second = other, (second[1] + 1) % count
        (one, first_id), (two, second_id) = self._tile(first), self._tile(second)
        apart = other if other != label else -1
        middle = (self._values(first[0]).mean(dim=0), self._values(other).mean(dim=0))
        embedding = between(one, two, self.share, *middle)
        return Told(embedding, first_id, "" if second == first else second_id, apart, self.share if apart >= 0 else 0.0)

    def _values(self, label: int) -> Tensor:
        return self.bank.values[label] if label < len(self.bank.values) else torch.empty(0, 0)

    def _tile(self, place: tuple[int, int]) -> tuple[Tensor, str]:
        label, i = place
        return self.bank.values[label][i], self.bank.ids[label][i]

    def _needs_own(self) -> bool:
        return self.condition == "interpolate" and not self.towards

    def _place(self, name: str) -> tuple[int, int]:
        for label, ids in enumerate(self.bank.ids):
            if name in ids:
                return label, ids.index(name)
        known = [i for ids in self.bank.ids for i in ids]
        raise SettingError(
            f"like is {name!r}, which is not among the {len(known)} training tiles that the checkpoint keeps.",
            did_you_mean(name, known) if len(known) < 20 else f"It keeps {', '.join(known[:3])} and others.",
        )


def between(one: Tensor, other: Tensor, share: float, middle: Tensor, other_middle: Tensor) -> Tensor:
    """From one standardised embedding [dim] to another, which belong to classes with these means.

    The means go along a line; what a tile has beyond its class's mean is turned from one to the other, since a line
    between two tiles passes where the tissue is blander than any: m + cos(t) a + sin(t) b, t = share pi / 2, as in
    `draw_condition`. Share 0 gives `one`, share 1 gives `other`.
    """
    angle = torch.tensor(share * math.pi / 2)
    line = (1 - share) * middle + share * other_middle
    if share in (0, 1):
        return other if share else one
    return line + angle.cos() * (one - middle) + angle.sin() * (other - other_middle)


def draw_condition(bank: Bank, label: int, seed: int, noise: float = 0.1) -> Tensor | None:
    """A conditioning embedding [dim] of a class for one seed; none when the bank has no tile of it.

    Two entries a, b are mixed about the class's mean m: m + cos(t) (a - m) + sin(t) (b - m), which keeps
    the class's spread where a plain average would shrink it, and noise is added (in standardised units).
    """
    values = bank.values[label] if label < len(bank.values) else torch.empty(0, 0)
    if len(values) == 0:
        return None
    generator = torch_generator(seed, "condition", label)
    i, j = torch.randint(len(values), (2,), generator=generator).tolist()
    angle = torch.rand((), generator=generator) * math.pi / 2
    middle = values.mean(dim=0)
    mixed = middle + angle.cos() * (values[i] - middle) + angle.sin() * (values[j] - middle)
    if i == j:
        mixed = values[i]
    return mixed + noise * torch.randn(mixed.shape, generator=generator)


def _pair(values: Tensor, label: int, seed: int) -> tuple[int, int]:
    """The two entries that `draw_condition` mixes."""
    if len(values) == 0:
        return 0, 1
    i, j = torch.randint(len(values), (2,), generator=torch_generator(seed, "condition", label)).tolist()
    return i, j
