"""Stable Diffusion's U-Net behind the same recipe, from a local folder.

For those who have no PixCell: the class-conditional U-Net with LoRA of the prototype, with LoRA that is trained and
latents that come from the autoencoder which decodes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from histosynth.autoencoder.network import to_signed
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.core.files import read_json, sha256_file
from histosynth.diffusion.noise import Process

_PREDICTIONS = {"v_prediction": "v", "epsilon": "epsilon"}
_SCHEDULES = {"squaredcos_cap_v2": "cosine", "linear": "linear", "scaled_linear": "scaled-linear"}


@dataclass
class UNet:
    """diffusers' conditional U-Net with the autoencoder that its latents come from; a `Backbone`."""

    network: nn.Module
    autoencoder: nn.Module
    process: Process
    latent: tuple[int, int, int]
    width: int
    tokens: int
    latent_space: str
    source: dict[str, Any] = field(default_factory=dict)
    kind: str = "unet"
    embeddings: tuple[str, int] | None = None
    whole: bool = False

    @classmethod
    def open(cls, folder: Path | str, size: int, vae: Path | str = "", tokens: int = 4) -> UNet:
        """Stable Diffusion's U-Net and autoencoder from a folder in diffusers' layout (unet/, vae/, scheduler/).

        Raises:
            CheckpointError: the folder lacks a part, or a part cannot be read.
            SettingError: tiles of a size that does not fit.
        """
        folder, vae_folder = Path(folder), Path(vae) if vae else Path(folder) / "vae"
        network = _read(UNet2DConditionModel, folder / "unet")
        first = _read(AutoencoderKL, vae_folder)
        down = 2 ** (len(first.config["block_out_channels"]) - 1)
        step = down * 2 ** (len(network.config["block_out_channels"]) - 1)
        if size % step:
            raise SettingError(f"size is {size}.", f"This U-Net takes multiples of {step}.")
        channels = int(network.config["in_channels"])
        if channels != first.config["latent_channels"]:
            raise CheckpointError(
                f"{folder} has a U-Net of {channels} latent channels and an autoencoder of "
                f"{first.config['latent_channels']}.",
                "Give the autoencoder that belongs to it (vae).",
            )
        space = next(iter(sorted(vae_folder.glob("*.safetensors"))))
        edge, width = size // down, int(network.config["cross_attention_dim"])
        source = {"kind": "unet", "path": str(folder), "vae": str(vae), "tokens": tokens}
        return cls(
            network.requires_grad_(False), first.eval().requires_grad_(False), _process(folder), (channels, edge, edge),
            width, tokens, sha256_file(space)[:16], source=source,
        )  # fmt: skip

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        first: Any = self.autoencoder
        pixels = to_signed(images).to(first.dtype)
        with torch.autocast(images.device.type, enabled=False):
            return first.encode(pixels).latent_dist.mean.float() * first.config["scaling_factor"]

    def decode(self, latents: Tensor) -> Tensor:
        first: Any = self.autoencoder
        with torch.autocast(latents.device.type, enabled=False):
            code = (latents.float() / first.config["scaling_factor"]).to(first.dtype)
            return first.decode(code, return_dict=False)[0].float()

    def denoise(self, noisy: Tensor, levels: Tensor, context: Tensor) -> Tensor:
        kept = next(p.dtype for n, p in self.network.named_parameters() if "lora_" not in n)
        out = self.network(noisy.to(kept), levels, encoder_hidden_states=context.to(kept), return_dict=False)[0]
        return out.float()

    def unconditional(self) -> None:
        return None

    def card(self) -> dict[str, Any]:
        return {}


def is_unet(folder: Path | str) -> bool:
    """Whether a folder holds a U-Net in diffusers' layout."""
    return (Path(folder) / "unet" / "config.json").is_file()


def _read(kind: Any, folder: Path) -> Any:
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds no .safetensors weights.", "Give a folder in diffusers' layout: unet/, vae/, scheduler/."
        )
    load: Callable[..., Any] = kind.from_pretrained
    try:
        return load(str(folder), local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}.", "Fetch it again.") from error


def _process(folder: Path) -> Process:
    path = folder / "scheduler" / "scheduler_config.json"
    told: dict[str, Any] = read_json(path) if path.is_file() else {"beta_schedule": "scaled_linear"}
    schedule, prediction = told.get("beta_schedule", "linear"), told.get("prediction_type", "epsilon")
    if schedule not in _SCHEDULES or prediction not in _PREDICTIONS:
        raise CheckpointError(
            f"{path} asks for the schedule {schedule!r} and the prediction {prediction!r}.",
            f"Known are {', '.join(_SCHEDULES)}, and {', '.join(_PREDICTIONS)}.",
        )
    first, last = float(told.get("beta_start", 0.00085)), float(told.get("beta_end", 0.012))
    return Process(_SCHEDULES[schedule], _PREDICTIONS[prediction], first, last)  # type: ignore[arg-type]
