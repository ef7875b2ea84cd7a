"""How unlike two tiles look to a frozen encoder, with gradients: the perceptual term of projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from histosynth import encoders
from histosynth.core.types import Encoder
from histosynth.encoders.lpips import BACKBONES, Lpips, load_lpips
from histosynth.encoders.weights import find

DEFAULT = "tissue-tiny"


class Likeness:
    """A distance of 0 for the same tile. Compare many candidates with one target: its features are kept."""

    def __init__(self, part: Encoder | Lpips) -> None:
        self.part = part
        self.name = f"lpips-{part.net}" if isinstance(part, Lpips) else part.card.name

    @torch.no_grad()
    def prepare(self, target: Tensor) -> list[Tensor]:
        """What is kept of targets, float [N, 3, S, S] in [-1, 1]."""
        return [target] if isinstance(self.part, Lpips) else self._see(target)

    def __call__(self, images: Tensor, prepared: list[Tensor]) -> Tensor:
        """float [N, 3, S, S] in [-1, 1] and `prepare` of as many targets (or of one) -> float32 [N]."""
        if isinstance(self.part, Lpips):
            return self.part.differentiable(images, prepared[0].expand_as(images))
        found = [(a - b).square().sum(dim=1).flatten(1).mean(dim=1)
                 for a, b in zip(self._see(images), prepared, strict=True)]  # fmt: skip
        return torch.stack(found).mean(dim=0)

    def _see(self, images: Tensor) -> list[Tensor]:
        """Feature maps, or the feature vector, of unit length at every place (1801.03924, without its weights)."""
        part: Any = self.part
        seen = part.maps(images) if hasattr(part, "maps") else [part.differentiable(images)[:, :, None, None]]
        return [F.normalize(x, dim=1, eps=1e-6) for x in seen]


def load_likeness(name: str, device: str) -> Likeness | None:
    """The distance called `name`: an encoder, lpips-alex, lpips-vgg, lpips-squeeze, auto or none.

    auto is LPIPS where its weights are, else the shipped encoder.

    Raises:
        SettingError: no encoder has this name.
        CheckpointError: its weights are missing.
    """
    if name == "none":
        return None
    if name == "auto":
        name = "lpips-alex" if find(BACKBONES["alex"]) else DEFAULT
    for net, card in BACKBONES.items():
        if name == card.name:
            return Likeness(load_lpips(net, device=device))  # type: ignore[arg-type]
    return Likeness(encoders.load(name, device))
