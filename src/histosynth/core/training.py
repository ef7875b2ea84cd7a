"""What the trainings of autoencoders and denoisers share: clock, learning rate, averaged weights, resume state."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from histosynth.core.errors import RunError

Schedule = Literal["steps", "clock"]


@dataclass
class Clock:
    """How far a training is, by steps or by a wall-clock cap.

    With schedule "steps" the cap only cuts, and the weights at any step do not depend on the machine's
    speed. With schedule "clock" the learning rate follows the cap, so that it still ends at zero; the
    result then cannot be repeated bit for bit.
    """

    steps: int
    seconds: float | None
    schedule: Schedule = "steps"
    spent: float = 0.0
    _start: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds spent, those before a resumption included."""
        return self.spent + time.monotonic() - self._start

    def progress(self, step: int) -> float:
        """0 at the start, 1 at the end."""
        share = step / self.steps
        if self.seconds is not None and self.schedule == "clock":
            share = max(share, self.elapsed() / self.seconds)
        return min(1.0, share)

    @property
    def length(self) -> float:
        """The whole, in steps or in seconds of the cap: for progress bars."""
        return round(self.seconds) if self.seconds is not None and self.schedule == "clock" else self.steps

    def position(self, step: int) -> float:
        """Where `step` is on that scale."""
        on_clock = self.seconds is not None and self.schedule == "clock"
        return min(self.length, round(self.elapsed())) if on_clock else step

    def is_over(self, step: int) -> bool:
        """Whether the training ends before `step`."""
        return step >= self.steps or (self.seconds is not None and self.elapsed() >= self.seconds)


def rate(step: int, progress: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to one hundredth at progress 1."""
    return min(1.0, (step + 1) / max(1, warmup)) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Averages:
    """Exponential moving averages of parameters: a <- d a + (1 - d) p.

    The decay grows as min(decay, (1 + k) / (10 + k)), so that short trainings do not keep their start.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self._live, self._decay = parameters, decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in self._live.values()], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged values; calling it again puts them back."""
        for name, parameter in self._live.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.values[name])
            self.values[name].copy_(kept)


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The running moments of every parameter, by its number, as a state file takes them."""
    return {str(number): moments for number, moments in optimizer.state_dict()["state"].items()}


@torch.no_grad()
def restore_moments(optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, Any]]) -> None:
    """Put back what `moments_of` gave, each moment in the memory layout of its weight: fused kernels need that, and the
    others are slower without it. Learning rates stay as they are."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {int(k): v for k, v in saved.items()}, "param_groups": groups})
    for weight, moments in optimizer.state.items():
        for name, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == weight.shape:
                moments[name] = torch.empty_like(weight).copy_(moment)


def pack(
    step: int,
    clock: Clock,
    parameters: dict[str, nn.Parameter],
    averages: Averages,
    optimizer: torch.optim.Optimizer,
    **more: Any,
) -> dict[str, Any]:
    """Everything that a resumed training needs; random numbers follow from the seed and the step.

    Args:
        more: what else the recipe keeps, under names of its own.
    """
    return {
        "step": step,
        "seconds": clock.elapsed(),
        "parameters": {k: p.detach() for k, p in parameters.items()},
        "averages": dict(averages.values),
        "moments": moments_of(optimizer),
        **more,
    }


@torch.no_grad()
def unpack(
    state: dict[str, Any],
    clock: Clock,
    parameters: dict[str, nn.Parameter],
    averages: Averages,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Restore what `pack` gave; returns the next step.

    Raises:
        RunError: the state belongs to other parameters.
    """
    saved = {name: value.shape for name, value in state["parameters"].items()}
    if saved != {name: value.shape for name, value in parameters.items()}:
        raise RunError(
            "The run's saved state belongs to a network of another shape.",
            "Delete the folder's state/ to train from the start, or choose another folder (--out).",
        )
    for name, parameter in parameters.items():
        parameter.copy_(state["parameters"][name])
        averages.values[name].copy_(state["averages"][name])
    restore_moments(optimizer, state["moments"])
    clock.spent = state["seconds"]
    return int(state["step"])


def check_finite(loss: float, step: int, rate_setting: str) -> None:
    """Stop a training whose loss is no longer a number.

    Raises:
        RunError: the loss is infinite or not a number.
    """
    if not math.isfinite(loss):
        raise RunError(
            f"The loss is {loss} at step {step}; the training cannot recover.",
            f"Lower {rate_setting}, or set precision=fp32, and choose a new folder. "
            "The last checkpoint before this step is intact.",
        )


def named(modules: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The trainable parameters of several modules under one flat naming."""
    return {
        f"{prefix}.{name}": p
        for prefix, module in modules.items()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def count(parameters: Iterable[Tensor]) -> int:
    """How many numbers there are in these tensors."""
    return sum(p.numel() for p in parameters)
