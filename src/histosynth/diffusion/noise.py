"""The noising process, what the network predicts of it, and the solvers that run it backwards.

x_t = a_t x_0 + s_t e with a_t^2 + s_t^2 = 1. The room's own model uses the cosine schedule (Nichol and Dhariwal
2021) and predicts v = a_t e - s_t x_0 (Salimans and Ho 2022), which stays well scaled at both ends; PixCell was
trained on the linear schedule and predicts e (Ho et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)
from torch import Tensor

from histosynth.core.errors import SettingError, did_you_mean

LEVELS = 1000
Schedule = Literal["cosine", "linear", "scaled-linear"]
Prediction = Literal["v", "epsilon"]
Solver = Literal["dpm++", "ddim", "euler-a", "ddpm"]

_BETAS = {"cosine": "squaredcos_cap_v2", "linear": "linear", "scaled-linear": "scaled_linear"}
_TYPES = {"v": "v_prediction", "epsilon": "epsilon"}
_SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    # DPM-Solver++ 2M (Lu et al. 2022)
    "dpm++": (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"},
    ),
    # Song et al. 2021. This and the next two start at the last level ("trailing"), where pure noise belongs
    # (Lin et al. 2024); latents are not pixels, so the estimate of x_0 is not cut to [-1, 1].
    "ddim": (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    # Ho et al. 2020
    "ddpm": (DDPMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}),
    # Karras et al. 2022, with the fresh noise of ancestral sampling
    "euler-a": (EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}),
}
# the logarithm of a / s from which on there is nothing but noise: the cosine schedule's last levels go on to -10
_LOWEST = -5.1
SOLVERS = tuple(_SOLVERS)
"""Names of the solvers. euler-a and ddpm draw fresh noise in every step, the other two draw none."""


@dataclass(frozen=True)
class Process:
    """A noise schedule and what a network predicts. Plain numbers: fit for cards, and equal when they are the same.

    Raises:
        SettingError: an unknown schedule or prediction, or betas that do not rise within (0, 1).
    """

    schedule: Schedule = "cosine"
    """cosine, linear in beta, or scaled-linear, which is linear in the root of beta (Stable Diffusion)."""
    prediction: Prediction = "v"
    """What the network is asked for: v, or the noise itself."""
    first_beta: float = 1e-4
    """The linear schedule's beta at level 0."""
    last_beta: float = 0.02
    """The linear schedule's beta at level 999."""

    def __post_init__(self) -> None:
        for name, known in (("schedule", _BETAS), ("prediction", _TYPES)):
            if getattr(self, name) not in known:
                raise SettingError(f"{name} is {getattr(self, name)!r}.", did_you_mean(getattr(self, name), known))
        if not 0 < self.first_beta < self.last_beta < 1:
            raise SettingError(
                f"The betas go from {self.first_beta} to {self.last_beta}.", "They rise, between 0 and 1."
            )

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """a and s of every level: float32 [1000, 1, 1, 1] each."""
        return _tables(self, device)

    def add(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """x_t of latents [N, C, H, W] at int64 levels [N]."""
        a, s = self._at(levels, clean.device)
        return a * clean + s * noise

    def target(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """What the network ought to predict for the same, [N, C, H, W]."""
        if self.prediction == "epsilon":
            return noise
        a, s = self._at(levels, clean.device)
        return a * noise - s * clean

    def clean(self, noisy: Tensor, predicted: Tensor, levels: Tensor) -> Tensor:
        """The x_0 that a prediction stands for, [N, C, H, W]: the inverse of `add` and `target`."""
        a, s = self._at(levels, noisy.device)
        if self.prediction == "epsilon":
            return (noisy - s * predicted) / a
        return a * noisy - s * predicted

    def weight(self, levels: Tensor, gamma: float) -> Tensor:
        """Min-SNR weight of the squared error in the prediction (Hang et al. 2023), float [N].

        min(SNR, gamma) / (SNR + 1) for v and min(SNR, gamma) / SNR for the noise, SNR = a^2 / s^2: both weigh the
        error in x_0 by min(SNR, gamma).
        """
        a, s = self._at(levels, levels.device)
        ratio = (a / s).square().flatten()
        return ratio.clamp_max(gamma) / (ratio + 1 if self.prediction == "v" else ratio)

    def solver(self, name: str = "dpm++", steps: int = 20) -> Any:
        """One of diffusers' schedulers, set to `steps` steps; it keeps state, so take a new one for every batch.

        Raises:
            SettingError: an unknown name (near names are suggested), or steps outside 1 to 1000.
        """
        if name not in _SOLVERS:
            raise SettingError(f"There is no solver {name!r}.", did_you_mean(name, SOLVERS))
        if not 1 <= steps <= LEVELS:
            raise SettingError(f"steps is {steps}.", f"Give 1 to {LEVELS}; 20 is usual for dpm++.")
        make, options = _SOLVERS[name]
        if name == "dpm++" and self.schedule == "cosine":
            options = options | {"lambda_min_clipped": _LOWEST}
        scheduler = make(
            num_train_timesteps=LEVELS,
            beta_schedule=_BETAS[self.schedule],
            beta_start=self.first_beta,
            beta_end=self.last_beta,
            prediction_type=_TYPES[self.prediction],
            **options,
        )
        scheduler.set_timesteps(steps)
        if name == "euler-a":  # above, the noise that a step adds rounds to more than it may, and its root to NaN
            scheduler.sigmas = scheduler.sigmas.clamp_max(math.exp(-_LOWEST))
        return scheduler

    @torch.no_grad()
    def backwards(
        self,
        predict: Callable[[Tensor, Tensor], Tensor],
        noise: Tensor,
        *,
        solver: str = "dpm++",
        steps: int = 20,
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Noise [N, C, H, W] -> x_0, float32 on the device of `noise`.

        Args:
            predict: (x_t [N, C, H, W], a level as a tensor without dimensions) -> the prediction [N, C, H, W].
            noise: standard normal numbers.
            generators: one an item, on the CPU; where euler-a and ddpm draw from, so that an item's result does not
                depend on the items beside it.

        Raises:
            SettingError: as `solver`.
        """
        scheduler = self.solver(solver, steps)
        draw = list(generators) if generators is not None else None
        x = noise.float() * scheduler.init_noise_sigma
        for level in scheduler.timesteps:
            given = predict(scheduler.scale_model_input(x, level), level.to(noise.device))
            x = scheduler.step(given.float(), level, x, generator=draw, return_dict=False)[0]
        return x

    def _at(self, levels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        a, s = self.tables(device)
        levels = levels.to(device)
        return a[levels], s[levels]


@lru_cache(maxsize=16)
def _tables(process: Process, device: torch.device) -> tuple[Tensor, Tensor]:
    products = process.solver(steps=1).alphas_cumprod.float()[:, None, None, None]
    return products.sqrt().to(device), (1 - products).sqrt().to(device)


def solver(steps: int) -> Any:
    """DPM-Solver++ 2M for the room's own process, set to `steps` steps."""
    return Process().solver("dpm++", steps)


class Noising:
    """A process with its noise levels as tensors on one device.

    Attributes:
        a, s: float32 [1000, 1, 1, 1].
    """

    def __init__(self, device: torch.device, process: Process = Process()) -> None:
        self.process = process
        self.a, self.s = process.tables(torch.device(device))

    def add(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """See `Process.add`."""
        return self.process.add(clean, noise, levels)

    def target(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """See `Process.target`."""
        return self.process.target(clean, noise, levels)

    def weight(self, levels: Tensor, gamma: float) -> Tensor:
        """See `Process.weight`."""
        return self.process.weight(levels, gamma)


def spread_levels(n: int, rng: np.random.Generator) -> Tensor:
    """One random level in each of n equal parts of 0..999, shuffled: int64 [n].

    A batch then covers all levels evenly, which takes most of the noise out of the loss.
    """
    places = (np.arange(n) + rng.random(n)) / n
    return torch.from_numpy((rng.permutation(places) * LEVELS).astype(np.int64).clip(0, LEVELS - 1))


def draw_levels(kind: str, n: int, rng: np.random.Generator) -> Tensor:
    """Noise levels of a batch, int64 [n] within 0..999, spread evenly over what is drawn from.

    "uniform", or "logit-normal" (Esser et al. 2024): level / 1000 = 1 / (1 + exp(-z)), z standard normal.
    """
    even = spread_levels(n, rng)
    if kind == "uniform":
        return even
    place = (even.double() + 0.5) / LEVELS
    return (torch.sigmoid(torch.special.ndtri(place)) * LEVELS).long().clamp(0, LEVELS - 1)
