"""The whole judgement: every score with its N, its interval and its floor, for the set and for each class.

The reference is always the real test tiles, which nothing was trained on. The floor of a score is the same
score with the real training tiles in the place of the synthetic ones, at the same N: what a perfect
generator would get. Its ceiling, where it is wanted, is the score of what a hopeless generator makes (the caller
says what that is). A score is read between the two, not beside zero or one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from histosynth.core.errors import DataError
from histosynth.core.seeds import derive
from histosynth.evaluate import METRICS
from histosynth.evaluate.checks import checked
from histosynth.evaluate.colour import colour
from histosynth.evaluate.copies import ClosestPairs, copies
from histosynth.evaluate.intervals import subsample
from histosynth.evaluate.settings import Metric, Protocol

__all__ = ["Protocol", "equal_sides", "judge", "position"]

_SIDES = ("train", "test", "synthetic")
_COLOUR_TILES = 1000


def judge(
    train: np.ndarray,
    test: np.ndarray,
    synthetic: np.ndarray,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    synthetic_labels: np.ndarray,
    *,
    classes: Sequence[str],
    encoder: str,
    train_images: np.ndarray | None = None,
    test_images: np.ndarray | None = None,
    synthetic_images: np.ndarray | None = None,
    ceiling: np.ndarray | None = None,
    ceiling_images: np.ndarray | None = None,
    protocol: Protocol = Protocol(),
    seed: int = 0,
) -> tuple[dict[str, Any], ClosestPairs]:
    """Judge synthetic tiles against real tiles of other patients.

    Args:
        train, test, synthetic: features [N, D] of the real tiles that the generator was trained on, of real
            tiles that it never saw, and of its own tiles.
        train_labels, test_labels, synthetic_labels: int [N], index into `classes`.
        encoder: name of the encoder that the features come from.
        train_images, test_images, synthetic_images: uint8 [N, 3, H, W] of the same tiles; all three, or none,
            in which case colour and pixel copies are left out.
        ceiling: features [n, D] of what a hopeless generator makes, row by row of the same classes as the tiles of
            train that `equal_sides` picks.
        ceiling_images: uint8 [n, 3, H, W] of the same.

    Returns:
        A JSON-ready report (numbers that could not be had are None, with a reason beside them) with the keys
        encoder, protocol, seed, counts, prior, all, per_class, copies, colour, warnings; and the closest pairs.
        `all` and every class of `per_class` hold n, reason, and scores: {name: value, low, high, floor,
        floor_low, floor_high, better, n}; with a ceiling also ceiling and position (see `position`). In `all` every
        class has the same share on both sides.

    Raises:
        DataError: features that are not finite, of different D, or labels that do not go with them; a side
            with fewer than two tiles; no class that all three sides have.
        SettingError: the protocol names an unknown metric.
    """
    features = {
        name: checked(array, f"{name} features", keep=True)
        for name, array in zip(_SIDES, (train, test, synthetic), strict=True)
    }
    dims = {name: array.shape[1] for name, array in features.items()}
    if len(set(dims.values())) > 1:
        raise DataError(
            f"The features have different dimensions: {dims}.", "Encode all three sides with the same encoder."
        )
    labels = {
        name: _checked_labels(array, features[name], classes, name)
        for name, array in zip(_SIDES, (train_labels, test_labels, synthetic_labels), strict=True)
    }
    metrics: dict[str, Metric] = {name: METRICS.load(name) for name in protocol.metrics}
    counts = {name: np.bincount(labels[name], minlength=len(classes)) for name in _SIDES}
    shared = np.min([counts[name] for name in _SIDES], axis=0)
    if not shared.any():
        raise DataError(
            "No class has tiles on all three sides (real train, real test, synthetic).",
            "Generate the classes that the real tiles have.",
        )

    picked = equal_sides(labels, classes, protocol, seed)
    whole = {name: features[name][np.concatenate(parts)] for name, parts in picked.items()}
    hopeless: list[np.ndarray] | None = None
    if ceiling is not None:
        whole["ceiling"] = _checked_ceiling(ceiling, whole["train"])
        hopeless = np.split(whole["ceiling"], np.cumsum([len(part) for part in picked["train"]])[:-1])
    report: dict[str, Any] = {
        "encoder": encoder,
        "protocol": asdict(protocol) | {"metrics": list(protocol.metrics)},
        "seed": seed,
        "counts": {n: {c: int(k) for c, k in zip(classes, counts[n], strict=True)} for n in _SIDES},
        "prior": "every class has the same share on each side: the smallest of its three counts",
        "all": _scores(whole, metrics, protocol, derive(seed, "all"), at_least=4),
        "per_class": {
            name: _scores(
                {side: features[side][picked[side][label]] for side in _SIDES}
                | ({} if hopeless is None else {"ceiling": hopeless[label]}),
                metrics,
                protocol,
                derive(seed, "class", name),
                at_least=max(protocol.min_per_class, 4),
            )
            for label, name in enumerate(classes)
        },
    }
    warnings = _warnings(counts, classes, len(whole["test"]), whole["test"].shape[1])

    copied, pairs = copies(
        features["train"], features["test"], features["synthetic"], train_images, test_images, synthetic_images
    )
    report["copies"] = {name: _number(value) for name, value in copied.items()} | {
        "n_train": len(train), "n_held_out": len(test), "n_synthetic": len(synthetic),
    }  # fmt: skip
    report["colour"] = None
    if train_images is not None and test_images is not None and synthetic_images is not None:
        images = {"train": train_images, "test": test_images, "synthetic": synthetic_images}
        report["colour"] = _colour(images, picked, seed, ceiling_images)
    report["warnings"] = warnings
    return report, pairs


def equal_sides(
    labels: Mapping[str, np.ndarray], classes: Sequence[str], protocol: Protocol = Protocol(), seed: int = 0
) -> dict[str, list[np.ndarray]]:
    """Positions of the same number of tiles of each class on each side, so that neither N nor the mix differs.

    Args:
        labels: side (train, test, synthetic) -> int [N], index into `classes`.

    Returns:
        Side -> one array of positions a class, in the order of `classes`.
    """
    shared = np.min([np.bincount(labels[name], minlength=len(classes)) for name in labels], axis=0)
    shrink = min(1.0, protocol.max_n / max(shared.sum(), 1))
    picked: dict[str, list[np.ndarray]] = {name: [] for name in labels}
    for label, n in enumerate(np.floor(shared * shrink).astype(int)):
        for name in labels:
            where = np.flatnonzero(labels[name] == label)
            picked[name].append(where[subsample(len(where), n, seed, f"{name} {classes[label]}")])
    return picked


def position(value: float | None, floor: float | None, ceiling: float | None, better: str) -> float | None:
    """Where a score lies on the way from its floor (0, as real) to its ceiling (1, hopeless); None when the score
    cannot tell those two apart. For scores that are best near 1 the way is measured in logarithms."""
    if value is None or floor is None or ceiling is None:
        return None

    def badness(x: float) -> float:
        return x if better == "lower" else -x if better == "higher" else abs(math.log(max(x, 1e-9)))

    way = badness(ceiling) - badness(floor)
    return (badness(value) - badness(floor)) / way if way > 1e-9 else None


def _scores(
    sides: dict[str, np.ndarray], metrics: dict[str, Metric], protocol: Protocol, seed: int, at_least: int
) -> dict[str, Any]:
    n = len(sides["test"])
    if n < at_least:
        return {"n": n, "reason": f"{n} tiles on the smallest side, fewer than {at_least}", "scores": {}}
    scores: dict[str, Any] = {}
    for name, metric in metrics.items():
        try:
            value = metric.measure(sides["test"], sides["synthetic"], protocol, derive(seed, name))
            floor = metric.measure(sides["test"], sides["train"], protocol, derive(seed, name))
            # one value suffices for the end of a scale
            quick = replace(protocol, replicates=0)
            worst = (
                metric.measure(sides["test"], sides["ceiling"], quick, derive(seed, name)) if "ceiling" in sides else {}
            )
        except DataError as error:
            for score, better in metric.better.items():
                scores[score] = {"value": None, "reason": str(error), "better": better, "n": n}
            continue
        for score, better in metric.better.items():
            entry = {
                "value": value.get(score), "low": value.get(f"{score}_low"), "high": value.get(f"{score}_high"),
                "floor": floor.get(score), "floor_low": floor.get(f"{score}_low"),
                "floor_high": floor.get(f"{score}_high"),
            }  # fmt: skip
            scores[score] = {k: _number(v) for k, v in entry.items()} | {"better": better, "n": n}
            if "ceiling" in sides:
                end = _number(worst.get(score))
                where = position(scores[score]["value"], scores[score]["floor"], end, better)
                scores[score] |= {"ceiling": end, "position": where}
    return {"n": n, "reason": None, "scores": scores}


def _colour(
    images: dict[str, np.ndarray], picked: dict[str, list[np.ndarray]], seed: int, ceiling: np.ndarray | None
) -> dict[str, Any]:
    """Colour against the test tiles, of the synthetic tiles and (floor) of the real training tiles."""
    used = {}
    for side, parts in picked.items():
        where = np.concatenate(parts)
        # the same positions on each side: class by class they line up, so the mix stays the same
        used[side] = images[side][np.sort(where[subsample(len(where), _COLOUR_TILES, seed, "colour")])]
    value, floor = colour(used["test"], used["synthetic"]), colour(used["test"], used["train"])
    found = {
        "n": len(used["test"]),
        "synthetic": {k: _number(v) for k, v in value.items()},
        "floor": {k: _number(v) for k, v in floor.items()},
    }
    if ceiling is not None:
        worst = colour(used["test"], ceiling[subsample(len(ceiling), _COLOUR_TILES, seed, "colour")])
        found["ceiling"] = {k: _number(v) for k, v in worst.items()}
    return found


def _warnings(counts: dict[str, np.ndarray], classes: Sequence[str], n: int, dim: int) -> list[str]:
    found = []
    for side in _SIDES:
        missing = [c for c, k in zip(classes, counts[side], strict=True) if k == 0]
        if missing:
            found.append(f"no {side} tile of {', '.join(missing)}: left out of every comparison")
    if n < 2 * dim:
        found.append(
            f"the Fréchet distance rests on {n} tiles a side for {dim} dimensions (fewer than twice as many): "
            "it is biased upwards and compares only with its floor and with scores at the same N"
        )
    return found


def _checked_ceiling(ceiling: np.ndarray, train: np.ndarray) -> np.ndarray:
    values = checked(ceiling, "ceiling features", keep=True)
    if values.shape != train.shape:
        raise DataError(
            f"The ceiling has features {values.shape}, the picked training tiles {train.shape}.",
            "Give one row for every tile of train that equal_sides picks.",
        )
    return values


def _checked_labels(labels: np.ndarray, features: np.ndarray, classes: Sequence[str], name: str) -> np.ndarray:
    array = np.asarray(labels)
    if array.shape != (len(features),) or array.dtype.kind not in "iu":
        raise DataError(
            f"The {name} labels are {array.dtype} {array.shape} beside {len(features)} tiles.",
            "Give one class index a tile.",
        )
    if array.min() < 0 or array.max() >= len(classes):
        raise DataError(
            f"The {name} labels run from {array.min()} to {array.max()} for {len(classes)} classes.",
            "Use indices into the classes.",
        )
    return array.astype(np.int64)


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
