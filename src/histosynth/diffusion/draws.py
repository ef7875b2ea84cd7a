"""What a training step sees: tiles, noise, levels, and what each tile is told. All of it follows from (seed, step)."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from histosynth.core.seeds import numpy_rng, torch_generator
from histosynth.diffusion.cache import Cache
from histosynth.diffusion.config import DiffusionConfig
from histosynth.diffusion.noise import draw_levels
from histosynth.tiles.batches import TileArray, batch_at


@dataclass
class Part:
    """A micro-batch of n tiles.

    Attributes:
        clean, noise: float32 [n, C, h, w].
        levels, labels: int64 [n].
        embeddings: float32 [n, dim], standardised.
        told_embedding, told_class: bool [n].
        maps: float32 [n, K, h', w'], or none.
    """

    clean: Tensor
    noise: Tensor
    levels: Tensor
    labels: Tensor
    embeddings: Tensor
    told_embedding: Tensor
    told_class: Tensor
    maps: Tensor | None = None

    def split(self, size: int, device: torch.device) -> list[Part]:
        """Micro-batches of `size` tiles on a device."""
        pieces = {f.name: value.split(size) for f in fields(self) if (value := getattr(self, f.name)) is not None}
        count = len(pieces["clean"])
        return [Part(**{name: piece[i].to(device) for name, piece in pieces.items()}) for i in range(count)]


class Source:
    """Deals the batches of a training."""

    def __init__(
        self, data: TileArray, cache: Cache, embeddings: Tensor, config: DiffusionConfig, device: torch.device
    ) -> None:
        self.cache, self.embeddings, self.config, self.device = cache, embeddings, config, device
        self.labels = data.labels.astype(np.int64)
        # positions for ids and no pixels: only which tiles come is asked for
        none = np.zeros((len(data), 3, 1, 1), dtype=np.uint8)
        names = [str(i) for i in range(len(data))]
        self.order = TileArray(none, data.labels, names, data.classes, sources=data.sources)

    def parts(self, step: int) -> list[Part]:
        """The micro-batches of a step. How many there are changes nothing in what is drawn."""
        config = self.config
        n, seed = config.batch, config.seed
        dealt = batch_at(self.order, step, batch_size=n, sampling=config.sampling, seed=seed, augment=False)
        tiles = np.array([int(i) for i in dealt.ids])
        rng = numpy_rng(seed, "diffusion step", step)
        views = rng.integers(0, len(self.cache.latents), n)
        clean = self.cache.batch(tiles, views)
        levels = draw_levels(config.levels, n, rng)
        # one draw a tile decides what it is told: nothing, the embedding, the class, or both
        lot = torch.from_numpy(rng.random(n))
        nothing = lot < config.cfg_dropout
        no_class = lot < config.cfg_dropout + config.class_dropout
        no_embedding = nothing | (lot > 1 - config.embedding_dropout)
        whole = Part(
            clean,
            torch.randn(clean.shape, generator=torch_generator(seed, "noise", step)),
            levels,
            torch.from_numpy(self.labels[tiles]),
            self.embeddings[tiles],
            ~no_embedding,
            ~no_class,
            self.cache.maps_of(tiles, views),
        )
        return whole.split(n // config.accumulate, self.device)
