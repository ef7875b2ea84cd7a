"""A frozen network as an encoder: one door for the pixels, one fixed batch, one precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histosynth.core.errors import DataError, SettingError
from histosynth.core.types import EncoderCard
from histosynth.encoders.door import Door

Precision = Literal["float32", "bfloat16"]

SMALLEST = 8
"""Shortest edge of a tile, pixels; anything smaller is a mistake."""
_FAR = 16.0  # a tile in [-1, 1] whose values reach this far is a tile in grey levels


@contextmanager
def whole_float32() -> Iterator[None]:
    """Convolutions of float32 in float32. By default NVIDIA cards round their inputs to the 10 bits of TF32, and the
    features of a tile would depend on the device."""
    now = torch.backends.cudnn
    with now.flags(now.enabled, now.benchmark, deterministic=now.deterministic, allow_tf32=False):
        yield


class FrozenEncoder:
    """The `Encoder` around a network that maps prepared pixels to features.

    A tile's features do not depend on how many tiles come with it: the network always sees one fixed batch, the last
    one padded. Its weights get no gradients; the images do, in `differentiable`.
    """

    def __init__(
        self,
        card: EncoderCard,
        network: nn.Module,
        door: Door,
        weights_hash: str | Callable[[], str],
        device: torch.device | None = None,
        precision: Precision = "float32",
        micro_batch: int = 16,
    ) -> None:
        if precision not in ("float32", "bfloat16"):
            raise SettingError(f"precision is {precision!r}.", "Use float32 or bfloat16.")
        if precision == "bfloat16" and not card.bfloat16:
            raise SettingError(f"{card.name} is not known to be safe in bfloat16.", "Use precision float32.")
        self.card, self.door, self.precision = card, door, precision
        self.device = device or torch.device("cpu")
        self.micro_batch = micro_batch * (4 if self.device.type == "cuda" else 1)
        self._hash = weights_hash
        network = network.eval().requires_grad_(False)
        if precision == "bfloat16":
            # converted once: autocast would convert frozen weights again for every batch
            for layer in network.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.to(torch.bfloat16)
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @cached_property
    def weights_hash(self) -> str:
        """What names the weights in feature caches; reading a large file takes seconds, so only when asked."""
        return self._hash if isinstance(self._hash, str) else self._hash()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, dim] on the CPU.

        Raises:
            DataError: another type, shape or size.
        """
        self._check(images, images.dtype == torch.uint8, "torch.uint8 [N, 3, H, W]")
        found = [torch.empty(0, self.card.dim)]
        for chunk in images.split(self.micro_batch) if len(images) else ():
            padded = F.pad(chunk, (0, 0, 0, 0, 0, 0, 0, self.micro_batch - len(chunk)))
            found.append(self._features(padded.to(self.device).float())[: len(chunk)].cpu())
        return torch.cat(found)

    def differentiable(self, images: Tensor) -> Tensor:
        """float [N, 3, H, W] in [-1, 1] -> float32 [N, dim] on the encoder's device, with gradients to the images.

        Raises:
            DataError: another type, shape or size, or values that are grey levels.
        """
        self._check(images, images.is_floating_point(), "floats [N, 3, H, W] in [-1, 1]")
        if images.numel() and images.detach().abs().amax() > _FAR:
            raise DataError(
                f"{self.card.name} got floats up to {float(images.detach().amax()):.0f} where [-1, 1] is expected.",
                "Give uint8 tiles to encode, or scale them once: tiles / 127.5 - 1.",
            )
        return self._features((images.to(self.device, torch.float32) + 1) * 127.5)

    def _features(self, grey: Tensor) -> Tensor:
        x = self.door(grey).contiguous(memory_format=torch.channels_last)
        half = self.precision == "bfloat16"
        with whole_float32(), torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            return self.network(x).float()

    def _check(self, images: Tensor, right_type: bool, wanted: str) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not right_type:
            raise DataError(
                f"{self.card.name} got images of shape {tuple(images.shape)} and type {images.dtype}.",
                f"Give {wanted}.",
            )
        if len(images) and min(images.shape[-2:]) < SMALLEST:
            raise DataError(
                f"{self.card.name} got tiles of {images.shape[-2]} x {images.shape[-1]} px.",
                f"It needs at least {SMALLEST} px.",
            )
