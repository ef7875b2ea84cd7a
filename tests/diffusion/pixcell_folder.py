"""A PixCell of a few thousand weights, written by diffusers itself in the layout of the published folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file

from histosynth.core.types import EncoderCard

STEM = "diffusion_pytorch_model.safetensors"
TINY: dict[str, Any] = {
    "sample_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16,
    "in_channels": 16, "out_channels": 32, "patch_size": 2, "caption_channels": 12, "interpolation_scale": 0.5,
    "use_additional_conditions": False,
}  # fmt: skip
TINY_VAE: dict[str, Any] = {
    "latent_channels": 16, "block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609,
}  # fmt: skip
# what the published config.json has beside diffusers' own settings
PUBLISHED = {
    "_class_name": "PixCellTransformer2DModel", "_diffusers_version": "0.32.2", "_name_or_path": "pixart/transformer",
    "double_self_attention": False, "num_vector_embeds": None, "only_cross_attention": False,
    "use_linear_projection": False,
}  # fmt: skip


def reference(tokens: int = 1, **changes: Any) -> PixArtTransformer2DModel:
    """Diffusers' own network, every weight random (its own start leaves some at zero)."""
    torch.manual_seed(3)
    model = PixArtTransformer2DModel(**TINY | {"sample_size": 8 if tokens > 1 else 4} | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def uncond(tokens: int = 1, dim: int = 12) -> torch.Tensor:
    return torch.randn(tokens, dim, generator=torch.Generator().manual_seed(5))


def write_folder(folder: Path, tokens: int = 1, *, vae: bool = True, published: bool = True, **changes: Any) -> Path:
    """transformer/, scheduler/ and, unless left out, vae/ with weights."""
    part = folder / "transformer"
    reference(tokens, **changes).save_pretrained(part)
    extra = {"caption_projection.uncond_embedding": uncond(tokens, changes.get("caption_channels", 12))}
    rewrite(part / STEM, extra)
    if published:
        edit(part / "config.json", **PUBLISHED, caption_num_tokens=tokens)
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")
    if vae:
        torch.manual_seed(4)
        AutoencoderKL(**TINY_VAE).save_pretrained(folder / "vae")
    return folder


def rewrite(path: Path, extra: dict[str, torch.Tensor], drop: tuple[str, ...] = ()) -> None:
    """Add, replace or drop tensors of a safetensors file."""
    tensors = {k: v for k, v in (load_file(path) | extra).items() if k not in drop}
    save_file(tensors, path)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class ColourEncoder:
    """Twelve numbers a tile: mean colours of its quarters, less their usual value."""

    def __init__(self, dim: int = 12) -> None:
        self.card = EncoderCard(name="colour-quarters", dim=dim, input_size=16, licence="Apache-2.0")

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.adaptive_avg_pool2d(images.float() / 64 - 2, 2).flatten(1)
        return means.repeat(1, 1 + self.card.dim // 12)[:, : self.card.dim]

    def differentiable(self, images: torch.Tensor) -> torch.Tensor:
        return self.encode((images + 1) * 127.5)


def original_names(tensors: dict[str, torch.Tensor], model: PixArtTransformer2DModel) -> dict[str, torch.Tensor]:
    """A state dict as the original training code writes it, put together from diffusers' names."""
    t = tensors
    out = {
        "pos_embed": model.pos_embed.pos_embed.clone(),
        "x_embedder.proj.weight": t["pos_embed.proj.weight"],
        "x_embedder.proj.bias": t["pos_embed.proj.bias"],
        "y_embedder.y_embedding": t["caption_projection.uncond_embedding"],
        "final_layer.scale_shift_table": t["scale_shift_table"],
    }
    time = "adaln_single.emb.timestep_embedder"
    for end in ("weight", "bias"):
        out[f"t_embedder.mlp.0.{end}"] = t[f"{time}.linear_1.{end}"]
        out[f"t_embedder.mlp.2.{end}"] = t[f"{time}.linear_2.{end}"]
        out[f"t_block.1.{end}"] = t[f"adaln_single.linear.{end}"]
        out[f"y_embedder.y_proj.fc1.{end}"] = t[f"caption_projection.linear_1.{end}"]
        out[f"y_embedder.y_proj.fc2.{end}"] = t[f"caption_projection.linear_2.{end}"]
        out[f"final_layer.linear.{end}"] = t[f"proj_out.{end}"]
        for i in range(len(model.transformer_blocks)):
            new, old = f"blocks.{i}", f"transformer_blocks.{i}"
            out[f"{new}.scale_shift_table"] = t[f"{old}.scale_shift_table"]
            out[f"{new}.attn.qkv.{end}"] = torch.cat([t[f"{old}.attn1.to_{c}.{end}"] for c in "qkv"])
            out[f"{new}.attn.proj.{end}"] = t[f"{old}.attn1.to_out.0.{end}"]
            out[f"{new}.cross_attn.q_linear.{end}"] = t[f"{old}.attn2.to_q.{end}"]
            out[f"{new}.cross_attn.kv_linear.{end}"] = torch.cat([t[f"{old}.attn2.to_{c}.{end}"] for c in "kv"])
            out[f"{new}.cross_attn.proj.{end}"] = t[f"{old}.attn2.to_out.0.{end}"]
            out[f"{new}.mlp.fc1.{end}"] = t[f"{old}.ff.net.0.proj.{end}"]
            out[f"{new}.mlp.fc2.{end}"] = t[f"{old}.ff.net.2.{end}"]
    return out
