"""A compact denoiser: diffusers' PixArt transformer (Chen et al. 2023), small, and told its condition twice.

PixArt hears its condition by cross-attention alone. A network of a few million weights learns faster
when the mean of the context also shifts the time embedding, as in DiT (Peebles and Xie 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from histosynth.core.errors import SettingError


@dataclass(frozen=True)
class TransformerShape:
    """What fixes the names and shapes of a denoiser's weights."""

    width: int = 192
    """Channels of a token."""
    layers: int = 6
    """Blocks of self-attention, cross-attention and feed-forward."""
    heads: int = 4
    """Attention heads; they divide the width."""
    tokens: int = 4
    """Context tokens made of one encoder embedding."""
    patch: int = 2
    """Edge of a token's patch, in latents."""
    channels: int = 4
    """Channels of a latent."""

    @property
    def told(self) -> int:
        """Channels of a context token."""
        return self.width


class PooledTime(nn.Module):
    """Stands in front of PixArt's time embedding and adds the projected mean of the context."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.project = nn.Linear(width, width)

    def forward(self, timestep: Tensor, pooled: Tensor, batch_size: int, hidden_dtype: torch.dtype) -> Tensor:
        time = self.inner(
            timestep, resolution=None, aspect_ratio=None, batch_size=batch_size, hidden_dtype=hidden_dtype
        )
        return time + self.project(pooled.to(time.dtype))


def build_transformer(shape: TransformerShape, latent_size: int) -> nn.Module:
    """A denoiser with fresh weights for latents of `latent_size` x `latent_size`.

    Raises:
        SettingError: the heads do not divide the width.
    """
    if shape.width % shape.heads or (shape.width // shape.heads) % 2:
        raise SettingError(f"width is {shape.width} with {shape.heads} heads.", "Give a width that 2 * heads divides.")
    model: Any = PixArtTransformer2DModel(  # diffusers loads it lazily, so no type checker knows it
        num_attention_heads=shape.heads,
        attention_head_dim=shape.width // shape.heads,
        in_channels=shape.channels,
        out_channels=shape.channels,
        num_layers=shape.layers,
        cross_attention_dim=shape.width,
        sample_size=latent_size,
        patch_size=shape.patch,
        caption_channels=shape.width,
        use_additional_conditions=False,
        interpolation_scale=1,
    )
    if (latent_size // shape.patch) ** 2 <= 256:
        # with few tokens torch's fused attention costs a third of a training step on a CPU, this a tenth
        model.set_default_attn_processor()
    model.adaln_single.emb = PooledTime(model.adaln_single.emb, shape.width)
    _initialise(model)
    return model


def denoise(model: nn.Module, noisy: Tensor, levels: Tensor, context: Tensor) -> Tensor:
    """The prediction of v, float32 [N, C, H, W].

    Args:
        model: what `build_transformer` gave, with or without LoRA around it.
        noisy: float [N, C, H, W].
        levels: int64 [N], 0 to 999.
        context: float [N, T, width].
    """
    output = model(
        noisy,
        encoder_hidden_states=context,
        timestep=levels,
        added_cond_kwargs={"pooled": context.mean(dim=1)},
        return_dict=False,
    )[0]
    return output.float()


@torch.no_grad()
def _initialise(model: Any) -> None:
    """DiT's start: every block is nearly an identity and the output is zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patch = model.pos_embed.proj
    nn.init.xavier_uniform_(patch.weight.view(len(patch.weight), -1))
    nn.init.zeros_(patch.bias)
    time = model.adaln_single.emb
    for layer in (time.inner.timestep_embedder.linear_1, time.inner.timestep_embedder.linear_2):
        nn.init.normal_(layer.weight, std=0.02)
    nn.init.normal_(model.adaln_single.linear.weight, std=0.02)
    for layer in (time.project, model.proj_out, *(block.attn2.to_out[0] for block in model.transformer_blocks)):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
