"""A small convolutional autoencoder: tiles to latents a quarter as wide, and back.

A variational autoencoder with a weak prior, the first stage of latent diffusion (Rombach et al. 2022).
Four pixels to a latent keep a nucleus (6 to 10 pixels) about two latents wide; eight would lose it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histosynth.core.checkpoint import load_checkpoint, require_kind, save_checkpoint
from histosynth.core.errors import CheckpointError, SettingError

FACTOR = 4
AUTOENCODER = "autoencoder-64.safetensors"
"""Asset of the shipped one."""


@dataclass(frozen=True)
class AutoencoderShape:
    """What fixes the names and shapes of an autoencoder's weights."""

    width: int = 48
    """Channels at half resolution; twice as many at a quarter."""
    blocks: int = 2
    """Residual blocks at each resolution."""
    channels: int = 4
    """Channels of a latent."""


class Residual(nn.Module):
    """Two normalised 3x3 convolutions beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        groups = max(g for g in (8, 4, 2, 1) if width % g == 0)
        self.norm1, self.conv1 = nn.GroupNorm(groups, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, width), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class Autoencoder(nn.Module):
    """Images [N, 3, S, S] in [-1, 1] to latents [N, C, S/4, S/4] of unit deviation, and back.

    Args:
        shape: widths and depths.

    Attributes:
        shift, scale: float [C, 1, 1]; latent = (posterior mean - shift) * scale.
        name: identifies the latent space. Networks trained on latents must meet the same name again.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, shape: AutoencoderShape | None = None) -> None:
        super().__init__()
        self.shape = shape = shape or AutoencoderShape()
        w, c = shape.width, shape.channels
        # space to depth instead of strided convolutions: nothing is lost before the first weights
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(12, w, 3, padding=1),
            *[Residual(w) for _ in range(shape.blocks)],
            nn.PixelUnshuffle(2),
            nn.Conv2d(4 * w, 2 * w, 1),
            *[Residual(2 * w) for _ in range(shape.blocks)],
            nn.Conv2d(2 * w, 2 * c, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(c, 2 * w, 3, padding=1),
            *[Residual(2 * w) for _ in range(shape.blocks + 1)],
            nn.Conv2d(2 * w, 4 * w, 1),
            nn.PixelShuffle(2),
            *[Residual(w) for _ in range(shape.blocks)],
            nn.Conv2d(w, 12, 3, padding=1),
            nn.PixelShuffle(2),
        )
        # linear paths beside the networks: the mean colour of each 4x4 block goes through from the first
        # step, and the networks learn what that leaves out
        self.coarse_in = nn.Conv2d(3, 2 * c, FACTOR, stride=FACTOR)
        self.coarse_out = nn.ConvTranspose2d(c, 3, FACTOR, stride=FACTOR)
        self._start_coarse()
        self.register_buffer("shift", torch.zeros(c, 1, 1))
        self.register_buffer("scale", torch.ones(c, 1, 1))
        self.name = ""

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, unscaled, of images in [-1, 1]."""
        mean, log_variance = (self.encoder(images) + self.coarse_in(images)).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 4)

    def encode(self, images: Tensor) -> Tensor:
        """uint8 or float-in-[-1, 1] images [N, 3, S, S] -> normalised latents [N, C, S/4, S/4]."""
        if images.dtype == torch.uint8:
            images = to_signed(images)
        return (self.posterior(images)[0] - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents -> float images, nearly in [-1, 1] (not clamped: the loss needs the slope)."""
        return self.pixels(latents / self.scale + self.shift)

    def pixels(self, code: Tensor) -> Tensor:
        """Unscaled latents -> float images."""
        return (self.decoder(code) + self.coarse_out(code)).float()

    @torch.no_grad()
    def _start_coarse(self) -> None:
        for parameter in (*self.coarse_in.parameters(), *self.coarse_out.parameters()):
            nn.init.zeros_(parameter)
        assert self.coarse_in.bias is not None  # for the type checker: it was not switched off
        self.coarse_in.bias[self.shape.channels :] = -6.0  # log-variance: nearly noiseless at first
        for k in range(min(3, self.shape.channels)):
            self.coarse_in.weight[k, k] = 2.0 / FACTOR**2
            self.coarse_out.weight[k, k] = 0.5


def decoder_state(model: Autoencoder) -> dict[str, Tensor]:
    """What `refine_decoder` changes: the weights that make tiles of latents, with shift and scale."""
    return {k: v for k, v in model.state_dict().items() if k.startswith(("decoder.", "coarse_out.", "shift", "scale"))}


def to_signed(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], rounded and clamped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_size(size: int, patch: int = 1) -> None:
    """Refuse tiles whose edge does not divide into latents (and those into a network's patches).

    Raises:
        SettingError: the size is no positive multiple of 4 * patch.
    """
    step = FACTOR * patch
    if size < step or size % step:
        near = max(step, round(size / step) * step)
        raise SettingError(f"size is {size}.", f"Give a multiple of {step}, such as {near}.")


def save_autoencoder(path: Path | str, model: Autoencoder, card: dict[str, Any], half: bool = False) -> Path:
    """Write an autoencoder with its card (the shape and the latent space's name are added)."""
    card = {"kind": "autoencoder", **card, "network": asdict(model.shape), "latent_space": model.name}
    return save_checkpoint(path, model.state_dict(), card, half=half)


def load_autoencoder(path: Path | str) -> tuple[Autoencoder, dict[str, Any]]:
    """Read an autoencoder (in evaluation mode, frozen) and its card.

    Raises:
        CheckpointError: no such file, another kind, or weights that do not fit the card.
    """
    tensors, card = load_checkpoint(path)
    require_kind(card, "autoencoder", path)
    return restore_autoencoder(tensors, card["network"], card["latent_space"], path), card


def restore_autoencoder(
    tensors: dict[str, Tensor], network: dict[str, Any], latent_space: str, path: Path | str
) -> Autoencoder:
    """An autoencoder from its weights and shape.

    Raises:
        CheckpointError: the weights do not fit the shape.
    """
    try:
        model = Autoencoder(AutoencoderShape(**network))
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"The autoencoder in {path} does not fit its card: {error}.", "Train it again, or take another file."
        ) from error
    model.name = latent_space
    return model.eval().requires_grad_(False)
