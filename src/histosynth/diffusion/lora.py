"""Low-rank adaptation (Hu et al. 2021) of the denoiser, through peft.

W' = W + (alpha / rank) B A, with W frozen. Only A and B are trained and can be shared alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from histosynth.core.errors import CheckpointError, SettingError, did_you_mean
from histosynth.diffusion.config import ATTENTION
from histosynth.diffusion.convolutional import UNetDenoiser

__all__ = ["ATTENTION", "LoraShape", "attach_lora", "count_targets", "lora_tensors", "merged"]

CONVOLUTIONS = ("conv1", "conv2")
_BLOCK = re.compile(r"(?:^|.*?\.)(?:transformer_blocks|blocks)\.\d+(?=\.)")
_LARGEST_RANK = 1024


@dataclass(frozen=True)
class LoraShape:
    """What fixes the names and shapes of the low-rank matrices."""

    rank: int = 8
    alpha: float = 16.0
    """Scale of the change, over the rank."""
    targets: tuple[str, ...] = ATTENTION
    """Layers, by the end of their names."""
    blocks: str = "all"
    """"all", or numbers from 0 and ranges: "14-27" or "0,3,8-11"."""

    @classmethod
    def of(cls, card: dict[str, Any]) -> LoraShape:
        """From a card."""
        return cls(int(card["rank"]), float(card["alpha"]), tuple(card["targets"]), str(card.get("blocks", "all")))


def block_numbers(blocks: str, count: int) -> list[int]:
    """The block numbers that a setting such as "14-27" or "0,3,8-11" names, ascending.

    Raises:
        SettingError: not such numbers, or numbers beyond the last of `count` blocks.
    """
    if blocks == "all":
        return list(range(count))
    chosen: set[int] = set()
    for part in blocks.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if match is None:
            raise SettingError(f"lora_blocks is {blocks!r}.", 'Give "all", or numbers and ranges such as "0,3,8-11".')
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise SettingError(
                f"lora_blocks is {blocks!r}, but the denoiser has {count} blocks.",
                f"Give numbers from 0 to {count - 1}.",
            )
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def find_targets(model: nn.Module, targets: Sequence[str], blocks: str = "all") -> dict[str, list[str]]:
    """The layers that each target (a dotted suffix) matches within the chosen blocks: linear ones, and convolutions of
    the compact U-Net.

    Raises:
        SettingError: a target that matches none (peft complains only when all miss, and would train less
            than was asked for), or blocks that the denoiser does not have.
    """
    kinds = (nn.Linear, nn.Conv2d) if isinstance(model, UNetDenoiser) else (nn.Linear,)
    linear = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    order = list(dict.fromkeys(m[0] for name in linear if (m := _BLOCK.match(name))))
    chosen = {order[k] for k in block_numbers(blocks, len(order))}
    if blocks != "all":
        linear = [name for name in linear if (m := _BLOCK.match(name)) and m[0] in chosen]
    found = {t: [name for name in linear if name == t or name.endswith(f".{t}")] for t in targets}
    missing = [t for t, names in found.items() if not names]
    if missing or not found:
        known = {".".join(name.split(".")[-k:]) for name in linear for k in (1, 2, 3)}
        known = {k for k in known if not k.split(".")[0].isdigit()}
        where = "" if blocks == "all" else f" of the blocks {blocks}"
        raise SettingError(
            f"lora_targets holds {missing[0]!r}, which matches no layer{where}."
            if missing
            else "lora_targets is empty.",
            did_you_mean(missing[0] if missing else "to_q", known),
        )
    return found


def lora_targets(model: nn.Module) -> tuple[str, ...]:
    """The layers that get low-rank matrices where nobody says which."""
    return ATTENTION + (CONVOLUTIONS if isinstance(model, UNetDenoiser) else ())


def count_targets(model: nn.Module, targets: Sequence[str], blocks: str = "all") -> dict[str, int]:
    """How many layers each target matches; see `find_targets`."""
    return {target: len(names) for target, names in find_targets(model, targets, blocks).items()}


def attach_lora(model: nn.Module, shape: LoraShape) -> PeftModel:
    """Freeze `model` and put trainable low-rank layers into every layer that the shape names.

    The change starts at zero (B = 0). A is drawn from torch's global generator: seed it first.

    Raises:
        SettingError: a target matches nothing, blocks that are not there, or a rank or alpha that cannot be.
    """
    if not 1 <= shape.rank <= _LARGEST_RANK or not shape.alpha > 0:
        raise SettingError(
            f"lora_rank is {shape.rank} and lora_alpha {shape.alpha}.", "Both must be positive; try 8 and 16."
        )
    names = sorted({name for some in find_targets(model, shape.targets, shape.blocks).values() for name in some})
    config = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=names, lora_dropout=0.0)  # type: ignore[arg-type]
    wrapped = get_peft_model(model, config)  # type: ignore[arg-type]
    wrapped.histosynth_shape = shape  # type: ignore[assignment]
    reached = sum(isinstance(module, LoraLayer) for module in wrapped.modules())
    if reached != len(names):
        raise SettingError(
            f"LoRA reached {reached} layers instead of {len(names)}.", "Install the tested peft version."
        )
    return wrapped


def lora_shape(model: PeftModel) -> LoraShape:
    """The shape that `attach_lora` was given."""
    return model.histosynth_shape  # type: ignore[return-value]


def describe_lora(model: PeftModel) -> str:
    """A line for people: which layers LoRA reaches, and how many numbers it trains."""
    shape = lora_shape(model)
    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    reached = {m[0] for name in names if (m := _BLOCK.match(name))}
    every = {m[0] for name, _ in model.named_modules() if (m := _BLOCK.match(name))}
    counts = ", ".join(f"{t} {sum(n.endswith(f'.{t}') for n in names)}" for t in shape.targets)
    numbers = sum(p.numel() for p in lora_tensors(model).values())
    return (
        f"LoRA: rank {shape.rank} in {len(names)} layers of {len(reached)} of {len(every)} blocks ({counts}), "
        f"{numbers:,} numbers"
    )


def lora_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The low-rank matrices alone, under peft's names."""
    return get_peft_model_state_dict(model)


def load_lora_tensors(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    """Put matrices that `lora_tensors` gave into a model with the same LoRA shape.

    Raises:
        CheckpointError: names or shapes differ.
    """
    expected = {k: v.shape for k, v in get_peft_model_state_dict(model).items()}
    given = {k: v.shape for k, v in tensors.items()}
    if expected != given:
        odd = sorted(k for k in expected.keys() | given.keys() if expected.get(k) != given.get(k))
        raise CheckpointError(
            f"The LoRA does not fit this denoiser: {len(odd)} matrices differ, {odd[0]} first.",
            "Load it onto the base that its card names.",
        )
    set_peft_model_state_dict(model, tensors)


def merged(model: nn.Module) -> nn.Module:
    """A copy with the low-rank changes added into the weights and plain names; without LoRA, the model itself."""
    if not isinstance(model, PeftModel):
        return model
    return copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]


def merge(model: PeftModel) -> None:
    """Add the low-rank changes into the weights in place: generation is then as fast as without LoRA."""
    model.merge_adapter()


def unmerge(model: PeftModel) -> None:
    """Take them out again; the weights come back to within rounding."""
    model.unmerge_adapter()
