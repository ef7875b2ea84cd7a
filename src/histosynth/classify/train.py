"""Train a network: the same steps in every arm; by default validation fits the temperature and chooses nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from histosynth.classify import augment, calibration, network, scores
from histosynth.classify.config import ClassifierConfig
from histosynth.classify.kept import KeptWeights, Watch
from histosynth.classify.model import Classifier, inspected, placed, temperature_of
from histosynth.classify.weights import start
from histosynth.core.checkpoint import load_state, save_state
from histosynth.core.errors import CheckpointError, RunError, SettingError
from histosynth.core.seeds import derive, torch_generator
from histosynth.tiles.batches import TileArray, batch_at

_SAVE_EVERY_S = 30.0


def train_classifier(
    train: TileArray,
    val: TileArray,
    config: ClassifierConfig,
    *,
    seed: int,
    tick: Callable[[], object] | None = None,
    device: str = "auto",
    architecture: str = "mobilenet-v2",
    state: Path | None = None,
) -> Classifier:
    """Train for `config.steps` steps, keep the averaged weights, fit the temperature on `val`.

    By default validation chooses nothing: the schedule ends at a learning rate of zero and the moving average of
    the weights is kept. Picking the best step on a few validation tiles would add noise to every arm, reward arms
    by luck, and use up the tiles on which the temperature must be honest. Two trainings with the same seed begin
    with the same weights, which makes arms comparable in pairs; on one machine with one number of threads they
    give the same logits (`core.pool.one_thread` makes the number of threads the same everywhere).

    Args:
        train: tiles to learn from. A class without tiles stays in the label space and is named in `notes`.
        val: tiles to fit the temperature on; may be empty (temperature 1, named in `notes`).
        seed: of the weights, the batches and the augmentation.
        tick: called without arguments after every step (the tick of a progress bar will do).
        architecture: a name in `network.ARCHITECTURES`.
        state: file that keeps what is needed to go on after a kill, to the same weights; none is kept by default.

    Raises:
        DataError: no tile, tiles of one class only, or `val` with other classes than `train`.
        SettingError: weights that do not exist for this network, or an unknown architecture.
        RunError: the loss is no longer a number, or `state` is of another training.
    """
    notes = inspected(train, val)
    if (config.patience or config.schedule == "plateau") and not len(val):
        raise SettingError("There is no validation tile to look at.", "Set patience 0 and schedule cosine.")
    shape = {"size": train.size, "width": config.width, "depth": config.depth}
    # fork, so that training in the middle of a caller's program leaves its random numbers alone
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "init"))
        model = network.build(architecture, len(train.classes), dropout=config.dropout, **shape)
        initialisation, parents = start(model, architecture, config.weights, **shape)
        model = placed(model, device)
        result = Classifier(model, train.classes, train.size, architecture, initialisation=initialisation)
        done, stopped = _optimise(result, train, val, config, seed, tick, state)
    result.temperature, unusual = temperature_of(result.logits, val)
    result.notes = (*notes, *([f"Stopped at step {done}: {stopped}."] if stopped else []), *unusual)
    result.card = {
        "name": architecture,
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": done,
        "seed": seed,
        "licence": "Apache-2.0",
        "parents": parents,
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
    state: Path | None,
) -> tuple[int, str]:
    """Train in place; returns the steps taken and why it ended early, or ""."""
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
    steps = config.length(len(train), len(train.members))
    kept, watch = KeptWeights(parameters, config), Watch(config)
    saved = None
    if state is not None:
        training = f"{result.architecture} {result.initialisation} {config} {seed} {train.digest()}"
        saved = _State(state, result, optimiser, kept, watch, training)
    first = 0 if saved is None else saved.load()
    for _ in range(first if tick is not None else 0):
        tick()
    low = config.precision == "bfloat16"
    done = first
    for step in range(first, steps):
        if watch.reason:
            break
        torch.manual_seed(derive(seed, "step", step))
        lr = config.lr * _share_of_lr(step, steps, config, watch)
        for group in optimiser.param_groups:
            group["lr"] = lr
        images, targets = _batch(train, config, seed, step, where)
        _train_mode(result, frozen=step < config.freeze)
        with torch.autocast(where.type, dtype=torch.bfloat16, enabled=low):
            logits = model(images)
        loss = nn.functional.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(parameters, config.clip)
        optimiser.step()
        kept.update(step)
        value, done = float(loss.detach()), step + 1
        if not math.isfinite(value):
            raise RunError(f"The classifier's loss is {value} at step {done}.", f"Lower lr (it is {config.lr:g}).")
        row = {"step": done, "loss": value, "lr": lr}
        if config.val_every and done % config.val_every == 0 and len(val):
            row |= _look(result, val, config)
            recent = [r["loss"] for r in result.history[1 - config.val_every :]] if config.val_every > 1 else []
            watch.look(row["val_loss"], float(np.mean([*recent, value])))
            if config.patience and watch.better:
                kept.mark_best(done)
        result.history.append(row)
        if saved is not None:
            saved.save(done, now=done == steps)
        if tick is not None:
            tick()
    kept.apply()
    _refresh_batch_norm(model, train, config, seed, where, kept.best_step or done)
    model.requires_grad_(True).eval()
    return done, watch.reason


class _State:
    """What is needed to go on after a kill: weights, optimiser, averages and what was seen of validation."""

    def __init__(
        self,
        path: Path,
        result: Classifier,
        optimiser: torch.optim.Optimizer,
        kept: KeptWeights,
        watch: Watch,
        training: str,
    ) -> None:
        self._path, self._result, self._optimiser = path, result, optimiser
        self._kept, self._watch = kept, watch
        self._training = training
        self._last = time.monotonic()

    def save(self, done: int, *, now: bool) -> None:
        """Write the state, if it is time."""
        if not now and time.monotonic() - self._last < _SAVE_EVERY_S:
            return
        self._last = time.monotonic()
        tree = {
            "training": self._training,
            "done": done,
            "model": dict(self._result.model.state_dict()),
            "optimiser": self._optimiser.state_dict(),
            "kept": self._kept.state(),
            "watch": self._watch.state(),
            "history": self._result.history,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        save_state(self._path, tree)

    def load(self) -> int:
        """Go on from the file, if there is one; returns the steps done."""
        if not self._path.is_file():
            return 0
        try:
            tree = load_state(self._path)
        except CheckpointError:  # half written by a disk that failed: the training can be had again
            return 0
        if tree["training"] != self._training:
            raise RunError(
                f"{self._path} belongs to a training with other settings, seed or tiles.",
                "Delete it, or choose another folder.",
            )
        self._result.model.load_state_dict(tree["model"])
        self._optimiser.load_state_dict(tree["optimiser"])
        for parameter, slots in self._optimiser.state.items():
            for name, value in slots.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    slots[name] = torch.empty_like(parameter).copy_(value)  # laid out in memory as before
        self._kept.restore(tree["kept"])
        self._watch.restore(tree["watch"])
        self._result.history = tree["history"]
        return tree["done"]


def _share_of_lr(step: int, steps: int, config: ClassifierConfig, watch: Watch) -> float:
    if config.swa_lr and step >= config.swa_from:
        return config.swa_lr
    if config.schedule == "plateau":
        return watch.factor
    # a linear rise over the first quarter, then half a cosine down to zero at the end
    done, rise = (step + 1) / (steps + 1), 0.25
    return done / rise if done < rise else 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))


def _train_mode(result: Classifier, *, frozen: bool) -> None:
    """Training mode; with frozen features only the last layer is in it, and only it has gradients."""
    model, head = result.model, network.architecture_of(result.architecture).head
    model.train(not frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or name.startswith(head))
    if frozen:
        model.get_submodule(head.rstrip(".")).train()


def _batch(
    train: TileArray, config: ClassifierConfig, seed: int, step: int, where: torch.device
) -> tuple[Tensor, Tensor]:
    """Normalised images and targets [N, K] of a step: a pure function of (seed, step)."""
    batch = batch_at(
        train,
        step,
        batch_size=config.batch,
        sampling=config.sampling,
        seed=derive(seed, "batches"),
        augment=config.augment == "classical",
        share=config.share,
    )
    images = augment.augmented(batch.images.to(where), config, torch_generator(seed, "augment", step))
    targets = nn.functional.one_hot(batch.labels, len(train.classes)).float().to(where)
    images = network.normalise(images)
    if config.mixup and (not config.mixup_until or step < config.mixup_until):
        # Zhang et al. 2018, arXiv:1710.09412: one weight and one partner for each tile
        rng = np.random.default_rng(derive(seed, "mixup", step))
        share = torch.from_numpy(rng.beta(config.mixup, config.mixup, len(images))).float().to(where)
        partner = torch.from_numpy(rng.permutation(len(images))).to(where)
        images = torch.lerp(images[partner], images, share.view(-1, 1, 1, 1))
        targets = torch.lerp(targets[partner], targets, share.view(-1, 1))
    return images, targets


@torch.no_grad()
def _refresh_batch_norm(
    model: nn.Module, train: TileArray, config: ClassifierConfig, seed: int, where: torch.device, steps: int
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
    for step in range(max(0, steps - 10), steps):
        torch.manual_seed(derive(seed, "refresh", step))
        model(_batch(train, config, seed, step, where)[0])
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum


def _look(result: Classifier, val: TileArray, config: ClassifierConfig) -> dict[str, float]:
    logits = result.logits(np.asarray(val.images))
    probs = torch.softmax(logits.double(), dim=1).numpy()
    matrix = scores.confusion_matrix(val.labels, probs.argmax(axis=1), len(val.classes))
    loss = nn.functional.cross_entropy(
        logits, torch.tensor(val.labels, dtype=torch.int64), label_smoothing=config.label_smoothing
    )
    return {
        "val_loss": float(loss),
        "val_nll": calibration.nll(probs, val.labels),
        "val_balanced_accuracy": float(scores.balanced_accuracy(matrix)),
    }
