"""All guards of a training together: each takes its settings from `GanConfig` and its part of every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from histosynth.gan.config import GanConfig
from histosynth.gan.guards import (
    AccuracyAda,
    AccuracyEma,
    AdaController,
    AlphaGate,
    CollapseMonitor,
    DiscriminatorGuard,
    SaturationGuard,
)


class Steering:
    """What steers and watches a training.

    Attributes:
        ada, accuracy, gate, saturation, winner, monitor: the guards (`histosynth.gan.guards`).
        warnings: what they have to say since `take_warnings`.
        alpha_seen: the largest weight that the pathology head has had.
    """

    def __init__(self, config: GanConfig) -> None:
        self.config = config
        self.ada: AdaController | AccuracyAda
        self._adapts = config.ada != "fixed" and config.ada_target > 0
        if config.ada == "accuracy":
            self.ada = AccuracyAda(
                config.ada_target,
                config.ada_decay,
                config.ada_rate * config.ada_gain / 1e-3,  # the guard has its own factor of 0.001
                config.ada_max,
                config.ada_freeze,
                config.ada_cap,
                config.ada_cap_above,
            )
            self.accuracy = self.ada.accuracy
        else:
            self.ada = AdaController(config.ada_target, config.ada_speed, config.batch, max_p=config.ada_max)
            self.accuracy = AccuracyEma(config.ada_decay)
        self.ada.p = config.ada_p
        self.gate = AlphaGate(
            config.alpha_on,
            config.alpha_off,
            config.alpha_dwell,
            config.alpha_step,
            config.alpha_tau,
            config.alpha_freeze,
            config.alpha_max,
        )
        self.saturation = SaturationGuard(
            config.perceptual,
            config.saturation_limit,
            config.saturation_perceptual,
            config.saturation_perceptual_min,
            config.saturation_alpha,
            config.saturation_alpha_min,
            config.saturation_say_every,
        )
        self.winner = DiscriminatorGuard(config.d_stop_acc, config.d_stop_ema, max(1, config.d_stop_steps))
        self.monitor = CollapseMonitor(config.collapse, stop_after=config.collapse_stop)
        self.alpha_seen = 0.0
        self.warnings: list[str] = []

    @property
    def p(self) -> float:
        """Probability of each augmentation."""
        return self.ada.p

    @property
    def alpha(self) -> float:
        """Weight of the pathology head; 0 without one."""
        if not self.config.head:
            return 0.0
        return self.gate.alpha if self.config.alpha_gate else self.gate.maximum

    @property
    def perceptual(self) -> float:
        """Weight of the perceptual loss."""
        return self.saturation.perceptual

    @property
    def stopped_by(self) -> str:
        """The guard that ends the training, or nothing."""
        if self.config.d_stop_steps and self.winner.stop:
            return "discriminator"
        return "collapse" if self.monitor.stop else ""

    def update(self, step: int, real_logits: Tensor, fake: Tensor, real: Tensor) -> None:
        """After step `step`, with the logits of the real tiles and the tiles of the whole batch in [-1, 1]."""
        config = self.config
        if self._adapts:
            self.ada.update(real_logits, step)
        if not (self._adapts and isinstance(self.ada, AccuracyAda)):  # which keeps the accuracy itself
            self.accuracy.update(real_logits)
        if config.saturation_guard:
            self.saturation.update(fake, self.gate, real if config.saturation_relative else None)
            self._hear(self.saturation.warning)
        if config.alpha_gate:
            self.gate.update(self.accuracy.ema, step)
        if config.d_stop_steps:
            self.winner.update(self.accuracy, not self._adapts or self.ada.at_cap)
            self._hear(self.winner.warning)
        self.alpha_seen = max(self.alpha_seen, self.alpha)

    def watch(self, fake: Tensor, real: Tensor, fake_features: Tensor, real_features: Tensor, labels: Tensor) -> None:
        """Now and then: whether the generator has collapsed (see `CollapseMonitor.update`)."""
        if self.config.collapse:
            with torch.no_grad():
                self._hear(self.monitor.update(fake, real, fake_features, real_features, labels))

    def row(self) -> dict[str, float]:
        """What the log says of them."""
        row = {"ada_p": self.ada.p, "acc_ema": self.accuracy.ema, "alpha": self.alpha, "spread": self.monitor.spread}
        return row | ({"r_t": self.ada.r_t} if isinstance(self.ada, AdaController) else {})

    def take_warnings(self) -> list[str]:
        """What they had to say; it is said once."""
        said, self.warnings = self.warnings, []
        return said

    def state(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {name: guard.state() for name, guard in self._guards().items()} | {"alpha_seen": self.alpha_seen}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, guard in self._guards().items():
            guard.restore(state[name])
        self.alpha_seen = state["alpha_seen"]

    def _guards(self) -> dict[str, Any]:
        found = {"ada": self.ada, "gate": self.gate, "saturation": self.saturation, "winner": self.winner}
        found["monitor"] = self.monitor
        return found if isinstance(self.ada, AccuracyAda) else found | {"accuracy": self.accuracy}

    def _hear(self, warning: str) -> None:
        if warning:
            self.warnings.append(warning)
