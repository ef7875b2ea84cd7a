"""PixCell's transformer: diffusers' PixArt (Apache-2.0) with an embedding for "not told" and positions for its tokens.

The names and shapes of the weights are those of PixCell-256 and PixCell-1024 as published. The module of code that
lies beside the published weights is neither needed nor read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from histosynth.core.errors import CheckpointError
from histosynth.core.types import EncoderCard
from histosynth.diffusion.pixcell.shape import POSITIONS, TOKEN_POSITIONS, UNCOND, PixCellShape
from histosynth.encoders.weights import fit


class TokenPositions(nn.Module):
    """Adds to each of several embeddings where in the tile its part lies."""

    y_pos_embed: Tensor

    def __init__(self, shape: PixCellShape) -> None:
        super().__init__()
        edge = math.isqrt(shape.tokens)
        # in the coordinates of PixCell-1024's latents (divided by 2), moved towards the middle of the parts
        coordinates = torch.arange(edge) * (shape.grid / edge / 2) + shape.grid // shape.tokens
        self.register_buffer("y_pos_embed", sinusoids(shape.dim, coordinates)[None])

    def forward(self, embeddings: Tensor) -> Tensor:
        return (embeddings + self.y_pos_embed).to(embeddings.dtype)


class PixCellTransformer(PixArtTransformer2DModel):
    """The denoiser: latents [N, 16, h, w], levels [N] and embeddings [N, T, dim] -> [N, 32, h, w].

    `state_dict` has the 603 tensors of the published names, `caption_projection.uncond_embedding` [T, dim], and with
    T > 1 `y_pos_embed.y_pos_embed` [1, T, dim]. The weights of a new one are random.

    Args:
        shape: widths and depths; PixCell-256 by default.
    """

    config_name = "config.json"

    def __init__(self, shape: PixCellShape | None = None) -> None:
        self_shape = shape or PixCellShape()
        super().__init__(**self_shape.options())
        self.shape = self_shape
        told = torch.randn(self_shape.tokens, self_shape.dim) / self_shape.dim**0.5
        self.caption_projection.register_buffer("uncond_embedding", told)
        self.y_pos_embed = TokenPositions(self_shape) if self_shape.tokens > 1 else None

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, **options: Any) -> Any:
        """As `PixArtTransformer2DModel.forward`; the embeddings come raw, [N, T, dim]."""
        if self.y_pos_embed is not None:
            encoder_hidden_states = self.y_pos_embed(encoder_hidden_states)
        options.setdefault("added_cond_kwargs", {"resolution": None, "aspect_ratio": None})
        return super().forward(hidden_states, encoder_hidden_states=encoder_hidden_states, timestep=timestep, **options)

    def slice_attention(self, on: bool = True) -> None:
        """Compute attention a head at a time: less memory, slower, the same up to rounding."""
        for module in self.modules():
            if isinstance(module, Attention):
                if on:
                    module.set_attention_slice(1)
                else:
                    module.set_processor(AttnProcessor2_0())


def sinusoids(width: int, coordinates: Tensor) -> Tensor:
    """The position embedding of a square grid (Vaswani et al. 2017, in two dimensions), float32 [len^2, width].

    The first half of the channels tells the column, the second the row, each as sines and then cosines.

    Args:
        coordinates: of the columns, and of the rows, in patches.
    """
    rates = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = coordinates.double()[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [n, width / 2]
    n = len(coordinates)
    columns, rows = line[None].expand(n, n, -1), line[:, None].expand(n, n, -1)
    return torch.cat([columns, rows], dim=2).reshape(n * n, width).float()


def grid_positions(shape: PixCellShape) -> Tensor:
    """What PixArt adds to the patches, float32 [1, grid^2, width]."""
    return sinusoids(shape.width, torch.arange(shape.grid) / shape.interpolation_scale)[None]


def place(tensors: dict[str, Tensor], shape: PixCellShape, card: EncoderCard, path: Path) -> PixCellTransformer:
    """A transformer with these weights, float32 on the CPU, frozen and in evaluation mode.

    Args:
        tensors: under diffusers' names. A stored position embedding is used as it is.
        card: for messages.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape, no float, or not finite.
    """
    tensors = dict(tensors)
    positions = tensors.pop(POSITIONS, None)
    usual = grid_positions(shape)
    if positions is not None and positions.shape != usual.shape:
        raise CheckpointError(
            f"{POSITIONS} in {path} has the shape {tuple(positions.shape)} instead of {tuple(usual.shape)}.",
            "Get the file again from its source.",
        )
    with torch.device("meta"):  # random weights of 600 million numbers would only be thrown away
        model = PixCellTransformer(shape)
    if shape.tokens > 1 and TOKEN_POSITIONS not in tensors:
        tensors[TOKEN_POSITIONS] = TokenPositions(shape).y_pos_embed
    for name, value in tensors.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{name} in {path} has values that are no finite numbers.", "Get the file again.")
    fit(model, tensors, path, card)
    # what the meta device could not compute; diffusers does not store it
    model.pos_embed.pos_embed = usual if positions is None else positions.float()
    return model.eval().requires_grad_(False)


__all__ = ["UNCOND", "PixCellTransformer", "TokenPositions", "grid_positions", "place", "sinusoids"]
