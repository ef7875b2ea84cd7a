"""A checkpoint of ours as plain tensors under NVIDIA's names, for their code to load."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from histosynth.core.checkpoint import load_checkpoint, require_kind
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.core.files import atomic_path
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator
from histosynth.gan.nvidia.names import EMBED, filters, theirs
from histosynth.gan.nvidia.plain import METADATA
from histosynth.gan.nvidia.settings import FILTER_TAPS
from histosynth.gan.sample import fill
from histosynth.gan.shape import Shape

_WANTED = {"architecture": "stylegan2", "start": "constant", "class_embedding": "concat"}
_REMEDY = f"Train with space=pixels {' '.join(f'{k}={v}' for k, v in _WANTED.items())} to export to NVIDIA's networks."


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    path: Path
    shape: Shape
    tensors: int
    notes: tuple[str, ...]


def export_nvidia(checkpoint: Path | str, out: Path | str) -> Exported:
    """Write the networks of a GAN checkpoint with NVIDIA's names, and the settings that make such networks.

    A .pt holds {"G_ema", "D": {name: tensor}, "G_kwargs", "D_kwargs": settings, "about"}; weights_only=True loads it.
    A .safetensors holds G_ema.* and D.*, and the settings as JSON in its header. The settings are those of
    StyleGAN2-ADA's classes; StyleGAN3's take the content of `synthesis_kwargs` directly.

    Raises:
        CheckpointError: the file is no GAN checkpoint, or its networks have no counterpart.
        SettingError: `out` has another suffix.
    """
    out = Path(out)
    if out.suffix not in (".pt", ".safetensors"):
        raise SettingError(f"out is {out}.", "Name a .pt or a .safetensors.")
    tensors, card = load_checkpoint(checkpoint)
    require_kind(card, "gan", checkpoint)
    try:
        shape = Shape(**card["shape"])
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"The card of {checkpoint} has no shape: {error}.", "Train it anew.") from error
    _refuse_others(shape, checkpoint)
    value: dict[str, Any] = {"about": {"classes": list(card["classes"]), "licence": card.get("licence", "")}}
    notes: list[str] = []
    generator = Generator(shape)
    fill(generator, tensors, "G_ema.", checkpoint)
    value["G_ema"] = _generator(generator, notes)
    value["G_kwargs"] = _generator_settings(shape)
    if any(name.startswith("D.") for name in tensors):
        discriminator = Discriminator(shape)
        fill(discriminator, tensors, "D.", checkpoint)
        value["D"], cmap, depth = _discriminator(discriminator)
        value["D_kwargs"] = _discriminator_settings(shape, cmap, depth)
    _write(out, value)
    return Exported(out, shape, sum(len(v) for k, v in value.items() if k in ("G_ema", "D")), tuple(notes))


def _write(out: Path, value: dict[str, Any]) -> None:
    parts = {k: v for k, v in value.items() if k in ("G_ema", "D")}
    with atomic_path(out) as temporary:
        if out.suffix == ".pt":
            with open(temporary, "wb") as stream:  # given a path, torch writes its name into the file
                torch.save(value, stream)
        else:
            from safetensors.torch import save_file

            settings = {k: v for k, v in value.items() if k not in parts}
            flat = {f"{owner}.{k}": v for owner, part in parts.items() for k, v in part.items()}
            save_file(flat, str(temporary), metadata={METADATA: json.dumps(settings)})


def _refuse_others(shape: Shape, path: Path | str) -> None:
    if shape.autoencoder:
        raise CheckpointError(f"{path} makes latents, which NVIDIA's networks do not.", _REMEDY)
    own = [
        name
        for name, wanted in _WANTED.items()
        if getattr(shape, name) != wanted and (name != "class_embedding" or shape.classes)
    ]
    if own:
        raise CheckpointError(f"{path} has {own[0]}={getattr(shape, own[0])}, which NVIDIA's networks lack.", _REMEDY)
    narrow = [r for r in shape.resolutions if shape.channels(r) > shape.channel_base // r]
    narrow += [r for r in shape.resolutions if shape.d_channels(r) > (shape.d_channel_base or shape.channel_base) // r]
    if narrow:
        raise CheckpointError(
            f"{path} has channel_min={shape.channel_min}, which acts at {narrow[0]} px; NVIDIA's networks lack it.",
            "Train with channel_min=1.",
        )


def _generator(network: Generator, notes: list[str]) -> dict[str, Tensor]:
    shape = network.shape
    out = _renamed(network, generator=True)
    if shape.noise and not shape.noise_const:
        for layer, plane in zip([n for n in out if n.endswith("noise_strength")], network.const_noise(), strict=True):
            out[layer.replace("noise_strength", "noise_const")] = plane[0, 0].clone()
    mapping = network.mapping
    if mapping.embedding is not None:
        out |= _embed(mapping.embedding.detach())
        if not torch.allclose(mapping.w_mean, mapping.w_avg.expand_as(mapping.w_mean), atol=1e-5):
            notes.append("NVIDIA's truncation pulls towards the mean of all classes; ours, by default, of each.")
    if shape.output_clamp is not None:
        notes.append(f"NVIDIA's generator does not clamp its images; ours does, at {shape.output_clamp}.")
    return out


def _discriminator(network: Discriminator) -> tuple[dict[str, Tensor], int | None, int]:
    """Tensors, cmap_dim and depth of the mapping network."""
    shape = network.shape
    out = _renamed(network, generator=False)
    if network.mapping is not None and network.mapping.embedding is not None:
        out |= _embed(network.mapping.embedding.detach())
        return out, shape.cmap_dim or None, shape.d_mapping_depth
    if network.embedding is not None:
        out |= _projection(network.head.weight.detach(), network.head.bias.detach(), network.embedding.detach())
        return out, len(out["b4.out.bias"]), 0
    return out, None, 8


def _renamed(network: Generator | Discriminator, generator: bool) -> dict[str, Tensor]:
    out = {}
    for name, tensor in network.state_dict().items():
        twin = theirs(name, network.shape, generator)
        if twin is not None:
            # a constant and noise planes have no batch in NVIDIA's networks
            lead = (
                tensor.ndim - 3 if name.endswith(".const") else tensor.ndim - 2 if name.endswith("noise_const") else 0
            )
            out[twin] = tensor.reshape(tensor.shape[lead:]).clone()
    taps = torch.tensor(FILTER_TAPS, dtype=torch.float32)
    kernel = torch.outer(taps, taps) / taps.sum().square()
    return out | {name: kernel.clone() for name in filters(network.shape, generator)}


def _embed(table: Tensor) -> dict[str, Tensor]:
    """NVIDIA's linear layer of a one-hot label that gives these rows [classes, width]."""
    weight = table.t() * math.sqrt(len(table))
    return {EMBED[0]: weight.contiguous(), EMBED[1]: torch.zeros(table.shape[1])}


def _projection(weight: Tensor, bias: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """head(x) + <x, row of the class> / sqrt(C) as NVIDIA's <out(x), cmap> / sqrt(K), K = C + 2, with no mapping layer.

    Their cmap is the embedding of the class at unit mean square. So it holds (row, 1, rest), where the rest gives all
    classes the same length, and `out` gives (x, head(x), 0), scaled by what the normalisation took away.
    """
    classes, channels = rows.shape
    length = (rows.square().sum(dim=1).max() + 1.0).item()
    rest = (length - 1.0 - rows.square().sum(dim=1)).clamp(min=0).sqrt()
    table = torch.cat([rows, torch.ones(classes, 1), rest[:, None]], dim=1)
    back = math.sqrt(channels + 2) * math.sqrt(length / (channels + 2) + 1e-8)
    # their layer divides its weights by sqrt(C), which for x itself cancels the 1 / sqrt(C) of the projection
    out = torch.cat([torch.eye(channels), weight, torch.zeros(1, channels)]) * back
    added = torch.cat([torch.zeros(channels), bias, torch.zeros(1)]) * back
    return _embed(table) | {"b4.out.weight": out, "b4.out.bias": added}


def _generator_settings(shape: Shape) -> dict[str, Any]:
    return {
        "z_dim": shape.z_dim, "c_dim": shape.classes, "w_dim": shape.w_dim, "img_resolution": shape.size,
        "img_channels": 3, "mapping_kwargs": {"num_layers": shape.mapping_depth, "lr_multiplier": shape.mapping_lr},
        "synthesis_kwargs": {
            "channel_base": shape.channel_base, "channel_max": shape.channel_max, "num_fp16_res": 0,
            "conv_clamp": shape.conv_clamp, "use_noise": shape.noise,
        },
    }  # fmt: skip


def _discriminator_settings(shape: Shape, cmap: int | None, depth: int) -> dict[str, Any]:
    return {
        "c_dim": 0 if shape.conditioning == "none" else shape.classes, "img_resolution": shape.size,
        "img_channels": 3, "architecture": shape.discriminator,
        "channel_base": shape.d_channel_base or shape.channel_base,
        "channel_max": shape.d_channel_max or shape.channel_max, "num_fp16_res": 0, "conv_clamp": shape.d_clamp,
        "cmap_dim": cmap, "mapping_kwargs": {"num_layers": depth, "lr_multiplier": shape.mapping_lr},
        "epilogue_kwargs": {
            "mbstd_group_size": shape.mbstd_group or None, "mbstd_num_channels": shape.mbstd_channels,
        },
    }  # fmt: skip
