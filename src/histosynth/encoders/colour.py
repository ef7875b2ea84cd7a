"""`colour`: no network, only colour. A baseline that shows how much colour alone explains.

On the public colorectal sets a colour histogram names the class of more than four tiles in five, so a
network that does no better than this has learnt no morphology.
"""

from __future__ import annotations

import torch
from torch import Tensor

from histosynth.core.device import pick_device
from histosynth.core.errors import DataError
from histosynth.encoders import card

_BINS = 20
DIM = 3 + 3 + 3 * _BINS


class ColourEncoder:
    """Mean (3) and deviation (3) of each channel, and a histogram of each channel over soft bins (3 x 20)."""

    weights_hash = "colour-1"

    def __init__(self, device: torch.device | None = None) -> None:
        self.card = card("colour")
        self.device = device or torch.device("cpu")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, 66] on the CPU.

        Raises:
            DataError: another type or shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise DataError(
                f"colour got images of shape {tuple(images.shape)} and type {images.dtype}.",
                "Give torch.uint8 [N, 3, H, W].",
            )
        if len(images) == 0:
            return torch.empty(0, DIM)
        return torch.cat([self.differentiable(chunk.float() / 127.5 - 1).cpu() for chunk in images.split(32)])

    def differentiable(self, images: Tensor) -> Tensor:
        """float [N, 3, H, W] in [-1, 1] -> float32 [N, 66], with gradients to the images."""
        pixels = ((images.to(self.device).float() + 1) / 2).flatten(2)
        place = pixels.clamp(0, 1) * (_BINS - 1)
        # triangular bins: each pixel shares its weight between its two nearest bins, so gradients flow
        shares = [(1 - (place - b).abs()).clamp_min(0).mean(2) for b in range(_BINS)]
        parts = [pixels.mean(2), pixels.std(2, correction=0), torch.stack(shares, 2).flatten(1)]
        return torch.cat(parts, 1)


def load(device: str = "cpu") -> ColourEncoder:
    """The colour baseline."""
    return ColourEncoder(pick_device(device))
