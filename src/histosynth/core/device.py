"""Where the networks run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from histosynth.core.errors import SettingError

if TYPE_CHECKING:
    import torch


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        SettingError: the name is unknown or that device is not on this machine.
    """
    import torch

    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingError(f"device is {name!r}.", "Use auto, cpu, cuda, cuda:N or mps.") from error
    missing = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not has_mps
    )
    if missing:
        raise SettingError(f"device is {name!r}, which this machine does not have.", "Use --device auto or cpu.")
    return device


def describe_device(device: torch.device) -> str:
    """A line for manifests and reports, such as "NVIDIA H200" or "CPU, 2 threads"."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} threads"
