"""PixCell: a transformer, the autoencoder in whose latents it draws, and its noising process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from histosynth.core.device import pick_device
from histosynth.core.errors import DataError
from histosynth.core.seeds import torch_generator
from histosynth.core.types import EncoderCard
from histosynth.diffusion.noise import Process
from histosynth.diffusion.pixcell.cards import CARDS, locate, missing
from histosynth.diffusion.pixcell.files import find_weights, json_object, read_weights, resolve
from histosynth.diffusion.pixcell.names import from_original, is_original
from histosynth.diffusion.pixcell.parts import find_vae, number_format, read_process
from histosynth.diffusion.pixcell.shape import PixCellShape, shape_from_config, shape_from_tensors
from histosynth.diffusion.pixcell.transformer import PixCellTransformer, place
from histosynth.diffusion.pixcell.vae import SCALE, SHIFT
from histosynth.encoders.weights import file_hash


@dataclass(frozen=True)
class Memory:
    """What is given up in speed for memory."""

    vae_slicing: bool = True
    """The autoencoder takes one tile at a time; its results then do not depend on the batch."""
    vae_tiling: bool = False
    """The autoencoder takes tiles of more than 512 px in overlapping parts, which are blended."""
    attention_slicing: bool = False
    """Attention is computed a head at a time."""


@dataclass
class PixCell:
    """A transformer and its autoencoder, on one device.

    Attributes:
        transformer: a `PixCellTransformer`, or peft's wrapper of it while LoRA is trained.
        vae: None where its weights are not on this machine; what needs it then says so.
        shape: what fixes the transformer's weights.
        process: the noise schedule, and that the transformer predicts the noise.
        uncond: float32 [T, dim] on the CPU: the embedding that means "not told", from the checkpoint.
        card: kind, name, licence, citation, url, source.
        files, vae_files: the weight files that were read.
    """

    transformer: nn.Module
    vae: AutoencoderKL | None
    shape: PixCellShape
    process: Process
    uncond: Tensor
    card: dict[str, Any]
    files: tuple[Path, ...] = ()
    vae_files: tuple[Path, ...] = ()
    memory: Memory = field(default_factory=Memory)

    @classmethod
    def load(
        cls,
        source: str | Path | None = None,
        *,
        vae: str | Path | None = None,
        token: str | None = None,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str = "fp32",
        memory: Memory = Memory(),
    ) -> Self:
        """Read a checkpoint. No code that comes with it is run, and pickles are read as weights only.

        Args:
            source: a folder in the layout of Hugging Face (transformer/, scheduler/, vae/), a weight file (the
                original .ckpt, .pth, .safetensors), or a repository of Hugging Face ("OWNER/NAME"); by default
                PixCell-256 where its card is found.
            vae: likewise for the autoencoder; by default that in `source`, else where the card "sd35-vae" is found.
            token: a read token for gated repositories; HF_TOKEN by default.
            dtype: fp32, bf16 or fp16. The autoencoder stays in float32 in fp16 if its configuration says so.

        Raises:
            CheckpointError: missing, damaged, unsafe, or not PixCell's.
            SettingError: an unknown device or dtype.
        """
        where = pick_device(str(device))
        kind = number_format(dtype)
        source = source or locate(CARDS["pixcell-256"])
        if source is None:
            raise missing(CARDS["pixcell-256"], "--weights")
        weights = find_weights(resolve(source, ("transformer", "scheduler", "vae"), token), "transformer")
        tensors = read_weights(weights)
        if is_original(tensors):
            tensors = from_original(tensors, weights.files[0])
        if weights.config is not None:
            shape = shape_from_config(json_object(weights.config), tensors, weights.config)
        else:
            shape = shape_from_tensors(tensors, weights.files[0])
        card = CARDS["pixcell-1024" if shape.tokens > 1 else "pixcell-256"]
        transformer = place(tensors, shape, card, weights.files[0])
        uncond = transformer.caption_projection.uncond_embedding.detach().clone()
        autoencoder, vae_files = find_vae(vae, weights, shape, token)
        model = cls(
            nn.Module.to(transformer, where, kind),  # diffusers' own `to` warns of an empty list
            autoencoder,
            shape,
            read_process(weights.folder / "scheduler" / "scheduler_config.json"),
            uncond,
            _describe(card, source, shape),
            weights.files,
            vae_files,
        )
        if model.vae is not None:
            upcast = kind == torch.float16 and bool(model.vae.config.force_upcast)
            nn.Module.to(model.vae, where, torch.float32 if upcast else kind)
        return model.save_memory(memory)

    @property
    def size(self) -> int:
        """Edge of a tile, pixels."""
        return self.latent_edge * self.factor

    @property
    def factor(self) -> int:
        """Pixels along an edge to a latent: 8."""
        return 8 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_edge(self) -> int:
        """Edge of the latents."""
        return self.shape.latent

    @property
    def channels(self) -> int:
        """Channels of a latent, 16."""
        return self.shape.channels

    @property
    def tokens(self) -> int:
        """Embeddings a tile."""
        return self.shape.tokens

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.shape.dim

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return next(self.transformer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the transformer computes in."""
        return next(self.transformer.parameters()).dtype

    def to(self, device: torch.device | str) -> Self:
        """Move the networks."""
        self.transformer.to(device)
        if self.vae is not None:
            self.vae.to(device)
        return self

    def save_memory(self, memory: Memory) -> Self:
        """Set how memory is saved."""
        self.memory = memory
        if isinstance(self.transformer, PixCellTransformer):
            self.transformer.slice_attention(memory.attention_slicing)
        if self.vae is not None:
            self.vae.use_slicing, self.vae.use_tiling = memory.vae_slicing, memory.vae_tiling
            self.vae.tile_sample_min_size = 512
            self.vae.tile_latent_min_size = 512 // self.factor
        return self

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the latents of images, float32 [N, 16, S/8, S/8] each.

        Args:
            images: float [N, 3, S, S] in [-1, 1].

        Raises:
            CheckpointError: there is no autoencoder.
            DataError: another type or shape, or an edge that does not divide into latents.
        """
        vae = self.require_vae()
        if not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(
                f"PixCell got images of shape {tuple(images.shape)} and type {images.dtype}.",
                "Give floats [N, 3, S, S] in [-1, 1].",
            )
        if any(edge % self.factor or edge == 0 for edge in images.shape[-2:]):
            raise DataError(
                f"PixCell got images of {images.shape[-2]} x {images.shape[-1]} px.",
                f"Give a multiple of {self.factor}; it draws at {self.size}.",
            )
        code = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        return (code.mean.float() - SHIFT) * SCALE, code.std.float() * SCALE

    def encode(self, images: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Images -> latents, float32 [N, 16, S/8, S/8]: (code - 0.0609) * 1.5305.

        Args:
            images: float [N, 3, S, S] in [-1, 1].
            seeds: one an image, for a sample of the posterior; by default its mean.

        Raises:
            CheckpointError, DataError: as `posterior`.
        """
        mean, deviation = self.posterior(images)
        if seeds is None:
            return mean
        draws = [torch.randn(mean.shape[1:], generator=torch_generator(s, "pixcell posterior")) for s in seeds]
        if len(draws) != len(mean):
            raise DataError(f"{len(mean)} images came with {len(draws)} seeds.", "Give one seed an image.")
        return mean + deviation * torch.stack(draws).to(mean) if draws else mean

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, 16, h, w] -> float32 images [N, 3, 8 h, 8 w], nearly in [-1, 1].

        Raises:
            CheckpointError: there is no autoencoder.
        """
        vae = self.require_vae()
        code = latents.to(vae.device, torch.float32) / SCALE + SHIFT
        if len(code) == 0:
            return code.new_empty(0, 3, *(self.factor * edge for edge in code.shape[-2:]))
        return vae.decode(code.to(vae.dtype)).sample.float()

    def denoise(self, noisy: Tensor, levels: Tensor, context: Tensor) -> Tensor:
        """The noise in latents, float32 [N, 16, h, w]: the first half of what comes out (the rest is a variance).

        Args:
            noisy: float [N, 16, h, w].
            levels: int64 [N], or one for all, 0 to 999.
            context: what `context` or `unconditional` gave, [N, T, dim].
        """
        kind, where = self.dtype, self.device
        output = self.transformer(
            noisy.to(where, kind),
            encoder_hidden_states=context.to(where, kind),
            timestep=levels.to(where).expand(len(noisy)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : self.channels].float()

    def context(self, embeddings: Tensor) -> Tensor:
        """What the transformer is told, in its number format and on its device; gradients pass.

        Args:
            embeddings: float [N, T, dim]; [N, dim] does where T is 1.

        Raises:
            DataError: another shape or type.
        """
        if self.tokens == 1 and embeddings.ndim == 2:
            embeddings = embeddings[:, None]
        if embeddings.ndim != 3 or embeddings.shape[1:] != (self.tokens, self.dim):
            raise DataError(
                f"PixCell got embeddings of shape {tuple(embeddings.shape)}.",
                f"It takes [N, {self.tokens}, {self.dim}]: those of UNI2-h, for {self.tokens} part(s) of a tile.",
            )
        if not embeddings.is_floating_point():
            raise DataError(f"PixCell got embeddings of type {embeddings.dtype}.", "Give floats.")
        return embeddings.to(self.device, self.dtype)

    def unconditional(self, n: int) -> Tensor:
        """The embedding that means "not told", n times: [n, T, dim]. It is the checkpoint's, not zeros."""
        return self.context(self.uncond[None].expand(n, -1, -1))

    def require_vae(self) -> AutoencoderKL:
        """The autoencoder.

        Raises:
            CheckpointError: its weights were not found; the remedy says how to get them.
        """
        if self.vae is None:
            raise missing(CARDS["sd35-vae"], "--vae")
        return self.vae

    def fingerprint(self) -> str:
        """Names the transformer's weights: the SHA-256 of the file, or of its shards (read once)."""
        return "-".join(file_hash(file) for file in self.files)

    def vae_fingerprint(self) -> str:
        """Names the autoencoder's weights in the same way."""
        return "-".join(file_hash(file) for file in self.vae_files)

    def memory_statement(self) -> str:
        """What the networks take, in words."""
        parts = [f"transformer {_gigabytes(self.transformer)} ({self.dtype})".replace("torch.", "")]
        if self.vae is not None:
            parts.append(f"autoencoder {_gigabytes(self.vae)} ({self.vae.dtype})".replace("torch.", ""))
        return f"{self.card['name']}: {', '.join(parts)}, on {self.device}; what a batch needs comes on top."


def _describe(card: EncoderCard, source: str | Path, shape: PixCellShape) -> dict[str, Any]:
    return {
        "kind": "pixcell",
        "name": card.name,
        "size": shape.size,
        "licence": card.licence,
        "commercial": card.commercial,
        "gated": card.gated,
        "citation": card.citation,
        "url": card.url,
        "source": str(source),
    }


def _gigabytes(network: nn.Module) -> str:
    return f"{sum(p.numel() * p.element_size() for p in network.parameters()) / 1e9:.2f} GB"
