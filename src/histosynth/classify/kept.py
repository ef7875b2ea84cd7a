"""Which weights a training keeps: a moving average, a plain mean, or those of the best look at validation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from histosynth.classify.config import ClassifierConfig

_FACTOR = 0.5  # plateau: of the learning rate
_COOLDOWN = 1  # plateau: looks after a fall that do not count
_BETTER = 1e-3  # a loss must fall by so much to count as better
_SMOOTHING = 0.3  # share of the newest look in the smoothed validation loss


class KeptWeights:
    """The average of the weights that is kept instead of the last ones."""

    def __init__(self, parameters: list[nn.Parameter], config: ClassifierConfig) -> None:
        self._parameters, self._config = parameters, config
        self.average = [p.detach().clone() for p in parameters]
        self.best: list[Tensor] | None = None
        self.best_step = 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step `step`, which counts from 0."""
        config = self._config
        if config.swa_from and step >= config.swa_from:
            # the plain mean of the weights so far: Izmailov et al. 2018, arXiv:1803.05407
            part = 1 / (step - config.swa_from + 1)
        else:
            # the average starts short, or it would remember the random start
            part = 1 - min(config.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self._parameters], part)

    def mark_best(self, step: int) -> None:
        """The average as it is now is the best so far."""
        self.best, self.best_step = [a.clone() for a in self.average], step

    @torch.no_grad()
    def apply(self) -> None:
        """Put into the network what is kept: the best average if one was marked, else the last."""
        for parameter, kept in zip(self._parameters, self.best or self.average, strict=True):
            parameter.copy_(kept)

    def state(self) -> dict[str, Any]:
        """What is needed to go on."""
        return {"average": self.average, "best": self.best, "best_step": self.best_step}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.best_step = state["best_step"]
        self.average = self._like(state["average"])
        self.best = None if state["best"] is None else self._like(state["best"])

    def _like(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.empty_like(p).copy_(t) for p, t in zip(self._parameters, tensors, strict=True)]


class Watch:
    """What follows from looks at validation: a lower learning rate (plateau), and an early end.

    Attributes:
        factor: of the learning rate.
        better: whether the last look was the best so far.
        reason: why the training should end, or "".
    """

    def __init__(self, config: ClassifierConfig) -> None:
        self._config = config
        self.factor, self.better, self.reason = 1.0, False, ""
        # numbers alone, so that they can be saved: -1 stands for "not yet"
        self._now = {"looks": 0, "smoothed": -1.0, "best": -1.0, "waited": 0, "over": 0}
        self._plateau = {"best": -1.0, "stood": 0, "cooling": 0}

    def look(self, val_loss: float, train_loss: float) -> None:
        """Take in the loss on the validation tiles, and the mean loss of the steps since the last look."""
        config, now = self._config, self._now
        now["looks"] += 1
        self._follow_plateau(val_loss)
        before = now["smoothed"]
        now["smoothed"] = val_loss if before < 0 else (1 - _SMOOTHING) * before + _SMOOTHING * val_loss
        self.better = now["best"] < 0 or now["smoothed"] < now["best"] - _BETTER
        if self.better:
            now["best"] = now["smoothed"]
        if now["looks"] <= config.patience_from:
            return
        now["waited"] = 0 if self.better else now["waited"] + 1
        now["over"] = now["over"] + 1 if now["smoothed"] - train_loss > _BETTER else 0
        if config.patience and now["waited"] >= config.patience:
            self.reason = f"the smoothed validation loss was no better at {config.patience} looks"
        elif config.overfit and now["over"] >= config.overfit:
            self.reason = f"the validation loss lay above the training loss at {config.overfit} looks in a row"

    def state(self) -> dict[str, Any]:
        """What is needed to go on."""
        return {"factor": self.factor, "now": self._now, "plateau": self._plateau, "reason": self.reason}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.factor, self.reason = state["factor"], state["reason"]
        self._now, self._plateau = dict(state["now"]), dict(state["plateau"])

    def _follow_plateau(self, loss: float) -> None:
        if self._config.schedule != "plateau":
            return
        seen = self._plateau
        if seen["best"] < 0 or loss < seen["best"] - _BETTER:
            seen["best"], seen["stood"] = loss, 0
        elif seen["cooling"]:
            seen["cooling"] -= 1
        else:
            seen["stood"] += 1
        if seen["stood"] > self._config.plateau_patience:
            self.factor *= _FACTOR
            seen["stood"], seen["cooling"] = 0, _COOLDOWN
