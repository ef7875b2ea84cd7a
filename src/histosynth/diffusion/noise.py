"""The noising process, what the network predicts of it, and the solver that runs it backwards.

x_t = a_t x_0 + s_t e with a_t^2 + s_t^2 = 1 on the cosine schedule (Nichol and Dhariwal 2021); the
network predicts v = a_t e - s_t x_0 (Salimans and Ho 2022), which stays well scaled at both ends.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

LEVELS = 1000
_BETAS = "squaredcos_cap_v2"


def solver(steps: int) -> Any:
    """DPM-Solver++ 2M (Lu et al. 2022): diffusers' scheduler, set to `steps` steps."""
    scheduler: Any = DPMSolverMultistepScheduler(
        num_train_timesteps=LEVELS,
        beta_schedule=_BETAS,
        prediction_type="v_prediction",
        algorithm_type="dpmsolver++",
        solver_order=2,
        lambda_min_clipped=-5.1,  # the cosine schedule's last levels are pure noise, where lambda diverges
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    return scheduler


class Noising:
    """Noise levels as tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        products = solver(1).alphas_cumprod.float()
        self.a = products.sqrt().to(device)[:, None, None, None]
        self.s = (1 - products).sqrt().to(device)[:, None, None, None]

    def add(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """x_t of latents [N, C, H, W] at int64 levels [N]."""
        return self.a[levels] * clean + self.s[levels] * noise

    def target(self, clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
        """v of the same."""
        return self.a[levels] * noise - self.s[levels] * clean

    def weight(self, levels: Tensor, gamma: float) -> Tensor:
        """Min-SNR weight of the squared error in v (Hang et al. 2023): min(SNR, gamma) / (SNR + 1), [N]."""
        ratio = (self.a[levels] / self.s[levels]).square().flatten()
        return ratio.clamp_max(gamma) / (ratio + 1)


def spread_levels(n: int, rng: np.random.Generator) -> Tensor:
    """One random level in each of n equal parts of 0..999, shuffled: int64 [n].

    A batch then covers all levels evenly, which takes most of the noise out of the loss.
    """
    places = (np.arange(n) + rng.random(n)) / n
    return torch.from_numpy((rng.permutation(places) * LEVELS).astype(np.int64).clip(0, LEVELS - 1))
