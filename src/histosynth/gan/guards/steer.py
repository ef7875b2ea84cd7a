"""What steers a training: the strength of the augmentation, and of the pathology head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Numbers = dict[str, float]


class AdaController:
    """Moves p so that r_t = E[sign D(real)] comes to rest at the target (2006.06676, equation 1).

    r_t near 0: the discriminator guesses; near 1: it has learned the training tiles by heart.
    """

    def __init__(self, target: float, kimg: float, batch: int, interval: int = 4, max_p: float = 1.0) -> None:
        self.target, self.interval, self.max_p = target, interval, max_p
        # the paper lets p go from 0 to 1 in `kimg` thousand images
        self.stride = batch * interval / (kimg * 1000) if kimg > 0 else 0.0
        self.p = 0.0
        self.r_t = 0.0
        self._signs: float | Tensor = 0.0
        self._count = 0

    @property
    def at_cap(self) -> bool:
        """Whether p cannot grow any more."""
        return self.p >= self.max_p

    def update(self, real_logits: Tensor, step: int) -> None:
        """Take in the logits ([N] or [N, k]) of the real batch of step `step`; every `interval` steps p moves."""
        # kept on the device: asking a GPU for a number every step would hold it up
        self._signs = self._signs + real_logits.detach().float().sign().sum()
        self._count += real_logits.numel()
        if (step + 1) % self.interval or not self._count:
            return
        self.r_t = float(self._signs) / self._count
        self.p = min(max(self.p + math.copysign(self.stride, self.r_t - self.target), 0.0), self.max_p)
        self._signs, self._count = 0.0, 0

    def state(self) -> Numbers:
        """What a resumed training needs."""
        return {"p": self.p, "r_t": self.r_t, "signs": float(self._signs), "count": self._count}

    def restore(self, state: Numbers) -> None:
        """Go on from `state`."""
        self.p, self.r_t = state["p"], state["r_t"]
        self._signs, self._count = state["signs"], int(state["count"])


class AccuracyEma:
    """How many of the real tiles the discriminator calls real: the last batch (`value`), and its running mean."""

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = decay
        self._value: float | Tensor = 0.0
        self._ema: float | Tensor = 0.0
        self._seen = 0

    @property
    def value(self) -> float:
        """Of the last batch, 0 to 1."""
        return float(self._value)

    @property
    def ema(self) -> float:
        """The running mean, 0 to 1."""
        return float(self._ema)

    def update(self, real_logits: Tensor) -> None:
        """Take in the logits of a real batch; the first one sets the mean."""
        right = real_logits.detach() > 0
        # kept on the device: asking a GPU for a number every step would hold it up
        self._value = (right.float() if right.device.type == "mps" else right.double()).mean()
        self._ema = self.decay * self._ema + (1 - self.decay) * self._value if self._seen else self._value
        self._seen += 1

    def state(self) -> Numbers:
        """What a resumed training needs."""
        return {"value": self.value, "ema": self.ema, "seen": self._seen}

    def restore(self, state: Numbers) -> None:
        """Go on from `state`."""
        self._value, self._ema, self._seen = state["value"], state["ema"], int(state["seen"])


class AccuracyAda:
    """The accuracy rule: p <- clamp(p + gain * speed * (accuracy - target), 0, max_p), every step.

    Where the running accuracy is above `cap_above`, p is at most `cap`: augmentation is not what a discriminator that
    wins everything lacks. Until step `freeze`, p stays 0.

    Attributes:
        accuracy: the `AccuracyEma` that it follows, which the gate of the pathology head can read too.
    """

    def __init__(
        self,
        target: float = 0.6,
        decay: float = 0.99,
        speed: float = 0.20,
        max_p: float = 0.12,
        freeze: int = 500,
        cap: float = 0.08,
        cap_above: float = 0.9,
        gain: float = 0.001,
    ) -> None:
        self.target, self.speed, self.max_p, self.gain = target, speed, max_p, gain
        self.freeze, self.cap, self.cap_above = freeze, cap, cap_above
        self.accuracy = AccuracyEma(decay)
        self.p = 0.0

    @property
    def at_cap(self) -> bool:
        """Whether p cannot grow any more."""
        return self.p >= self._most()

    def update(self, real_logits: Tensor, step: int) -> None:
        """Take in the logits of the real batch of step `step`."""
        self.accuracy.update(real_logits)
        error = self.accuracy.ema - self.target
        if step >= self.freeze:
            self.p = min(max(self.p + self.gain * self.speed * error, 0.0), self._most())

    def _most(self) -> float:
        return min(self.max_p, self.cap) if self.accuracy.ema > self.cap_above else self.max_p

    def state(self) -> Numbers:
        """What a resumed training needs."""
        return {"p": self.p} | self.accuracy.state()

    def restore(self, state: Numbers) -> None:
        """Go on from `state`."""
        self.p = state["p"]
        self.accuracy.restore(state)


class AlphaGate:
    """The weight alpha of the pathology head: in while the discriminator is good, out while it is not.

    The gate opens at a running accuracy of `high`, shuts at `low`, and stays in its position for at least `dwell` steps
    after each move. Alpha goes to `maximum` or to 0 with the time constant `tau`, and never by more than `slew` a
    step. Until step `freeze` the gate is shut.

    Attributes:
        alpha: the weight of this step.
        open: whether alpha is on its way up.
        maximum: where alpha goes while the gate is open; `SaturationGuard` lowers it.
    """

    def __init__(
        self,
        high: float = 0.78,
        low: float = 0.70,
        dwell: int = 200,
        slew: float = 1e-4,
        tau: float = 400.0,
        freeze: int = 500,
        maximum: float = 0.15,
    ) -> None:
        self.high, self.low, self.dwell = high, low, dwell
        self.slew, self.tau, self.freeze = slew, tau, freeze
        self.maximum = maximum
        self.alpha = 0.0
        self.open = False
        self._held = dwell  # steps since the gate moved; at the start it may move at once

    def update(self, accuracy_ema: float, step: int, stable: bool = True) -> float:
        """Take in the running accuracy on real tiles after step `step`; gives the alpha of the next one.

        Args:
            stable: whether the discriminator may be trusted; the gate does not open while it may not.
        """
        if step < self.freeze:
            return self.alpha
        self._held += 1
        if self._held >= self.dwell:
            if not self.open and stable and accuracy_ema >= self.high:
                self._move(True)
            elif self.open and accuracy_ema <= self.low:
                self._move(False)
        aim = self.maximum if self.open else 0.0
        change = (1 - math.exp(-1 / self.tau)) * (aim - self.alpha)
        self.alpha = max(self.alpha + min(max(change, -self.slew), self.slew), 0.0)
        return self.alpha

    def shut(self) -> None:
        """Shut the gate whatever the accuracy; it stays shut for `dwell` steps."""
        self._move(False)

    def _move(self, opened: bool) -> None:
        self.open, self._held = opened, 0

    def state(self) -> Numbers:
        """What a resumed training needs."""
        return {"alpha": self.alpha, "open": int(self.open), "held": self._held, "maximum": self.maximum}

    def restore(self, state: Numbers) -> None:
        """Go on from `state`."""
        self.alpha, self.open = state["alpha"], bool(state["open"])
        self._held, self.maximum = int(state["held"]), state["maximum"]
