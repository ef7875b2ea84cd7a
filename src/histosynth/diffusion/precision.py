"""Which number format the networks compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal

import torch

from histosynth.core.errors import SettingError

Precision = Literal["auto", "fp32", "bf16"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """A context in which matrix products run in bfloat16, or nothing changes.

    "auto" takes bfloat16 where the processor has instructions for it (about twice the speed of float32
    for both networks of this room on such a CPU); without them it would be emulated and slower.

    Raises:
        SettingError: an unknown precision.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise SettingError(f"precision is {precision!r}.", "Use auto, fp32 or bf16.")
    use = precision == "bf16" or (precision == "auto" and _native_bf16(device))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=use)


def _native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # private names that came and went between torch releases: a missing one means "unknown", so float32
        tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in tests)
    return False
