"""From noise to latents: the guided prediction and the solver's loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from histosynth.core.errors import SettingError
from histosynth.core.precision import Precision, autocast
from histosynth.diffusion.fast import Fast
from histosynth.diffusion.model import LatentDiffusion
from histosynth.diffusion.noise import LEVELS

Watch = Callable[[int, int, Tensor, Tensor], None]
"""Sees every step: (its number, its level, x_t [N, C, h, w], the estimate of x_0 [N, C, h, w])."""


@dataclass(frozen=True)
class Solving:
    """How noise is removed."""

    guidance: float = 2.0
    """Classifier-free guidance (Ho and Salimans 2022), v = u + guidance (c - u); 1 is none."""
    guidance_from: int = 0
    """Guidance acts from this noise level (0 is clean) ..."""
    guidance_to: int = LEVELS - 1
    """... to this one (999 is noise), and outside not at all (Kynkaanniemi et al. 2024)."""
    steps: int = 20
    """Solver steps."""
    solver: str = "dpm++"
    """dpm++, ddim, euler-a or ddpm; the last two draw fresh noise in every step, from the tile's seed."""

    def check(self, model: LatentDiffusion) -> None:
        """Refuse values that cannot be used.

        Raises:
            SettingError: one is out of range, or an unknown solver.
        """
        if not isinstance(self.guidance, (int, float)) or self.guidance < 0 or not math.isfinite(self.guidance):
            raise SettingError(f"guidance is {self.guidance}.", "Give 0 or more; 1 is none, 2 is usual.")
        low, high = self.guidance_from, self.guidance_to
        if not 0 <= low <= high < LEVELS:
            raise SettingError(
                f"guidance_from is {low} and guidance_to {high}.", f"Give two rising levels from 0 to {LEVELS - 1}."
            )
        model.backbone.process.solver(self.solver, self.steps)


def context_of(
    model: LatentDiffusion,
    embeddings: Tensor,
    labels: Tensor,
    told: Tensor,
    others: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """The context [N, T, width] of tiles, on the model's device.

    Args:
        embeddings: float [N, dim], standardised.
        labels: int64 [N].
        told: bool [N]; false leaves the embedding out and conditions on the class alone.
        others, shares: int64 [N] and float [N]; a second class and its share, where tiles stand between two.
    """
    device = next(model.conditioner.parameters()).device

    def of(classes: Tensor) -> Tensor:
        return model.conditioner(embeddings.to(device), classes.to(device), told_embedding=told.to(device))[0]

    context = of(labels)
    if others is None or shares is None or not bool((shares > 0).any()):
        return context
    weight = shares.to(device, context.dtype)[:, None, None]
    return torch.lerp(context, of(torch.where(others < 0, labels, others)), weight)


@torch.no_grad()
def solve(
    model: LatentDiffusion,
    noise: Tensor,
    context: Tensor,
    how: Solving,
    precision: Precision,
    *,
    generators: Sequence[torch.Generator] | None = None,
    clean: Tensor | None = None,
    strength: float = 1.0,
    fast: Fast | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Noise [N, C, h, w] -> latents, float32 on the CPU.

    Args:
        context: what `context_of` gave.
        generators: one an item, on the CPU, where stochastic solvers draw from.
        clean: latents to start from, with noise added, instead of pure noise (SDEdit, Meng et al. 2022).
        strength: then the share of the steps that are run, above 0 to 1.
        fast: the network prepared for generation, if there is one; otherwise the backbone's own pass.
        watch: sees every step.
    """
    process, device = model.backbone.process, context.device
    scheduler = process.solver(how.solver, how.steps)
    first = 0 if clean is None else first_step(how.steps, strength)
    levels = scheduler.timesteps[min(first, len(scheduler.timesteps) - 1) :]
    draw = list(generators) if generators is not None else None
    if clean is None:
        x = noise.to(device).float() * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(clean.to(device).float(), noise.to(device).float(), levels[:1].expand(len(noise)))
    predict = _Guided(model, context, levels.to(device), how, precision, fast)
    for k, level in enumerate(levels):
        given = scheduler.scale_model_input(x, level)
        predicted = predict(given, k)
        if watch is not None:
            at = level.long().expand(len(x)).to(device)
            watch(k, int(level), given.float().cpu(), process.clean(given, predicted, at).float().cpu())
        x = scheduler.step(predicted, level, x, generator=draw, return_dict=False)[0]
    return x.float().cpu()


def first_step(steps: int, strength: float) -> int:
    """Number of the first step that SDEdit runs.

    Raises:
        SettingError: a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise SettingError(f"strength is {strength}.", "Give more than 0 and at most 1; 0.4 keeps the layout.")
    return steps - max(1, round(strength * steps))


class _Guided:
    """The prediction, guided where the level lies in the interval; elsewhere half the work is saved."""

    def __init__(
        self,
        model: LatentDiffusion,
        context: Tensor,
        levels: Tensor,
        how: Solving,
        precision: Precision,
        fast: Fast | None,
    ) -> None:
        self.model, self.levels, self.how, self.precision = model, levels, how, precision
        inside = (levels >= how.guidance_from) & (levels <= how.guidance_to)
        self.guided: list[bool] = (inside & (how.guidance != 1)).tolist()
        if any(self.guided):
            context = torch.cat([context, model.conditioner.untold(len(context)).to(context.dtype)])
        self.context = context
        self.told: Any = fast.tell(context, levels) if fast else None

    def __call__(self, x: Tensor, step: int) -> Tensor:
        if not self.guided[step]:
            return self._plain(x, step)
        told, untold = self._plain(torch.cat([x, x]), step).chunk(2)
        return untold + self.how.guidance * (told - untold)

    def _plain(self, x: Tensor, step: int) -> Tensor:
        if self.told is not None:
            return self.told(x, step)
        levels = self.levels[step].expand(len(x))
        with autocast(x.device, self.precision):
            return self.model.backbone.denoise(x, levels, self.context[: len(x)]).float()


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
    """Noise [N, C, h, w] -> latents, float32 on the CPU, by DPM-Solver++; for `told` see `context_of`."""
    with torch.no_grad():
        context = context_of(model, embeddings, labels, told)
    return solve(model, noise, context, Solving(guidance=guidance, steps=steps), precision)
