"""Generation from a diffusion checkpoint: no image is needed, only classes and seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from histosynth.core.device import pick_device
from histosynth.core.errors import SettingError
from histosynth.core.seeds import torch_generator
from histosynth.diffusion.autoencoder import FACTOR, to_uint8
from histosynth.diffusion.model import Bank, LatentDiffusion, load_model
from histosynth.diffusion.noise import solver
from histosynth.diffusion.precision import Precision, autocast
from histosynth.diffusion.transformer import denoise

MICRO = 16
"""Tiles that go through the networks together, always: the last batch is padded. Matrix products round
differently at different batch sizes, so a fixed one is what makes a tile independent of its neighbours."""
GUIDANCE = 2.0
STEPS = 20


class DiffusionGenerator:
    """A `LatentGenerator` around a diffusion model.

    A tile's starting noise follows from its seed. Its condition is drawn, by the seed, from its class's
    bank of training embeddings: two of them mixed so that the spread of the class is kept, with a little
    noise. A tile is therefore not a variation on one training tile.
    """

    def __init__(self, model: LatentDiffusion, device: torch.device, precision: Precision = "auto") -> None:
        self.model = model.to(device)
        self.device, self.precision = device, precision
        self.classes: tuple[str, ...] = model.classes
        self.size: int = model.size
        self.card: dict[str, Any] = model.card

    @classmethod
    def from_checkpoint(cls, path: Path | str, device: str = "auto", precision: Precision = "auto") -> Self:
        """Read a checkpoint that `train_diffusion` wrote ("base" for the shipped one).

        Raises:
            CheckpointError: it cannot be read.
        """
        return cls(load_model(path), pick_device(device), precision)

    def sample(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        batch_size: int = 16,
        guidance: float = GUIDANCE,
        steps: int = STEPS,
    ) -> Iterator[Tensor]:
        """Yield uint8 [n, 3, size, size] in the order asked for, n = `batch_size` but for the last.

        Args:
            labels: class indices.
            seeds: one a tile; the same (label, seed) gives the same tile whatever stands beside it.
            batch_size: tiles a yield; what goes through the networks together is fixed.
            guidance: classifier-free guidance (Ho and Salimans 2022), v = u + guidance (c - u); 1 is none.
            steps: solver steps.

        Raises:
            SettingError: labels out of range, lengths that differ, or settings that are not positive.
        """
        if batch_size < 1:
            raise SettingError(f"batch_size is {batch_size}.", "Give a positive number.")
        ready: list[Tensor] = []
        for latents in self._latent_batches(labels, seeds, guidance, steps):
            ready.extend(self.decode(latents))
            while len(ready) >= batch_size:
                yield torch.stack(ready[:batch_size])
                del ready[:batch_size]
        if ready:
            yield torch.stack(ready)

    def latents(
        self, labels: Sequence[int], seeds: Sequence[int], guidance: float = GUIDANCE, steps: int = STEPS
    ) -> Tensor:
        """The latents float32 [N, C, size/4, size/4] (on the CPU) of the tiles that `sample` would make."""
        edge = self.size // FACTOR
        empty = torch.empty(0, self.model.shape.channels, edge, edge)
        return torch.cat([empty, *self._latent_batches(labels, seeds, guidance, steps)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, size/4, size/4] -> uint8 [N, 3, size, size], on the CPU."""
        if len(latents) == 0:
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        tiles = []
        for part in latents.split(MICRO):
            with autocast(self.device, self.precision):
                pixels = self.model.autoencoder.decode(_padded(part).to(self.device))
            tiles.append(to_uint8(pixels[: len(part)]).cpu())
        return torch.cat(tiles)

    def _latent_batches(
        self, labels: Sequence[int], seeds: Sequence[int], guidance: float, steps: int
    ) -> Iterator[Tensor]:
        labels, seeds = [int(k) for k in labels], [int(s) for s in seeds]
        self._check(labels, seeds, guidance, steps)
        edge = self.size // FACTOR
        for at in range(0, len(labels), MICRO):
            some, own = labels[at : at + MICRO], seeds[at : at + MICRO]
            noise = torch.stack(
                [torch.randn(self.model.shape.channels, edge, edge, generator=torch_generator(s)) for s in own]
            )
            drawn = [draw_condition(self.model.bank, k, s) for k, s in zip(some, own, strict=True)]
            told = torch.tensor([d is not None for d in drawn])
            dim = self.model.encoder["dim"]
            embeddings = torch.stack([torch.zeros(dim) if d is None else d for d in drawn])
            yield run_solver(
                self.model,
                _padded(noise),
                _padded(embeddings),
                _padded(torch.tensor(some)),
                _padded(told),
                guidance=guidance,
                steps=steps,
                precision=self.precision,
            )[: len(some)]

    def _check(self, labels: list[int], seeds: list[int], guidance: float, steps: int) -> None:
        if len(labels) != len(seeds):
            raise SettingError(f"{len(labels)} labels came with {len(seeds)} seeds.", "Give one seed a tile.")
        for label in labels:
            if not 0 <= label < len(self.classes):
                raise SettingError(
                    f"A label is {label}, but the checkpoint has {len(self.classes)} classes.",
                    f"Use 0 to {len(self.classes) - 1}: {', '.join(self.classes)}.",
                )
        if steps < 1 or guidance < 0 or not math.isfinite(guidance):
            raise SettingError(f"steps is {steps} and guidance {guidance}.", "Try steps=20 and guidance=2.")


def draw_condition(bank: Bank, label: int, seed: int, noise: float = 0.1) -> Tensor | None:
    """A conditioning embedding [dim] of a class for one seed; none when the bank has no tile of it.

    Two entries a, b are mixed about the class's mean m: m + cos(t) (a - m) + sin(t) (b - m), which keeps
    the class's spread where a plain average would shrink it, and noise is added (in standardised units).
    """
    values = bank.values[label] if label < len(bank.values) else torch.empty(0, 0)
    if len(values) == 0:
        return None
    generator = torch_generator(seed, "condition", label)
    i, j = torch.randint(len(values), (2,), generator=generator).tolist()
    angle = torch.rand((), generator=generator) * math.pi / 2
    middle = values.mean(dim=0)
    mixed = middle + angle.cos() * (values[i] - middle) + angle.sin() * (values[j] - middle)
    if i == j:
        mixed = values[i]
    return mixed + noise * torch.randn(mixed.shape, generator=generator)


@torch.no_grad()
def run_solver(
    model: LatentDiffusion,
    noise: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    told: Tensor,
    *,
    guidance: float,
    steps: int,
    precision: Precision,
) -> Tensor:
    """Noise [N, C, h, w] -> latents, float32 on the CPU.

    Args:
        embeddings: float [N, dim], standardised.
        labels: int64 [N].
        told: bool [N]; false leaves the embedding out and conditions on the class alone.
    """
    device = next(model.conditioner.parameters()).device
    context = model.conditioner(embeddings.to(device), labels.to(device), told_embedding=told.to(device))[0]
    guided = guidance != 1
    if guided:
        context = torch.cat([context, model.conditioner.untold(len(noise))])
    scheduler = solver(steps)
    x = noise.to(device)
    for level in scheduler.timesteps:
        doubled = torch.cat([x, x]) if guided else x
        levels = level.to(device).expand(len(doubled))
        with autocast(device, precision):
            v = denoise(model.transformer, doubled, levels, context)
        if guided:
            told_v, untold_v = v.chunk(2)
            v = untold_v + guidance * (told_v - untold_v)
        x = scheduler.step(v, level, x, return_dict=False)[0]
    return x.float().cpu()


def _padded(values: Tensor) -> Tensor:
    """Rows repeated up to MICRO."""
    return values[torch.arange(MICRO).clamp_max(len(values) - 1)]
