"""Low-rank adaptation (Hu et al. 2021) of the denoiser's attention, through peft.

W' = W + (alpha / rank) B A, with W frozen. Only A and B are trained and can be shared alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from histosynth.core.errors import CheckpointError, SettingError, did_you_mean

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def count_targets(model: nn.Module, targets: Sequence[str]) -> dict[str, int]:
    """How many linear layers each target name (a dotted suffix) matches.

    Raises:
        SettingError: a name matches none. (peft complains only when all miss, and would train less than
            was asked for.)
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    counts = {t: sum(name == t or name.endswith(f".{t}") for name in linear) for t in targets}
    missing = [t for t, n in counts.items() if n == 0]
    if missing or not counts:
        known = {".".join(name.split(".")[-k:]) for name in linear for k in (1, 2)}
        known = {k for k in known if not k.split(".")[0].isdigit()}
        raise SettingError(
            f"lora_targets holds {missing[0]!r}, which matches no layer." if missing else "lora_targets is empty.",
            did_you_mean(missing[0] if missing else "to_q", known),
        )
    return counts


def attach_lora(model: nn.Module, rank: int, alpha: float, targets: Sequence[str] = ATTENTION) -> PeftModel:
    """Freeze `model` and put trainable low-rank layers into every layer that `targets` names.

    The change starts at zero (B = 0). A is drawn from torch's global generator: seed it first.

    Raises:
        SettingError: a target matches nothing, or a rank or alpha that is not positive.
    """
    if rank < 1 or alpha <= 0:
        raise SettingError(f"lora_rank is {rank} and lora_alpha {alpha}.", "Both must be positive; try 8 and 16.")
    count_targets(model, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)  # type: ignore[arg-type]
    return get_peft_model(model, config)  # type: ignore[arg-type]


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
