"""Fidelity of every generator's tiles against real test patients, in one feature space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from histosynth import encoders
from histosynth.core.seeds import numpy_rng
from histosynth.core.types import Encoder
from histosynth.encoders.store import features
from histosynth.evaluate.copies import ClosestPairs
from histosynth.evaluate.protocol import judge
from histosynth.tiles.batches import TileArray

_PAIRS = 8
_MAPPED = 400  # tiles of each source on the map


def judge_all(
    splits: Mapping[str, TileArray],
    synthetic: Mapping[str, TileArray],
    encoder_name: str,
    out: Path,
    seed: int,
    device: str = "auto",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Judge each synthetic set against the test tiles, the training tiles giving the floor.

    Returns:
        The section "fidelity" of the report, and the keyword arguments of `report.Pictures` that show it.
    """
    encoder = encoders.load(encoder_name, device)
    found = {n: encode(encoder, a, out) for n, a in {**splits, **synthetic}.items() if n != "val"}
    train, test = splits["train"], splits["test"]
    judged, neighbours = {}, {}
    for name, array in synthetic.items():
        judged[name], pairs = judge(
            found["train"],
            found["test"],
            found[name],
            train.labels,
            test.labels,
            array.labels,
            classes=train.classes,
            encoder=encoder.card.name,
            train_images=np.asarray(train.images),
            test_images=np.asarray(test.images),
            synthetic_images=np.asarray(array.images),
            seed=seed,
        )
        neighbours[name] = pair_pictures(pairs, array, train)
    first = next(iter(judged.values()), None)
    section = {
        "encoder": asdict(encoder.card),
        "protocol": first["protocol"] if first else {},
        "generators": judged,
    }
    arrays = {"real": (found["test"], test.labels)} | {n: (found[n], synthetic[n].labels) for n in synthetic}
    return section, {"neighbours": neighbours, **embedding_map(arrays, train.classes, seed)}


def align(array: TileArray, classes: tuple[str, ...]) -> TileArray:
    """The same tiles with labels that index `classes`; tiles of other classes are left out."""
    known = [i for i, label in enumerate(array.classes) if label in classes]
    chosen = array.subset(np.flatnonzero(np.isin(array.labels, known)))
    index = np.array([classes.index(c) if c in classes else -1 for c in array.classes])
    return TileArray(chosen.images, index[chosen.labels], chosen.ids, classes, chosen.groups)


def encode(encoder: Encoder, array: TileArray, out: Path) -> np.ndarray:
    """Features of tiles, float32 [N, dim], kept in the cache of the folder `out`."""
    return features(encoder, array.images, array.ids, array.digest(), out / "cache" / "features")


def pair_pictures(
    pairs: ClosestPairs, synthetic: TileArray, train: TileArray
) -> list[tuple[np.ndarray, np.ndarray, float, str]]:
    """For the report: synthetic tile, its closest training tile, their distance, the class."""
    found = []
    for made, real, distance in list(zip(pairs.synthetic, pairs.training, pairs.distance, strict=True))[:_PAIRS]:
        label = synthetic.classes[synthetic.labels[made]]
        found.append((np.array(synthetic.images[made]), np.array(train.images[real]), float(distance), label))
    return found


def embedding_map(
    arrays: Mapping[str, tuple[np.ndarray, np.ndarray]], classes: tuple[str, ...], seed: int
) -> dict[str, Any]:
    """A two-dimensional map (t-SNE of the leading principal components) of real test and synthetic tiles."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    picked, labels = {}, {}
    for name, (values, label) in arrays.items():
        where = numpy_rng(seed, "map", name).permutation(len(values))[:_MAPPED]
        picked[name], labels[name] = values[where], np.array(classes)[label[where]]
    stacked = np.concatenate(list(picked.values()))
    if len(stacked) < 10:
        return {"embedding": None, "embedding_labels": None}
    reduced = PCA(min(30, *stacked.shape), random_state=seed % 2**31).fit_transform(stacked)
    points = TSNE(perplexity=min(30, (len(stacked) - 1) / 3), init="pca", random_state=seed % 2**31).fit_transform(
        reduced
    )
    parts = np.split(points, np.cumsum([len(p) for p in picked.values()])[:-1])
    return {"embedding": dict(zip(picked, parts, strict=True)), "embedding_labels": labels}
