"""Fine-tuned models as small files: what was trained, without the base it was trained from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from histosynth.autoencoder.network import Autoencoder, decoder_state
from histosynth.core.checkpoint import load_checkpoint, require_kind, save_checkpoint
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.core.files import atomic_path, ensure_folder, write_json
from histosynth.diffusion.adapter import CLASS_WISE
from histosynth.diffusion.backbone import Backbone, architecture_in, shape_in
from histosynth.diffusion.lora import ATTENTION, LoraShape, lora_shape, lora_tensors
from histosynth.diffusion.model import LatentDiffusion, check_card, describe, load_model, restore, split_parts
from histosynth.diffusion.start import open_backbone, resized

_PEFT = "base_model.model."


def save_lora(path: Path, model: LatentDiffusion, card: dict[str, Any]) -> Path:
    """Write what was fine-tuned without the base: low-rank matrices, conditioner, bank and decoder (small, to share).

    LoRA goes beside it as peft and diffusers read it, too; see `save_peft`.
    """
    tensors = {f"conditioner.{k}": v for k, v in model.conditioner.state_dict().items()}
    tensors |= {f"bank.{i}": v for i, v in enumerate(model.bank.values)}
    if isinstance(model.autoencoder, Autoencoder):
        tensors |= {f"decoder.{k}": v for k, v in decoder_state(model.autoencoder).items()}
    card = {**card, **describe(model), "kind": "diffusion-lora"}
    if isinstance(model.transformer, PeftModel):
        tensors |= {f"lora.{k}": v for k, v in lora_tensors(model.transformer).items()}
        card["lora"] = asdict(lora_shape(model.transformer))
        save_peft(path.parent / "peft", model.transformer, model.backbone.kind)
    return save_checkpoint(path, tensors, card)


def save_peft(folder: Path, network: PeftModel, kind: str) -> Path:
    """Write LoRA as others read it.

    adapter_model.safetensors and adapter_config.json are for `PeftModel.from_pretrained`;
    pytorch_lora_weights.safetensors is for diffusers' `load_lora_adapter`.
    """
    from safetensors.torch import save_file

    ensure_folder(folder)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in lora_tensors(network).items()}
    shape = lora_shape(network)
    prefix = "unet" if kind == "unet" else "transformer"
    config = network.peft_config["default"]
    told = {
        f"{prefix}.{k}": v for k, v in _plain(config.to_dict()).items() if k in ("r", "lora_alpha", "target_modules")
    }
    renamed = {f"{prefix}.{name.removeprefix(_PEFT)}": value for name, value in tensors.items()}
    with atomic_path(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, str(temporary), metadata={"format": "pt"})
    with atomic_path(folder / "pytorch_lora_weights.safetensors") as temporary:
        save_file(renamed, str(temporary), metadata={"format": "pt", "lora_adapter_metadata": json.dumps(told)})
    write_json(folder / "adapter_config.json", _plain(config.to_dict()) | {"inference_mode": True, "r": shape.rank})
    return folder


def apply_lora(
    path: Path | str, base: Path | str | None = None, source: dict[str, Any] | None = None
) -> LatentDiffusion:
    """Rebuild a fine-tuned model from its base and what `save_lora` wrote.

    Args:
        path: lora.safetensors.
        base: the checkpoint it was trained from; by default the one that its card names.
        source: where a pretrained backbone of others is, instead of what the card says; see `open_backbone`.

    Raises:
        CheckpointError: a file cannot be read, or the two do not belong together.
    """
    tensors, card = load_checkpoint(path)
    require_kind(card, "diffusion-lora", path)
    try:
        check_card(card)
        if card.get("source"):
            backbone = open_backbone(source or card["source"], card["size"])
        else:
            start = load_model(base or card["config"]["init"])
            backbone = resized(start.backbone, card["size"])
            _require_network(card, backbone)
        part = split_parts(tensors)
        if part["decoder."] and isinstance(backbone.autoencoder, Autoencoder):
            backbone.autoencoder.load_state_dict(backbone.autoencoder.state_dict() | part["decoder."])
        if "lora" not in card and part["lora."]:  # cards of the first version
            old = card["config"]
            card["lora"] = {
                "rank": old["lora_rank"],
                "alpha": old["lora_alpha"],
                "targets": old["lora_targets"] or ATTENTION,
            }
        return restore(backbone, part, card)
    except (RuntimeError, TypeError, KeyError, ValueError, IndexError, AttributeError, SettingError) as error:
        raise CheckpointError(
            f"{path} does not fit its base: {error}.", "Give the base it was trained from."
        ) from error


def blend(
    paths: Sequence[Path | str], weights: Sequence[float], base: Path | str | None = None,
    source: dict[str, Any] | None = None,
) -> LatentDiffusion:  # fmt: skip
    """Several fine-tuned models of one base in one: W' = W + sum of weight (alpha / rank) B A.

    Low-rank changes add up exactly (as one LoRA whose rank is the sum of the ranks). Adapters, class tokens and heads
    and decoders are averaged by the weights, a class over the models that know it; the classes are those of all.

    Args:
        paths: files of `save_lora`, with the same encoder and way of telling the class.
        weights: one a file; they need not add up to 1.
        base, source: as in `apply_lora`.

    Raises:
        SettingError: not one finite weight a file, or weights that add up to nothing.
        CheckpointError: a file cannot be read, or the files do not belong together.
    """
    if not paths or len(paths) != len(weights):
        raise SettingError(f"{len(paths)} files came with {len(weights)} weights.", "Give one weight a file.")
    total = sum(weights)
    if not all(abs(w) < float("inf") for w in weights) or total == 0:
        raise SettingError(f"The weights are {tuple(weights)}.", "Give finite numbers whose sum is not 0.")
    models = [apply_lora(path, base, source) for path in paths]
    first = models[0]
    for path, model in zip(paths[1:], models[1:], strict=True):
        same = replace(model.conditioner.shape, classes=0) == replace(first.conditioner.shape, classes=0)
        same = same and model.backbone.card() == first.backbone.card()
        if not same or model.encoder != first.encoder or model.size != first.size:
            raise CheckpointError(
                f"{path} cannot be blended with {paths[0]}: another base, encoder, size or way of telling the class.",
                "Blend models that were trained alike.",
            )
    classes = tuple(dict.fromkeys(name for model in models for name in model.classes))
    shares = [w / total for w in weights]
    shape, changes = _added([(m.transformer, w) for m, w in zip(models, weights, strict=True)])
    backbone = first.backbone
    if isinstance(backbone.network, PeftModel):
        backbone.network = backbone.network.unload()  # the base alone  # type: ignore[operator]
    part = {
        "conditioner.": _averaged(models, shares, classes),
        "lora.": changes,
        "bank.": {str(i): torch.cat([_of_class(m, c)[0] for m in models]) for i, c in enumerate(classes)},
    }
    if isinstance(backbone.autoencoder, Autoencoder):
        states = [decoder_state(m.autoencoder) for m in models if isinstance(m.autoencoder, Autoencoder)]
        mean = {k: sum(share * s[k] for share, s in zip(shares, states, strict=True)) for k in states[0]}
        backbone.autoencoder.load_state_dict(backbone.autoencoder.state_dict() | mean)
    card = dict(first.card) | {
        "classes": list(classes),
        "lora": asdict(shape) if shape else None,
        "blended": [{"file": Path(p).name, "weight": float(w)} for p, w in zip(paths, weights, strict=True)],
        "bank_ids": [[i for m in models for i in _of_class(m, c)[1]] for c in classes],
    }
    return restore(backbone, part, card)


def _require_network(card: dict[str, Any], backbone: Backbone) -> None:
    """An adapter alone would fit other networks too, which it has never met."""
    own = backbone.card()
    if "network" in card and (shape_in(card) != shape_in(own)):
        raise ValueError(f"it was trained on a {architecture_in(card)} of another shape")


def _added(networks: Sequence[tuple[Any, float]]) -> tuple[LoraShape | None, dict[str, Tensor]]:
    """One LoRA that does what several do together: A stacked, B side by side with its weight and scale."""
    tuned = [(n, w) for n, w in networks if isinstance(n, PeftModel)]
    if not tuned:
        return None, {}
    shapes = [lora_shape(n) for n, _ in tuned]
    states = [lora_tensors(n) for n, _ in tuned]
    names = sorted({name for state in states for name in state if ".lora_A." in name})
    rank = sum(shape.rank for shape in shapes)
    found: dict[str, Tensor] = {}
    for name in names:
        other = name.replace(".lora_A.", ".lora_B.")
        like_a, like_b = next((s[name], s[other]) for s in states if name in s)
        a, b = [], []
        for (_, weight), shape, state in zip(tuned, shapes, states, strict=True):
            scale = weight * shape.alpha / shape.rank
            a.append(state.get(name, like_a.new_zeros(shape.rank, *like_a.shape[1:])))
            b.append(scale * state.get(other, like_b.new_zeros(like_b.shape[0], shape.rank, *like_b.shape[2:])))
        found[name], found[other] = torch.cat(a, dim=0), torch.cat(b, dim=1)
    if len({(s.targets, s.blocks) for s in shapes}) == 1:
        targets, blocks = shapes[0].targets, shapes[0].blocks
    else:  # the layers one by one
        targets = tuple(n.removeprefix(_PEFT).removesuffix(".lora_A.weight") for n in names)
        blocks = "all"
    return LoraShape(rank, float(rank), targets, blocks), found


def _averaged(models: Sequence[LatentDiffusion], shares: Sequence[float], classes: Sequence[str]) -> dict[str, Tensor]:
    states = [m.conditioner.state_dict() for m in models]
    found: dict[str, Tensor] = {}
    for name in states[0]:
        if name not in CLASS_WISE:
            found[name] = sum(share * s[name] for share, s in zip(shares, states, strict=True))  # type: ignore[assignment]
            continue
        rows = []
        for label in classes:
            known = [(s, st[name][m.classes.index(label)]) for s, st, m in zip(shares, states, models, strict=True)
                     if label in m.classes]  # fmt: skip
            weight = sum(s for s, _ in known) or 1.0
            rows.append(sum(s * row for s, row in known) / weight)
        found[name] = torch.stack(rows)  # type: ignore[arg-type]
    return found


def _of_class(model: LatentDiffusion, label: str) -> tuple[Tensor, list[str]]:
    empty = torch.empty(0, model.encoder["dim"])
    if label not in model.classes or not model.bank.values:
        return empty, []
    at = model.classes.index(label)
    return model.bank.values[at], model.bank.ids[at]


def _plain(value: Any) -> Any:
    """A configuration of peft as JSON takes it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return getattr(value, "value", value)
    return str(getattr(value, "value", value))
