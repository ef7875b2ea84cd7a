"""What watches a training: saturation, a discriminator that has won, collapse; and the best weights so far."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from histosynth.gan.guards.steer import AccuracyEma, AlphaGate, Numbers

if TYPE_CHECKING:
    from torch import Tensor


class SaturationGuard:
    """Takes back what pushes the fakes into white and black: when their mean |pixel| is above `limit`, the perceptual
    weight times 0.9, the gate's maximum times 0.95, neither below its floor, and the gate shut.

    Attributes:
        perceptual: the weight of the perceptual loss, from now on.
        trips: how many steps were above the limit.
    """

    stop = False

    def __init__(
        self,
        perceptual: float = 0.01,
        limit: float = 0.75,
        perceptual_factor: float = 0.9,
        perceptual_floor: float = 0.005,
        alpha_factor: float = 0.95,
        alpha_floor: float = 0.1,
        every: int = 50,
    ) -> None:
        self.perceptual, self.limit, self.every = perceptual, limit, every
        self.perceptual_factor, self.perceptual_floor = perceptual_factor, perceptual_floor
        self.alpha_factor, self.alpha_floor = alpha_factor, alpha_floor
        self.trips = 0
        self.warning = ""

    def update(self, fake: Tensor, gate: AlphaGate, real: Tensor | None = None) -> bool:
        """Look at the fakes of a step, float [N, 3, H, W] in [-1, 1]; gives whether they are saturated.

        Args:
            real: real tiles of the same classes; what is as bright as they are (fat, background) is not saturated.
        """
        self.warning = ""
        level = float(fake.detach().float().abs().mean())
        limit = self.limit if real is None else max(self.limit, float(real.float().abs().mean()))
        if level <= limit:
            return False
        self.perceptual = _shrunk(self.perceptual, self.perceptual_factor, self.perceptual_floor)
        gate.maximum = _shrunk(gate.maximum, self.alpha_factor, self.alpha_floor)
        gate.shut()
        if self.trips % self.every == 0:
            self.warning = (
                f"The fake tiles are saturated (mean |pixel| {level:.2f}, limit {limit:.2f}): "
                f"perceptual weight {self.perceptual:.4f}, alpha at most {gate.maximum:.3f}."
            )
        self.trips += 1
        return True

    def state(self) -> Numbers:
        """What a resumed training needs; the gate keeps its own."""
        return {"perceptual": self.perceptual, "trips": self.trips}

    def restore(self, state: Numbers) -> None:
        """Go on from `state`."""
        self.perceptual, self.trips = state["perceptual"], int(state["trips"])


class DiscriminatorGuard:
    """Stops a training that the discriminator has won: for `patience` steps in a row its accuracy on real tiles is at
    least `accuracy`, or the running one at least `ema`, while the augmentation is at its cap.
    """

    def __init__(self, accuracy: float = 0.995, ema: float = 0.985, patience: int = 500) -> None:
        self.accuracy, self.ema, self.patience = accuracy, ema, patience
        self.steps = 0
        self.warning = ""

    @property
    def stop(self) -> bool:
        """Whether the training is lost."""
        return self.steps >= self.patience

    def update(self, accuracy: AccuracyEma, at_cap: bool) -> bool:
        """Take in the accuracy and whether the augmentation is at its cap; gives `stop`."""
        too_strong = accuracy.value >= self.accuracy or accuracy.ema >= self.ema
        self.steps = self.steps + 1 if too_strong and at_cap else 0
        self.warning = ""
        if self.steps == self.patience:
            self.warning = (
                f"The discriminator has won: it knew {accuracy.ema:.1%} of the real tiles for {self.patience} steps, "
                "with augmentation at its cap. Use more tiles, more augmentation or a smaller lr_d."
            )
        return self.stop

    def state(self) -> Numbers:
        """What a resumed training needs."""
        return {"steps": self.steps}

    def restore(self, state: Numbers) -> None:
        """Go on from `state`."""
        self.steps = int(state["steps"])


class CollapseMonitor:
    """Sees a generator that repeats itself, or that makes blank tiles.

    Give it tiles of the generator that *learns*: an averaged one is still fine a thousand steps after the collapse.

    `spread` is the variance of the fakes' features over that of the reals', inside the classes where labels are given
    (else other classes hide that each has become one tile); 1 is as varied. `intensity` is the mean pixel, -1 black
    and 1 white. Both are running means over the updates. It warns after `patience` updates in a row with a spread
    below `spread_low`, or an intensity beyond +-`blank` and further out than the reals' by `margin`; and would stop
    after `stop_after` such updates (0: never).
    """

    def __init__(
        self,
        spread_low: float = 0.2,
        blank: float = 0.8,
        margin: float = 0.15,
        decay: float = 0.8,
        patience: int = 5,
        stop_after: int = 0,
    ) -> None:
        self.spread_low, self.blank, self.margin = spread_low, blank, margin
        self.decay, self.patience, self.stop_after = decay, patience, stop_after
        self.spread = 1.0
        self.intensity = 0.0
        self._real_intensity = 0.0
        self._seen = 0
        self.bad = 0
        self.warning = ""

    @property
    def stop(self) -> bool:
        """Whether the generator has collapsed for so long that going on is of no use."""
        return 0 < self.stop_after <= self.bad

    def update(
        self, fake: Tensor, real: Tensor, fake_features: Tensor, real_features: Tensor, labels: Tensor | None = None
    ) -> str:
        """Look at a batch of each; gives the warning, or nothing.

        Args:
            fake, real: float [N, 3, H, W] in [-1, 1].
            fake_features, real_features: [N, ...], through an encoder or of the discriminator.
            labels: int64 [N], the classes of both; at least one class must come twice, else they are not used.
        """
        with torch.no_grad():
            groups = labels if labels is not None and len(labels.unique()) < len(labels) else None
            wide = float(_spread(real_features, groups))
            spread = float(_spread(fake_features, groups)) / wide if wide > 0 else 1.0
            intensity, expected = float(fake.float().mean()), float(real.float().mean())
        keep = self.decay if self._seen else 0.0
        self.spread = keep * self.spread + (1 - keep) * spread
        self.intensity = keep * self.intensity + (1 - keep) * intensity
        self._real_intensity = keep * self._real_intensity + (1 - keep) * expected
        self._seen += 1

        alike = self.spread < self.spread_low
        outwards = math.copysign(1.0, self.intensity) * (self.intensity - self._real_intensity)
        blank = abs(self.intensity) > self.blank and outwards > self.margin
        self.bad = self.bad + 1 if alike or blank else 0
        self.warning = ""
        if self.bad and self.bad % self.patience == 0:
            colour = "white" if self.intensity > 0 else "black"
            what = f"nearly {colour}" if blank else "nearly alike"
            self.warning = (
                f"The generator seems to have collapsed: its tiles are {what} (spread {self.spread:.2f} of the real "
                f"one, mean pixel {self.intensity:.2f} against {self._real_intensity:.2f})."
            )
        return self.warning

    def state(self) -> Numbers:
        """What a resumed training needs."""
        return {
            "spread": self.spread,
            "intensity": self.intensity,
            "real_intensity": self._real_intensity,
            "seen": self._seen,
            "bad": self.bad,
        }

    def restore(self, state: Numbers) -> None:
        """Go on from `state`."""
        self.spread, self.intensity = state["spread"], state["intensity"]
        self._real_intensity, self._seen = state["real_intensity"], int(state["seen"])
        self.bad = int(state["bad"])


class BestCheckpoint:
    """Remembers the step with the smallest validation score, and stops after `patience` evaluations without a smaller
    one (0: never). A score that is not a number is never the best.

    Attributes:
        score, step: of the best so far; step -1 is none.
    """

    def __init__(self, measure: str, patience: int = 0) -> None:
        self.measure, self.patience = measure, patience
        self.score = 0.0
        self.step = -1
        self.evaluations = 0
        self.since = 0

    @property
    def stop(self) -> bool:
        """Whether it has not become better for long enough."""
        return 0 < self.patience <= self.since

    def update(self, score: float, step: int) -> bool:
        """Take in the score of step `step`; gives whether it is the best, so that the caller keeps the weights."""
        better = math.isfinite(score) and (self.step < 0 or score < self.score)
        self.evaluations += 1
        self.since = 0 if better else self.since + 1
        if better:
            self.score, self.step = float(score), step
        return better

    def chosen_on(self) -> dict[str, str | float] | None:
        """What the card says of how these weights were chosen; None where no score was ever a number."""
        if self.step < 0:
            return None
        return {"measure": self.measure, "score": self.score, "step": self.step, "evaluations": self.evaluations}

    def state(self) -> Numbers:
        """What a resumed training needs."""
        return {"score": self.score, "step": self.step, "evaluations": self.evaluations, "since": self.since}

    def restore(self, state: Numbers) -> None:
        """Go on from `state`."""
        self.score, self.step = state["score"], int(state["step"])
        self.evaluations, self.since = int(state["evaluations"]), int(state["since"])


def _shrunk(value: float, factor: float, floor: float) -> float:
    """`value` times `factor`, not below `floor`; a value that is below it already stays."""
    return min(value, max(value * factor, floor))


def _spread(features: Tensor, groups: Tensor | None) -> Tensor:
    """Variance of the features, summed over them; inside the groups where there are any."""
    x = features.detach().flatten(1).double()
    if groups is None:
        return x.var(dim=0, correction=1).sum() if len(x) > 1 else x.new_zeros(())
    _, which, counts = groups.to(x.device).unique(return_inverse=True, return_counts=True)
    sums = x.new_zeros(len(counts), x.shape[1]).index_add_(0, which, x)
    inside = x - (sums / counts[:, None])[which]
    return inside.square().sum() / (len(x) - len(counts))
