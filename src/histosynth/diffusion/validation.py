"""The denoising error on tiles of other patients, always the same tiles, noise and levels; and the best weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from histosynth.core.precision import autocast
from histosynth.core.seeds import numpy_rng, torch_generator
from histosynth.core.training import Averages
from histosynth.core.types import Encoder
from histosynth.diffusion.cache import embed, open_cache
from histosynth.diffusion.config import DiffusionConfig
from histosynth.diffusion.model import LatentDiffusion
from histosynth.diffusion.noise import LEVELS
from histosynth.tiles.batches import TileArray

_CHUNK = 32


@dataclass
class Best:
    """The averaged weights with the lowest loss on held-out tiles so far."""

    loss: float = float("inf")
    step: int = -1
    values: dict[str, Tensor] = field(default_factory=dict)

    def or_better(self, loss: float, step: int, averages: Averages) -> Best:
        """These, or the present ones if their loss is lower."""
        if not loss < self.loss:
            return self
        return Best(loss, step, {name: value.clone() for name, value in averages.values.items()})

    @torch.no_grad()
    def put_into(self, parameters: dict[str, nn.Parameter]) -> None:
        """Write these weights into the networks."""
        for name, parameter in parameters.items():
            parameter.copy_(self.values[name])

    def state(self) -> dict[str, Any]:
        """For the resume state; text, because JSON has no infinity."""
        return {"loss": str(self.loss), "step": self.step, "values": self.values}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Best:
        """From `state`."""
        return cls(float(state["loss"]), state["step"], state["values"])


class Validation:
    """Measures the loss on held-out tiles, told embedding and class, by the weights of the training's own loss."""

    def __init__(
        self, latents: Tensor, embeddings: Tensor, labels: Tensor, config: DiffusionConfig, device: torch.device
    ) -> None:
        n = len(latents)
        self.latents, self.embeddings, self.labels = latents, embeddings, labels
        # the levels stand evenly over the whole range, in an order of their own
        places = (torch.arange(n) + 0.5) * LEVELS / n
        self.levels = places.long()[torch.from_numpy(numpy_rng(config.seed, "held-out levels").permutation(n))]
        self.noise = torch.randn(latents.shape, generator=torch_generator(config.seed, "held-out noise"))
        self.config, self.device = config, device
        self.loss, self.step = float("nan"), -1

    @classmethod
    def of(
        cls, model: LatentDiffusion, data: TileArray, encoder: Encoder, config: DiffusionConfig, folder: Path,
        device: torch.device,
    ) -> Validation:  # fmt: skip
        """Of a seeded choice of the tiles, in latents and embeddings that are kept in `folder`."""
        order = numpy_rng(config.seed, "held-out tiles").permutation(len(data))[: config.validate_tiles]
        picked = np.sort(order)
        some = data.subset(picked)
        cache = open_cache(folder, some, model.backbone, embed(folder, some, encoder), config, device, views=1)
        latents = cache.batch(np.arange(len(some)), np.zeros(len(some), dtype=np.int64))
        labels = torch.from_numpy(some.labels.astype(np.int64))
        return cls(latents, torch.from_numpy(np.array(cache.embeddings)), labels, config, device)

    @torch.no_grad()
    def measure(self, model: LatentDiffusion, step: int) -> float:
        """The loss of the model as it stands; kept as `loss`, with its `step`."""
        process, where, total = model.backbone.process, self.device, 0.0
        model.transformer.eval()
        for at in range(0, len(self.latents), _CHUNK):
            part = slice(at, at + _CHUNK)
            clean, noise = self.latents[part].to(where), self.noise[part].to(where)
            levels, labels = self.levels[part].to(where), self.labels[part].to(where)
            told = model.conditioner.standardise(self.embeddings[part].to(where))
            context, _ = model.conditioner(told, labels)
            with autocast(where, self.config.precision):
                predicted = model.backbone.denoise(process.add(clean, noise, levels), levels, context)
            error = (predicted - process.target(clean, noise, levels)).square().mean(dim=(1, 2, 3))
            if self.config.min_snr:
                error = process.weight(levels, self.config.min_snr) * error
            total += error.double().sum().item()
        model.transformer.train()
        self.loss, self.step = total / len(self.latents), step
        return self.loss
