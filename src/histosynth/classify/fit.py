"""Every kind of classifier by its name: networks that are trained, and probes on the features of an encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from histosynth.classify.config import ClassifierConfig
from histosynth.classify.model import Classifier, Predictor
from histosynth.classify.network import ARCHITECTURES
from histosynth.classify.probe import PROBES, Probe, fit_probe
from histosynth.classify.train import train_classifier
from histosynth.core.checkpoint import read_card
from histosynth.core.errors import SettingError, did_you_mean
from histosynth.encoders import REGISTRY as ENCODERS
from histosynth.tiles.batches import TileArray


def check_kind(kind: str) -> None:
    """Refuse a kind that does not exist.

    Raises:
        SettingError: no network has this name, and it is not PROBE:ENCODER of known ones.
    """
    probe, colon, encoder = kind.partition(":")
    if colon:
        if probe not in PROBES:
            raise SettingError(f"The classifier is {kind!r}.", did_you_mean(probe, PROBES))
        if encoder not in ENCODERS.names():
            raise SettingError(
                f"The classifier is {kind!r}, on an unknown encoder.", did_you_mean(encoder, ENCODERS.names())
            )
    elif kind not in ARCHITECTURES:
        probes = [f"{probe}:tissue-tiny" for probe in PROBES]
        raise SettingError(f"The classifier is {kind!r}.", did_you_mean(kind, [*ARCHITECTURES, *probes]))


def ticks(kind: str, config: ClassifierConfig) -> int:
    """How often `fit` calls `tick`: once a training step (in a training of so many steps); a probe once."""
    check_kind(kind)
    return 1 if ":" in kind else config.steps


def fit(
    kind: str,
    train: TileArray,
    val: TileArray,
    config: ClassifierConfig = ClassifierConfig(),
    *,
    seed: int,
    tick: Callable[[], object] | None = None,
    device: str = "auto",
    state: Path | None = None,
) -> Predictor:
    """A classifier of `kind`, learned from `train`, its temperature fitted on `val`.

    Args:
        kind: a network such as "mobilenet-v2", or a probe and its encoder such as "linear:tissue-tiny".
        train: tiles to learn from.
        val: tiles that fit the temperature, and the penalty of a linear probe; may be empty.
        config: a probe takes share, augment, jitter, blur, jpeg and copies from it.
        seed: of all that is random.
        tick: called without arguments, `ticks` times.
        state: see `train_classifier`; a probe needs none.

    Raises:
        SettingError: an unknown kind, or settings that do not go with it.
        DataError: no tile, tiles of one class only, or `val` with other classes than `train`.
        CheckpointError: the encoder's weights are missing.
    """
    check_kind(kind)
    probe, colon, encoder = kind.partition(":")
    if colon:
        return fit_probe(probe, encoder, train, val, config, seed=seed, tick=tick, device=device)
    return train_classifier(train, val, config, seed=seed, tick=tick, device=device, architecture=kind, state=state)


def load(path: Path | str, *, device: str = "auto") -> Predictor:
    """Read a classifier of any kind that `save` wrote.

    Raises:
        CheckpointError: missing, damaged, not a classifier, or its encoder is not the one it was fitted on.
    """
    if read_card(path).get("kind") == "probe":
        return Probe.load(path, device=device)
    return Classifier.load(path, device=device)
