"""Decoded tiles as one uint8 array, and batches from it.

Batch number k is a pure function of (seed, k): a resumed training asks for batch k and needs no sampler
state, and the same seed gives the same batches whatever ran before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from histosynth.core.errors import DataError, SettingError
from histosynth.core.seeds import derive, numpy_rng
from histosynth.core.types import Batch

if TYPE_CHECKING:
    import torch

Sampling = Literal["balanced", "natural"]


@dataclass(frozen=True)
class TileArray:
    """Decoded tiles of one size.

    Attributes:
        images: uint8 [N, 3, S, S], an array or a memory map.
        labels: int64 [N], index into `classes`.
        ids: N tile ids.
        classes: class names; a class may have no tile.
        groups: N patient (or near-duplicate group) names, or none.
        sources: int64 [N], such as 0 for real and 1 for synthetic, or none. Balanced sampling gives every
            source of a class the same share, so that many synthetic tiles cannot crowd out few real ones.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: list[str]
    classes: tuple[str, ...]
    groups: list[str] | None = None
    sources: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.dtype != np.uint8:
            raise DataError(
                f"Tiles have shape {self.images.shape} and type {self.images.dtype}.",
                "They must be uint8 [N, 3, H, W].",
            )
        if not len(self.images) == len(self.labels) == len(self.ids):
            raise DataError(
                f"{len(self.images)} tiles came with {len(self.labels)} labels and {len(self.ids)} ids.",
                "Give one label and one id a tile.",
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """Edge length in pixels."""
        return self.images.shape[-1]

    @cached_property
    def members(self) -> dict[int, dict[int, np.ndarray]]:
        """Positions of the tiles by class and source, ascending; classes without tiles are left out."""
        sources = np.zeros(len(self), np.int64) if self.sources is None else self.sources
        order = np.lexsort((sources, self.labels))
        keys = np.stack([self.labels[order], sources[order]])
        cuts = np.flatnonzero((np.diff(keys) != 0).any(axis=0)) + 1
        found: dict[int, dict[int, np.ndarray]] = {}
        for part in np.split(order, cuts) if len(order) else []:
            found.setdefault(int(self.labels[part[0]]), {})[int(sources[part[0]])] = part
        return found

    def subset(self, indices: Sequence[int] | np.ndarray) -> TileArray:
        """The tiles at these positions, in this order (copied into memory)."""
        index = np.asarray(indices, dtype=np.int64)
        return TileArray(
            np.ascontiguousarray(self.images[index]),
            self.labels[index],
            [self.ids[i] for i in index],
            self.classes,
            [self.groups[i] for i in index] if self.groups is not None else None,
            self.sources[index] if self.sources is not None else None,
        )

    def joined(self, other: TileArray) -> TileArray:
        """These tiles followed by those of `other`, of the same classes and size.

        These tiles keep their sources (0 if they have none); those of `other` become the next source. Groups
        are dropped.

        Raises:
            DataError: other classes or another size.
        """
        if self.classes != other.classes or self.images.shape[1:] != other.images.shape[1:]:
            raise DataError(
                f"Tiles of classes {self.classes}, {self.size} px, cannot be joined with tiles of classes "
                f"{other.classes}, {other.size} px.",
                "Import both with the same classes and size.",
            )
        own = np.zeros(len(self), np.int64) if self.sources is None else self.sources
        return TileArray(
            np.concatenate([self.images, other.images]),
            np.concatenate([self.labels, other.labels]),
            [*self.ids, *other.ids],
            self.classes,
            sources=np.concatenate([own, np.full(len(other), own.max(initial=0) + 1)]),
        )

    def digest(self) -> str:
        """Hexadecimal SHA-256 of pixels, labels, class names and ids."""
        found = hashlib.sha256(np.ascontiguousarray(self.images).data)
        found.update(np.ascontiguousarray(self.labels).tobytes())
        found.update("\x1f".join([*self.classes, "", *self.ids]).encode())
        return found.hexdigest()

    def counts(self) -> dict[str, int]:
        """Tiles a class, in the order of `classes`."""
        numbers = np.bincount(self.labels, minlength=len(self.classes))
        return {c: int(n) for c, n in zip(self.classes, numbers, strict=True)}

    def tensor(self) -> torch.Tensor:
        """All images as a uint8 torch tensor [N, 3, S, S] (a copy in memory)."""
        import torch

        return torch.from_numpy(np.array(self.images))


def batch_at(
    array: TileArray,
    step: int,
    *,
    batch_size: int,
    sampling: Sampling = "balanced",
    seed: int = 0,
    augment: bool = True,
    share: float | None = None,
) -> Batch:
    """Training batch number `step`.

    Args:
        sampling: "balanced" gives every class that has tiles the same share, and every source of a
            class the same share of it; "natural" follows the counts. Within a class (or the whole set)
            tiles come in a new random order every pass, so every tile is seen equally often.
        augment: a random flip and quarter turn a tile, the eight symmetries of a tile of tissue.
        share: of what is drawn of a class, the part that comes from sources above 0, evenly among them; a class
            that has tiles on one side only is drawn from there. None: every source the same share. The tiles of
            source 0 come in the same order for every share.

    Raises:
        DataError: the array is empty.
        SettingError: an unknown `sampling`, or a share outside of 0 to 1 or with natural sampling.
    """
    import torch

    if len(array) == 0:
        raise DataError("The training set has no tile.", "Check the split and the quality filter.")
    if share is not None and not (0 <= share <= 1 and sampling == "balanced"):
        raise SettingError(
            f"share is {share}, with {sampling} sampling.", "Use 0 to 1 with balanced sampling, or leave it out."
        )
    indices = indices_at(array, step, batch_size, sampling, seed, share)
    images = torch.from_numpy(np.ascontiguousarray(array.images[indices]))
    if augment:
        images = turned(images, symmetries_at(step, batch_size, seed))
    labels = torch.from_numpy(array.labels[indices].astype(np.int64))
    return Batch(images, labels, [array.ids[i] for i in indices])


def symmetry(images: torch.Tensor, which: int) -> torch.Tensor:
    """One of the eight symmetries of the square, 0 (identity) to 7, on [..., H, W]."""
    rotated = images.rot90(which % 4, (-2, -1))
    return rotated.flip(-1) if which >= 4 else rotated


def turned(images: torch.Tensor, which: np.ndarray) -> torch.Tensor:
    """Square tiles [N, C, S, S] on the CPU, each with its own symmetry, 0 to 7 (see `symmetry`)."""
    import torch

    # one symmetry at a time: a few large copies instead of many small ones, gathered by NumPy, which is faster
    result, pixels = torch.empty_like(images), images.numpy()
    for k in np.unique(which).tolist():
        here = np.flatnonzero(which == k)
        result.numpy()[here] = symmetry(torch.from_numpy(pixels[here]), k).numpy()
    return result


def symmetries_at(step: int, batch_size: int, seed: int) -> np.ndarray:
    """The symmetry, 0 to 7, of every tile of training batch number `step`: int64 [batch_size]."""
    return numpy_rng(seed, "symmetry", step).integers(0, 8, size=batch_size)


def indices_at(
    array: TileArray,
    step: int,
    batch_size: int,
    sampling: Sampling,
    seed: int,
    share: float | None = None,
    run: int = 1,
) -> np.ndarray:
    """The rows of training batch number `step`, int64 [batch_size]; see `batch_at`.

    Args:
        run: of balanced sampling, how many tiles of a class come one after another before the next class's.
    """
    start = step * batch_size
    positions = np.arange(start, start + batch_size)
    if sampling == "natural":
        return walk(len(array), positions, seed, "all")
    if sampling != "balanced":
        raise SettingError(f"sampling is {sampling!r}.", "Use balanced or natural.")
    members = array.members
    present = np.array(sorted(members))
    # deal the classes like cards: every run of len(present) turns holds each class once, in a
    # random order, so that any batch is as balanced as its size allows
    rounds, slots = positions // run // len(present), positions // run % len(present)
    drawn = rounds * run + positions % run  # from each class before
    picked = np.empty(batch_size, dtype=np.int64)
    for round_ in np.unique(rounds):
        order = numpy_rng(seed, "deal", int(round_)).permutation(present)
        here = rounds == round_
        picked[here] = order[slots[here]]
    indices = np.empty(batch_size, dtype=np.int64)
    for label in np.unique(picked).tolist():
        kinds = members[label]
        own = picked == label
        turns, draws = _turns(drawn[own], list(kinds), share)
        found = np.empty(len(turns), dtype=np.int64)
        for kind, tiles in kinds.items():
            here = turns == kind
            found[here] = tiles[walk(len(tiles), draws[here], seed, f"class {label} source {kind}")]
        indices[own] = found
    return indices


def _turns(drawn: np.ndarray, kinds: list[int], share: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Whose turn it is at these draws of a class, and how often that source has been drawn from before."""
    others = [k for k in kinds if k > 0]
    if share is None or len(others) in (0, len(kinds)):  # the sources take turns
        return np.array(kinds)[drawn % len(kinds)], drawn // len(kinds)
    # like Bresenham's line: over any stretch the drawn share is within one draw of the wanted one, and a share of
    # one half beside one generator is taking turns
    before = np.floor(drawn * share).astype(np.int64)
    made = np.floor((drawn + 1) * share).astype(np.int64) > before
    turns = np.where(made, np.array(others)[before % len(others)], 0)
    return turns, np.where(made, before // len(others), drawn - before)


def walk(count: int, positions: np.ndarray, seed: int, name: str) -> np.ndarray:
    """Which of `count` things stand at these positions of an endless walk that is reshuffled every pass."""
    found = np.empty(len(positions), dtype=np.int64)
    passes = positions // count
    for number in np.unique(passes).tolist():
        here = passes == number
        found[here] = _order(count, seed, name, number)[positions[here] % count]
    return found


@lru_cache(maxsize=256)
def _order(count: int, seed: int, name: str, number: int) -> np.ndarray:
    return np.random.default_rng(derive(seed, "order", name, number)).permutation(count)
