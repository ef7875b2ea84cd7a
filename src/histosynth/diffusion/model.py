"""The three networks of a latent diffusion model together, and their checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from histosynth.core.assets import asset_path
from histosynth.core.checkpoint import load_checkpoint, require_kind, save_checkpoint
from histosynth.core.errors import CheckpointError
from histosynth.diffusion.adapter import Conditioner
from histosynth.diffusion.autoencoder import FACTOR, Autoencoder, load_autoencoder, restore_autoencoder
from histosynth.diffusion.lora import merged
from histosynth.diffusion.transformer import TransformerShape, build_transformer

BASE = "diffusion-base-64.safetensors"
AUTOENCODER = "autoencoder-64.safetensors"


@dataclass
class Bank:
    """Conditioning embeddings of training tiles, a class at a time: what generation draws from.

    Attributes:
        values: a standardised float32 [n, dim] tensor a class; n may be 0.
        ids: the tiles they come from, in the same order.
    """

    values: list[Tensor] = field(default_factory=list)
    ids: list[list[str]] = field(default_factory=list)


@dataclass
class LatentDiffusion:
    """Autoencoder, conditioner and denoiser, with what is needed to use them.

    Attributes:
        transformer: diffusers' PixArt, or peft's wrapper of it while LoRA is trained.
        shape: the denoiser's shape.
        encoder: the encoder's {"name", "dim"} whose embeddings the conditioner takes.
        size: edge of a tile in pixels.
    """

    transformer: nn.Module
    conditioner: Conditioner
    autoencoder: Autoencoder
    shape: TransformerShape
    encoder: dict[str, Any]
    classes: tuple[str, ...]
    size: int
    bank: Bank = field(default_factory=Bank)
    card: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> LatentDiffusion:
        """Move the networks; the bank stays on the CPU."""
        for module in (self.transformer, self.conditioner, self.autoencoder):
            module.to(device)
        return self

    def modules(self) -> dict[str, nn.Module]:
        """The networks that are trained here, by the prefix of their weights."""
        return {"transformer": self.transformer, "conditioner": self.conditioner}


def new_model(
    shape: TransformerShape, autoencoder: Autoencoder, encoder: dict[str, Any], classes: Sequence[str], size: int
) -> LatentDiffusion:
    """A model with a fresh denoiser and conditioner (torch's global generator: seed it first)."""
    transformer = build_transformer(shape, size // FACTOR)
    conditioner = Conditioner(encoder["dim"], len(classes), shape.width, shape.tokens)
    return LatentDiffusion(transformer, conditioner, autoencoder, shape, encoder, tuple(classes), size)


def save_model(
    path: Path | str, model: LatentDiffusion, card: dict[str, Any], *, half: bool = False, autoencoder: bool = True
) -> Path:
    """Write a self-contained checkpoint; LoRA is merged into the denoiser.

    Args:
        card: name, config, parameters, steps, licence, parents and so on; what loading needs is added.
        half: store float16 (for shipping).
        autoencoder: false leaves the autoencoder out (it is shipped as a file of its own).
    """
    tensors = {f"transformer.{k}": v for k, v in merged(model.transformer).state_dict().items()}
    tensors |= {f"conditioner.{k}": v for k, v in model.conditioner.state_dict().items()}
    tensors |= {f"bank.{i}": v for i, v in enumerate(model.bank.values)}
    if autoencoder:
        tensors |= {f"autoencoder.{k}": v for k, v in model.autoencoder.state_dict().items()}
    card = {
        "kind": "diffusion",
        **card,
        "classes": list(model.classes),
        "size": model.size,
        "network": asdict(model.shape),
        "autoencoder": asdict(model.autoencoder.shape),
        "latent_space": model.autoencoder.name,
        "encoder": model.encoder,
        "bank_ids": model.bank.ids,
    }
    return save_checkpoint(path, tensors, card, half=half)


def load_model(path: Path | str, autoencoder: Autoencoder | None = None) -> LatentDiffusion:
    """Read a checkpoint; networks come back on the CPU, frozen, in evaluation mode.

    Args:
        path: of a checkpoint, or "base" for the shipped one.
        autoencoder: used when the file holds none; by default the shipped one.

    Raises:
        CheckpointError: missing, damaged, of another kind, or without the autoencoder it was trained on.
    """
    path = asset_path(BASE) if str(path) == "base" else Path(path)
    tensors, card = load_checkpoint(path)
    require_kind(card, "diffusion", path)
    part = {
        prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in ("transformer.", "conditioner.", "autoencoder.", "bank.")
    }
    if part["autoencoder."]:
        autoencoder = restore_autoencoder(part["autoencoder."], card["autoencoder"], card["latent_space"], path)
    elif autoencoder is None:
        autoencoder = load_autoencoder(asset_path(AUTOENCODER))[0]
    if autoencoder.name != card["latent_space"]:
        raise CheckpointError(
            f"{path} was trained on another autoencoder (latent space {card['latent_space']!r}, given "
            f"{autoencoder.name!r}).",
            "Give the autoencoder it was trained with, or a decoder-only refinement of it.",
        )
    try:
        model = new_model(
            TransformerShape(**card["network"]), autoencoder, card["encoder"], card["classes"], card["size"]
        )
        model.transformer.load_state_dict(part["transformer."])
        model.conditioner.load_state_dict(part["conditioner."])
    except (RuntimeError, TypeError, KeyError) as error:
        raise CheckpointError(f"The weights in {path} do not fit its card: {error}.", "Take another file.") from error
    model.bank = Bank([part["bank."][str(i)] for i in range(len(part["bank."]))], card["bank_ids"])
    model.card = {k: v for k, v in card.items() if k != "bank_ids"}
    for module in model.modules().values():
        module.eval().requires_grad_(False)
    return model


def export_base(checkpoint: Path | str, out: Path | str, *, bank: int = 64) -> Path:
    """Write a trained checkpoint as a base to ship: float16, without the autoencoder, with a shorter bank.

    Args:
        checkpoint: what `train_diffusion` wrote.
        out: the new file.
        bank: embeddings kept a class.

    Raises:
        CheckpointError: the checkpoint cannot be read.
    """
    model = load_model(checkpoint)
    model.bank = Bank([v[:bank] for v in model.bank.values], [ids[:bank] for ids in model.bank.ids])
    card = {**json.loads(json.dumps(model.card)), "name": Path(out).stem}
    return save_model(out, model, card, half=True, autoencoder=False)
