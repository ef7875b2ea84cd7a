"""The compact transformer as generation runs it: the same function, without what does not change over the steps.

The context of a tile stays the same in every step, and the levels are known beforehand. So the keys and values of
cross-attention and all time modulations are computed once a batch. There are few context tokens: cross-attention's
projections are folded into its keys and values, softmax((x Wq)(c Wk)') (c Wv) Wo = softmax(x K) V with
K = Wq (c Wk)' and V = (c Wv) Wo a head, which leaves a twelfth of its products. Queries, keys and values of
self-attention are one product. Weights are kept in the number format of the products: autocast would convert frozen
ones again in every call. The residual stream, normalisation and modulation stay in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from histosynth.diffusion.backbone import Backbone
from histosynth.diffusion.convolutional import FastUNet, UNetDenoiser
from histosynth.diffusion.transformer import PooledTime

_EPS = 1e-6
_FUSED_FROM = 256
"""Tokens from which torch's fused attention pays on a CPU; see `build_transformer`."""


@dataclass(frozen=True)
class _Block:
    table: Tensor
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    cross: Any
    cross_bias: Tensor
    up: tuple[Tensor, Tensor]
    down: tuple[Tensor, Tensor]


class FastCompact:
    """A compact transformer prepared for generation. A copy of the weights: train on, and it must be made again.

    Args:
        network: what `build_transformer` gave.
        kind: number format of the products; None for float32.
    """

    def __init__(self, network: Any, kind: torch.dtype | None = None) -> None:
        self.network, self.kind = network, kind or torch.float32
        self.heads, self.depth = network.config.num_attention_heads, network.config.attention_head_dim
        self.width, self.patch = self.heads * self.depth, network.config.patch_size
        self.blocks = [self._block(block) for block in network.transformer_blocks]
        self.last = self._pair(network.proj_out)

    @torch.inference_mode()
    def tell(self, context: Tensor, levels: Tensor) -> FastTold:
        """Context [N, T, width] and the levels [S] of all steps -> the prediction as a function of x and the step."""
        network = self.network
        tokens = network.caption_projection(context)
        embedding = network.adaln_single.emb
        time = embedding.inner.time_proj(levels.flatten())
        time = embedding.inner.timestep_embedder(time.to(context.dtype))
        time = time[:, None] + embedding.project(context.mean(dim=1))  # [S, N, width]
        shifts = network.adaln_single.linear(F.silu(time)).unflatten(-1, (6, self.width))
        ends = network.scale_shift_table + time[:, :, None]
        return FastTold(self, [self._cross(block.cross, tokens) for block in self.blocks], shifts, ends)

    def _cross(self, attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys [N, width, heads * T], their bias [N, 1, heads * T] and values [N, heads * T, width]."""
        split, scale = (self.heads, self.depth), 1 / math.sqrt(self.depth)
        keys, values = (layer(tokens).unflatten(-1, split) for layer in (attention.to_k, attention.to_v))
        query, out = attention.to_q, attention.to_out[0].weight.unflatten(1, split)
        folded = torch.einsum("hdw,nthd->nwht", query.weight.unflatten(0, split), keys).flatten(2) * scale
        bias = torch.einsum("hd,nthd->nht", query.bias.unflatten(0, split), keys).flatten(1)[:, None] * scale
        read = torch.einsum("whd,nthd->nhtw", out, values).flatten(1, 2)
        return folded.to(self.kind).contiguous(), bias.to(self.kind), read.to(self.kind).contiguous()

    def _block(self, block: Any) -> _Block:
        own = block.attn1
        layers = (own.to_q, own.to_k, own.to_v)
        joined = torch.cat([x.weight for x in layers]), torch.cat([x.bias for x in layers])
        return _Block(
            block.scale_shift_table.detach().float(),
            (self._kept(joined[0]), self._kept(joined[1])),
            self._pair(own.to_out[0]),
            block.attn2,
            self._kept(block.attn2.to_out[0].bias),
            self._pair(block.ff.net[0].proj),
            self._pair(block.ff.net[2]),
        )

    def _pair(self, layer: Any) -> tuple[Tensor, Tensor]:
        return self._kept(layer.weight), self._kept(layer.bias)

    def _kept(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.kind).contiguous()


class FastTold:
    """A `FastCompact` that was told a context and the levels of the steps."""

    def __init__(
        self, fast: FastCompact, cross: list[tuple[Tensor, Tensor, Tensor]], shifts: Tensor, ends: Tensor
    ) -> None:
        self.fast, self.cross, self.shifts, self.ends = fast, cross, shifts, ends

    @torch.inference_mode()
    def __call__(self, noisy: Tensor, step: int) -> Tensor:
        """The prediction, float32 [n, C, h, w], of latents at the level of a step; they go with the first n of the
        contexts."""
        fast, n = self.fast, len(noisy)
        place = fast.network.pos_embed
        x = place.proj(noisy.to(place.proj.weight.dtype)).flatten(2).transpose(1, 2).float() + place.pos_embed
        x = x.contiguous()
        for block, (keys, bias, values) in zip(fast.blocks, self.cross, strict=True):
            table = (block.table + self.shifts[step, :n]).unsqueeze(2)
            shift, scale, gate, shift2, scale2, gate2 = table.unbind(1)
            own = self._attend(F.linear(_modulated(x, shift, scale, fast.kind), *block.qkv))
            x = torch.addcmul(x, gate, F.linear(own, *block.out).float())
            scores = torch.baddbmm(bias[:n], x.to(fast.kind), keys[:n])
            shares = scores.unflatten(-1, (fast.heads, -1)).softmax(dim=-1).flatten(2)
            x = x + (torch.bmm(shares, values[:n]) + block.cross_bias)
            hidden = F.linear(_modulated(x, shift2, scale2, fast.kind), *block.up)
            x = torch.addcmul(x, gate2, F.linear(_gelu(hidden), *block.down).float())
        shift, scale = self.ends[step, :n, :, None].unbind(1)
        out = F.linear(_modulated(x, shift, scale, fast.kind), *fast.last).float()
        p, edge = fast.patch, math.isqrt(x.shape[1])
        patches = out.view(n, edge, edge, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return patches.reshape(n, -1, edge * p, edge * p)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Self-attention of [n, L, 3 width]."""
        fast, (n, length) = self.fast, qkv.shape[:2]
        parts = qkv.view(n, length, 3, fast.heads, fast.depth)
        if qkv.device.type != "cpu" or length >= _FUSED_FROM:
            query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        query, key, value = parts.permute(2, 0, 3, 1, 4).reshape(3, n * fast.heads, length, fast.depth).unbind(0)
        empty = query.new_empty(1).expand(len(query), length, length)
        scores = torch.baddbmm(empty, query, key.transpose(1, 2), beta=0, alpha=1 / math.sqrt(fast.depth))
        mixed = torch.bmm(scores.softmax(dim=-1), value)
        return mixed.view(n, fast.heads, length, fast.depth).transpose(1, 2).flatten(2)


Fast = FastCompact | FastUNet
"""A compact network prepared for generation: told a context and the levels, it predicts at a step."""


def fast_network(backbone: Backbone, kind: torch.dtype | None) -> Fast | None:
    """The backbone's network prepared for generation, or None for networks of another build (PixCell, LoRA that is not
    merged) and where folding cross-attention would not pay."""
    network: Any = backbone.network
    if isinstance(network, UNetDenoiser):
        return FastUNet(network, kind)
    if backbone.kind != "compact" or not isinstance(network, PixArtTransformer2DModel):
        return None
    told = (backbone.tokens + 1) * network.config.num_attention_heads
    if not isinstance(network.adaln_single.emb, PooledTime) or told > backbone.width:
        return None
    return FastCompact(network, kind)


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, kind: torch.dtype) -> Tensor:
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=_EPS), 1 + scale).to(kind)


def _gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel 2016), as x times a sigmoid: torch's own takes twice as long on a
    CPU, where a hyperbolic tangent is dearer than a sigmoid."""
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    wide = x.float()
    root = 2 * math.sqrt(2 / math.pi)
    share = torch.addcmul(wide.new_tensor(root), wide, wide, value=0.044715 * root).mul_(wide).sigmoid_()
    return share.mul_(wide).to(x.dtype)
