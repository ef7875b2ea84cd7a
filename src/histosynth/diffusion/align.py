"""Representation alignment (Yu et al. 2024, arXiv:2410.06940): the denoiser's middle tokens, through a small
projection, are drawn towards what a frozen encoder sees at the same place of the clean tile. Early in training this
spares the denoiser from finding tissue structure out by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histosynth.autoencoder.network import to_signed
from histosynth.core.errors import SettingError
from histosynth.core.types import Encoder
from histosynth.diffusion.backbone import Compact
from histosynth.diffusion.cache import encoder_key
from histosynth.diffusion.config import DiffusionConfig
from histosynth.diffusion.model import LatentDiffusion
from histosynth.diffusion.transformer import TransformerShape

_SOME = 1024


class Alignment:
    """Listens to a block of the denoiser and compares its tokens with feature maps.

    Attributes:
        project: the projection that is trained along and thrown away afterwards.
        name: identifies the maps.
    """

    def __init__(
        self, block: nn.Module, width: int, features: int, mapper: Callable[[Tensor], Tensor], name: str
    ) -> None:
        self.project = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, features))
        self._mapper, self.name = mapper, name
        self._middle, self._spread = torch.zeros(features, 1, 1), torch.ones(features, 1, 1)
        self._heard: Tensor | None = None
        block.register_forward_hook(self._listen)

    @classmethod
    def of(cls, model: LatentDiffusion, encoder: Encoder, config: DiffusionConfig) -> Alignment | None:
        """What `config.align` asks for; the projection's weights come from torch's global generator.

        Raises:
            SettingError: an encoder without feature maps, or a denoiser without a block in the middle.
        """
        if not config.align:
            return None
        maps: Any = getattr(encoder, "maps", None)
        if maps is None:
            raise SettingError(
                f"align is {config.align}, but the encoder {encoder.card.name!r} gives no feature maps.",
                "Use encoder=tissue-tiny, or align=0.",
            )
        backbone = model.backbone
        if not isinstance(backbone, Compact) or not isinstance(backbone.shape, TransformerShape):
            raise SettingError(
                f"align is {config.align}.", "Start from a transformer, or set init=none and backbone=transformer."
            )
        grid = backbone.latent[1] // backbone.shape.patch

        @torch.no_grad()
        def mapper(images: Tensor) -> Tensor:
            # the finest maps that are not finer than the tokens, or else the coarsest that are
            found = sorted(maps(to_signed(images)), key=lambda m: m.shape[-1])
            fit = [m for m in found if m.shape[-1] <= grid]
            return F.adaptive_avg_pool2d((fit[-1] if fit else found[0]).float(), grid)

        features = mapper(torch.zeros(1, 3, config.size, config.size, dtype=torch.uint8)).shape[1]
        blocks: Any = getattr(backbone.network, "transformer_blocks", None)
        if blocks is None:  # peft's wrapper
            blocks = backbone.network.get_base_model().transformer_blocks
        middle = blocks[max(0, (len(blocks) - 1) // 2)]
        return cls(middle, backbone.width, features, mapper, f"{encoder_key(encoder)} {grid}")

    def mapper(self, images: Tensor) -> Tensor:
        """uint8 tiles [n, 3, S, S] -> feature maps float32 [n, K, g, g], g tokens along an edge."""
        return self._mapper(images)

    def measure(self, maps: np.ndarray) -> None:
        """Take mean and deviation a feature from the maps of one view, [N, K, g, g].

        Features that are never negative point the same way everywhere; what differs from place to place is the rest.
        """
        some = torch.from_numpy(maps[:_SOME].astype(np.float32))
        self._middle = some.mean(dim=(0, 2, 3))[:, None, None]
        spread = some.std(dim=(0, 2, 3))
        self._spread = spread.clamp_min(0.1 * spread.mean().clamp_min(1e-6))[:, None, None]

    def loss(self, maps: Tensor | None) -> Tensor:
        """One minus the mean cosine between projected tokens and standardised maps [n, K, g, g], of the last forward
        pass."""
        if maps is None or self._heard is None:
            raise SettingError("align is set, but there are no feature maps.", "Delete the run's cache and repeat.")
        tokens, self._heard = self._heard, None
        with torch.autocast(tokens.device.type, enabled=False):
            maps = (maps - self._middle.to(maps)) / self._spread.to(maps)
            seen = maps.flatten(2).transpose(1, 2)
            told = self.project(tokens.float())
            return 1 - F.cosine_similarity(told, seen, dim=-1).mean()

    def _listen(self, block: nn.Module, inputs: Any, output: Any) -> None:
        self._heard = output[0] if isinstance(output, tuple) else output
