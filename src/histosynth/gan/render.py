"""Running a generator in fixed micro-batches, so that a tile never depends on the tiles made beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from histosynth.core.errors import SettingError
from histosynth.core.seeds import torch_generator
from histosynth.gan.generator import Generator
from histosynth.gan.mapping import Centre

Noise = Literal["random", "constant", "none"]
"""Of the per-pixel noise: from each tile's own seed, one fixed plane for all tiles, or nothing."""
Precision = Literal["fp32", "bf16"]
# the network always runs at one size, since kernels round differently at different sizes
MICRO_BATCH = {"cpu": 8, "cuda": 64, "mps": 16}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Pull:
    """Truncation (1812.04948, appendix B)."""

    truncation: float = 1.0
    """1 for the learned variety; less pulls codes towards a mean."""
    cutoff: int | None = None
    """How many layers, from the coarsest, are pulled; all by default."""
    centre: Centre = "class"
    """The mean of the class, or of all classes (global)."""

    def check(self, layers: int) -> None:
        """Raise SettingError for a value out of range."""
        if not 0 <= self.truncation <= 1:
            raise SettingError(f"truncation is {self.truncation}.", "Use a number from 0 to 1.")
        if self.cutoff is not None and not 0 <= self.cutoff <= layers:
            raise SettingError(f"truncation_cutoff is {self.cutoff}.", f"Use 0 to {layers} layers.")
        if self.centre not in ("class", "global"):
            raise SettingError(f"truncation_centre is {self.centre!r}.", "Use class or global.")


def rows_of(network: Generator) -> int:
    """How many classes can be asked for; one, if the network knows none."""
    return max(1, network.shape.classes)


@torch.no_grad()
def render(network: Generator, labels: Sequence[int], seeds: Sequence[int], truncation: float = 1.0) -> Tensor:
    """uint8 [N, 3, size, size] on the CPU; every tile from its own label and seed."""
    return decode_codes(network, codes_of(network, labels, seeds, Pull(truncation)), seeds)


@torch.no_grad()
def draw_z(network: Generator, seeds: Sequence[int]) -> Tensor:
    """z [N, z_dim] on the CPU, each from its own seed."""
    drawn = [torch.randn(network.shape.z_dim, generator=torch_generator(int(s), "z")) for s in seeds]
    return torch.stack(drawn) if drawn else torch.empty(0, network.shape.z_dim)


@torch.no_grad()
def codes_of(network: Generator, labels: Sequence[int], seeds: Sequence[int], pull: Pull = Pull()) -> Tensor:
    """w [N, w_dim] on the device; with a cutoff w+ [N, layers, w_dim], whose later layers are not pulled."""
    z = draw_z(network, seeds)
    if pull.cutoff is None:
        return map_codes(network, z, labels, pull)
    return _in_parts(
        network, z, labels, lambda z, y: network.codes(z, y, pull.truncation, pull.cutoff, pull.centre)
    )  # fmt: skip


@torch.no_grad()
def map_codes(
    network: Generator,
    z: Tensor,
    labels: Sequence[int],
    pull: Pull = Pull(),
    rows: dict[str, Tensor] | None = None,
) -> Tensor:
    """z [N, z_dim] -> w [N, w_dim] on the device; `rows` stand in for the class rows of the mapping network."""

    def run(part: Tensor, label: Tensor) -> Tensor:
        arguments = (part, label, pull.truncation, pull.centre)
        return torch.func.functional_call(network.mapping, rows or {}, arguments)

    return _in_parts(network, z, labels, run)


@torch.no_grad()
def decode_codes(
    network: Generator,
    latents: Tensor,
    seeds: Sequence[int],
    noise: Noise | Tensor = "random",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """w [N, w_dim] or w+ [N, layers, w_dim] -> uint8 [N, 3, size, size] on the CPU."""
    count = micro_batch(network)
    tiles = []
    for start in range(0, len(latents), count):
        w = latents[start : start + count].to(network.device)
        planes = _planes(network, noise, slice(start, start + count), seeds)
        padded = None if planes is None else [_padded(p, count) for p in planes]
        images = network.synthesise(_padded(w, count), padded, dtype)[: len(w)]
        tiles.append(to_pixels(images))
    size = network.shape.size
    return torch.cat(tiles) if tiles else torch.empty(0, 3, size, size, dtype=torch.uint8)


def to_pixels(images: Tensor) -> Tensor:
    """Floats in about [-1, 1] -> uint8 on the CPU."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def micro_batch(network: Generator) -> int:
    """Tiles at a time on the device of the network."""
    return MICRO_BATCH.get(network.device.type, 8)


def _in_parts(network: Generator, z: Tensor, labels: Sequence[int], run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    count = micro_batch(network)
    known = torch.tensor([int(k) for k in labels], dtype=torch.long)
    codes = []
    for start in range(0, len(z), count):
        part = _padded(z[start : start + count].float(), count).to(network.device)
        label = _padded(known[start : start + count], count).to(network.device)
        codes.append(run(part, label)[: len(z) - start])
    return torch.cat(codes) if codes else torch.empty(0, network.shape.w_dim, device=network.device)


def _planes(network: Generator, noise: Noise | Tensor, part: slice, seeds: Sequence[int]) -> list[Tensor] | None:
    if isinstance(noise, Tensor):
        return network.shape_noise(noise[part])
    if noise == "random":
        return network.seeded_noise(seeds[part])
    return network.const_noise() if noise == "constant" else None


def _padded(x: Tensor, count: int) -> Tensor:
    """Repeat the last row until there are `count`."""
    missing = count - len(x)
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x
