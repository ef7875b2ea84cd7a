"""The names of the original checkpoint (pixcell_256.ckpt) under diffusers' names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from histosynth.core.errors import CheckpointError
from histosynth.diffusion.pixcell.shape import POSITIONS, TOKEN_POSITIONS, UNCOND

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE = {
    "pos_embed": POSITIONS,
    "y_pos_embed": TOKEN_POSITIONS,
    "y_embedder.y_embedding": UNCOND,
    "final_layer.scale_shift_table": "scale_shift_table",
}
_OUTSIDE = {
    "x_embedder.proj.": "pos_embed.proj.",
    "t_embedder.mlp.0.": "adaln_single.emb.timestep_embedder.linear_1.",
    "t_embedder.mlp.2.": "adaln_single.emb.timestep_embedder.linear_2.",
    "t_block.1.": "adaln_single.linear.",
    "y_embedder.y_proj.fc1.": "caption_projection.linear_1.",
    "y_embedder.y_proj.fc2.": "caption_projection.linear_2.",
    "final_layer.linear.": "proj_out.",
}
_INSIDE = {  # several names: the rows are split evenly among them
    "scale_shift_table": ("scale_shift_table",),
    "attn.qkv.": ("attn1.to_q.", "attn1.to_k.", "attn1.to_v."),
    "attn.proj.": ("attn1.to_out.0.",),
    "cross_attn.q_linear.": ("attn2.to_q.",),
    "cross_attn.kv_linear.": ("attn2.to_k.", "attn2.to_v."),
    "cross_attn.proj.": ("attn2.to_out.0.",),
    "mlp.fc1.": ("ff.net.0.proj.",),
    "mlp.fc2.": ("ff.net.2.",),
}


def is_original(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of the original checkpoint."""
    return "x_embedder.proj.weight" in tensors


def from_original(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of an original checkpoint under diffusers' names; unknown names stay as they are.

    Raises:
        CheckpointError: rows of queries, keys and values that do not split evenly.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in _WHOLE:
            # the two position embeddings have a leading 1, the "not told" embedding has none
            found[_WHOLE[name]] = value[0] if _WHOLE[name] == UNCOND and value.ndim == 3 else value
        elif name.startswith("blocks."):
            found |= _block(name, value, path)
        else:
            found[_outside(name)] = value
    return found


def _outside(name: str) -> str:
    for old, new in _OUTSIDE.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _block(name: str, value: Tensor, path: Path) -> dict[str, Tensor]:
    number, _, rest = name.removeprefix("blocks.").partition(".")
    for old, new in _INSIDE.items():
        if rest.startswith(old):
            if value.ndim == 0 or len(value) % len(new):
                raise CheckpointError(
                    f"{name} in {path} has the shape {tuple(value.shape)}, which does not split into {len(new)}.",
                    "Get the file again from its source.",
                )
            parts = value.chunk(len(new)) if len(new) > 1 else (value,)
            tail = rest.removeprefix(old)
            return {f"transformer_blocks.{number}.{n}{tail}": part for n, part in zip(new, parts, strict=True)}
    return {name: value}
