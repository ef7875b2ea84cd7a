"""What `evaluate` measures beside the feature scores: labels, references, staining, nuclei, single tiles.

Every section holds the synthetic tiles, what real tiles get in their place, and what a hopeless generator would get.
A section that cannot be had is a dict with a reason alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.classify.model import Predictor
from histosynth.core.device import pick_device
from histosynth.core.errors import CheckpointError, DataError
from histosynth.core.seeds import numpy_rng
from histosynth.evaluate.consistency import label_consistency, pair_consistency, reference_cosine
from histosynth.evaluate.copies import pixel_copies
from histosynth.evaluate.neighbours import distance_rows
from histosynth.evaluate.nuclei import fit_nuclei, measure_nuclei, nuclei
from histosynth.evaluate.patients import patient_colour, tile_density
from histosynth.evaluate.perceptual import lpips_diversity, pair_distance
from histosynth.tiles.batches import TileArray

BLUR = 1 / 16
"""Deviation of the Gaussian that makes the hopeless tiles, as a share of the edge: no nucleus survives it."""
PATIENTS_LIMIT = 2.795
"""95 % of patients lie within so many units of the spread between patients: chi with three degrees of freedom."""
_TILES = 400  # for measures that converge with a few hundred tiles
_STAINED = 2000
_CLOUD = 300
_PLANTED = 40
_PAIRS = 100  # of tiles of one class
_HELD_OUT = 400


@dataclass(frozen=True)
class Sides:
    """Decoded tiles of all sides with labels that index the classes of the real set."""

    train: TileArray
    test: TileArray
    synthetic: TileArray
    picked: dict[str, np.ndarray]
    """Side -> positions of the tiles of which every score speaks: as many of each class on every side."""

    def images(self, side: str, most: int = 10**9) -> np.ndarray:
        """The picked tiles of a side, or an evenly spaced part of them: uint8 [n, 3, S, S]."""
        array: TileArray = getattr(self, side)
        return np.ascontiguousarray(array.images[self.positions(side, most)])

    def positions(self, side: str, most: int = 10**9) -> np.ndarray:
        """Where these tiles are in the side's array; class by class they are the same on every side."""
        where = self.picked[side]
        return where[np.unique(np.linspace(0, len(where) - 1, min(most, len(where))).astype(int))]


def blurred(images: np.ndarray) -> np.ndarray:
    """What a hopeless generator makes: real tiles without structure. uint8 [N, 3, H, W] -> the same."""
    from scipy.ndimage import gaussian_filter

    sigma = images.shape[-1] * BLUR
    found = np.empty_like(images)
    for i, image in enumerate(images):
        found[i] = np.rint(gaussian_filter(image.astype(np.float32), (0, sigma, sigma)))
    return found


def labels(sides: Sides, classifier: Predictor, seed: int) -> dict[str, Any]:
    """Does a classifier that learned from real tiles see the label that each tile was made for?

    Real: the same for real test tiles. Hopeless: the synthetic tiles with their labels shuffled.
    """
    known = [c for c in classifier.classes if c in sides.synthetic.classes]
    made = _with_labels_of(sides.synthetic, classifier.classes)
    if not len(made):
        return {"reason": f"The classifier knows {', '.join(classifier.classes)}: none of the synthetic classes."}
    present = {c for c, n in made.counts().items() if n}
    test = _with_labels_of(sides.test, classifier.classes)
    test = test.subset(np.flatnonzero(np.isin(test.labels, [classifier.classes.index(c) for c in present])))
    ours = classifier.probabilities(np.ascontiguousarray(made.images)).numpy()
    shuffled = numpy_rng(seed, "shuffled labels").permutation(made.labels)
    found: dict[str, Any] = {
        "classes": list(classifier.classes),
        "n": len(made),
        "n_real": len(test),
        "synthetic": _finite(label_consistency(ours, made.labels, classifier.classes)),
        "hopeless": _finite(label_consistency(ours, shuffled, classifier.classes)),
        "confusion": _confusion(made.labels, ours.argmax(1), len(classifier.classes)),
        "left_out": sorted(set(sides.synthetic.classes) - set(known)),
    }
    if len(test):
        real = classifier.probabilities(np.ascontiguousarray(test.images)).numpy()
        found["real"] = _finite(label_consistency(real, test.labels, classifier.classes))
        found["confusion_real"] = _confusion(test.labels, real.argmax(1), len(classifier.classes))
    return found


def references(
    sides: Sides,
    parents: Sequence[str],
    encoded: Mapping[str, np.ndarray],
    encoder: str,
    classifier: Predictor | None,
    seed: int,
) -> dict[str, Any]:
    """How much of the tile that it was conditioned on does a synthetic tile show?

    Args:
        parents: for each synthetic tile the id of its reference, or "".
        encoded: features of the sides train and synthetic.
    """
    where = {tile: i for i, tile in enumerate(sides.train.ids)}
    rows = np.array([i for i, parent in enumerate(parents) if parent in where], dtype=np.int64)
    if not len(rows):
        return {"reason": "No synthetic tile names a real training tile as its reference."}
    theirs = np.array([where[parents[i]] for i in rows])
    own = sides.synthetic.labels[rows]
    cosine = reference_cosine(encoded["synthetic"][rows], encoded["train"][theirs], own, seed)
    found: dict[str, Any] = {"n": len(rows), "encoder": encoder, "cosine": _finite(cosine)}
    if classifier is not None:
        seen = [
            classifier.probabilities(np.ascontiguousarray(array.images[at])).numpy().argmax(1)
            for array, at in ((sides.train, theirs), (sides.synthetic, rows))
        ]
        found["pairs"] = _finite(pair_consistency(seen[0], seen[1], classifier.classes))
    return found


def staining(sides: Sides, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Staining in units of the spread between the real test patients; and the clouds that show it."""
    groups = np.array(sides.test.groups or [""] * len(sides.test), dtype=object)[sides.positions("test", _STAINED)]
    test = sides.images("test", _STAINED)
    found: dict[str, Any] = {"limit": PATIENTS_LIMIT, "patients": len(set(groups) - {""}), "n": len(test)}
    try:
        for name, side in (("synthetic", "synthetic"), ("real", "train")):
            found[name] = _finite(patient_colour(test, list(groups), sides.images(side, _STAINED), seed))
    except DataError as error:
        found = {"reason": str(error)}
    clouds = {side: tile_density(sides.images(side, _CLOUD)) for side in ("train", "synthetic")}
    ours = tile_density(test)
    patients = {str(g): ours[groups == g] for g in dict.fromkeys(groups) if g}
    return found, {"clouds": clouds | {"test": ours}, "patients": patients}


def nuclear(sides: Sides, hopeless: np.ndarray, microns: float | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nuclei beside those of real test tiles; and the values of each tile.

    Args:
        hopeless: the blurred tiles.
        microns: edge length of a pixel at the size of the tiles, where it is known.
    """
    used = {side: sides.images(side, _TILES) for side in ("test", "train", "synthetic")}
    model = fit_nuclei(used["test"], microns)
    step = max(1, len(hopeless) // _TILES)
    found = {
        name: _finite(nuclei(used["test"], images, model=model))
        for name, images in (
            ("synthetic", used["synthetic"]), ("real", used["train"]), ("hopeless", hopeless[::step][:_TILES])
        )
    }  # fmt: skip
    values = {side: measure_nuclei(images, model) for side, images in used.items()}
    return {"n": len(used["test"]), "radius_px": model.radius, **found}, values


def variety(
    sides: Sides, distances: Sequence[tuple[str, Path | None]], seed: int, device: str
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Mean perceptual distance between two tiles of one class, of the synthetic and of real training tiles; and which
    distances cannot be had, with the reason."""
    found: dict[str, Any] = {}
    skipped = []
    for name, weights in distances:
        try:
            distance = pair_distance(name, weights, str(pick_device(device)))
            found[name] = {
                title: _renamed(
                    lpips_diversity(
                        sides.images(side), getattr(sides, side).labels[sides.picked[side]], sides.train.classes,
                        distance, _PAIRS, seed,
                    ),
                    f"diversity_{distance.name}",
                )
                for title, side in (("synthetic", "synthetic"), ("real", "train"))
            }  # fmt: skip
        except (CheckpointError, DataError) as error:
            skipped.append({"what": f"variety by {name}", "reason": str(error)})
    return found, skipped


def _renamed(scores: Mapping[str, float], key: str) -> dict[str, float | None]:
    return {name.replace(key, "diversity", 1): value for name, value in _finite(scores).items()}


def single_tiles(test: np.ndarray, train: np.ndarray, synthetic: np.ndarray, k: int = 5) -> np.ndarray:
    """How far each synthetic tile lies from the real test tiles: its mean distance to the `k` nearest of them, over
    the median of the same for real training tiles. float64 [n]; about 1 is usual, large is unlike any real tile."""
    k = min(k, len(test))

    def reach(rows: np.ndarray) -> np.ndarray:
        found = np.empty(len(rows))
        for part, squares in distance_rows(rows.astype(np.float64), test.astype(np.float64)):
            found[part] = np.sqrt(np.partition(squares, k - 1, axis=1)[:, :k]).mean(1)
        return found

    return reach(synthetic) / max(float(np.median(reach(train))), 1e-12)


def planted_copies(sides: Sides, seed: int) -> dict[str, Any]:
    """Whether the copy check works on these tiles: copies of training tiles, each turned, mirrored, tinted or
    compressed, are given to it, and the share that it finds is counted."""
    rng = numpy_rng(seed, "planted copies")
    where = np.sort(rng.permutation(len(sides.train))[:_PLANTED])
    copies = np.stack([_disguised(np.array(sides.train.images[i]), kind, rng) for kind, i in enumerate(where)])
    held_out = np.sort(rng.permutation(len(sides.test))[:_HELD_OUT])
    alarm, _, twin = pixel_copies(np.asarray(sides.train.images), np.asarray(sides.test.images[held_out]), copies)
    return {"n": len(where), "found": float(alarm.mean()), "right_twin": float((twin == where)[alarm].mean())
            if alarm.any() else None}  # fmt: skip


def _disguised(tile: np.ndarray, kind: int, rng: np.random.Generator) -> np.ndarray:
    """A copy of a tile uint8 [3, S, S]: as it is, mirrored, turned, tinted, or compressed, one after another."""
    import io

    from PIL import Image

    if kind % 5 == 1:
        return np.ascontiguousarray(tile[:, :, ::-1])
    if kind % 5 == 2:
        return np.ascontiguousarray(np.rot90(tile, 1 + kind % 3, axes=(1, 2)))
    if kind % 5 == 3:
        gain = rng.uniform(0.85, 1.15, (3, 1, 1))
        return np.clip(tile * gain + rng.uniform(-12, 12), 0, 255).astype(np.uint8)
    if kind % 5 == 4:
        stream = io.BytesIO()
        Image.fromarray(tile.transpose(1, 2, 0)).save(stream, "JPEG", quality=60)
        return np.asarray(Image.open(stream)).transpose(2, 0, 1)
    return tile


def _with_labels_of(array: TileArray, classes: Sequence[str]) -> TileArray:
    """The tiles whose class is one of `classes`, with labels that index these."""
    index = np.array([classes.index(c) if c in classes else -1 for c in array.classes])
    chosen = array.subset(np.flatnonzero(index[array.labels] >= 0))
    return TileArray(chosen.images, index[chosen.labels], chosen.ids, tuple(classes))


def _confusion(wanted: np.ndarray, seen: np.ndarray, classes: int) -> list[list[int]]:
    found = np.zeros((classes, classes), np.int64)
    np.add.at(found, (wanted, seen), 1)
    return found.tolist()


def _finite(scores: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if np.isfinite(value) else None for name, value in scores.items()}
