"""What fixes the names and shapes of a PixCell transformer, read from a config.json or from the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histosynth.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

UNCOND = "caption_projection.uncond_embedding"
TOKEN_POSITIONS = "y_pos_embed.y_pos_embed"
POSITIONS = "pos_embed.pos_embed"

_CLASSES = ("PixCellTransformer2DModel", "PixArtTransformer2DModel", "PixCellTransformer")
_NUMBERS = {  # name in config.json: (name here, diffusers' default)
    "sample_size": ("latent", 128),
    "num_layers": ("layers", 28),
    "num_attention_heads": ("heads", 16),
    "attention_head_dim": ("head_dim", 72),
    "in_channels": ("channels", 4),
    "out_channels": ("outputs", 8),
    "patch_size": ("patch", 2),
    "caption_channels": ("dim", None),
}
_ONLY = {  # settings of diffusers' transformer that PixCell has one value of
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_type": ("default",),
    "norm_elementwise_affine": (False,),
    "norm_type": ("ada_norm_single",),
    "upcast_attention": (False,),
    "use_additional_conditions": (False, None),
    "double_self_attention": (False, None),
    "num_vector_embeds": (None, False),
    "only_cross_attention": (False, None),
    "use_linear_projection": (False, None),
}
_WITHOUT_EFFECT = ("dropout", "norm_num_groups", "num_embeds_ada_norm")
_LARGEST = 1024


@dataclass(frozen=True)
class PixCellShape:
    """What fixes the names and shapes of a transformer's weights; the defaults are PixCell-256."""

    latent: int = 32
    """Edge of the latents, an eighth of the tile's."""
    layers: int = 28
    """Blocks of self-attention, cross-attention and feed-forward."""
    heads: int = 16
    """Attention heads."""
    head_dim: int = 72
    """Channels of a head."""
    channels: int = 16
    """Channels of a latent."""
    outputs: int = 32
    """Channels that come out: the noise, then a variance that the solvers here do not use."""
    patch: int = 2
    """Edge of a token's patch, in latents."""
    dim: int = 1536
    """Width of the embeddings that it is told."""
    tokens: int = 1
    """Embeddings a tile: 1 at 256 px, 16 (a grid of 4 x 4 parts) at 1024 px."""
    interpolation_scale: float = 0.5
    """Divides the coordinates of the latents' position embedding."""
    norm_eps: float = 1e-6
    """Of the layer normalisations."""

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def grid(self) -> int:
        """Patches along an edge."""
        return self.latent // self.patch

    @property
    def size(self) -> int:
        """Edge of a tile, pixels."""
        return 8 * self.latent

    def options(self) -> dict[str, Any]:
        """The same in the words of diffusers' `PixArtTransformer2DModel`."""
        return {name: getattr(self, ours) for name, (ours, _) in _NUMBERS.items()} | {
            "cross_attention_dim": self.width,
            "interpolation_scale": self.interpolation_scale,
            "norm_eps": self.norm_eps,
            "use_additional_conditions": False,
        }


def shape_from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> PixCellShape:
    """The shape that a config.json describes; the weights must agree with it.

    Args:
        config: what the file holds. Nothing in it is imported or run.
        tensors: the weights, under diffusers' names.
        path: of the file, for messages.

    Raises:
        CheckpointError: another class, an entry that asks for code, an unknown setting, a setting that PixCell cannot
            have, or one that the weights contradict.
    """
    _check_words(config, path)
    found: dict[str, Any] = {}
    for name, (ours, default) in _NUMBERS.items():
        value = config.get(name, default)
        if name == "out_channels" and value is None:
            value = found["channels"]
        found[ours] = _whole(name, value, path)
    found["norm_eps"] = _positive("norm_eps", config.get("norm_eps", 1e-6), path)
    scale = config.get("interpolation_scale")
    # diffusers' own default, which is wrong for 256 px; the published file says 0.5
    found["interpolation_scale"] = _positive(
        "interpolation_scale", max(found["latent"] // 64, 1) if scale is None else scale, path
    )
    facts = measured(tensors, path)
    found["tokens"] = _whole("caption_num_tokens", config.get("caption_num_tokens", facts["tokens"]), path)
    shape = PixCellShape(**found)
    cross = _whole("cross_attention_dim", config.get("cross_attention_dim", shape.width), path)
    if cross != shape.width:
        raise CheckpointError(
            f"{path} has cross_attention_dim {cross} beside {shape.heads} heads of {shape.head_dim}.", _AGAIN
        )
    _check_agreement(shape, facts, path)
    return _checked(shape, path)


def shape_from_tensors(tensors: Mapping[str, Tensor], path: Path) -> PixCellShape:
    """The shape of weights that came without a config.json, as far as they tell it.

    The number of heads is not in the weights: heads are taken to have 72 channels, as those of both PixCells.

    Raises:
        CheckpointError: the weights are not PixCell's, or their width is no multiple of 72.
    """
    facts = measured(tensors, path)
    width = facts.pop("width")
    if width % 72:
        raise CheckpointError(
            f"{path} is {width} wide, from which the number of attention heads cannot be told.",
            "Put the model's config.json beside it.",
        )
    places = tensors[POSITIONS].shape[1] if POSITIONS in tensors and tensors[POSITIONS].ndim == 3 else 0
    grid = math.isqrt(places) if places else 16 * math.isqrt(facts["tokens"])
    latent = grid * facts["patch"]
    return _checked(PixCellShape(**facts, latent=latent, heads=width // 72, interpolation_scale=latent / 64), path)


def measured(tensors: Mapping[str, Tensor], path: Path) -> dict[str, int]:
    """What the weights alone tell: layers, width, channels, outputs, patch, dim, tokens.

    Raises:
        CheckpointError: one of the tensors that tell it is missing or of another rank.
    """
    ranks = {"pos_embed.proj.weight": 4, "caption_projection.linear_1.weight": 2, "proj_out.weight": 2, UNCOND: 2}
    for name, rank in ranks.items():
        if name not in tensors:
            raise CheckpointError(f"{path} has no tensor {name}.", _ABSENT.get(name, _AGAIN))
        if tensors[name].ndim != rank or 0 in tensors[name].shape:
            raise CheckpointError(f"{name} in {path} has the shape {tuple(tensors[name].shape)}.", _AGAIN)
    patches, told = tensors["pos_embed.proj.weight"].shape, tensors["caption_projection.linear_1.weight"].shape
    blocks = {name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")}
    return {
        "layers": len(blocks),
        "width": patches[0],
        "channels": patches[1],
        "outputs": tensors["proj_out.weight"].shape[0] // patches[2] ** 2,
        "patch": patches[2],
        "dim": told[1],
        "tokens": tensors[UNCOND].shape[0],
    }


_AGAIN = "Get the folder again from its source."
_ABSENT = {
    UNCOND: (
        'Guidance needs the embedding that PixCell was trained with for "not told"; zeros would not do. Take the '
        "checkpoint as it was published, not only the tensors of a PixArt transformer."
    )
}


def _check_words(config: Mapping[str, Any], path: Path) -> None:
    kind = config.get("_class_name", _CLASSES[0])
    if kind not in _CLASSES:
        raise CheckpointError(
            f"{path} has _class_name {kind!r}; no code is loaded for it.", f"PixCell's is {' or '.join(_CLASSES[:2])}."
        )
    known = {*_NUMBERS, *_ONLY, *_WITHOUT_EFFECT, "cross_attention_dim", "interpolation_scale", "norm_eps",
             "caption_num_tokens"}  # fmt: skip
    for name, value in config.items():
        if name in _ONLY and value not in _ONLY[name]:
            raise CheckpointError(f"{path} has {name} {value!r}; PixCell has {_ONLY[name][0]!r}.", _AGAIN)
        if name not in known and not name.startswith("_") and value not in (None, False):
            what = (
                "asks for code that comes with the weights, which is never run" if name == "auto_map" else "is unknown"
            )
            raise CheckpointError(f"{path} has the entry {name!r}, which {what}.", "Remove it, or take another folder.")


def _check_agreement(shape: PixCellShape, facts: dict[str, int], path: Path) -> None:
    # before anything is built: a file that claims a million layers would otherwise build them
    said = asdict(shape) | {"width": shape.width}
    names = {ours: name for name, (ours, _) in _NUMBERS.items()} | {
        "tokens": "caption_num_tokens", "width": "num_attention_heads * attention_head_dim",
    }  # fmt: skip
    for key, value in facts.items():
        if said[key] != value:
            raise CheckpointError(
                f"{path} says that {names[key]} is {said[key]}, but the weights have {value}.", _AGAIN
            )


def _checked(shape: PixCellShape, path: Path) -> PixCellShape:
    if shape.latent % shape.patch or shape.latent > _LARGEST:
        raise CheckpointError(
            f"{path} has sample_size {shape.latent} with patches of {shape.patch}.",
            f"It is a multiple of the patch, {_LARGEST} at most.",
        )
    if shape.outputs < shape.channels:
        raise CheckpointError(f"{path} has out_channels {shape.outputs} for {shape.channels} in_channels.", _AGAIN)
    if math.isqrt(shape.tokens) ** 2 != shape.tokens or (shape.tokens > 1 and shape.dim % 4) or shape.width % 4:
        raise CheckpointError(
            f"{path} has {shape.tokens} tokens of {shape.dim}, {shape.width} wide.", "Tokens lie on a square grid."
        )
    return shape


def _whole(name: str, value: Any, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path} has {name} {value!r}.", "It is a positive whole number.")
    return value


def _positive(name: str, value: Any, path: Path) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"{path} has {name} {value!r}.", "It is a positive number.")
    return float(value)
