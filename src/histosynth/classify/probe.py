"""Probes: a classifier on the features of a frozen encoder, in seconds and without training a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from histosynth import encoders
from histosynth.classify import augment
from histosynth.classify.config import ClassifierConfig
from histosynth.classify.model import can_calibrate, checked_images, inspected, temperature_of
from histosynth.core.checkpoint import load_checkpoint, require_kind, save_checkpoint
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.core.seeds import torch_generator
from histosynth.core.threads import on_one_thread
from histosynth.core.types import Encoder
from histosynth.encoders.store import weights_hash
from histosynth.tiles.batches import TileArray, symmetry

ProbeKind = Literal["linear", "knn"]
Fitted = tuple[dict[str, Tensor], list[str]]
"""What was fitted, and what is to be said of it."""

PENALTIES = (10.0, 1.0, 0.1, 0.01, 0.001)
"""L2 penalties of the linear probe, strongest first; validation chooses."""
USUAL_PENALTY = 0.1
"""The one without validation."""
NEIGHBOURS = 10
"""Nearest training tiles that vote."""
VOTE_TEMPERATURE = 0.07
"""Of the votes' softmax over cosines, as in Caron et al. 2021 (arXiv:2104.14294)."""
_LEAST_VOTE = 0.01  # shared by all classes, so that no class has probability 0


@dataclass(eq=False)
class Probe:
    """A fitted probe. What is evaluated is what `save` writes.

    Attributes:
        kind: linear or knn.
        encoder: the frozen encoder.
        tensors: what was fitted. Both: mean and scale [D] of the features. Linear: weight [K, D] and bias [K]. knn:
            bank [N, D] (unit length), labels [N] and votes [N], how much each training tile counts.
        classes: names, in the order of the outputs.
        temperature: fitted on validation; `probabilities` divides by it.
        initialisation: "frozen ENCODER".
        notes: what was unusual in the data, the fit or the calibration.
        card: what the checkpoint's header says beside the above.
        history: none; a probe has no learning curve.
    """

    kind: ProbeKind
    encoder: Encoder
    tensors: dict[str, Tensor]
    classes: tuple[str, ...]
    temperature: float = 1.0
    initialisation: str = ""
    notes: tuple[str, ...] = ()
    card: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    def logits(self, images: Tensor | np.ndarray, batch_size: int = 128) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, K] on the CPU, without temperature.

        The linear probe's logits are those of its regression; the neighbours' are log shares of the votes.

        Raises:
            DataError: not uint8 [N, 3, H, W], or tiles too small for the encoder.
        """
        images = checked_images(images)
        parts = [torch.zeros(0, len(self.classes))]
        parts += [self.from_features(self.encoder.encode(chunk)) for chunk in images.split(batch_size) if len(chunk)]
        return torch.cat(parts)

    def from_features(self, features: Tensor) -> Tensor:
        """float [N, D], as the encoder gives them -> float32 [N, K]."""
        known = self.tensors
        x = (features.double() - known["mean"]) / known["scale"]
        if self.kind == "linear":
            return (x @ known["weight"].T + known["bias"]).float()
        likeness = torch.nn.functional.normalize(x, dim=1) @ known["bank"].T
        nearest = likeness.topk(min(NEIGHBOURS, likeness.shape[1]), dim=1)
        votes = known["votes"][nearest.indices] * ((nearest.values - 1) / VOTE_TEMPERATURE).exp()
        shares = torch.zeros(len(x), len(self.classes), dtype=torch.float64)
        shares.scatter_add_(1, known["labels"][nearest.indices], votes / votes.sum(1, keepdim=True))
        return ((1 - _LEAST_VOTE) * shares + _LEAST_VOTE / len(self.classes)).log().float()

    def probabilities(self, images: Tensor | np.ndarray, batch_size: int = 128) -> Tensor:
        """uint8 [N, 3, H, W] -> float64 [N, K] on the CPU, calibrated: rows sum to 1."""
        return torch.softmax(self.logits(images, batch_size).double() / self.temperature, dim=1)

    def save(self, path: Path | str) -> Path:
        """Write what was fitted, temperature and card to a .safetensors file; the encoder stays where it is."""
        card = {
            **self.card,
            "kind": "probe",
            "probe": self.kind,
            "encoder": self.encoder.card.name,
            "encoder_weights": weights_hash(self.encoder),
            "classes": list(self.classes),
            "temperature": self.temperature,
            "initialisation": self.initialisation,
            "notes": list(self.notes),
        }
        return save_checkpoint(path, self.tensors, card)

    @classmethod
    def load(cls, path: Path | str, *, device: str = "auto") -> Probe:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, damaged, not a probe, or this installation's encoder has other weights.
        """
        tensors, card = load_checkpoint(path)
        require_kind(card, "probe", path)
        encoder = _encoder(card["encoder"], device)
        if weights_hash(encoder) != card["encoder_weights"]:
            raise CheckpointError(
                f"{path} was fitted on features of {card['encoder']} with other weights.",
                "Use those weights, or fit the probe again.",
            )
        return cls(
            card["probe"],
            encoder,
            tensors,
            tuple(card["classes"]),
            card["temperature"],
            card["initialisation"],
            tuple(card["notes"]),
            card,
        )


@on_one_thread
def fit_probe(
    probe: str,
    encoder: str,
    train: TileArray,
    val: TileArray,
    config: ClassifierConfig = ClassifierConfig(),
    *,
    seed: int,
    tick: Callable[[], object] | None = None,
    device: str = "auto",
) -> Probe:
    """Fit a probe on the features of `train`.

    Every class counts the same, and within a class the sources do as in `tiles.batches.batch_at`: with
    `config.share` the synthetic tiles have that share of the class, else all sources the same. With augmentation
    each tile stands for itself and for `config.copies - 1` copies that are turned, flipped and restained.

    Args:
        probe: a name in `PROBES`.
        encoder: the name of an encoder.
        train: tiles to learn from. A class without tiles stays in the label space and is named in `notes`.
        val: tiles that choose the penalty and fit the temperature; may be empty.
        seed: of the copies; nothing else is random.

    Raises:
        DataError: no tile, tiles of one class only, or `val` with other classes than `train`.
        SettingError: an unknown probe or encoder.
        CheckpointError: the encoder's weights are missing.
    """
    notes = inspected(train, val)
    network = _encoder(encoder, device)
    weight = tile_weights(train, config.share)
    features, tiles = _features(network, train, config, seed)
    weight = weight[tiles]
    weight = weight / weight.sum()
    mean = weight @ features
    scale = spread_of(features, weight, mean)
    x, y = (features - mean) / scale, train.labels[tiles]
    seen = network.encode(torch.from_numpy(np.ascontiguousarray(val.images)))
    of_val = ((seen.double().numpy() - mean) / scale, val.labels) if can_calibrate(val) else None
    fitted, unusual = PROBES[_known(probe)](x, y, weight, len(train.classes), of_val)
    tensors = {"mean": torch.from_numpy(mean), "scale": torch.from_numpy(scale), **fitted}
    result = Probe(probe, network, tensors, train.classes, initialisation=f"frozen {encoder}")  # type: ignore[arg-type]
    result.temperature, of_temperature = temperature_of(lambda _: result.from_features(seen), val)
    result.notes = (*notes, *unusual, *of_temperature)
    result.card = {
        "name": f"{probe}:{encoder}",
        "config": asdict(config),
        "parameters": sum(t.numel() for t in tensors.values()),
        "steps": 0,
        "seed": seed,
        "licence": network.card.licence,
        "parents": [f"{encoder} ({network.card.licence})"],
        "trained_on": train.counts(),
        "command": "histosynth train classifier",
    }
    if tick is not None:
        tick()
    return result


def spread_of(features: np.ndarray, weight: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """float64 [D]: the weighted standard deviation by which features are divided, at least a hundredth of the largest.

    (An empty bin of a histogram is constant over few tiles, and would be worth thousands of deviations in the next.)
    """
    scale = np.sqrt(weight @ (features - mean) ** 2)
    return np.maximum(scale, 0.01 * scale.max()) if scale.max() > 0 else np.ones_like(scale)


def tile_weights(tiles: TileArray, share: float | None) -> np.ndarray:
    """float64 [N], sum 1: every class the same, and its sources as `batch_at` draws them in the long run."""
    found = np.zeros(len(tiles))
    for sources in tiles.members.values():
        made = [kind for kind in sources if kind > 0]
        for kind, positions in sources.items():
            part = 1 / len(sources)
            if share is not None and 0 < len(made) < len(sources):
                part = share / len(made) if kind > 0 else 1 - share
            found[positions] = part / len(positions)
    return found / found.sum()


def _features(encoder: Encoder, tiles: TileArray, config: ClassifierConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [M, D] and int64 [M]: features, and which tile each row is a copy of."""
    copies = 1 if config.augment == "none" else config.copies
    parts = []
    for copy in range(copies):
        images = torch.from_numpy(np.ascontiguousarray(tiles.images))
        if copy:
            images = symmetry(images, copy % 8)
            changed = augment.augmented(images, config, torch_generator(seed, "probe copy", copy))
            images = changed.round().clamp(0, 255).to(torch.uint8)
        parts.append(encoder.encode(images.contiguous()).double().numpy())
    return np.concatenate(parts), np.tile(np.arange(len(tiles)), copies)


def _fit_linear(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, classes: int, val: tuple[np.ndarray, np.ndarray] | None
) -> Fitted:
    """Multinomial logistic regression; validation chooses the penalty."""
    if val is None:
        note = f"The penalty is {USUAL_PENALTY:g}: too few validation tiles to choose it."
        return _linear(logistic(x, y, weight, classes, USUAL_PENALTY)), [note]
    found: np.ndarray | None = None
    tried: list[tuple[float, float, np.ndarray]] = []
    for penalty in PENALTIES:  # from the strongest, each starting where the last ended
        found = logistic(x, y, weight, classes, penalty, found)
        tried.append((_nll(val[0], val[1], found), penalty, found))
    _, chosen, best = min(tried, key=lambda one: one[0])
    return _linear(best), [f"Validation chose the penalty {chosen:g} of {len(PENALTIES)}."]


def logistic(
    x: np.ndarray, y: np.ndarray, weight: np.ndarray, classes: int, penalty: float, start: np.ndarray | None = None
) -> np.ndarray:
    """Minimise sum_i weight_i (-log softmax(W x_i + b)[y_i]) + penalty / (2 D) |W|^2, which is convex.

    Args:
        x: float64 [N, D], standardised.
        y: int [N].
        weight: float64 [N], sum 1.
        classes: K.
        penalty: of the weights; not of the bias.
        start: [K, D + 1].

    Returns:
        float64 [K, D + 1]: W, and b as the last column.
    """
    from scipy.optimize import minimize

    n, d = x.shape
    strength = penalty / d
    target = np.zeros((n, classes))
    target[np.arange(n), y] = 1

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(classes, d + 1)
        log_p = _log_softmax(x @ w[:, :d].T + w[:, d])
        error = weight[:, None] * (np.exp(log_p) - target)
        slope = np.concatenate([error.T @ x + strength * w[:, :d], error.sum(0)[:, None]], axis=1)
        value = -(weight * log_p[np.arange(n), y]).sum() + strength / 2 * (w[:, :d] ** 2).sum()
        return float(value), slope.ravel()

    begin = np.zeros((classes, d + 1)) if start is None else start
    options = {"maxiter": 500, "ftol": 1e-9, "gtol": 1e-6}
    return minimize(loss, begin.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(classes, d + 1)


def _nll(x: np.ndarray, y: np.ndarray, parameters: np.ndarray) -> float:
    log_p = _log_softmax(x @ parameters[:, :-1].T + parameters[:, -1])
    return float(-log_p[np.arange(len(y)), y].mean())


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def _linear(parameters: np.ndarray) -> dict[str, Tensor]:
    return {
        "weight": torch.from_numpy(np.ascontiguousarray(parameters[:, :-1])),
        "bias": torch.from_numpy(np.ascontiguousarray(parameters[:, -1])),
    }


def _fit_neighbours(x: np.ndarray, y: np.ndarray, weight: np.ndarray, *_: Any) -> Fitted:
    """Nothing is fitted: the training tiles are kept."""
    bank = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    votes = torch.from_numpy(weight / weight.max())
    return {"bank": torch.from_numpy(bank), "labels": torch.from_numpy(y.astype(np.int64)), "votes": votes}, []


def _known(probe: str) -> str:
    if probe not in PROBES:
        raise SettingError(f"The probe is {probe!r}.", f"Use {' or '.join(PROBES)}.")
    return probe


@lru_cache(maxsize=2)
def _encoder(name: str, device: str) -> Encoder:
    """Kept between fits: an experiment fits hundreds of probes on one encoder."""
    return encoders.load(name, device)


PROBES: dict[str, Callable[..., Fitted]] = {"linear": _fit_linear, "knn": _fit_neighbours}
