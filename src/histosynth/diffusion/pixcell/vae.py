"""The autoencoder of Stable Diffusion 3.5 (diffusers' `AutoencoderKL`), in whose latents PixCell draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from histosynth.core.errors import CheckpointError
from histosynth.core.types import EncoderCard
from histosynth.diffusion.pixcell.files import Weights, json_object, read_weights
from histosynth.encoders.weights import fit

SCALE, SHIFT = 1.5305, 0.0609
"""latent = (code - SHIFT) * SCALE: what PixCell was trained with. The scale without the shift moves every colour."""

SD35: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "act_fn": "silu",
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 1024,
    "scaling_factor": SCALE,
    "shift_factor": SHIFT,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}
"""The published configuration; what a config.json leaves out is taken from diffusers' defaults, not from here."""

_DEFAULT_SCALE = 0.18215  # diffusers' own, in files that do not set one
_MOST_BLOCKS, _MOST_LAYERS, _WIDEST = 8, 8, 4096
_AGAIN = "Get the folder again from its source (the vae of stabilityai/stable-diffusion-3.5-large)."


def build_vae(options: dict[str, Any] | None = None) -> AutoencoderKL:
    """An autoencoder with random weights; SD3.5's by default."""
    return AutoencoderKL(**(options or SD35))


def load_vae(weights: Weights, channels: int, card: EncoderCard) -> AutoencoderKL:
    """An autoencoder, float32 on the CPU, frozen and in evaluation mode.

    Args:
        channels: of a latent, as the transformer has them.
        card: for messages.

    Raises:
        CheckpointError: the weights cannot be read or do not fit, or it is another autoencoder.
    """
    path = weights.config or weights.files[0]
    options = dict(SD35) if weights.config is None else vae_options(json_object(weights.config), weights.config)
    if options["latent_channels"] != channels:
        raise CheckpointError(
            f"{path} has {options['latent_channels']} latent channels, the transformer {channels}.",
            "Give the autoencoder that this PixCell was trained with, SD3.5's.",
        )
    with torch.device("meta"):
        vae = build_vae(options)
    tensors = read_weights(weights)
    if strange := next((k for k, v in tensors.items() if not v.is_floating_point()), None):
        raise CheckpointError(f"{strange} in {weights.files[0]} holds no floats.", _AGAIN)
    fit(vae, tensors, weights.files[0], card)
    return vae.eval().requires_grad_(False)


def vae_options(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The arguments of `AutoencoderKL` in a config.json.

    Raises:
        CheckpointError: another class, an entry that asks for code, blocks that it cannot have, or a scale and shift
            of latents in which PixCell does not draw.
    """
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise CheckpointError(f"{path} has _class_name {kind!r}; no code is loaded for it.", "It is AutoencoderKL.")
    options: dict[str, Any] = {}
    for name, value in config.items():
        if name in SD35:
            options[name] = value
        elif not name.startswith("_") and value not in (None, False):
            raise CheckpointError(f"{path} has the entry {name!r}, which an AutoencoderKL does not know.", _AGAIN)
    options = {"latent_channels": 4, "block_out_channels": (64,), "layers_per_block": 1} | options
    _check_sizes(options, path)
    scale, shift = options.get("scaling_factor", _DEFAULT_SCALE), options.get("shift_factor")
    if scale not in (SCALE, _DEFAULT_SCALE) or shift not in (SHIFT, None):
        raise CheckpointError(
            f"{path} has scaling_factor {scale!r} and shift_factor {shift!r}: another space of latents.",
            f"PixCell draws in SD3.5's, with {SCALE} and {SHIFT}.",
        )
    return options | {"scaling_factor": SCALE, "shift_factor": SHIFT}


def _check_sizes(options: dict[str, Any], path: Path) -> None:
    widths = options["block_out_channels"]
    blocks = len(widths) if isinstance(widths, (list, tuple)) else 0
    kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    limits = {"layers_per_block": _MOST_LAYERS, "latent_channels": 64, "norm_num_groups": _WIDEST, "sample_size": 16384}
    numbers = {name: options[name] for name in limits if name in options}
    numbers |= {f"block_out_channels[{i}]": widths[i] for i in range(blocks)}
    bad = next((n for n, v in numbers.items() if type(v) is not int or not 0 < v <= limits.get(n, _WIDEST)), None)
    if bad or not 0 < blocks <= _MOST_BLOCKS:
        raise CheckpointError(f"{path} has {bad or 'block_out_channels'} {numbers.get(bad or '', widths)!r}.", _AGAIN)
    for name, kind in kinds.items():
        if list(options.get(name, (kind,))) != [kind] * blocks:
            raise CheckpointError(f"{path} has {name} {options.get(name)!r}.", f"It is {blocks} times {kind}.")
