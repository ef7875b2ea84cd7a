"""The U-Net behind the same recipe: a small one on our autoencoder, or Stable Diffusion's from a local folder.

For those who have no PixCell: the class-conditional U-Net with LoRA of the prototype, with LoRA that is trained and
latents that come from the autoencoder which decodes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from histosynth.autoencoder.network import FACTOR, Autoencoder, to_signed
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.core.files import read_json, sha256_file
from histosynth.diffusion.noise import Process

_PREDICTIONS = {"v_prediction": "v", "epsilon": "epsilon"}
_SCHEDULES = {"squaredcos_cap_v2": "cosine", "linear": "linear", "scaled_linear": "scaled-linear"}


@dataclass(frozen=True)
class UNetShape:
    """What fixes the names and shapes of a small U-Net's weights."""

    width: int = 256
    """Channels of a context token, and of the lowest resolution."""
    layers: int = 2
    """Residual and attention blocks a resolution."""
    heads: int = 4
    """Attention heads; they divide half the width."""
    tokens: int = 4
    """Context tokens made of one encoder embedding."""
    channels: int = 4
    """Channels of a latent."""


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
    shape: UNetShape | None = None
    source: dict[str, Any] = field(default_factory=dict)
    kind: str = "unet"
    embeddings: tuple[str, int] | None = None

    @property
    def whole(self) -> bool:
        return not self.source

    @classmethod
    def new(cls, shape: UNetShape, autoencoder: Autoencoder, size: int, process: Process | None = None) -> UNet:
        """A small one with fresh weights, drawn from torch's global generator: seed it first.

        Raises:
            SettingError: widths that the heads or the normalisation do not divide.
        """
        half = shape.width // 2
        if shape.width % 16 or half % shape.heads:
            raise SettingError(
                f"width is {shape.width} with {shape.heads} heads.", "Give a multiple of 16 that 2 * heads divides."
            )
        edge = size // FACTOR
        network = UNet2DConditionModel(
            sample_size=edge,
            in_channels=shape.channels,
            out_channels=shape.channels,
            block_out_channels=(half, shape.width),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=shape.layers,
            cross_attention_dim=shape.width,
            attention_head_dim=shape.heads,  # in diffusers' U-Net this is the number of heads
            norm_num_groups=8,
        )
        nn.init.zeros_(network.conv_out.weight)
        nn.init.zeros_(network.conv_out.bias)
        latent = (shape.channels, edge, edge)
        return cls(
            network, autoencoder, process or Process(), latent, shape.width, shape.tokens, autoencoder.name, shape
        )

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
        if isinstance(self.autoencoder, Autoencoder):
            return self.autoencoder.encode(images)
        first: Any = self.autoencoder
        pixels = to_signed(images).to(first.dtype)
        with torch.autocast(images.device.type, enabled=False):
            return first.encode(pixels).latent_dist.mean.float() * first.config["scaling_factor"]

    def decode(self, latents: Tensor) -> Tensor:
        if isinstance(self.autoencoder, Autoencoder):
            return self.autoencoder.decode(latents)
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
        if self.shape is None or not isinstance(self.autoencoder, Autoencoder):
            return {}
        return {"network": asdict(self.shape), "autoencoder": asdict(self.autoencoder.shape)}


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
