"""Vector scaling: a factor and an offset for each class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from histosynth.classify.calibration.arrays import checked, softmax
from histosynth.classify.calibration.temperature import Temperature
from histosynth.core.errors import DataError

_STEPS = 100
_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Vector:
    """softmax(scale * z + offset), element by element (Guo et al. 2017, section 4.2: matrix scaling with a diagonal).

    Attributes:
        scale: float64 [K].
        offset: float64 [K].
        notes: what was unusual in fitting them.
    """

    scale: np.ndarray
    offset: np.ndarray
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("scale", "offset"):
            value = np.asarray(getattr(self, name), dtype=np.float64)
            if value.ndim != 1 or value.shape != np.shape(self.scale) or not np.isfinite(value).all():
                raise DataError(f"{name} of vector scaling is {getattr(self, name)!r}.", "Give K finite numbers.")
            object.__setattr__(self, name, value)

    @classmethod
    def fit(cls, logits: np.ndarray, y: np.ndarray, *, strength: float = 1.0) -> Vector:
        """The most likely factors and offsets, given that they are near those of temperature scaling.

        With z the logits divided by their best temperature, the sum over tiles of -log p plus
        strength / 2 (|scale - 1|^2 + |offset|^2) is minimised: a normal prior of standard deviation
        1 / sqrt(strength), which a class with few tiles needs and many tiles overrule. The likelihood is convex
        in both and the prior strictly so, so the minimum is one; Newton's method finds it. Logits that are
        all twice as large give the same probabilities.

        Raises:
            DataError: no tile, or arrays that do not fit together.
        """
        logits, y = checked(logits, y, "logits")
        first = Temperature.fit(logits, y)
        z = logits / first.temperature
        classes = z.shape[1]
        target = np.eye(classes)[y]
        middle = np.concatenate([np.ones(classes), np.zeros(classes)])
        theta = middle.copy()

        def loss(at: np.ndarray) -> float:
            out = z * at[:classes] + at[classes:]
            top = out.max(axis=1)
            log_sum = top + np.log(np.exp(out - top[:, None]).sum(axis=1))
            return float((log_sum - out[np.arange(len(y)), y]).sum() + strength / 2 * ((at - middle) ** 2).sum())

        now, notes = loss(theta), list(first.notes)
        for _ in range(_STEPS):
            p = softmax(z * theta[:classes] + theta[classes:])
            away = p - target
            slope = np.concatenate([(away * z).sum(axis=0), away.sum(axis=0)]) + strength * (theta - middle)
            if np.abs(slope).max() <= _TOLERANCE * len(y):
                break
            # the second derivative of log-sum-exp by its inputs i and j is p_i ([i = j] - p_j)
            rows = np.concatenate([p * z, p], axis=1)
            own = [np.diag((p * power).sum(axis=0)) for power in (z**2, z, np.ones_like(z))]
            curve = np.block([[own[0], own[1]], [own[1], own[2]]]) - rows.T @ rows + strength * np.eye(2 * classes)
            step = np.linalg.solve(curve, slope)
            length = 1.0
            while (after := loss(theta - length * step)) > now - 1e-4 * length * (slope @ step) and length > 1e-10:
                length /= 2
            theta, now = theta - length * step, after
        else:
            notes.append(f"Vector scaling did not settle in {_STEPS} steps.")
        absent = classes - len(np.unique(y))
        if absent:
            notes.append(f"Vector scaling: {absent} classes have no validation tile; the prior alone decides for them.")
        return cls(theta[:classes] / first.temperature, theta[classes:], tuple(notes))

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """float [N, K] -> float64 [N, K], rows that sum to 1.

        Raises:
            DataError: another number of classes.
        """
        logits = np.asarray(logits, dtype=np.float64)
        if logits.shape[1] != len(self.scale):
            raise DataError(f"Logits have {logits.shape[1]} classes.", f"This calibrator has {len(self.scale)}.")
        return softmax(logits * self.scale + self.offset)

    def to_json(self) -> dict[str, Any]:
        return {"scale": self.scale.tolist(), "offset": self.offset.tolist(), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Vector:
        return cls(np.asarray(value["scale"]), np.asarray(value["offset"]), tuple(value.get("notes", ())))
