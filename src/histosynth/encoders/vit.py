"""Vision transformers with timm's layers: DINOv2, UNI, UNI2-h, Virchow2, H-optimus-0, Phikon-v2.

Files come in the layout of timm (which is also that of Meta) or of transformers; both are read. Sources of the
architectures: the model cards named in `cards.yaml`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histosynth.core.device import pick_device
from histosynth.core.errors import CheckpointError
from histosynth.encoders import card
from histosynth.encoders.door import IMAGENET, Door
from histosynth.encoders.frozen import FrozenEncoder, Precision
from histosynth.encoders.weights import file_hash, fit, read_tensors, require

_H_OPTIMUS = (
    tuple(255 * v for v in (0.707223, 0.578729, 0.703617)),
    tuple(255 * v for v in (0.211883, 0.230117, 0.177517)),
)
# used in training only, or of a head that gives no features
_UNUSED = ("mask_token", "head.", "pooler.")


@dataclass(frozen=True)
class Architecture:
    """What it takes to build one of these networks."""

    model: str
    """timm's name."""
    options: dict[str, Any] = field(default_factory=dict)
    """What differs from timm's defaults for that name."""
    door: Door = Door(224, "bicubic", *IMAGENET)
    """How pixels enter."""
    pool: Literal["class", "class and patches"] = "class"
    """Features: the class token, or that and the mean of the patch tokens."""
    micro_batch: int = 8
    """Tiles in one pass on a CPU."""


_SWIGLU = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
_UNI2_H = {
    "patch_size": 14,
    "depth": 24,
    "num_heads": 24,
    "init_values": 1e-5,
    "embed_dim": 1536,
    "mlp_ratio": 2.66667 * 2,
    "no_embed_class": True,
    "reg_tokens": 8,
    "dynamic_img_size": True,
    **_SWIGLU,
}
_VIRCHOW2 = {"init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4, "dynamic_img_size": True, **_SWIGLU}

ARCHITECTURES = {
    "dinov2-s": Architecture("vit_small_patch14_dinov2", micro_batch=16),
    "dinov2-b": Architecture("vit_base_patch14_dinov2", micro_batch=16),
    "dinov2-l": Architecture("vit_large_patch14_dinov2"),
    "uni": Architecture(
        "vit_large_patch16_224", {"init_values": 1e-5, "dynamic_img_size": True}, Door(224, "bilinear", *IMAGENET)
    ),
    "uni2-h": Architecture("vit_giant_patch14_224", _UNI2_H, Door(224, "bilinear", *IMAGENET)),
    "virchow2": Architecture("vit_huge_patch14_224", _VIRCHOW2, pool="class and patches"),
    "h-optimus-0": Architecture(
        "vit_giant_patch14_reg4_dinov2",
        {"init_values": 1e-5, "dynamic_img_size": False},
        Door(224, "bicubic", *_H_OPTIMUS),
    ),
    "phikon-v2": Architecture("vit_large_patch16_224", {"init_values": 1.0}),
}


class Pooled(nn.Module):
    """A transformer and how its tokens become one row: float [N, 3, S, S] -> float [N, dim]."""

    def __init__(self, transformer: nn.Module, pool: str) -> None:
        super().__init__()
        self.transformer, self.pool = transformer, pool

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.transformer.forward_features(x).float()
        if self.pool == "class":
            return tokens[:, 0]
        # class token, register tokens, patch tokens: the registers are left out
        return torch.cat([tokens[:, 0], tokens[:, self.transformer.num_prefix_tokens :].mean(1)], 1)


def build(name: str, **changes: Any) -> nn.Module:
    """The transformer of an encoder with random weights; `changes` override its options (for small copies)."""
    import timm
    from timm.layers import SwiGLUPacked

    known = {"SwiGLUPacked": SwiGLUPacked, "silu": nn.SiLU}
    chosen = ARCHITECTURES[name]
    options = {"img_size": chosen.door.size, "num_classes": 0, **chosen.options, **changes}
    options = {k: known.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
    return timm.create_model(chosen.model, pretrained=False, **options)


def load(
    device: str = "auto", weights: Path | None = None, precision: Precision = "float32", *, name: str
) -> FrozenEncoder:
    """The encoder `name`, one of `ARCHITECTURES`.

    Raises:
        CheckpointError: the weights are missing or are not those of this network.
    """
    path = require(card(name), weights)
    with torch.device("meta"):  # random weights of a billion numbers would only be thrown away
        transformer = build(name)
    place(transformer, read_tensors(path), path, name)
    return wrap(transformer, name, device, precision, path)


def place(transformer: nn.Module, tensors: dict[str, Tensor], path: Path, name: str) -> None:
    """Put the tensors of a file into a transformer, whichever layout the file has.

    Raises:
        CheckpointError: they do not fit.
    """
    tensors = from_transformers(tensors, path)
    if "register_tokens" in tensors:
        tensors["reg_token"] = tensors.pop("register_tokens")
    if name.startswith("dinov2"):
        tensors = _resample_positions(tensors, transformer.patch_embed.grid_size[0])
    fit(transformer, tensors, path, card(name), _UNUSED)


def wrap(transformer: nn.Module, name: str, device: str, precision: Precision, path: Path) -> FrozenEncoder:
    """An encoder of a transformer that `build` made and `place` filled from `path`."""
    chosen = ARCHITECTURES[name]
    network = Pooled(transformer, chosen.pool)
    return FrozenEncoder(
        card(name),
        network,
        chosen.door,
        lambda: file_hash(path),
        pick_device(device),
        precision,
        chosen.micro_batch,
    )


dinov2_s = partial(load, name="dinov2-s")
dinov2_b = partial(load, name="dinov2-b")
dinov2_l = partial(load, name="dinov2-l")
uni = partial(load, name="uni")
uni2_h = partial(load, name="uni2-h")
virchow2 = partial(load, name="virchow2")
h_optimus_0 = partial(load, name="h-optimus-0")
phikon_v2 = partial(load, name="phikon-v2")

_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "layernorm.": "norm.",
}
_INSIDE = {  # both the names of transformers 4 and of 5
    "attention.output.dense.": "attn.proj.",
    "attention.o_proj.": "attn.proj.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_ATTENTION = (
    tuple(f"attention.attention.{n}." for n in ("query", "key", "value")),
    tuple(f"attention.{n}_proj." for n in "qkv"),
)


def from_transformers(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A Dinov2 state dict of transformers under timm's names; other state dicts as they are.

    Raises:
        CheckpointError: a block lacks one of query, key and value.
    """
    tensors = {k.removeprefix("dinov2."): v for k, v in tensors.items()}
    if "embeddings.cls_token" not in tensors:
        return tensors
    found: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith("encoder.layer."):
            found[_renamed(key, _OUTSIDE)] = value
            continue
        number, _, rest = key.removeprefix("encoder.layer.").partition(".")
        attention = [(i, n) for names in _ATTENTION for i, n in enumerate(names) if rest.startswith(n)]
        if attention:
            which, begin = attention[0]
            parts.setdefault(f"blocks.{number}.attn.qkv.{rest.removeprefix(begin)}", {})[which] = value
        else:
            found[f"blocks.{number}.{_renamed(rest, _INSIDE)}"] = value
    for key, three in parts.items():
        if set(three) != {0, 1, 2}:
            raise CheckpointError(f"{path} lacks a part of {key} (query, key, value).", "Get the file again.")
        found[key] = torch.cat([three[i] for i in range(3)])
    return found


def _renamed(key: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _resample_positions(tensors: dict[str, Tensor], grid: int) -> dict[str, Tensor]:
    """Position embeddings of another grid (37 x 37 for 518 px), brought to `grid` as DINOv2's own code does.

    Bicubic with the scale (grid + 0.1) / old, without antialiasing: what its published features, and those of the
    studies of metrics that use it, were computed with.
    """
    positions = tensors.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return tensors
    old = math.isqrt(positions.shape[1] - 1)
    if old == grid or old * old != positions.shape[1] - 1:
        return tensors
    patches = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / old
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).flatten(1, 2)
    return tensors | {"pos_embed": torch.cat([positions[:, :1], patches], 1)}
