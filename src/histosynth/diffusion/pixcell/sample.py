"""Tiles from PixCell: from reference tiles, from embeddings, from class prototypes, or told nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from histosynth.autoencoder.network import to_uint8
from histosynth.core.errors import DataError, SettingError
from histosynth.core.seeds import torch_generator
from histosynth.core.types import Encoder
from histosynth.diffusion.pixcell.conditions import embed
from histosynth.diffusion.pixcell.model import PixCell

GUIDANCE, STEPS, SOLVER = 2.0, 20, "dpm++"
_MICRO = {"cpu": 1, "cuda": 8, "mps": 2}

Conditions = Tensor | Sequence[int] | None


class PixCellGenerator:
    """A `LatentGenerator` around PixCell.

    A tile depends on its condition and its seed alone: the networks always see the same number of tiles, the last
    batch padded, because matrix products round differently at different batch sizes.

    Args:
        model: with its autoencoder.
        encoder: turns reference tiles into embeddings; needed for references only.
        prototypes: an embedding [T, dim] a class, for `sample` by class index.
        micro_batch: tiles in the networks at a time; 1 on a CPU and 8 on CUDA by default. Another number changes the
            rounding of a tile.

    Raises:
        CheckpointError: the model has no autoencoder.
        SettingError: the encoder gives another width than PixCell takes, or no positive micro_batch.
    """

    def __init__(
        self,
        model: PixCell,
        encoder: Encoder | None = None,
        prototypes: Mapping[str, Tensor] | None = None,
        micro_batch: int | None = None,
    ) -> None:
        model.require_vae()
        if encoder is not None:
            check_encoder(model, encoder)
        if micro_batch is not None and micro_batch < 1:
            raise SettingError(f"micro_batch is {micro_batch}.", "Give a positive number.")
        self.model, self.encoder = model, encoder
        self.prototypes = dict(prototypes or {})
        self.classes: tuple[str, ...] = tuple(self.prototypes)
        self.size: int = model.size
        self.card: dict[str, Any] = model.card
        self.micro_batch = micro_batch or _MICRO.get(model.device.type, 1)

    def sample(
        self,
        conditions: Conditions,
        seeds: Sequence[int],
        batch_size: int = 16,
        guidance: float = GUIDANCE,
        steps: int = STEPS,
        solver: str = SOLVER,
    ) -> Iterator[Tensor]:
        """Yield uint8 [n, 3, size, size] in the order asked for, n = `batch_size` but for the last.

        Args:
            conditions: float [N, T, dim] (or [N, dim] where T is 1), embeddings; uint8 [N, 3, H, W], reference tiles;
                N class indices, for the prototypes; or None, for tiles that are told nothing.
            seeds: N, one a tile; the same (condition, seed) gives the same tile whatever stands beside it.
            batch_size: tiles a yield; changes nothing else.
            guidance: classifier-free guidance (Ho and Salimans 2022), e = u + guidance (c - u); 1 is none.
            steps: solver steps.
            solver: dpm++, ddim, euler-a or ddpm.

        Raises:
            SettingError: settings out of range, no encoder for references, or a class without prototype.
            DataError: conditions of another shape, or not one seed a tile.
        """
        if batch_size < 1:
            raise SettingError(f"batch_size is {batch_size}.", "Give a positive number.")
        ready: list[Tensor] = []
        for latents in self._batches(conditions, seeds, guidance, steps, solver):
            ready.extend(self.decode(latents))
            while len(ready) >= batch_size:
                yield torch.stack(ready[:batch_size])
                del ready[:batch_size]
        if ready:
            yield torch.stack(ready)

    def latents(
        self,
        conditions: Conditions,
        seeds: Sequence[int],
        guidance: float = GUIDANCE,
        steps: int = STEPS,
        solver: str = SOLVER,
    ) -> Tensor:
        """The latents float32 [N, 16, h, w] (on the CPU) of the tiles that `sample` would make."""
        edge = self.model.latent_edge
        empty = torch.empty(0, self.model.channels, edge, edge)
        return torch.cat([empty, *self._batches(conditions, seeds, guidance, steps, solver)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, 16, h, w] -> uint8 [N, 3, size, size], on the CPU."""
        empty = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        parts = latents.split(self.micro_batch) if len(latents) else ()
        return torch.cat([empty, *(to_uint8(self.model.decode(self._padded(p)))[: len(p)].cpu() for p in parts)])

    def check(self, guidance: float = GUIDANCE, steps: int = STEPS, solver: str = SOLVER) -> None:
        """Refuse settings of `sample` before anything is computed.

        Raises:
            SettingError: one is out of range.
        """
        if guidance < 0 or not math.isfinite(guidance):
            raise SettingError(f"guidance is {guidance}.", "Try 2.")
        self.model.process.solver(solver, steps)

    def embeddings(self, conditions: Conditions) -> Tensor | None:
        """Conditions as embeddings float [N, T, dim], or None for None; see `sample`."""
        if conditions is None:
            return None
        if isinstance(conditions, Tensor) and conditions.is_floating_point():
            return self.model.context(conditions).cpu().float() if len(conditions) else conditions
        if isinstance(conditions, Tensor) and conditions.ndim == 4:
            if self.encoder is None:
                raise SettingError(
                    "Reference tiles were given, but no encoder.", "Give an encoder (uni2-h), or give embeddings."
                )
            return embed(self.encoder, conditions, self.model.tokens)
        labels = [int(k) for k in conditions]
        for label in labels:
            if not 0 <= label < len(self.classes):
                raise SettingError(
                    f"A class index is {label}, but there are {len(self.classes)} prototypes.",
                    f"Known: {', '.join(self.classes) or 'none'}.",
                )
        if not labels:
            return torch.empty(0, self.model.tokens, self.model.dim)
        return torch.stack([self.prototypes[self.classes[k]] for k in labels])

    @torch.no_grad()
    def _batches(
        self, conditions: Conditions, seeds: Sequence[int], guidance: float, steps: int, solver: str
    ) -> Iterator[Tensor]:
        seeds = [int(s) for s in seeds]
        self.check(guidance, steps, solver)
        told = self.embeddings(conditions)
        if told is not None and len(told) != len(seeds):
            raise DataError(f"{len(told)} conditions came with {len(seeds)} seeds.", "Give one seed a tile.")
        edge = self.model.latent_edge
        for at in range(0, len(seeds), self.micro_batch):
            own = seeds[at : at + self.micro_batch]
            padded = [own[min(i, len(own) - 1)] for i in range(self.micro_batch)]
            noise = torch.stack(
                [
                    torch.randn(self.model.channels, edge, edge, generator=torch_generator(s, "pixcell noise"))
                    for s in padded
                ]
            )
            context = self.model.unconditional(self.micro_batch)
            if told is not None:
                named = self.model.context(self._padded(told[at : at + self.micro_batch]))
                context = torch.cat([named, context]) if guidance != 1 else named
            latents = self.model.process.backwards(
                _Guided(self.model, context, guidance),
                noise.to(self.model.device),
                solver=solver,
                steps=steps,
                generators=[torch_generator(s, "pixcell solver") for s in padded],
            )
            yield latents[: len(own)].cpu()

    def _padded(self, values: Tensor) -> Tensor:
        return values[torch.arange(self.micro_batch).clamp_max(len(values) - 1)]


class _Guided:
    """The noise as a solver asks for it, guided where the context holds the "not told" half."""

    def __init__(self, model: PixCell, context: Tensor, guidance: float) -> None:
        self.model, self.context, self.guidance = model, context, guidance

    def __call__(self, noisy: Tensor, level: Tensor) -> Tensor:
        if len(self.context) == len(noisy):
            return self.model.denoise(noisy, level, self.context)
        # over all 16 channels; the original code's other samplers guide the first three alone
        told, untold = self.model.denoise(torch.cat([noisy, noisy]), level, self.context).chunk(2)
        return untold + self.guidance * (told - untold)


def check_encoder(model: PixCell, encoder: Encoder) -> None:
    """Refuse an encoder whose embeddings this PixCell does not take.

    Raises:
        SettingError: another width.
    """
    if encoder.card.dim != model.dim:
        raise SettingError(
            f"The encoder {encoder.card.name} gives {encoder.card.dim} numbers, but this PixCell takes {model.dim}, as "
            "those of the encoder that it was trained with.",
            "Use uni2-h.",
        )
