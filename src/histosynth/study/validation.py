"""The score by which a training chooses its weights: the kernel distance to validation tiles."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from histosynth import encoders
from histosynth.core.progress import say
from histosynth.evaluate.kernel import mmd2

if TYPE_CHECKING:
    import numpy as np
    import torch

    from histosynth.core.types import Encoder
    from histosynth.tiles.batches import TileArray

FEWEST = 16
"""With fewer validation tiles, chance would choose."""


@dataclass
class KidScore:
    """KID (the unbiased squared MMD with a cubic kernel, 1801.01401) on the features of an encoder; see
    `histosynth.core.types.Score`. The features of the real tiles are kept from call to call."""

    encoder: str = "tissue-tiny"
    device: str = "auto"
    _real: tuple[torch.Tensor, np.ndarray] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """What the card calls it."""
        return f"KID on {self.encoder}"

    @cached_property
    def _network(self) -> Encoder:
        return encoders.load(self.encoder, self.device)

    def __call__(self, real: torch.Tensor, fake: torch.Tensor) -> float:
        """uint8 [N, 3, S, S] and [M, 3, S, S], N and M at least 2 -> KID; the smaller, the more alike."""
        if self._real is None or self._real[0] is not real:
            self._real = real, self._features(real)
        return mmd2(self._real[1], self._features(fake))

    def _features(self, images: torch.Tensor) -> np.ndarray:
        return self._network.encode(images).double().numpy()


def validation(tiles: TileArray, encoder: str, device: str) -> tuple[TileArray, KidScore] | tuple[None, None]:
    """The tiles and the score that a training may choose by; nothing where there are too few tiles.

    Raises:
        SettingError, CheckpointError: the encoder does not exist, or its weights are missing.
    """
    if len(tiles) < FEWEST:
        say(f"{len(tiles)} validation tiles are too few to choose weights by, so the last ones are kept.")
        return None, None
    score = KidScore(encoder, device)
    score._network  # noqa: B018  a missing weight file must show before hours of training
    return tiles, score
