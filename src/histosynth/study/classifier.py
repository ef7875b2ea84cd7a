"""Train one classifier on a tile set and write down everything: weights, predictions, scores, pictures."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.classify.calibration import softmax
from histosynth.classify.config import TrainClassifierConfig
from histosynth.classify.fit import fit, load, ticks
from histosynth.classify.model import Predictor
from histosynth.classify.predictions import Predictions, write_predictions
from histosynth.classify.scores import scores
from histosynth.classify.weights import for_tiles
from histosynth.core.pool import one_thread
from histosynth.core.progress import bar, say
from histosynth.core.run import Run, is_finished
from histosynth.core.seeds import derive
from histosynth.study.figures import INK, MUTED, PALE, THIRD, confusion, drawing, panel_title
from histosynth.study.statistics import intervals
from histosynth.tiles.batches import TileArray
from histosynth.tiles.tileset import TileSet

_SHADE = "#1f4e79"
_SCORES = ("balanced_accuracy", "macro_f1", "accuracy", "auroc", "ece", "brier", "nll")


def run_training(tiles: Path, out: Path, config: TrainClassifierConfig) -> dict[str, Any]:
    """Train on the split train, calibrate on val, and score the saved file on val and test.

    Writes checkpoints/classifier.safetensors, predictions.csv, confusion.png, and for a network learning-curve.png.
    An interrupted training goes on when it is repeated; a finished one is scored again.

    Args:
        tiles: a tile set.
        out: folder of the run.

    Returns:
        {split: scores}, those of val and test that have tiles; each as `classify.scores.scores`, of calibrated
        probabilities, with `intervals` {score: [low, high]} over patients and `raw` {ece, brier, nll} before.

    Raises:
        DataError: tiles that cannot be learned from.
        SettingError: settings that cannot be used.
        CheckpointError: weights that are missing.
        RunError: `out` holds another run.
    """
    tileset = TileSet.open(tiles)
    splits = {s: tileset.array(s, size=config.size) for s in ("train", "val", "test")}
    finished = is_finished(out)
    weights = for_tiles(config.classifier.weights, tileset.meta.get("simulated"))
    settings = replace(config.classifier, weights=weights)
    with Run.open(out, "train classifier", config, parents=[tileset.digest]) as run, _threads(config.threads):
        path = run.checkpoint_path("classifier")
        if not (finished and path.is_file()):
            steps = settings.length(len(splits["train"]), len(splits["train"].members))
            with bar("Classifier", ticks(config.kind, replace(settings, steps=steps))) as tick:
                model = fit(
                    config.kind,
                    splits["train"],
                    splits["val"],
                    settings,
                    seed=config.seed,
                    tick=lambda: tick(1),
                    device=config.device,
                    state=run.state_path,
                )
            model.card["command"] = shlex.join(["histosynth", *_without_folders(sys.argv[1:], tiles, out)])
            model.card["data"] = tileset.digest
            model.save(path)
            _log(run, model, settings.val_every)
            if model.history:
                learning_curve(model.history, out / "learning-curve.png")
            run.state_path.unlink(missing_ok=True)
        saved = load(path, device=config.device)
        found = _scored(saved, tileset, splits, config, out)
        run.finish(**found)
    for note in saved.notes:
        say(note)
    for split, one in found.items():
        say(f"{split}: {_said(one)}")
    say(f"Classifier: {path} (started from {saved.initialisation}, temperature {saved.temperature:.3g})")
    return found


def _scored(
    model: Predictor, tileset: TileSet, splits: Mapping[str, TileArray], config: TrainClassifierConfig, out: Path
) -> dict[str, Any]:
    """Predict val and test with the file that was saved; write predictions and confusion matrices."""
    shown = {name: array for name, array in splits.items() if name != "train" and len(array)}
    if not shown:
        return {}
    logits = {name: model.logits(np.asarray(array.images)).numpy() for name, array in shown.items()}
    arrays = list(shown.values())
    table = tileset.kept.set_index("id")
    ids = [i for array in arrays for i in array.ids]
    grouped = all(array.groups is not None for array in arrays)
    predictions = Predictions(
        np.repeat(list(shown), [len(a) for a in arrays]),
        table.path.reindex(ids).to_numpy(),
        np.concatenate([a.labels for a in arrays]),
        np.concatenate(list(logits.values())),
        tileset.classes,
        np.concatenate([a.groups for a in arrays if a.groups is not None]) if grouped else None,
    )
    write_predictions(out / "predictions.csv", predictions, temperature=model.temperature)
    found = {}
    for name, array in shown.items():
        part = predictions.of(name)
        found[name] = score(part, model.temperature, seed=config.seed, replicates=config.replicates)
        title = f"{name}, {len(array)} tiles"
        suffix = "" if name == "test" else f"-{name}"
        confusion(found[name]["confusion"], tileset.classes, title, _SHADE, out / f"confusion{suffix}.png")
    return found


def score(part: Predictions, temperature: float, *, seed: int, replicates: int) -> dict[str, Any]:
    """Scores of one split with intervals over patients, of probabilities at this temperature.

    Returns:
        As `classify.scores.scores`, with `intervals` {score: [low, high]} (balanced_accuracy, macro_f1, accuracy,
        auroc, ece, brier, nll and recall:K; [None, None] where none can be had), `raw` {ece, brier, nll} at
        temperature 1, and `patients`, None where they are not known.
    """
    probs = softmax(part.logits / temperature)
    found = scores(probs, part.y, part.classes)
    groups = part.paths if part.patients is None else part.patients
    wanted = [m for m in _SCORES if found[m] is not None] + [f"recall:{k}" for k in np.unique(part.y).tolist()]
    spread = intervals(part.y, probs[None], groups, wanted, seed=derive(seed, "scores"), n=replicates)
    found["intervals"] = {name: list(ends) for name, ends in spread.items()}
    raw = scores(softmax(part.logits), part.y, part.classes)
    found["raw"] = {name: raw[name] for name in ("ece", "brier", "nll")}
    found["patients"] = None if part.patients is None else len(np.unique(part.patients))
    return found


def learning_curve(history: Sequence[Mapping[str, float]], png: Path) -> None:
    """Draw the loss of every step (smoothed), and loss and balanced accuracy on validation where it was looked at."""
    steps = np.array([row["step"] for row in history])
    loss = np.array([row["loss"] for row in history])
    width = max(1, len(loss) // 40)
    smooth = np.convolve(loss, np.full(width, 1 / width), mode="valid")
    looks = [row for row in history if "val_loss" in row]
    with drawing(THIRD + 1, 3.2, left=0.6, right=0.6, bottom=0.5, top=0.34, png=png) as (figure, panel):
        axes = figure.subplots()
        axes.plot(steps, loss, color=MUTED, linewidth=0.6, alpha=0.35)
        axes.plot(steps[width - 1 :], smooth, color=_SHADE, linewidth=1.8, label="training loss")
        axes.set(xlabel="step", ylabel="cross-entropy, nats", ylim=(0, None))
        axes.grid(color=PALE, linewidth=0.8)
        if looks:
            at = [row["step"] for row in looks]
            losses, right_share = ([r[k] for r in looks] for k in ("val_loss", "val_balanced_accuracy"))
            axes.plot(at, losses, "o-", color="#b4531a", ms=3.5, lw=1.4, label="validation loss")
            right = axes.twinx()
            right.plot(at, right_share, "s:", color=INK, ms=3, lw=1)
            right.set(ylim=(0, 1), ylabel="balanced accuracy (dotted)")
        axes.legend(frameon=False, fontsize=8)
        panel_title(axes, "Learning curve")
        panel["alt"] = f"Training loss from {smooth[0]:.2f} to {smooth[-1]:.2f} in {len(steps)} steps."


def _log(run: Run, model: Predictor, every: int) -> None:
    """The learning curve as metrics.csv and events: every step, or the mean since the last look at validation."""
    run.truncate_log(0)
    since: list[float] = []
    for row in model.history:
        since.append(row["loss"])
        if not every or "val_loss" in row:
            run.log(int(row["step"]), **{k: v for k, v in row.items() if k != "step"} | {"loss": float(np.mean(since))})
            since = []


def _said(found: Mapping[str, Any]) -> str:
    def one(name: str, title: str) -> str:
        low, high = found["intervals"].get(name, (None, None))
        value = "unknown" if found[name] is None else f"{found[name]:.3f}"
        return f"{title} {value}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")

    people = "" if found["patients"] is None else f" of {found['patients']} patients"
    parts = [one("balanced_accuracy", "balanced accuracy"), one("macro_f1", "macro-F1"), one("ece", "ECE")]
    return f"{', '.join(parts)} on {found['tiles']} tiles{people}."


def _without_folders(words: Sequence[str], tiles: Path, out: Path) -> list[str]:
    """A card travels with its file, and names no folder of somebody's machine."""
    return [{str(tiles): "TILES", str(out): "OUT"}.get(word, word) for word in words]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    if count == 1:
        with one_thread():
            yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
