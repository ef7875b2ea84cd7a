"""The mapping network: code z and class -> w, and the means of w that truncation pulls towards."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from histosynth.core.seeds import torch_generator
from histosynth.gan.layers import EqualLinear, normalise

Centre = Literal["class", "global"]


class Mapping(nn.Module):
    """z [N, z_dim] and class int64 [N] -> w [N, w_dim] (1812.04948).

    With z_dim = 0 it maps the class alone, as the discriminator of StyleGAN2-ADA does; with classes = 0 the code
    alone. `w_mean` is the mean w of every class and `w_avg` the mean of all: truncation towards the mean of its
    class pulls a tile to its own tissue and not to one that does not exist.
    """

    w_mean: Tensor
    w_avg: Tensor

    def __init__(
        self,
        z_dim: int,
        classes: int,
        w_dim: int,
        depth: int,
        lr_multiplier: float = 0.01,
        *,
        add: bool = False,
        equalised: bool = True,
    ) -> None:
        super().__init__()
        self.z_dim, self.add = z_dim, add
        length = z_dim if add else w_dim
        # small at first where it is added: the code must stay visible
        self.embedding = nn.Parameter(torch.randn(classes, length) * (0.02 if add else 1.0)) if classes else None
        widths = [z_dim + (length if classes and not add else 0)] + [w_dim] * depth
        self.layers = nn.ModuleList(
            EqualLinear(a, b, lr_multiplier=lr_multiplier, active=True, equalised=equalised)
            for a, b in pairwise(widths)
        )
        if z_dim:
            self.register_buffer("w_mean", torch.zeros(max(classes, 1), w_dim))
            self.register_buffer("w_avg", torch.zeros(w_dim))
            self.register_load_state_dict_pre_hook(_fill_average)

    def forward(
        self, z: Tensor | None, labels: Tensor | None, truncation: float = 1.0, centre: Centre = "class"
    ) -> Tensor:
        """w, moved towards a mean: mean + truncation (w - mean). Labels are not read where there is no class."""
        x = normalise(z) if z is not None else None
        if self.embedding is not None:
            y = self.embedding[labels]
            if self.add and x is not None:
                x = x + y
            else:
                y = normalise(y)
                x = y if x is None else torch.cat([x, y], dim=1)
        for layer in self.layers:
            x = layer(x)
        assert x is not None
        return x if truncation == 1.0 else self.mean(labels, centre).lerp(x, truncation)

    def mean(self, labels: Tensor | None, centre: Centre = "class") -> Tensor:
        """The w that truncation pulls towards: [N, w_dim], or [1, w_dim] where it is the same for all."""
        if centre == "global":
            return self.w_avg[None]
        return self.w_mean if self.embedding is None or labels is None else self.w_mean[labels]

    @torch.no_grad()
    def measure_mean(self, draws: int = 2048) -> None:
        """Set `w_mean` to the mean over the same `draws` codes of every class, and `w_avg` to their mean."""
        z = torch.randn(draws, self.z_dim, generator=torch_generator(0, "w mean")).to(self.w_mean.device)
        for label in range(len(self.w_mean)):
            labels = torch.full((draws,), label, device=z.device)
            self.w_mean[label] = self(z, labels).mean(dim=0)
        self.w_avg.copy_(self.w_mean.mean(dim=0))


def _fill_average(module: nn.Module, tensors: dict[str, Any], prefix: str, *_: object) -> None:
    """Checkpoints from before `w_avg` have the means of the classes only."""
    if f"{prefix}w_avg" not in tensors and f"{prefix}w_mean" in tensors:
        tensors[f"{prefix}w_avg"] = tensors[f"{prefix}w_mean"].float().mean(dim=0)
