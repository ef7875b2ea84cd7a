"""PixCell behind the recipe: its transformer, its autoencoder and its process as a `Backbone`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from histosynth.autoencoder.network import to_signed
from histosynth.core.errors import SettingError
from histosynth.diffusion.noise import Process
from histosynth.diffusion.pixcell.cards import CARDS, locate, missing
from histosynth.diffusion.pixcell.model import Memory, PixCell

EMBEDDINGS = "uni2-h"


@dataclass
class PixCellBackbone:
    """PixCell, frozen, on the CPU until it is moved; a `Backbone`.

    Args:
        model: with its autoencoder.
        source: what `open_backbone` finds it by.

    Raises:
        CheckpointError: the autoencoder's weights are not here.
    """

    model: PixCell
    source: dict[str, Any]
    kind: str = "pixcell"
    whole: bool = False

    def __post_init__(self) -> None:
        self.model.require_vae()

    @classmethod
    def open(cls, source: dict[str, Any], size: int) -> PixCellBackbone:
        """Read it from a folder, a file or a repository of Hugging Face, for tiles of `size` pixels.

        Raises:
            CheckpointError: missing, damaged, unsafe, or not PixCell's.
            SettingError: tiles of another size than it draws.
        """
        path = source["path"]
        if path in CARDS:
            path = locate(CARDS[path])
            if path is None:
                raise missing(CARDS[source["path"]], "--init")
        memory = Memory(vae_tiling=bool(source.get("vae_tiling", False)))
        model = PixCell.load(path, vae=source.get("vae") or None, device="cpu", memory=memory)
        if model.size != size:
            raise SettingError(
                f"size is {size}, but {source['path']} draws {model.size} px.", f"Set size={model.size}."
            )
        return cls(model, source)

    @cached_property
    def latent_space(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self.autoencoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def network(self) -> nn.Module:
        return self.model.transformer

    @network.setter
    def network(self, network: nn.Module) -> None:
        self.model.transformer = network

    @property
    def autoencoder(self) -> nn.Module:
        return self.model.require_vae()

    @property
    def process(self) -> Process:
        return self.model.process

    @property
    def latent(self) -> tuple[int, int, int]:
        return self.model.channels, self.model.latent_edge, self.model.latent_edge

    @property
    def width(self) -> int:
        return self.model.dim

    @property
    def tokens(self) -> int:
        return self.model.tokens

    @property
    def embeddings(self) -> tuple[str, int]:
        return EMBEDDINGS, self.model.dim

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):  # its number format is the checkpoint's choice
            return self.model.encode(to_signed(images))

    def decode(self, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, enabled=False):
            return self.model.decode(latents)

    def denoise(self, noisy: Tensor, levels: Tensor, context: Tensor) -> Tensor:
        return self.model.denoise(noisy, levels, context)

    def unconditional(self) -> Tensor:
        return self.model.uncond.float()

    def card(self) -> dict[str, Any]:
        return {"backbone_card": self.model.card, "backbone_weights": self.model.fingerprint()}
