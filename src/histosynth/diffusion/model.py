"""A denoiser, its autoencoder and its conditioner together, and their checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from histosynth.autoencoder.network import AUTOENCODER, Autoencoder, load_autoencoder, restore_autoencoder
from histosynth.core.assets import asset_path
from histosynth.core.checkpoint import load_checkpoint, require_kind, save_checkpoint
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.diffusion.adapter import Conditioner
from histosynth.diffusion.backbone import Backbone, Compact, NetworkShape, shape_in
from histosynth.diffusion.lora import LoraShape, attach_lora, load_lora_tensors, lora_shape, lora_tensors, merged
from histosynth.diffusion.noise import Process

BASE = "diffusion-base-64.safetensors"
_PARTS = ("transformer.", "conditioner.", "autoencoder.", "bank.", "lora.", "decoder.")
# no number of a network's shape is larger; a card that says so is damaged or hostile
_LARGEST, _DEEPEST = 65_536, 256


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
    """A backbone and what conditions it, with what is needed to use them.

    Attributes:
        encoder: the encoder's {"name", "dim"} whose embeddings the conditioner takes.
        size: edge of a tile in pixels.
    """

    backbone: Backbone
    conditioner: Conditioner
    encoder: dict[str, Any]
    classes: tuple[str, ...]
    size: int
    bank: Bank = field(default_factory=Bank)
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def transformer(self) -> nn.Module:
        """The denoiser's network, or peft's wrapper of it while LoRA is trained."""
        return self.backbone.network

    @transformer.setter
    def transformer(self, network: nn.Module) -> None:
        self.backbone.network = network

    @property
    def autoencoder(self) -> nn.Module:
        """The first stage."""
        return self.backbone.autoencoder

    def to(self, device: torch.device) -> LatentDiffusion:
        """Move the networks; the bank stays on the CPU."""
        for module in (self.transformer, self.conditioner, self.autoencoder):
            module.to(device)
        return self

    def modules(self) -> dict[str, nn.Module]:
        """The networks that are trained here, by the prefix of their weights."""
        return {"transformer": self.transformer, "conditioner": self.conditioner}

    def frozen(self) -> LatentDiffusion:
        """Put every network in evaluation mode, without gradients."""
        for module in (self.transformer, self.conditioner, self.autoencoder):
            module.eval().requires_grad_(False)
        return self


def new_model(
    shape: NetworkShape, autoencoder: Autoencoder, encoder: dict[str, Any], classes: Sequence[str], size: int
) -> LatentDiffusion:
    """A compact model with a fresh denoiser and conditioner (torch's global generator: seed it first)."""
    return with_conditioner(Compact.new(shape, autoencoder, size), encoder, classes, size)


def with_conditioner(
    backbone: Backbone, encoder: dict[str, Any], classes: Sequence[str], size: int, join: str = "auto"
) -> LatentDiffusion:
    """A backbone with a fresh conditioner for these classes and this encoder's embeddings.

    A backbone that was pretrained on this very encoder's embeddings gets an adapter that changes nothing at
    first; any pretrained one gets its own "told nothing". See `ContextShape` for `join`.
    """
    unconditional = backbone.unconditional()
    if join == "auto":
        join = "token" if unconditional is None else "add"
    conditioner = Conditioner(
        encoder["dim"],
        len(classes),
        backbone.width,
        backbone.tokens,
        join=cast(Any, join),
        identity=backbone.embeddings == (encoder["name"], encoder["dim"]),
        unconditional=unconditional,
    )
    return LatentDiffusion(backbone, conditioner, encoder, tuple(classes), size)


def save_model(
    path: Path | str, model: LatentDiffusion, card: dict[str, Any], *, half: bool = False, autoencoder: bool = True
) -> Path:
    """Write a checkpoint: self-contained with LoRA merged, or for a backbone that must not be copied what was
    trained and where the backbone is.

    Args:
        card: name, config, parameters, steps, licence, parents and so on; what loading needs is added.
        half: store float16 (for shipping).
        autoencoder: false leaves the autoencoder out (it is shipped as a file of its own).
    """
    backbone = model.backbone
    tensors = {f"conditioner.{k}": v for k, v in model.conditioner.state_dict().items()}
    tensors |= {f"bank.{i}": v for i, v in enumerate(model.bank.values)}
    if backbone.whole:
        tensors |= {f"transformer.{k}": v for k, v in merged(model.transformer).state_dict().items()}
        if autoencoder:
            tensors |= {f"autoencoder.{k}": v for k, v in model.autoencoder.state_dict().items()}
    elif isinstance(model.transformer, PeftModel):
        tensors |= {f"lora.{k}": v for k, v in lora_tensors(model.transformer).items()}
        card = card | {"lora": asdict(lora_shape(model.transformer))}
    card = {"kind": "diffusion", **card, **describe(model)}
    return save_checkpoint(path, tensors, card, half=half)


def describe(model: LatentDiffusion) -> dict[str, Any]:
    """What a card must say so that the model can be built again."""
    backbone = model.backbone
    return {
        "classes": list(model.classes),
        "size": model.size,
        "backbone": backbone.kind,
        "source": backbone.source,
        **backbone.card(),
        "process": asdict(backbone.process),
        "latent_space": backbone.latent_space,
        "conditioner": asdict(model.conditioner.shape),
        "encoder": model.encoder,
        "bank_ids": model.bank.ids,
    }


def load_model(
    path: Path | str, autoencoder: Autoencoder | None = None, source: dict[str, Any] | None = None
) -> LatentDiffusion:
    """Read a checkpoint; networks come back on the CPU, frozen, in evaluation mode.

    Args:
        path: of a checkpoint, or "base" for the shipped one.
        autoencoder: used when the file holds none; by default the shipped one.
        source: where the backbone is, instead of what the card says, for checkpoints that hold none.

    Raises:
        CheckpointError: missing, damaged, of another kind, or without the autoencoder it was trained on.
    """
    path = asset_path(BASE) if str(path) == "base" else Path(path)
    tensors, card = load_checkpoint(path)
    require_kind(card, "diffusion", path)
    part = split_parts(tensors)
    try:
        check_card(card)
        if card.get("source"):
            from histosynth.diffusion.start import open_backbone

            backbone = open_backbone(source or card["source"], card["size"])
        else:
            backbone = _own_backbone(part, card, autoencoder, path)
        _same_latents(backbone.latent_space, card, path)
        model = restore(backbone, part, card)
    except (RuntimeError, TypeError, KeyError, ValueError, IndexError, AttributeError, SettingError) as error:
        raise CheckpointError(f"The weights in {path} do not fit its card: {error}.", "Take another file.") from error
    return model


def restore(backbone: Backbone, part: dict[str, dict[str, Tensor]], card: dict[str, Any]) -> LatentDiffusion:
    """The model around a backbone, from the weights and the card of a checkpoint or a share file."""
    told = card.get("conditioner") or {}
    conditioner = Conditioner(
        card["encoder"]["dim"], len(card["classes"]), backbone.width, backbone.tokens,
        join=told.get("join", "token"), identity=told.get("identity", False),
    )  # fmt: skip
    conditioner.load_state_dict(part["conditioner."])
    model = LatentDiffusion(backbone, conditioner, card["encoder"], tuple(card["classes"]), card["size"])
    if part["lora."]:
        model.transformer = attach_lora(backbone.network, LoraShape.of(card["lora"]))
        load_lora_tensors(model.transformer, part["lora."])
    model.bank = read_bank(part["bank."], card)
    model.card = {k: v for k, v in card.items() if k != "bank_ids"} | {"kind": "diffusion"}
    return model.frozen()


def split_parts(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's tensors by the prefix of their names."""
    return {
        prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)} for prefix in _PARTS
    }


def check_card(card: dict[str, Any]) -> None:
    """Refuse a card without what loading needs, or with sizes that no network has.

    Raises:
        ValueError, KeyError: says what is wrong.
    """
    shapes = [*card.get("network", {}).items(), *card.get("autoencoder", {}).items()]
    for name, value in [("size", card["size"]), ("dim", card["encoder"]["dim"]), *shapes]:
        if type(value) is not int or not 0 < value <= (_DEEPEST if name in ("layers", "blocks") else _LARGEST):
            raise ValueError(f"{name} {value!r}")
    if not card["classes"] or not all(isinstance(name, str) for name in card["classes"]):
        raise ValueError(f"the classes {card['classes']!r}")


def read_bank(values: dict[str, Tensor], card: dict[str, Any]) -> Bank:
    """The bank in a checkpoint.

    Raises:
        ValueError: not one tensor [n, dim] a class, or other numbers of ids.
    """
    bank = Bank([values[str(i)] for i in range(len(values))], card["bank_ids"])
    dim = card["encoder"]["dim"]
    fits = all(
        v.ndim == 2 and v.shape[1] == dim and len(v) == len(i) for v, i in zip(bank.values, bank.ids, strict=True)
    )
    if not fits or len(bank.values) not in (0, len(card["classes"])):
        raise ValueError("the bank of embeddings has another shape")
    return bank


def _own_backbone(
    part: dict[str, dict[str, Tensor]], card: dict[str, Any], autoencoder: Autoencoder | None, path: Path
) -> Backbone:
    if card.get("backbone", "compact") != "compact":
        raise ValueError(f"it holds a {card['backbone']!r} of its own, which this version does not have")
    if part["autoencoder."]:
        autoencoder = restore_autoencoder(part["autoencoder."], card["autoencoder"], card["latent_space"], path)
    elif autoencoder is None:
        autoencoder = load_autoencoder(asset_path(AUTOENCODER))[0]
    _same_latents(autoencoder.name, card, path)
    process = Process(**card.get("process", {}))
    backbone = Compact.new(shape_in(card), autoencoder, card["size"], process)
    backbone.network.load_state_dict(part["transformer."])
    return backbone


def _same_latents(name: str, card: dict[str, Any], path: Path) -> None:
    if name != card["latent_space"]:
        raise CheckpointError(
            f"{path} was trained on another autoencoder (latent space {card['latent_space']!r}, given {name!r}).",
            "Give the autoencoder it was trained with, or a decoder-only refinement of it.",
        )


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
