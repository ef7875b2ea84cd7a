"""The compact denoiser: a small convolutional U-Net with attention at its lower resolutions.

Residual blocks whose normalisation is scaled and shifted by time and condition, as in ADM (Dhariwal and Nichol 2021),
and attention to itself and to the context's tokens, as in latent diffusion (Rombach et al. 2022). At the size of a
laptop's training a transformer first has to learn what a convolution knows from the start: that neighbours belong
together. The condition arrives twice, by attention and, as the mean of the tokens, with the time.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from histosynth.core.errors import SettingError
from histosynth.core.seeds import torch_generator

SCALES = 3
"""Resolutions, each half the one before."""
_GROUPS = 8
_TIMES = 128
_FUSED_FROM = 256
"""Places from which torch's fused attention pays on a CPU."""


@dataclass(frozen=True)
class UNetShape:
    """What fixes the names and shapes of a U-Net's weights."""

    width: int = 64
    """Channels at the highest resolution; the next has twice as many, the lowest and a context token three times."""
    layers: int = 1
    """Residual blocks a resolution on the way down; on the way up there is one more."""
    heads: int = 4
    """Attention heads; they divide the width."""
    tokens: int = 4
    """Context tokens made of one encoder embedding."""
    channels: int = 4
    """Channels of a latent."""

    @property
    def told(self) -> int:
        """Channels of a context token."""
        return SCALES * self.width


class Attention(nn.Module):
    """Attention of places to places or to the context's tokens: [N, L, width] and [N, T, told] -> [N, L, width]."""

    def __init__(self, width: int, told: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(told, width), nn.Linear(told, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])  # the name it has in diffusers, for LoRA
        nn.init.zeros_(self.to_out[0].weight)
        nn.init.zeros_(self.to_out[0].bias)

    def keys(self, told: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [N, heads, T, depth]."""
        return self._split(self.to_k(told)), self._split(self.to_v(told))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What every place reads."""
        query = self._split(self.to_q(x))
        if x.device.type == "cpu" and keys.shape[2] < _FUSED_FROM:
            shares = (query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1)
            read = shares.to(values.dtype) @ values
        else:
            read = F.scaled_dot_product_attention(query, keys, values)
        return self.to_out[0](read.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Block(nn.Module):
    """Two convolutions beside a shortcut, then attention where `heads` is not 0."""

    def __init__(self, inputs: int, outputs: int, time: int, told: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(_GROUPS, inputs), nn.GroupNorm(_GROUPS, outputs)
        self.conv1, self.conv2 = (nn.Conv2d(c, outputs, 3, padding=1) for c in (inputs, outputs))
        self.time = nn.Linear(time, 2 * outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]
        self.norm3 = self.attn1 = self.attn2 = None
        if heads:
            self.norm3 = nn.GroupNorm(_GROUPS, outputs)
            self.attn1, self.attn2 = Attention(outputs, outputs, heads), Attention(outputs, told, heads)

    def tell(self, time: Tensor, context: Tensor) -> tuple[Tensor, Any]:
        """What the block needs to know of the step and of the condition: scale and shift [..., 2 C], and the context's
        keys and values."""
        return self.time(time), self.attn2.keys(context) if self.attn2 is not None else None

    def forward(self, x: Tensor, modulation: Tensor, told: Any) -> Tensor:
        """[N, inputs, h, w] -> [N, outputs, h, w]; `modulation` [N, 2 outputs] and `told` as `tell` gave them."""
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = modulation.to(y.dtype)[:, :, None, None].chunk(2, dim=1)
        y = self.conv2(F.silu(torch.addcmul(shift, self.norm2(y), 1 + scale)))
        x = self.skip(x) + y
        if self.attn1 is None or self.attn2 is None or self.norm3 is None:
            return x
        places = self.norm3(x).permute(0, 2, 3, 1).flatten(1, 2)
        read = self.attn1(places, *self.attn1.keys(places))
        read = read + self.attn2(places, *told)
        return x + read.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class UNetDenoiser(nn.Module):
    """Noisy latents, levels and a context -> the prediction. Fresh weights come from torch's global generator.

    Attributes:
        blocks: all residual blocks in the order of computing.
        gradient_checkpointing: compute the blocks again for the gradients instead of keeping them.

    Raises:
        SettingError: a width that does not fit.
    """

    def __init__(self, shape: UNetShape) -> None:
        super().__init__()
        if shape.width % _GROUPS or shape.width % shape.heads:
            raise SettingError(
                f"width is {shape.width} with {shape.heads} heads.",
                f"Give a multiple of {_GROUPS} that the heads divide.",
            )
        self.shape, self.gradient_checkpointing = shape, False
        widths = [shape.width * (k + 1) for k in range(SCALES)]
        time = 4 * widths[0]
        self.time1, self.time2 = nn.Linear(_TIMES, time), nn.Linear(time, time)
        self.pooled = nn.Linear(shape.told, time)
        nn.init.zeros_(self.pooled.weight)
        nn.init.zeros_(self.pooled.bias)
        self.enter = nn.Conv2d(shape.channels, widths[0], 3, padding=1)
        self.blocks, self.down, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        kept, c = [widths[0]], widths[0]
        for scale, width in enumerate(widths):
            if scale:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                kept.append(c)
            for _ in range(shape.layers):
                self._append(c, width, time, scale)
                c = width
                kept.append(c)
        self._append(c, c, time, SCALES - 1)
        for scale in reversed(range(SCALES)):
            for _ in range(shape.layers + 1):
                self._append(c + kept.pop(), widths[scale], time, scale)
                c = widths[scale]
            if scale:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))
        self.norm, self.leave = nn.GroupNorm(_GROUPS, c), nn.Conv2d(c, shape.channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]
        self.to(memory_format=torch.channels_last)

    def _append(self, inputs: int, outputs: int, time: int, scale: int) -> None:
        heads = self.shape.heads if scale else 0
        self.blocks.append(Block(inputs, outputs, time, self.shape.told, heads))

    def enable_gradient_checkpointing(self) -> None:
        """As diffusers' networks."""
        self.gradient_checkpointing = True

    def time_of(self, levels: Tensor, context: Tensor) -> Tensor:
        """Time and mean condition [..., N, time] of levels [..., N] or [..., 1], and context [N, T, width]."""
        half = _TIMES // 2
        rates = torch.exp(torch.arange(half, device=levels.device) * (-math.log(10_000) / half))
        angle = levels.float()[..., None] * rates
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.time1.weight.dtype)
        time = self.time2(F.silu(self.time1(waves)))
        return F.silu(time + self.pooled(context.mean(dim=1)).to(time.dtype))

    def tell(self, levels: Tensor, context: Tensor) -> list[tuple[Tensor, Any]]:
        """What every block needs to know (see `Block.tell`)."""
        time = self.time_of(levels, context)
        return [block.tell(time, context) for block in self.blocks]  # type: ignore[operator]

    def forward(self, noisy: Tensor, levels: Tensor, context: Tensor) -> Tensor:
        """float [N, C, h, w], int64 [N] and float [N, T, 3 width] -> float32 [N, C, h, w]."""
        return self.run(noisy, self.tell(levels, context))

    def run(self, noisy: Tensor, told: list[tuple[Tensor, Any]]) -> Tensor:
        """`forward`, with what `tell` gave."""
        place, layers = iter(zip(self.blocks, told, strict=True)), self.shape.layers
        x = self.enter(noisy.contiguous(memory_format=torch.channels_last))
        kept = [x]
        for scale in range(SCALES):
            if scale:
                x = self.down[scale - 1](x)
                kept.append(x)
            for _ in range(layers):
                x = self._through(x, *next(place))
                kept.append(x)
        x = self._through(x, *next(place))
        for scale in reversed(range(SCALES)):
            for _ in range(layers + 1):
                x = self._through(torch.cat([x, kept.pop()], dim=1), *next(place))
            if scale:
                # to the size of what was kept, which is not always even
                x = self.up[SCALES - 1 - scale](F.interpolate(x, kept[-1].shape[2:]))
        return self.leave(F.silu(self.norm(x))).float()

    def _through(self, x: Tensor, block: nn.Module, told: tuple[Tensor, Any]) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, *told, use_reentrant=False)  # type: ignore[no-any-return]
        return block(x, *told)  # type: ignore[no-any-return]


class FastUNet:
    """A U-Net prepared for generation: time, condition and the context's keys are computed once a batch, and weights
    are kept in the number format of the products, which autocast would convert again in every call.

    A copy of the weights: train on, and it must be made again.

    Args:
        network: what generation runs.
        kind: number format of the products; None for float32.
    """

    def __init__(self, network: UNetDenoiser, kind: torch.dtype | None = None) -> None:
        self.kind = kind or torch.float32
        self.network = copy.deepcopy(network).requires_grad_(False).eval().to(self.kind)

    @torch.inference_mode()
    def tell(self, context: Tensor, levels: Tensor) -> ToldUNet:
        """Context [N, T, width] and the levels [S] of all steps -> the prediction as a function of x and the step.

        Each context by itself, so that what a tile is told does not depend on how many stand beside it.
        """
        levels = levels.flatten()[:, None]
        rows = [self.network.tell(levels, one) for one in context.to(self.kind).split(1)]
        told = []
        for block in zip(*rows, strict=True):
            films, keys = zip(*block, strict=True)
            told.append((torch.cat(films, dim=1), keys[0] and tuple(torch.cat(k) for k in zip(*keys, strict=True))))
        return ToldUNet(self, told)

    @torch.inference_mode()
    def same_in_every_batch(self, edge: int, largest: int) -> bool:
        """Whether a tile gets the same bits in batches of 1, 2, 4 ... `largest` tiles, and at another place in one.

        Which products are computed how depends on the shapes, on the number format, on the processor and on the number
        of threads, but not on the values: so one look with random ones says it for all.

        Args:
            edge: of the latents.
            largest: a power of two.
        """
        shape, device = self.network.shape, self.network.leave.weight.device
        draw = torch_generator(0, "same in every batch")
        x = torch.randn(largest, shape.channels, edge, edge, generator=draw).to(device)
        context = torch.randn(largest, shape.tokens + 1, shape.told, generator=draw).to(device)
        rows, levels = torch.arange(largest, device=device), torch.tensor([500], device=device)

        def predicted(rows: Tensor) -> Tensor:
            return self.tell(context[rows], levels)(x[rows], 0)

        whole = predicted(rows)
        if not torch.equal(predicted(rows.roll(1)), whole.roll(1, dims=0)):
            return False
        return all(torch.equal(predicted(rows[: 1 << k]), whole[: 1 << k]) for k in range(largest.bit_length() - 1))


class ToldUNet:
    """A `FastUNet` that was told a context and the levels of the steps."""

    def __init__(self, fast: FastUNet, told: list[tuple[Tensor, Any]]) -> None:
        self.fast, self.told = fast, told

    @torch.inference_mode()
    def __call__(self, noisy: Tensor, step: int) -> Tensor:
        """The prediction, float32 [n, C, h, w], of latents at the level of a step; they go with the first n of the
        contexts."""
        n = len(noisy)
        told = [(film[step, :n], keys and tuple(k[:n] for k in keys)) for film, keys in self.told]
        return self.fast.network.run(noisy.to(self.fast.kind), told)
