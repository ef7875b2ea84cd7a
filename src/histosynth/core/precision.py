"""Which number format the networks compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

from histosynth.core.errors import SettingError

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def half_type(device: torch.device, precision: Precision) -> torch.dtype | None:
    """The 16-bit format of the matrix products, or none where they stay in float32.

    "auto" takes bfloat16 where the processor has instructions for it (about twice the speed of float32
    on such a CPU); without them it would be emulated and slower.

    Raises:
        SettingError: an unknown precision.
    """
    if precision not in ("auto", "fp32", "bf16", "fp16"):
        raise SettingError(f"precision is {precision!r}.", "Use auto, fp32, bf16 or fp16.")
    if precision == "auto":
        return torch.bfloat16 if _native_bf16(device) else None
    return _TYPES.get(precision)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """A context in which matrix products run in a 16-bit format, or nothing changes; see `half_type`.

    Raises:
        SettingError: an unknown precision.
    """
    half = half_type(device, precision)
    return torch.autocast(device.type, dtype=half or torch.bfloat16, enabled=half is not None)


def loss_scaler(device: torch.device, precision: Precision) -> torch.amp.GradScaler:
    """Scales the loss so that gradients of float16 do not vanish; does nothing in the other formats."""
    return torch.amp.GradScaler(device.type, enabled=half_type(device, precision) == torch.float16)


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # private names that came and went between torch releases: a missing one means "unknown", so float32
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in tests)
    return False
