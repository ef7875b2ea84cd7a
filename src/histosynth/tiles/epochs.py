"""Epochs of tiles as float images, with synthetic tiles mixed in, for training loops that count in epochs.

`loader(array, synthetic, config)` iterates over batches; `EpochDataset` serves torch's own DataLoader. What an epoch
holds is written in `epoch_sampler`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.tiles.batches import TileArray, turned
from histosynth.tiles.epoch_sampler import EpochConfig, EpochSampler, PixelRange

if TYPE_CHECKING:
    import torch

__all__ = ["EpochConfig", "EpochDataset", "EpochLoader", "EpochSampler", "PixelRange", "loader", "scaled"]

# mean and standard deviation of a channel, for pixels in 0 to 1
_SCALES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "0_1": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "-1_1": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class EpochDataset:
    """Tiles for `torch.utils.data.DataLoader`: float image [3, S, S], label, id.

    Use `sampler` of this object for the epochs; position i
    below N is the plain real tile i, and N + j is the synthetic tile j.
    """

    def __init__(
        self, array: TileArray, synthetic: TileArray | None = None, config: EpochConfig = EpochConfig()
    ) -> None:
        """Use the tiles of `array`, and of `synthetic` for the share `gan_ratio`.

        Raises:
            DataError: classes or sizes differ, or what `EpochSampler` refuses.
            SettingError: what `EpochSampler` refuses.
        """
        if synthetic is not None and (
            array.classes != synthetic.classes or array.images.shape[1:] != synthetic.images.shape[1:]
        ):
            raise DataError(
                f"Tiles of classes {array.classes}, {array.size} px, cannot be mixed with tiles of classes "
                f"{synthetic.classes}, {synthetic.size} px.",
                "Import both with the same classes and size.",
            )
        self.array, self.synthetic, self.config = array, synthetic, config
        self.sampler = EpochSampler(
            array.labels,
            config,
            synthetic=None if synthetic is None else synthetic.labels,
            classes=array.classes,
            turns=True,
        )

    def __len__(self) -> int:
        return self.sampler.tiles

    def __getitem__(self, key: int) -> tuple[torch.Tensor, int, str]:
        images, labels, ids = self.batch([key])
        return images[0], int(labels[0]), ids[0]

    def __getitems__(self, keys: Sequence[int]) -> list[tuple[torch.Tensor, int, str]]:
        """What torch's loader asks for when it wants a batch: one read of the memory map for all."""
        images, labels, ids = self.batch(keys)
        return list(zip(images, labels.tolist(), ids, strict=True))

    def batch(self, keys: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Float images [B, 3, S, S] in the pixel range, int64 labels [B], and ids of these positions."""
        import torch

        which, tiles = np.divmod(np.asarray(keys, dtype=np.int64), len(self))
        pixels = np.empty((len(tiles), *self.array.images.shape[1:]), dtype=np.uint8)
        labels = np.empty(len(tiles), dtype=np.int64)
        ids = np.empty(len(tiles), dtype=object)
        first = 0
        for part in (self.array, self.synthetic):
            if part is None:
                continue
            here = np.flatnonzero((tiles >= first) & (tiles < first + len(part)))
            places = tiles[here] - first
            pixels[here], labels[here] = part.images[places], part.labels[places]
            ids[here] = [part.ids[i] for i in places]
            first += len(part)
        images = torch.from_numpy(pixels)
        if which.any():
            images = turned(images, which)
        return scaled(images, self.config.pixel_range), torch.from_numpy(labels), ids.tolist()


class EpochLoader:
    """Batches of an epoch: float32 images [B, 3, S, S], int64 labels [B], ids."""

    def __init__(self, dataset: EpochDataset, workers: int = 0) -> None:
        """Load in this process, or in `workers` others."""
        if workers < 0:
            raise SettingError(f"workers is {workers}.", "Use 0 or more.")
        self.dataset, self.sampler = dataset, dataset.sampler
        self._workers = _worker_loader(dataset, workers) if workers else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated next (see `EpochSampler.set_epoch`)."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.dataset.config.batch)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[str]]]:
        if self._workers is not None:
            yield from self._workers
            return
        keys, size = self.sampler.keys(self.sampler.epoch), self.dataset.config.batch
        for start in range(0, len(keys), size):
            yield self.dataset.batch(keys[start : start + size])


def loader(
    array: TileArray,
    synthetic: TileArray | None = None,
    config: EpochConfig = EpochConfig(),
    *,
    workers: int = 0,
) -> EpochLoader:
    """Iterate over epochs of tiles, with a share of synthetic ones.

    Args:
        array: real tiles, in memory or a memory map.
        synthetic: synthetic tiles of the same classes and size; see `leaks.check_synthetic` for their references.
        workers: processes that read ahead; 0 reads in this one, which is enough for most networks.

    Raises:
        DataError, SettingError: as for `EpochDataset`.
    """
    return EpochLoader(EpochDataset(array, synthetic, config), workers)


def scaled(images: torch.Tensor, pixel_range: PixelRange) -> torch.Tensor:
    """Pixels uint8 [N, 3, H, W] as float32 in a pixel range.

    Raises:
        SettingError: an unknown range.
    """
    import torch

    if pixel_range not in _SCALES:
        raise SettingError(f"pixel_range is {pixel_range!r}.", did_you_mean(pixel_range, _SCALES))
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in _SCALES[pixel_range])
    return images.float().sub_(255 * mean).div_(255 * deviation)


def _worker_loader(dataset: EpochDataset, workers: int) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(
        dataset,  # type: ignore[arg-type]
        batch_size=dataset.config.batch,
        sampler=dataset.sampler,
        num_workers=workers,
        collate_fn=_collate,
        persistent_workers=True,
    )


def _collate(samples: list[tuple[torch.Tensor, int, str]]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    import torch

    images, labels, ids = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), list(ids)
