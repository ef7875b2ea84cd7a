"""Simulated tile sets: hospitals, patients and classes with a known truth, in the format of real ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from histosynth.core.errors import SettingError, did_you_mean
from histosynth.core.files import atomic_path, new_array
from histosynth.core.progress import bar
from histosynth.core.seeds import derive, numpy_rng
from histosynth.tiles.batches import TileArray
from histosynth.tiles.images import write_png
from histosynth.tiles.phantom import CLASSES, Patient, make_hospital, make_patient, render
from histosynth.tiles.tileset import SPLITS, TileSet, claim

_CHUNK = 256


@dataclass(frozen=True)
class PhantomConfig:
    """A simulated hospital that sent in its tiles."""

    per_class: int = 60
    """Tiles a class, over all splits, of a common class."""
    rare: dict[str, int] = field(default_factory=dict)
    """Training tiles of the rare classes, such as {"MUC": 8}; their val and test counts are as for others."""
    patients: int = 18
    """Number of patients, divided over the splits."""
    size: int = 128
    """Edge length of a tile in pixels."""
    field_um: float = 112.0
    """Edge length of a tile in microns."""
    shift: float = 0.6
    """How far this hospital's staining lies from the common centre, 0 to 1."""
    val: float = 0.2
    """Share of the tiles for validation."""
    test: float = 0.4
    """Share of the tiles for the test."""
    seed: int = 0
    """Seed of the hospital, its patients and its tiles."""


def simulate(out: Path | str, config: PhantomConfig = PhantomConfig()) -> TileSet:
    """Write a simulated tile set; every patient is in one split only.

    Raises:
        SettingError: an unknown class in `rare`, or fewer than three patients.
        RunError: `out` cannot be written, or holds a tile set or other files.
    """
    for label in config.rare:
        if label not in CLASSES:
            raise SettingError(f"rare names the class {label!r}.", did_you_mean(label, CLASSES))
    if config.patients < len(SPLITS):
        raise SettingError(f"patients is {config.patients}.", "At least three are needed, one a split.")
    out = claim(out)
    shares = {"train": 1 - config.val - config.test, "val": config.val, "test": config.test}
    hospital = make_hospital(config.seed, shift=config.shift)
    patients = [make_patient(derive(config.seed, "patient", i), hospital) for i in range(config.patients)]
    sides = _divide(config.patients, shares)
    rows = []
    plan = [
        (split, label, k)
        for split in SPLITS
        for label in CLASSES
        for k in range(_count(config, split, label, shares[split]))
    ]
    with bar("Simulate tissue", len(plan)) as tick:
        for split, label, k in plan:
            who = sides[split][k % len(sides[split])]
            tile_id = f"{label}-{split}-{k:05d}"
            path = f"images/{label}/{tile_id}.png"
            seed = derive(config.seed, tile_id)
            tile = render(label, patient=patients[who], seed=seed, size=config.size, field_um=config.field_um)
            write_png(out / path, tile.image)
            digest = hashlib.sha256(tile.image.tobytes()).hexdigest()
            rows.append(
                {
                    "id": tile_id, "path": path, "label": label, "split": split,
                    "patient": f"hospital-{config.seed}-patient-{who:03d}",  # those of another hospital are others
                    "source": "phantom", "sha256": digest, "format": "PNG",
                    "width": config.size, "height": config.size, "kept": True,
                }
            )  # fmt: skip
            tick()
    return TileSet.create(
        out,
        pd.DataFrame(rows),
        CLASSES,
        made_by="phantom",
        simulated=True,
        source=f"simulated hospital {config.seed}",
        split_protocol="by patient",
        licence="Apache-2.0 (simulated)",
        microns_per_pixel=config.field_um / config.size,
    )


def _count(config: PhantomConfig, split: str, label: str, share: float) -> int:
    if split == "train" and label in config.rare:
        return config.rare[label]
    return max(1, round(config.per_class * share))


def _divide(patients: int, shares: dict[str, float]) -> dict[str, list[int]]:
    val = min(max(1, round(patients * shares["val"])), patients - 2)
    test = min(max(1, round(patients * shares["test"])), patients - val - 1)
    train = patients - val - test
    everyone = list(range(patients))
    return {"train": everyone[:train], "val": everyone[train : train + val], "test": everyone[train + val :]}


@dataclass(frozen=True)
class BaseTissueConfig:
    """Simulated tissue of many hospitals, on which base weights are trained."""

    tiles: int = 27_000
    """Number of tiles, the same for each class."""
    size: int = 64
    """Edge length in pixels."""
    hospitals: int = 60
    """Number of hospitals."""
    patients_per_hospital: int = 6
    """Patients a hospital."""
    field_min_um: float = 90.0
    """Smallest field of view; log-uniform between this and `field_max_um`."""
    field_max_um: float = 400.0
    """Largest field of view."""
    seed: int = 1_000_003
    """Seed; hospitals of base tissue never share a seed with those of `tiles phantom` and the demo."""


def base_tissue(config: BaseTissueConfig, cache: Path, workers: int = 1) -> TileArray:
    """Simulated tiles with hospital, patient and field of view drawn anew for each; cached on disk.

    Tile i depends on (seed, i) alone, so the number of workers changes nothing.
    """
    path = cache / f"base-{hashlib.sha256(repr(config).encode()).hexdigest()[:16]}.npy"
    shape = (config.tiles, 3, config.size, config.size)
    if not path.exists():
        from joblib import Parallel, delayed

        starts = range(0, config.tiles, _CHUNK)
        with atomic_path(path) as temporary, bar("Simulate tissue", config.tiles) as tick:
            pixels = new_array(temporary, shape, np.uint8)
            jobs = Parallel(n_jobs=workers, return_as="generator")(
                delayed(_base_chunk)(config, start) for start in starts
            )
            for start, chunk in zip(starts, jobs, strict=True):
                pixels[start : start + len(chunk)] = chunk
                tick(len(chunk))
            pixels.flush()
    pixels = np.load(path, mmap_mode="r")
    labels = np.arange(config.tiles, dtype=np.int64) % len(CLASSES)
    return TileArray(pixels, labels, [f"base-{i:06d}" for i in range(config.tiles)], CLASSES)


def _base_chunk(config: BaseTissueConfig, start: int) -> np.ndarray:
    images = []
    for i in range(start, min(start + _CHUNK, config.tiles)):
        rng = numpy_rng(config.seed, "tile", i)
        field_um = float(np.exp(rng.uniform(np.log(config.field_min_um), np.log(config.field_max_um))))
        patient = _base_patient(
            config.seed, int(rng.integers(config.hospitals)), int(rng.integers(config.patients_per_hospital))
        )
        seed = derive(config.seed, "pixels", i)
        tile = render(CLASSES[i % len(CLASSES)], patient=patient, seed=seed, size=config.size, field_um=field_um)
        images.append(tile.image.transpose(2, 0, 1))
    return np.stack(images)


def _base_patient(seed: int, hospital: int, patient: int) -> Patient:
    where = derive(seed, "hospital", hospital)
    shift = float(numpy_rng(where, "shift").uniform(0, 1))
    return make_patient(derive(where, "patient", patient), make_hospital(where, shift=shift))
