"""The numbers of the overview, part by part: each function returns plain values for overview.json and the page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError
from histosynth.core.files import atomic_path
from histosynth.study.overview.sample import Measured, each_tile, spread
from histosynth.tiles.probes import leakage as probes
from histosynth.tiles.probes import separation
from histosynth.tiles.probes.features import beyond_texture, file_facts
from histosynth.tiles.tileset import SPLITS, TileSet

if TYPE_CHECKING:
    from histosynth.tiles.quality.thresholds import QualityConfig, Thresholds
    from histosynth.tiles.split.duplicates import DuplicateConfig

_MOST = 6  # sizes, formats and sources that are listed by name
_REFERENCE = 24  # tiles that a normalisation takes its reference from
_CHUNK = 32


def plain(value: Any) -> Any:
    """A value as JSON holds it: numbers of Python with six significant digits, NaN as None, arrays as lists."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(v) for v in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return value


def has_patients(tileset: TileSet) -> bool:
    """Whether the patients of the tiles are known, and not groups of look-alikes that stand in for them."""
    given = (tileset.kept.patient != "").any()
    return bool(given) and "no patients were given" not in str(tileset.meta.get("split_protocol", ""))


def splits_of(tileset: TileSet) -> list[str]:
    """The splits that have tiles, in their order; [""] for a set that is not split."""
    present = set(tileset.kept.split)
    return [s for s in (*SPLITS, "") if s in present]


def counts(tileset: TileSet) -> list[dict[str, Any]]:
    """Tiles and patients of each class in each split."""
    kept, splits = tileset.kept, splits_of(tileset)
    training = [s for s in splits if s in ("train", "")][:1] or splits[:1]
    amounts = {c: int(((kept.label == c) & kept.split.isin(training)).sum()) for c in tileset.classes}
    few = 0.5 * sum(amounts.values()) / max(len(amounts), 1)
    found = []
    for entry in tileset.meta["classes"]:
        own = kept[kept.label == entry["label"]]
        known = own[own.patient != ""]
        found.append(
            {
                "label": entry["label"], "name": entry.get("name", entry["label"]), "colour": entry["colour"],
                "tiles": {s: int((own.split == s).sum()) for s in splits},
                "patients": {s: int(known[known.split == s].patient.nunique()) for s in splits},
                "all_patients": int(known.patient.nunique()), "training": amounts[entry["label"]],
                "rare": amounts[entry["label"]] < few,
            }
        )  # fmt: skip
    return found


def files(tileset: TileSet) -> dict[str, dict[str, int]]:
    """How many kept tiles have each size, format, source folder and generator."""
    kept = tileset.kept
    sizes = kept.width.astype(str) + " × " + kept.height.astype(str)
    sources = kept.source.map(lambda s: PurePosixPath(s).parts[0] if len(PurePosixPath(s).parts) > 2 else "")
    named = {"sizes": sizes, "formats": kept.format, "sources": sources, "generators": kept.generator}
    return {name: _frequent(values[values != ""]) for name, values in named.items()}


def set_aside(tileset: TileSet) -> list[dict[str, Any]]:
    """Tiles that are in the table and never used: number, reason, and the first few by name."""
    lost = tileset.table[~tileset.table.kept]
    found = []
    for kind, rows in lost.groupby(lost.reason.str.split(":").str[0], sort=False):
        names = rows.source.where(rows.source != "", rows.id)
        examples = [{"tile": n, "label": row.label, "reason": row.reason}
                    for n, row in zip(names[:3], rows[:3].itertuples(), strict=True)]  # fmt: skip
        found.append({"kind": str(kind) or "no reason given", "tiles": len(rows), "examples": examples})
    return sorted(found, key=lambda row: -row["tiles"])


def straddling(tileset: TileSet) -> list[str]:
    """Patients that have tiles in more than one split."""
    rows = tileset.kept[(tileset.kept.patient != "") & (tileset.kept.split != "")]
    sides = rows.groupby("patient").split.nunique()
    return [str(p) for p in sides[sides > 1].index]


def quality(
    tileset: TileSet, config: QualityConfig, workers: int | None
) -> tuple[dict[str, Any], pd.DataFrame, Thresholds]:
    """Spread of each metric in each class, the limits, and what they would reject.

    Returns:
        (the part of the report; a row a kept tile with score and reason; the limits).
    """
    from histosynth.tiles.quality.metrics import METRICS, quality_table
    from histosynth.tiles.quality.thresholds import learn

    rows = tileset.kept
    table = quality_table(tileset, workers=workers)
    learnable = (rows.split == "train") if (rows.split == "train").any() else (rows.split != "test")
    taught = bool(learnable.any())
    if not taught:  # the test teaches no limits
        config = replace(config, rules="none")
    limits = learn(table.loc[rows.id[learnable]], rows.label[learnable], config)
    judged = pd.DataFrame({"score": limits.score(table, rows.label), "label": rows.label.to_numpy()})
    judged["reason"] = limits.verdicts(table, rows.label, warn=False)
    numbers = table.to_numpy(float)
    metrics = []
    for column, metric in enumerate(METRICS):
        per_class = []
        for label in tileset.classes:
            values = numbers[(rows.label == label).to_numpy(), column]
            values = values[np.isfinite(values)]
            own = limits.of(label)
            rules = {} if own.accept else own.rules
            if len(values):
                per_class.append(
                    {"label": label, "quantiles": np.percentile(values, (1, 25, 50, 75, 99)).tolist(),
                     "low": rules.get(f"{metric}_min"), "high": rules.get(f"{metric}_max")}
                )  # fmt: skip
        metrics.append({"metric": metric, "classes": per_class})
    rejected = judged[judged.reason != ""]
    part = {
        "rules": limits.name or config.rules,
        "learned_on": "train" if (rows.split == "train").any()
        else "all tiles but those of the test split" if taught else "",
        "pooled": list(limits.pooled),
        "metrics": metrics,
        "tiles": len(rows),
        "rejected": len(rejected),
        "by_class": [
            {"label": c, "tiles": int((judged.label == c).sum()), "rejected": int((rejected.label == c).sum()),
             "reasons": _frequent(rejected[rejected.label == c].reason.str.split().str[1], 3),
             "exempt": limits.of(c).accept}
            for c in tileset.classes
        ],
    }  # fmt: skip
    return part, judged, limits


def duplicates(
    tileset: TileSet, config: DuplicateConfig, workers: int | None
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Near-duplicates that lie on two sides: of the split, or of two patients.

    Returns:
        (the part of the report; pairs of positions in the kept rows, those across splits first).
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    from histosynth.tiles.split.duplicates import near_duplicate_pairs

    rows, small = tileset.kept, _thumbnails(tileset, workers)
    pairs = near_duplicate_pairs(small, config)
    # tiles without contrast look alike and are no copies
    pairs = pairs[small[pairs[:, 0]].std((1, 2)) >= config.contrast] if len(pairs) else pairs
    split, patient, label = (rows[name].to_numpy(str) for name in ("split", "patient", "label"))
    first, second = pairs.T if len(pairs) else (np.zeros(0, int), np.zeros(0, int))
    over_split = split[first] != split[second]
    over_patient = patient[first] != patient[second]
    over_label = label[first] != label[second]
    edges = coo_array((np.ones(len(pairs), bool), (first, second)), shape=(len(rows),) * 2)
    _, component = connected_components(edges, directed=False)
    members = np.bincount(component) if len(rows) else np.zeros(0, int)
    part = {
        "groups": int((members > 1).sum()), "tiles": int(members[members > 1].sum()), "pairs": len(pairs),
        "across_splits": int(over_split.sum()), "across_patients": int(over_patient.sum()),
        "across_classes": int(over_label.sum()),
    }  # fmt: skip
    crossing = np.flatnonzero(over_split | over_patient)
    crossing = crossing[np.lexsort((~over_label[crossing], ~over_split[crossing]))]
    return part, [(int(first[i]), int(second[i])) for i in crossing]


def _thumbnails(tileset: TileSet, workers: int | None) -> np.ndarray:
    """Grey 32 px thumbnails of the kept tiles, uint8 [N, 32, 32]; made once, then read from the set's cache."""
    from histosynth.tiles.split.duplicates import EDGE, thumbnails

    rows = tileset.kept
    key = hashlib.sha256(json.dumps([tileset.digest, rows.id.tolist()]).encode()).hexdigest()[:16]
    path = tileset.folder / "cache" / f"thumbnails-{key}.npy"
    if path.exists():
        try:
            found = np.load(path)
            if found.shape == (len(rows), EDGE, EDGE) and found.dtype == np.uint8:
                return found
        except (OSError, ValueError):
            pass  # a damaged cache is made anew
    small = np.full((len(rows), EDGE, EDGE), 255, dtype=np.uint8)

    def shrink(image: np.ndarray) -> np.ndarray:
        return thumbnails(image.transpose(2, 0, 1)[None])[0]

    for position, tile in enumerate(each_tile(tileset, rows, shrink, "Look for near-duplicates", workers)):
        if isinstance(tile, np.ndarray):
            small[position] = tile
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, small)
    return small


def colour(measured: Measured, classes: Sequence[str]) -> tuple[dict[str, Any], pd.DataFrame]:
    """Mean colours: how much they differ between classes and between the patients of a class.

    Returns:
        (the part of the report; a row a patient and class with its mean red, green and blue).
    """
    frame = _units(measured.rows).assign(**dict(zip("rgb", measured.rgb.T, strict=True)))
    means = frame.groupby(["label", "unit"], sort=True)[list("rgb")].mean().reset_index()
    part = {
        "tiles": len(frame),
        "spread": _spreads(frame, measured.rgb),
        "classes": [
            {"label": c, "rgb": means[means.label == c][list("rgb")].mean().tolist()}
            for c in classes if (means.label == c).any()
        ],
    }  # fmt: skip
    return part, means


def stain(rows: pd.DataFrame, images: np.ndarray, method: str) -> tuple[dict[str, Any], np.ndarray]:
    """Directions of the stains, and how much they differ between classes and between patients.

    Returns:
        (the part of the report; [patients, 2 stains, 2 angles] in degrees: green against red, and blue).
    """
    from histosynth.tiles.stain import stain_matrix

    found = [stain_matrix(images[i : i + _CHUNK], method) for i in range(0, len(images), _CHUNK)]
    matrices, ok = (np.concatenate(parts) for parts in zip(*found, strict=True))
    part: dict[str, Any] = {"method": method, "tiles": len(images), "without": int((~ok).sum()), "spread": {}}
    if not ok.any():
        return part, np.zeros((0, 2, 2))
    frame, vectors = _units(rows)[ok], matrices[ok]
    for i, name in enumerate(("haematoxylin", "eosin")):
        # of unit vectors, differences times 180 / pi are angles in degrees as long as they are small
        part["spread"][name] = _spreads(frame, np.degrees(vectors[:, i]))
    _, unit = np.unique(frame.unit.to_numpy(str), return_inverse=True)
    sums = np.zeros((unit.max() + 1, 2, 3))
    np.add.at(sums, unit, vectors)
    means = sums / np.linalg.norm(sums, axis=2, keepdims=True)
    red, green, blue = np.moveaxis(means, 2, 0)
    angles = np.degrees(np.stack([np.arctan2(green, red), np.arcsin(np.clip(blue, -1, 1))], axis=2))
    part["patients"] = len(angles)
    part["angles"] = {n: angles[:, i].mean(0).tolist() for i, n in enumerate(("haematoxylin", "eosin"))}
    return part, angles


def normalisation(
    rows: pd.DataFrame, images: np.ndarray, classes: Sequence[str], methods: Sequence[str], seed: int
) -> dict[str, Any]:
    """Class separation of the mean colour, before and after each method of stain normalisation."""
    from histosynth.tiles.stain import load_normaliser

    labels = rows.label.map({c: i for i, c in enumerate(classes)}).to_numpy(np.int64)
    before = separation.mean_rgb(images)
    training = np.flatnonzero((rows.split == "train").to_numpy() | (rows.split != "test").all())
    reference = training[spread(rows.iloc[training].reset_index(drop=True), _REFERENCE, seed, "stain reference")]
    found = {"tiles": len(images), "reference": len(reference), "states": [_state("before", before, labels, classes)]}
    for method in methods:
        normaliser = load_normaliser(method)
        try:
            fitted = normaliser.fit(images[reference])
        except DataError as error:  # such as a set of background only
            found["states"].append({"name": method, "error": error.message})
            continue
        after, unchanged = np.empty_like(before), 0
        for start in range(0, len(images), _CHUNK):
            part = slice(start, start + _CHUNK)
            changed, same = fitted.transform(images[part])
            after[part], unchanged = separation.mean_rgb(changed), unchanged + int(same.sum())
        found["states"].append(_state(method, after, labels, classes) | {"unchanged": unchanged})
    return found


def leaks(measured: Measured, count: int, seed: int) -> dict[str, Any]:
    """What colour, traces of JPEG, and file facts tell of the class and of the split."""
    rows, groups = measured.rows, measured.rows.patient.tolist()
    shown = np.isfinite(measured.traces).all(1)
    left = np.zeros_like(measured.traces)
    if shown.any():
        left[shown] = beyond_texture(measured.traces[shown], measured.alike[shown])
    features = {
        "mean colour": (measured.mean, np.ones(len(rows), bool)),
        "colour histogram": (measured.histogram, np.ones(len(rows), bool)),
        "JPEG traces": (left, shown),
        "file facts": (file_facts(rows), np.ones(len(rows), bool)),
    }
    learning = (rows.split != "test").to_numpy()
    sides = rows.split.isin(("train", "test")).to_numpy()
    found: dict[str, Any] = {"tiles": len(rows), "class": [], "split": []}
    for name, (values, usable) in features.items():
        chosen = np.flatnonzero(learning & usable)
        some = [groups[i] for i in chosen]
        if not len(chosen):
            result = probes.Probe(name, "class", 0.5, reason="the tiles are too small")
        elif name == "JPEG traces":
            result = probes.probe_compression(
                measured.traces[chosen], measured.alike[chosen], measured.labels[chosen], some, count, seed
            )
        else:
            result = probes.probe_class(name, values[chosen], measured.labels[chosen], some, count, seed)
        found["class"].append(asdict(result))
        chosen = np.flatnonzero(sides & usable)
        test = (rows.split.to_numpy(str) == "test")[chosen]
        if test.any() and not test.all():
            some = [groups[i] for i in chosen]
            split = probes.probe_split(name, values[chosen], measured.labels[chosen], test, some, seed)
            found["split"].append(asdict(split))
    return found


def _state(name: str, features: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    found = separation.separation(features, labels, len(classes))
    distances = ("euclidean", "mahalanobis", "bhattacharyya")
    return (
        {"name": name, "silhouette": found.silhouette}
        | {d: getattr(found, d) for d in distances}
        | {f"mean_{d}": separation.mean_off_diagonal(getattr(found, d)) for d in distances}
        | {"kruskal": found.kruskal, "epsilon_squared": found.epsilon_squared}
    )


def _units(rows: pd.DataFrame) -> pd.DataFrame:
    """Label, and the patient or else the tile itself, of each row."""
    return pd.DataFrame({"label": rows.label, "unit": rows.patient.where(rows.patient != "", rows.id)})


def _spreads(frame: pd.DataFrame, values: np.ndarray) -> dict[str, float]:
    """Root mean square distances: class means to their mean, patients to their class, tiles to their patient."""
    numbers = pd.DataFrame(values, index=frame.index)
    patients = numbers.groupby([frame.label, frame.unit]).mean()
    classes = patients.groupby(level=0).mean()
    parts = {
        "classes": classes - classes.mean(),
        "patients": patients - classes.loc[patients.index.get_level_values(0)].to_numpy(),
        "tiles": numbers - patients.loc[list(zip(frame.label, frame.unit, strict=True))].to_numpy(),
    }
    return {name: float(np.sqrt((part.to_numpy() ** 2).sum(1).mean())) for name, part in parts.items()}


def _frequent(values: pd.Series, most: int = _MOST) -> dict[str, int]:
    found = values.value_counts()
    listed = {str(k): int(v) for k, v in found[:most].items()}
    return listed | ({f"{len(found) - most} more": int(found[most:].sum())} if len(found) > most else {})
