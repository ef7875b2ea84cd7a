"""What the report says of the data, of what weakens the answer, and of the protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from histosynth.classify.train import ClassifierConfig
from histosynth.core.errors import DataError
from histosynth.core.seeds import numpy_rng
from histosynth.study.usefulness.plan import BASELINE
from histosynth.tiles.batches import TileArray
from histosynth.tiles.tileset import SPLITS, TileSet, set_aside

_SHOWN = 8


def check_usable(splits: Mapping[str, TileArray]) -> list[str]:
    """Refuse what cannot be compared; name what makes the answer weak.

    Raises:
        DataError: fewer than two classes, or a split without tiles.
    """
    train, test = splits["train"].counts(), splits["test"].counts()
    if len(train) < 2:
        raise DataError(
            f"The tiles have one class only ({', '.join(train)}), so no classifier can be trained.",
            "Add another class, or train a generator alone with `histosynth train gan`.",
        )
    for name, array in splits.items():
        if len(array) == 0:
            raise DataError(f"The split {name!r} has no tile.", "Add patients, or change --val and --test.")
    warnings = []
    for label, count in train.items():
        if count == 0:
            warnings.append(f"Class {label} has no training tile (too few patients): nothing can be learned of it.")
        elif count < 10:
            warnings.append(f"Class {label} has only {count} training tiles.")
        if test[label] == 0:
            warnings.append(f"Class {label} has no test tile: no score speaks of it.")
        elif test[label] < 10:
            warnings.append(f"Class {label} has only {test[label]} test tiles: its recall is uncertain.")
    patients = len(set(splits["test"].groups or []))
    if patients < 10:
        warnings.append(f"The test has {patients} patients only: intervals over so few are too narrow.")
    return warnings


def describe_data(tileset: TileSet, splits: Mapping[str, TileArray], size: int) -> dict[str, Any]:
    """The section "data" of the report."""
    kept = tileset.kept
    small = int((kept[["width", "height"]].min(axis=1) < size).sum())
    return {
        "source": tileset.meta.get("source", tileset.folder.name),
        "digest": tileset.digest,
        "classes": tileset.meta["classes"],
        "counts": {s: a.counts() for s, a in splits.items()},
        "patients": {s: int(kept[kept.split == s].patient.nunique()) for s in SPLITS},
        "set_aside": set_aside(tileset.table),
        "split_protocol": tileset.meta.get("split_protocol", "as given"),
        "size": size,
        "upsampled": small,
        "formats": {str(k): int(v) for k, v in kept.format.value_counts().items()},
        "simulated": bool(tileset.meta.get("simulated", False)),
        "licence": tileset.meta.get("licence", ""),
    }


def generator_warnings(
    described: Mapping[str, Mapping[str, Any]], tileset: TileSet, size: int, from_base: bool, encoder: str
) -> list[str]:
    """What weakens the answer, of the generators and of the tiles' files."""
    warnings = []
    for name, one in described.items():
        if "error" in one:
            warnings.append(f"{one['title']} failed and is left out: {one['error']}")
        elif one["stopped_by_clock"]:
            warnings.append(
                f"{one['title']} was stopped by the clock at step {one['steps']} of {one['planned_steps']}, so another "
                f"run may give other figures; a run with --generator-steps.{name} {one['steps']} can be repeated."
            )
    flattered = [str(one["title"]) for one in described.values() if encoder in (one.get("learned_through") or ())]
    if flattered:
        warnings.append(
            f"{' and '.join(flattered)} was trained through {encoder}, whose features give the fidelity scores here: "
            "they are flattered. histosynth evaluate takes them on other features too."
        )
    if from_base:
        text = "The generators start from weights trained on simulated tissue (shipped with histosynth)."
        if tileset.meta.get("simulated"):
            text += (
                " These tiles are simulated too, by the same simulator with other hospitals: what helps here"
                " need not help on real tissue."
            )
        warnings.append(text)
    if "no patients were given" in tileset.meta.get("split_protocol", ""):
        warnings.append(
            "No patients were given: tiles of one patient may be on both sides of the split, and what this report "
            "counts as patients are groups of tiles that look alike. Scores may be too good, intervals too narrow."
        )
    small = int((tileset.kept[["width", "height"]].min(axis=1) < size).sum())
    if small:
        warnings.append(f"{small} tiles are smaller than {size} px and were enlarged.")
    if tileset.kept.format.nunique() > 1 or "JPEG" in set(tileset.kept.format):
        formats = ", ".join(sorted(set(tileset.kept.format)))
        warnings.append(
            f"The tiles were stored as {formats} and synthetic tiles are never JPEG: "
            "compression traces alone can move the fidelity scores."
        )
    return warnings


def protocol(
    classifier: ClassifierConfig, arms: Sequence[Mapping[str, Any]], seeds: Sequence[int], test: TileArray
) -> dict[str, Any]:
    """How usefulness was measured."""
    return {
        "classifier": "MobileNetV2",
        "initialisation": arms[0]["initialisation"],
        "steps": classifier.steps,
        "batch": classifier.batch,
        "width": classifier.width,
        "seeds": list(seeds),
        "primary": "balanced accuracy",
        "baseline": BASELINE,
        "interval": "95 %, paired bootstrap over patients and training seeds",
        "test_tiles": len(test),
        "test_patients": len(set(test.groups or [])),
        "mixing": "half of the training tiles drawn from each class are synthetic in the mixed arms",
    }


def samples(train: TileArray, made: Mapping[str, TileArray], seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Tiles of every source and class for the report's sheet, drawn at random and not picked by eye."""
    found = {}
    for source, array in {"real": train, **made}.items():
        rng = numpy_rng(seed, "shown", source)
        found[source] = {}
        for i, label in enumerate(array.classes):
            members = np.flatnonzero(array.labels == i)
            picked = rng.permutation(members)[:_SHOWN]
            if len(picked):
                found[source][label] = np.array(array.images[picked])
    return found
