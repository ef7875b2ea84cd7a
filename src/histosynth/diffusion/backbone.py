"""What the recipe and the generation need of a latent denoiser with its first stage, whoever made it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from histosynth.autoencoder.network import FACTOR, Autoencoder
from histosynth.diffusion.convolutional import UNetDenoiser, UNetShape
from histosynth.diffusion.noise import Process
from histosynth.diffusion.transformer import TransformerShape, build_transformer, denoise

NetworkShape = UNetShape | TransformerShape
SHAPES: dict[str, type[UNetShape] | type[TransformerShape]] = {"unet": UNetShape, "transformer": TransformerShape}
"""What fixes the weights of our denoisers, by the name of their architecture."""


@runtime_checkable
class Backbone(Protocol):
    """A denoiser of latents and the autoencoder that makes them.

    Attributes:
        kind: "compact", "pixcell" or "unet".
        network: the denoiser. LoRA goes into it: while it is trained this is peft's wrapper.
        autoencoder: the first stage; never trained here.
        process: how noise is added and what is predicted.
        latent: (channels, height, width) of a tile's latents.
        width, tokens: channels of a context token that `denoise` takes, and tokens made of one embedding.
        latent_space: identifies the latents; networks trained on them must meet the same name again.
        embeddings: (name, dim) of the encoder whose raw embeddings the denoiser was pretrained on, or none.
        whole: whether checkpoints hold its weights. False for weights of others that must not be copied:
            checkpoints then name the `source` and hold what was trained.
        source: what `open_backbone` needs to find it again, JSON-ready; empty when `whole`.
    """

    kind: str
    network: nn.Module
    autoencoder: nn.Module
    process: Process
    latent: tuple[int, int, int]
    width: int
    tokens: int
    latent_space: str
    embeddings: tuple[str, int] | None
    whole: bool
    source: dict[str, Any]

    def encode(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, S, S] -> latents [N, C, h, w] of about unit deviation, without gradients."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] -> float images, nearly in [-1, 1]."""
        ...

    def denoise(self, noisy: Tensor, levels: Tensor, context: Tensor) -> Tensor:
        """The prediction, float32 [N, C, h, w], of latents at int64 levels [N], told context [N, T, width]."""
        ...

    def unconditional(self) -> Tensor | None:
        """What it was pretrained to hear as "told nothing", float [tokens, width], or none."""
        ...

    def card(self) -> dict[str, Any]:
        """JSON-ready: what a checkpoint's card must say to build it again."""
        ...


@dataclass
class Compact:
    """A small denoiser of this project, a U-Net or a transformer, on its small autoencoder; a `Backbone`."""

    network: nn.Module
    autoencoder: Autoencoder
    shape: NetworkShape
    size: int
    process: Process = field(default_factory=Process)
    kind: str = "compact"
    embeddings: tuple[str, int] | None = None
    whole: bool = True
    source: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def new(cls, shape: NetworkShape, autoencoder: Autoencoder, size: int, process: Process | None = None) -> Compact:
        """With fresh weights, drawn from torch's global generator: seed it first.

        Raises:
            SettingError: a width that does not fit.
        """
        if isinstance(shape, UNetShape):
            network: nn.Module = UNetDenoiser(shape)
        else:
            network = build_transformer(shape, size // FACTOR)
        return cls(network, autoencoder, shape, size, process or Process())

    @property
    def latent(self) -> tuple[int, int, int]:
        return self.shape.channels, self.size // FACTOR, self.size // FACTOR

    @property
    def width(self) -> int:
        return self.shape.told

    @property
    def tokens(self) -> int:
        return self.shape.tokens

    @property
    def latent_space(self) -> str:
        return self.autoencoder.name

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents)

    def denoise(self, noisy: Tensor, levels: Tensor, context: Tensor) -> Tensor:
        if isinstance(self.shape, UNetShape):
            return self.network(noisy, levels, context)  # type: ignore[no-any-return]
        return denoise(self.network, noisy, levels, context)

    def unconditional(self) -> None:
        return None

    def card(self) -> dict[str, Any]:
        architecture = next(name for name, kind in SHAPES.items() if isinstance(self.shape, kind))
        return {
            "architecture": architecture,
            "network": asdict(self.shape),
            "autoencoder": asdict(self.autoencoder.shape),
        }


def architecture_in(card: dict[str, Any]) -> str:
    """The architecture of a compact denoiser by its card; the first ones were transformers and did not say so."""
    return str(card.get("architecture", "transformer"))


def shape_in(card: dict[str, Any]) -> NetworkShape:
    """The shape of the denoiser in the card of a compact checkpoint.

    Raises:
        KeyError, TypeError: an architecture or a setting that this version does not know.
    """
    return SHAPES[architecture_in(card)](**card["network"])
