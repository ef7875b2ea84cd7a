"""Fine-tuned models as small files: what was trained, without the base it was trained from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel

from histosynth.core.checkpoint import load_checkpoint, require_kind, save_checkpoint
from histosynth.core.errors import CheckpointError
from histosynth.diffusion.lora import attach_lora, load_lora_tensors, lora_tensors
from histosynth.diffusion.model import Bank, LatentDiffusion, load_model, new_model


def save_lora(path: Path, model: LatentDiffusion, card: dict[str, Any]) -> Path:
    """Write what was fine-tuned without the base: low-rank matrices, conditioner and bank (small, to share)."""
    tensors = {f"conditioner.{k}": v for k, v in model.conditioner.state_dict().items()}
    tensors |= {f"bank.{i}": v for i, v in enumerate(model.bank.values)}
    if isinstance(model.transformer, PeftModel):
        tensors |= {f"lora.{k}": v for k, v in lora_tensors(model.transformer).items()}
    card = {**card, "kind": "diffusion-lora", "classes": list(model.classes), "size": model.size,
            "encoder": model.encoder, "bank_ids": model.bank.ids}  # fmt: skip
    return save_checkpoint(path, tensors, card)


def apply_lora(path: Path | str, base: Path | str | None = None) -> LatentDiffusion:
    """Rebuild a fine-tuned model from its base and what `save_lora` wrote.

    Args:
        path: lora.safetensors.
        base: the checkpoint it was trained from; by default the one that its card names.

    Raises:
        CheckpointError: a file cannot be read, or the two do not belong together.
    """
    tensors, card = load_checkpoint(path)
    require_kind(card, "diffusion-lora", path)
    config = card["config"]
    start = load_model(base or config["init"])
    model = new_model(start.shape, start.autoencoder, card["encoder"], card["classes"], card["size"])
    model.transformer.load_state_dict(start.transformer.state_dict())
    part = {
        prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        for prefix in ("conditioner.", "lora.", "bank.")
    }
    try:
        model.conditioner.load_state_dict(part["conditioner."])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit its base: {error}.", "Give the base it was trained from."
        ) from error
    if part["lora."]:
        model.transformer = attach_lora(
            model.transformer, config["lora_rank"], config["lora_alpha"], config["lora_targets"]
        )
        load_lora_tensors(model.transformer, part["lora."])
    model.bank = Bank([part["bank."][str(i)] for i in range(len(part["bank."]))], card["bank_ids"])
    model.card = {k: v for k, v in card.items() if k != "bank_ids"} | {"kind": "diffusion"}
    for module in model.modules().values():
        module.eval().requires_grad_(False)
    return model
