"""Train the classifier: the same steps in every arm; validation fits the temperature and chooses nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from histosynth.classify import augment, calibration, network, scores
from histosynth.core.checkpoint import load_checkpoint, require_kind, save_checkpoint
from histosynth.core.device import pick_device
from histosynth.core.errors import DataError, RunError, SettingError
from histosynth.core.seeds import derive, torch_generator
from histosynth.tiles.batches import Sampling, TileArray, batch_at

_ENOUGH_TO_CALIBRATE = 20
_TORCHVISION = "MobileNetV2 IMAGENET1K_V2 of torchvision (BSD-3-Clause; trained on ImageNet)"


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained."""

    steps: int = 150
    """Optimisation steps. The same in every arm: more tiles must not mean more training."""
    batch: int = 32
    """Tiles a step."""
    lr: float = 1e-2
    """Highest learning rate: a linear rise over the first quarter, then a cosine to zero."""
    weight_decay: float = 0.05
    """Of AdamW (decoupled)."""
    width: float = 0.5
    """Multiplier of MobileNetV2's channels. ImageNet weights exist for 1.0 only."""
    depth: float = 0.25
    """Multiplier of MobileNetV2's blocks a stage (at least one). ImageNet weights exist for 1.0 only."""
    dropout: float = 0.1
    """Before the last layer."""
    weights: network.Weights = "auto"
    """auto: ImageNet weights if they are on this disk and width and depth are 1.0; imagenet: insist and
    download; none: from scratch."""
    augment: Literal["none", "classical"] = "none"
    """classical: flips, quarter turns, stain jitter in optical density, blur."""
    mixup: float = 0.0
    """Alpha of MixUp (0 = off). With label smoothing it makes a network under-confident; the temperature
    mends that."""
    label_smoothing: float = 0.1
    """Probability taken from the true class and spread over all classes."""
    sampling: Sampling = "balanced"
    """balanced: every class the same share of a batch; natural: as they come."""
    share: float | None = None
    """Share of synthetic tiles (sources above 0) in what is seen of a class that has both; with balanced sampling.
    None: every source of a class the same share."""
    average: float = 0.9
    """Decay of the moving average of the weights, which is what is kept (0 = the last weights)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is for GPUs and CPUs with matrix units; elsewhere it is slower."""
    val_every: int = 0
    """Look at the validation tiles every so many steps, for the learning curve only (0 = never)."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("steps", 1, math.inf),
            ("batch", 2, math.inf),
            ("lr", 1e-12, math.inf),
            ("weight_decay", 0, math.inf),
            ("dropout", 0, 0.99),
            ("mixup", 0, math.inf),
            ("label_smoothing", 0, 0.99),
            ("average", 0, 0.9999),
            ("val_every", 0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise SettingError(f"{name} is {value}.", f"Use a number from {low:g} to {high:g}.")
        if self.share is not None and not 0 <= self.share <= 1:
            raise SettingError(f"share is {self.share}.", "Use a number from 0 to 1, or leave it out.")
        if self.share is not None and self.sampling != "balanced":
            raise SettingError(f"share is {self.share}, but sampling is {self.sampling!r}.", "Use sampling balanced.")
        for name, known in (
            ("augment", ("none", "classical")),
            ("sampling", ("balanced", "natural")),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise SettingError(f"{name} is {getattr(self, name)!r}.", f"Use {' or '.join(known)}.")


@dataclass(eq=False)
class Classifier:
    """A trained classifier. The one that is evaluated is the one that `save` writes.

    Attributes:
        model: the network, in evaluation mode.
        classes: names, in the order of the outputs.
        size: edge length that tiles are brought to, pixels.
        temperature: fitted on validation; `probabilities` divides by it.
        initialisation: "imagenet" or "scratch".
        notes: what was unusual in the data or the calibration.
        card: what the checkpoint's header says beside the above.
        history: step, loss and, where looked at, val_nll and val_balanced_accuracy.
    """

    model: nn.Module
    classes: tuple[str, ...]
    size: int
    temperature: float = 1.0
    initialisation: network.Initialisation = "scratch"
    notes: tuple[str, ...] = ()
    card: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    @torch.inference_mode()
    def logits(self, images: Tensor | np.ndarray, batch_size: int = 128) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, K] on the CPU, without temperature.

        Tiles of another size are resized (bilinear, antialiased) to `size`.

        Raises:
            DataError: not uint8 [N, 3, H, W].
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DataError(
                f"Tiles have shape {tuple(images.shape)} and type {images.dtype}.", "Give uint8 [N, 3, H, W]."
            )
        device = next(self.model.parameters()).device
        self.model.eval()
        parts = [torch.zeros(0, len(self.classes))]
        for start in range(0, len(images), batch_size):
            tiles = images[start : start + batch_size].to(device).float()
            if tiles.shape[-2:] != (self.size, self.size):
                tiles = nn.functional.interpolate(
                    tiles, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
                )
            parts.append(self.model(network.normalise(tiles)).float().cpu())
        return torch.cat(parts)

    def probabilities(self, images: Tensor | np.ndarray, batch_size: int = 128) -> Tensor:
        """uint8 [N, 3, H, W] -> float64 [N, K] on the CPU, calibrated: rows sum to 1."""
        return torch.softmax(self.logits(images, batch_size).double() / self.temperature, dim=1)

    def save(self, path: Path | str) -> Path:
        """Write weights, temperature and card to a .safetensors file."""
        card = {
            **self.card,
            "kind": "classifier",
            "classes": list(self.classes),
            "size": self.size,
            "temperature": self.temperature,
            "initialisation": self.initialisation,
            "notes": list(self.notes),
        }
        return save_checkpoint(path, self.model.state_dict(), card)

    @classmethod
    def load(cls, path: Path | str, *, device: str = "auto") -> Classifier:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, damaged, or not a classifier.
        """
        tensors, card = load_checkpoint(path)
        require_kind(card, "classifier", path)
        config = card["config"]
        model, _ = network.build(len(card["classes"]), size=card["size"], width=config["width"], depth=config["depth"])
        model.load_state_dict(tensors)
        model = _placed(model, device).eval()
        return cls(
            model,
            tuple(card["classes"]),
            card["size"],
            card["temperature"],
            card["initialisation"],
            tuple(card["notes"]),
            card,
        )


def train_classifier(
    train: TileArray,
    val: TileArray,
    config: ClassifierConfig,
    *,
    seed: int,
    tick: Callable[[], object] | None = None,
    device: str = "auto",
) -> Classifier:
    """Train for `config.steps` steps, keep the averaged weights, fit the temperature on `val`.

    Validation chooses nothing: the schedule ends at a learning rate of zero and the moving average of the
    weights is kept. Picking the best step on a few validation tiles would add noise to every arm, reward
    arms by luck, and use up the tiles on which the temperature must be honest. Two trainings with the same
    seed begin with the same weights, which makes arms comparable in pairs; on one machine with one number
    of threads they give the same logits.

    Args:
        train: tiles to learn from. A class without tiles stays in the label space and is named in `notes`.
        val: tiles to fit the temperature on; may be empty (temperature 1, named in `notes`).
        seed: of the weights, the batches and the augmentation.
        tick: called without arguments after every step (the tick of a progress bar will do).

    Raises:
        DataError: no tile, tiles of one class only, or `val` with other classes than `train`.
        SettingError: weights that do not exist for this network.
        RunError: the loss is no longer a number.
    """
    notes = _inspected(train, val)
    # fork, so that training in the middle of a caller's program leaves its random numbers alone
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "init"))
        model, initialisation = network.build(
            len(train.classes),
            size=train.size,
            width=config.width,
            depth=config.depth,
            dropout=config.dropout,
            weights=config.weights,
        )
        model = _placed(model, device)
        result = Classifier(model, train.classes, train.size, initialisation=initialisation)
        _optimise(result, train, val, config, seed, tick)
    result.temperature, unusual = _temperature(result, val)
    result.notes = (*notes, *unusual)
    result.card = {
        "name": "mobilenet_v2",
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": config.steps,
        "seed": seed,
        "licence": "Apache-2.0",
        "parents": [_TORCHVISION] if initialisation == "imagenet" else [],
        "trained_on": train.counts(),
        "command": "histosynth train classifier",
    }
    return result


def _optimise(
    result: Classifier,
    train: TileArray,
    val: TileArray,
    config: ClassifierConfig,
    seed: int,
    tick: Callable[[], object] | None,
) -> None:
    model = result.model
    parameters = list(model.parameters())
    where = parameters[0].device
    # no decay of biases and batch-norm scales, as usual for AdamW
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=config.lr,
    )
    average = [p.detach().clone() for p in parameters]
    low = config.precision == "bfloat16"
    for step in range(config.steps):
        torch.manual_seed(derive(seed, "step", step))
        for group in optimiser.param_groups:
            group["lr"] = config.lr * _schedule(step, config.steps)
        images, targets = _batch(train, config, seed, step, where)
        model.train()
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=low):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        # the average starts short, or it would remember the random start
        decay = min(config.average, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RunError(f"The classifier's loss is {value} at step {step + 1}.", f"Lower lr (it is {config.lr:g}).")
        row = {"step": step + 1, "loss": value}
        if config.val_every and (step + 1) % config.val_every == 0 and len(val):
            row |= _look(result, val)
        result.history.append(row)
        if tick is not None:
            tick()
    if config.average:
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.data.copy_(mean)
    _refresh_batch_norm(model, train, config, seed, where)
    model.eval()


def _schedule(step: int, steps: int) -> float:
    """A linear rise over the first quarter, then half a cosine down to zero at the end."""
    done, rise = (step + 1) / (steps + 1), 0.25
    return done / rise if done < rise else 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))


def _batch(
    train: TileArray, config: ClassifierConfig, seed: int, step: int, where: torch.device
) -> tuple[Tensor, Tensor]:
    """Normalised images and targets [N, K] of a step: a pure function of (seed, step)."""
    classical = config.augment == "classical"
    batch = batch_at(
        train,
        step,
        batch_size=config.batch,
        sampling=config.sampling,
        seed=derive(seed, "batches"),
        augment=classical,
        **({} if config.share is None else {"share": config.share}),
    )
    images = batch.images.to(where).float()
    targets = nn.functional.one_hot(batch.labels, len(train.classes)).float().to(where)
    generator = torch_generator(seed, "augment", step)
    if classical:
        images = augment.classical(images, generator)
    images = network.normalise(images)
    if config.mixup:
        # Zhang et al. 2018, arXiv:1710.09412: one weight and one partner for each tile
        rng = np.random.default_rng(derive(seed, "mixup", step))
        share = torch.from_numpy(rng.beta(config.mixup, config.mixup, len(images))).float().to(where)
        partner = torch.from_numpy(rng.permutation(len(images))).to(where)
        images = torch.lerp(images[partner], images, share.view(-1, 1, 1, 1))
        targets = torch.lerp(targets[partner], targets, share.view(-1, 1))
    return images, targets


@torch.no_grad()
def _refresh_batch_norm(
    model: nn.Module, train: TileArray, config: ClassifierConfig, seed: int, where: torch.device
) -> None:
    """Measure the batch-norm statistics again, for the averaged weights, as plain means over a few batches.

    The running averages of a training of a hundred steps lag behind its weights and belong to the last
    ones (Izmailov et al. 2018, arXiv:1803.05407, section 3.2; Wu and Johnson 2021, arXiv:2105.07576).
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    model.train()
    for step in range(max(0, config.steps - 10), config.steps):
        torch.manual_seed(derive(seed, "refresh", step))
        model(_batch(train, config, seed, step, where)[0])
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


def _look(result: Classifier, val: TileArray) -> dict[str, float]:
    probs = result.probabilities(np.asarray(val.images)).numpy()
    matrix = scores.confusion_matrix(val.labels, probs.argmax(axis=1), len(val.classes))
    return {
        "val_nll": calibration.nll(probs, val.labels),
        "val_balanced_accuracy": float(scores.balanced_accuracy(matrix)),
    }


def _temperature(result: Classifier, val: TileArray) -> tuple[float, list[str]]:
    """The temperature from validation, and what was unusual about it."""
    if len(val) < _ENOUGH_TO_CALIBRATE or len(np.unique(val.labels)) < 2:
        found = f"{len(val)} tiles of {len(np.unique(val.labels))} classes"
        needed = f"needs {_ENOUGH_TO_CALIBRATE} tiles of two classes"
        return 1.0, [f"Not calibrated (temperature 1): validation has {found}; it {needed}."]
    logits = result.logits(np.asarray(val.images)).numpy()
    flawless = bool((logits.argmax(axis=1) == val.labels).all())
    fit = calibration.fit_temperature(logits, val.labels, smoothing=1 / (len(val) + 2) if flawless else 0.0)
    notes = []
    if flawless:
        notes.append("Every validation tile is right, so the temperature was fitted to smoothed targets.")
    if fit.note:
        notes.append(f"Calibration: {fit.note}.")
    return fit.temperature, notes


def _inspected(train: TileArray, val: TileArray) -> list[str]:
    """Refuse data that cannot be learned from; name classes that lack tiles."""
    if len(train) == 0:
        raise DataError("The training set has no tile.", "Check the split and the quality filter.")
    if train.classes != val.classes:
        raise DataError(
            f"Training has the classes {train.classes}, validation {val.classes}.",
            "Import both with the same classes.",
        )
    absent = [name for name, n in train.counts().items() if n == 0]
    if len(train.classes) - len(absent) < 2:
        present = next(name for name, n in train.counts().items() if n)
        raise DataError(
            f"The training set has tiles of one class only, {present!r}.",
            "A classifier needs tiles of at least two classes.",
        )
    if not absent:
        return []
    return [f"No training tile of {', '.join(absent)}: the classifier cannot have learned it."]


def _placed(model: nn.Module, device: str) -> nn.Module:
    return model.to(pick_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
