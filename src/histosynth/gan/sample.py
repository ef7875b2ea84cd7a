"""Making tiles from a GAN checkpoint: one seed a tile, the same tile at any batch size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from histosynth.core.checkpoint import load_checkpoint, require_kind
from histosynth.core.device import pick_device
from histosynth.core.errors import SettingError
from histosynth.core.files import atomic_path
from histosynth.core.seeds import torch_generator
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.layers import place

# the network always runs at one size, since kernels round differently at different sizes
MICRO_BATCH = {"cpu": 8, "cuda": 64, "mps": 16}


class GanGenerator:
    """A trained generator. `classes`, `size` and `card` say what it makes."""

    def __init__(self, network: Generator, card: dict[str, Any], device: torch.device) -> None:
        self.network = place(network, device).eval().requires_grad_(False)
        self.card = card
        self.classes: tuple[str, ...] = tuple(card["classes"])
        self.size = network.shape.size
        self.device = device

    @classmethod
    def from_checkpoint(cls, path: Path | str, device: str = "auto") -> Self:
        """Read a checkpoint that `train gan` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of another kind.
        """
        tensors, card = _read(path)
        network = Generator(Shape(**card["shape"]))
        network.load_state_dict(_part(tensors, "G_ema."))
        return cls(network, card, pick_device(device))

    def sample(
        self, labels: Sequence[int], seeds: Sequence[int], batch_size: int = 16, truncation: float = 1.0
    ) -> Iterator[Tensor]:
        """Yield uint8 [n, 3, size, size] on the CPU, n = batch_size but for the last batch.

        A tile depends on its label, its seed and the truncation only, bit for bit.

        Args:
            labels: class indices.
            seeds: one a tile, any integers.
            truncation: 1 for the learned variety; less pulls tiles towards the mean of their class.

        Raises:
            SettingError: lengths differ, a label is not a class, or a number is out of range.
        """
        self._check(labels, seeds)
        if batch_size < 1:
            raise SettingError(f"batch_size is {batch_size}.", "Use a positive number.")
        if not 0 <= truncation <= 1:
            raise SettingError(f"truncation is {truncation}.", "Use a number from 0 to 1.")
        return self._batches(list(labels), list(seeds), batch_size, truncation)

    def _batches(self, labels: list[int], seeds: list[int], batch_size: int, truncation: float) -> Iterator[Tensor]:
        for start in range(0, len(seeds), batch_size):
            part = slice(start, start + batch_size)
            yield render(self.network, labels[part], seeds[part], truncation)

    def latents(self, labels: Sequence[int], seeds: Sequence[int], truncation: float = 1.0) -> Tensor:
        """Codes w float32 [N, w_dim] on the CPU of the tiles that `sample` makes."""
        self._check(labels, seeds)
        return _latents(self.network, list(labels), list(seeds), truncation).cpu()

    def decode(self, latents: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Codes -> uint8 [N, 3, size, size] on the CPU.

        Args:
            latents: w [N, w_dim], or one code a layer [N, layers, w_dim].
            seeds: of the per-pixel noise; with the seeds of `latents`, the tiles equal those of `sample`.
                None gives every tile the same noise, so that tiles differ by their codes alone.
        """
        return _decode(self.network, latents, list(seeds) if seeds is not None else [0] * len(latents))

    def synthesise(self, latents: Tensor) -> Tensor:
        """Codes [N, w_dim] or [N, layers, w_dim] -> float32 in about [-1, 1], differentiable, on the device.

        With the noise of `decode`; for encoders and inversion.
        """
        noise = self.network.seeded_noise([0]) if len(latents) else None
        planes = [n.expand(len(latents), -1, -1, -1) for n in noise] if noise else None
        return self.network.synthesise(latents.to(self.device), planes)

    def _check(self, labels: Sequence[int], seeds: Sequence[int]) -> None:
        if len(labels) != len(seeds):
            raise SettingError(f"{len(labels)} labels came with {len(seeds)} seeds.", "Give one seed a label.")
        wrong = [int(k) for k in labels if not 0 <= int(k) < len(self.classes)]
        if wrong:
            raise SettingError(
                f"Label {wrong[0]} is not a class of this generator.",
                f"Use 0 to {len(self.classes) - 1}: {', '.join(self.classes)}.",
            )


def load_discriminator(path: Path | str, device: str = "auto") -> Discriminator:
    """The discriminator of a GAN checkpoint, frozen; `features` is what anomaly scores compare.

    Raises:
        CheckpointError: as `GanGenerator.from_checkpoint`.
    """
    tensors, card = _read(path)
    network = Discriminator(Shape(**card["shape"]))
    network.load_state_dict(_part(tensors, "D."))
    return place(network, pick_device(device)).eval().requires_grad_(False)


@torch.no_grad()
def render(network: Generator, labels: Sequence[int], seeds: Sequence[int], truncation: float = 1.0) -> Tensor:
    """uint8 [N, 3, size, size] on the CPU; every tile from its own label and seed."""
    return _decode(network, _latents(network, labels, seeds, truncation), seeds)


@torch.no_grad()
def write_grid(network: Generator, path: Path, columns: int = 8) -> None:
    """A PNG with a row a class (the first 32) and the same seeds in every row."""
    from PIL import Image

    rows = min(network.shape.classes, 32)
    seeds = list(range(columns)) * rows
    labels = [k for k in range(rows) for _ in range(columns)]
    tiles = render(network, labels, seeds)
    size = network.shape.size
    sheet = tiles.view(rows, columns, 3, size, size).permute(0, 3, 1, 4, 2).reshape(rows * size, columns * size, 3)
    with atomic_path(path) as temporary:
        Image.fromarray(sheet.numpy()).save(temporary, format="PNG")


@torch.no_grad()
def _latents(network: Generator, labels: Sequence[int], seeds: Sequence[int], truncation: float) -> Tensor:
    device = network.mapping.embedding.device
    count = MICRO_BATCH.get(device.type, 8)
    codes = []
    for start in range(0, len(seeds), count):
        part = [int(s) for s in seeds[start : start + count]]
        z = torch.stack([torch.randn(network.shape.z_dim, generator=torch_generator(s, "z")) for s in part])
        label = torch.tensor([int(k) for k in labels[start : start + count]])
        w = network.mapping(_padded(z, count).to(device), _padded(label, count).to(device), truncation)
        codes.append(w[: len(part)])
    return torch.cat(codes) if codes else torch.empty(0, network.shape.w_dim, device=device)


@torch.no_grad()
def _decode(network: Generator, latents: Tensor, seeds: Sequence[int]) -> Tensor:
    device = network.mapping.embedding.device
    count = MICRO_BATCH.get(device.type, 8)
    tiles = []
    for start in range(0, len(latents), count):
        w = latents[start : start + count].to(device)
        noise = network.seeded_noise(seeds[start : start + count])
        images = network.synthesise(_padded(w, count), [_padded(n, count) for n in noise])[: len(w)]
        tiles.append(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu())
    size = network.shape.size
    return torch.cat(tiles) if tiles else torch.empty(0, 3, size, size, dtype=torch.uint8)


def _padded(x: Tensor, count: int) -> Tensor:
    """Repeat the last row until there are `count`."""
    missing = count - len(x)
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x


def _read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, card = load_checkpoint(path)
    require_kind(card, "gan", path)
    return tensors, card


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
