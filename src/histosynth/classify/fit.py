"""Every kind of classifier by its name: networks that are trained, and probes on the features of an encoder."""

from __future__ import annotations

from collections.abc import Callable

from histosynth.classify.train import Classifier, ClassifierConfig, train_classifier
from histosynth.core.errors import SettingError, did_you_mean
from histosynth.tiles.batches import TileArray

NETWORKS = ("mobilenet-v2",)


def check_kind(kind: str) -> None:
    """Refuse a kind that does not exist.

    Raises:
        SettingError: no network and no probe has this name.
    """
    if kind not in NETWORKS:
        raise SettingError(f"classifier is {kind!r}.", did_you_mean(kind, NETWORKS))


def ticks(kind: str, config: ClassifierConfig) -> int:
    """How often `fit` calls `tick`: once a training step; a probe once."""
    check_kind(kind)
    return config.steps


def fit(
    kind: str,
    train: TileArray,
    val: TileArray,
    config: ClassifierConfig = ClassifierConfig(),
    *,
    seed: int,
    tick: Callable[[], object] | None = None,
    device: str = "auto",
) -> Classifier:
    """A classifier of `kind`, learned from `train`, its temperature fitted on `val`.

    Raises:
        SettingError: an unknown kind, or settings that do not go with it.
        DataError: no tile, tiles of one class only, or `val` with other classes than `train`.
    """
    check_kind(kind)
    return train_classifier(train, val, config, seed=seed, tick=tick, device=device)
