"""Batches for the training, read ahead by threads where they are asked for."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np
import torch

from histosynth.core.errors import DataError
from histosynth.core.progress import say
from histosynth.core.types import Batch
from histosynth.gan.config import GanConfig
from histosynth.gan.layers import group_size
from histosynth.tiles.batches import TileArray, indices_at, symmetries_at, turned

UNLABELLED = ("tissue",)
"""The one class of a training without classes."""


def usable(
    data: TileArray, validation: TileArray | None, config: GanConfig
) -> tuple[TileArray, TileArray | None, GanConfig]:
    """The tiles as the training takes them; without labels, it is one without classes.

    Validation tiles of classes that no training tile has are left out: they would choose weights by tissue that the
    generator never saw.

    Raises:
        DataError: no tile, tiles that are not square or of another size than `config.size`, labels for some tiles
            only, or validation tiles that are training tiles, unlabelled or of other classes.
    """
    _check_tiles(data, config)
    known = _labelled(data)
    if config.conditional and not known.any():
        config = replace(config, conditional=False)
    if config.conditional and not known.all():
        raise DataError(
            f"{np.count_nonzero(~known)} of {len(data)} tiles have no class.",
            "Label all tiles, or set conditional=no to learn without classes.",
        )
    if validation is not None:
        _check_tiles(validation, config)
        if config.conditional and validation.classes != data.classes:
            raise DataError(
                f"The validation tiles have the classes {validation.classes}, the training tiles {data.classes}.",
                "Take both from the same tile set.",
            )
        if config.conditional and not (named := _labelled(validation)).all():
            raise DataError(f"{np.count_nonzero(~named)} of {len(validation)} validation tiles have no class.",
                            "Label all tiles, or leave them out.")  # fmt: skip
        if both := set(validation.ids) & set(data.ids):
            raise DataError(
                f"{len(both)} validation tiles are training tiles ({min(both)}).",
                "Take them from the split val.",
            )
    if config.conditional:
        bare = [label for label, count in data.counts().items() if not count]
        if bare:
            say(f"No training tile is {' or '.join(bare)}, so the GAN will not know what they look like.")
        if bare and validation is not None:
            seen = np.flatnonzero(np.isin(validation.labels, list(data.members)))
            validation = validation.subset(seen) if len(seen) else None
        return data, validation, config
    return _without_classes(data), None if validation is None else _without_classes(validation), config


class Feed:
    """Batch number k on demand; a context manager, since it may hold threads."""

    def __init__(
        self,
        data: TileArray,
        config: GanConfig,
        steps: int,
        pin: bool = False,
        latents: tuple[np.ndarray, np.ndarray] | None = None,
        processes: int = 1,
    ) -> None:
        """Args:
        pin: in memory from which a GPU can copy while it computes.
        latents: what batches hold instead of pixels, with the symmetries of every tile (`latents_of`).
        processes: that share a batch.
        """
        self._latents = latents
        self._data, self._config, self._steps, self._pin = data, config, steps, pin
        self._pool = ThreadPoolExecutor(config.workers) if config.workers else None
        self._ahead: OrderedDict[int, Future[Batch]] = OrderedDict()
        self._present = data.members  # found once, before threads ask for it
        part = config.batch // (config.accumulate * processes)
        self._run = group_size(part, config.mbstd_group) if config.class_groups else 1
        # the minibatch standard deviation compares every (part / run)th tile of a part
        places = np.arange(config.batch).reshape(-1, part // self._run, self._run)
        self._places = places.transpose(0, 2, 1).ravel()

    def __call__(self, step: int) -> Batch:
        """The batch of step `step`: `config.batch` tiles, always whole."""
        if self._pool is None:
            return self._read(step)
        for later in range(step, min(step + 2 * self._config.workers, self._steps)):
            if later not in self._ahead:
                self._ahead[later] = self._pool.submit(self._read, later)
        return self._ahead.pop(step).result()

    def _read(self, step: int) -> Batch:
        config, data = self._config, self._data
        rows = indices_at(data, step, config.batch, config.sampling, config.seed, run=self._run)[self._places]
        views = symmetries_at(step, config.batch, config.seed)
        if self._latents is None:
            images = turned(torch.from_numpy(np.ascontiguousarray(data.images[rows])), views)
        else:  # of the symmetries that a tile was encoded in, the one that is drawn
            latents, turns = self._latents
            images = torch.from_numpy(latents[views % turns.shape[1], rows].astype(np.float32))
        labels = torch.from_numpy(data.labels[rows].astype(np.int64))
        return Batch(images.pin_memory() if self._pin else images, labels, [data.ids[i] for i in rows])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _check_tiles(data: TileArray, config: GanConfig) -> None:
    if len(data) == 0:
        raise DataError("The training set has no tile.", "Check the split and the quality filter.")
    height, width = data.images.shape[2:]
    if height != width:
        raise DataError(f"The tiles are {height} x {width} px, not square.", "Cut or import them as squares.")
    if height != config.size:
        raise DataError(
            f"The tiles are {height} x {width} px, but size is {config.size}.",
            "Read the tiles at that size, or set size to theirs.",
        )


def _labelled(data: TileArray) -> np.ndarray:
    return (data.labels >= 0) & (data.labels < len(data.classes))


def _without_classes(data: TileArray) -> TileArray:
    return replace(data, labels=np.zeros(len(data), np.int64), classes=UNLABELLED)
