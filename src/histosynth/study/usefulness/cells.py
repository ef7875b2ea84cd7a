"""One cell of the grid: make up its training set, train its classifier, predict every test set, write two files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.classify.fit import fit
from histosynth.classify.train import ClassifierConfig
from histosynth.core.files import atomic_path, write_json
from histosynth.core.pool import check_stop
from histosynth.core.seeds import numpy_rng
from histosynth.study.fidelity import align
from histosynth.study.usefulness.nested import strangers
from histosynth.study.usefulness.plan import ALL, BASELINE, Cell, SelectionConfig
from histosynth.study.usefulness.select import Kept, choose
from histosynth.tiles.batches import TileArray
from histosynth.tiles.tileset import TileSet

TEST = "test"


@dataclass(frozen=True)
class Places:
    """Where the tiles are: what a process needs to open them.

    Attributes:
        real: a tile set.
        synthetic: name -> tile set.
        external: name -> tile set.
        size: edge length in pixels.
        features: folder of the features by which tiles are selected.
        cache: folder of decoded tiles; None: each tile set's own.
    """

    real: Path
    synthetic: dict[str, Path]
    external: dict[str, Path]
    size: int
    features: Path
    cache: Path | None = None


@dataclass(frozen=True)
class Material:
    """The tiles of the experiment, all with the classes of the real set.

    Attributes:
        sets: what classifiers are tested on: "test" and the external sets.
        synthetic: by generator.
        parents: for each generator, the id of the real tile that each synthetic one was made from, or "".
        features: of "train", "val" and each generator, float32 [N, D], where tiles are selected.
    """

    train: TileArray
    val: TileArray
    sets: dict[str, TileArray]
    synthetic: dict[str, TileArray]
    parents: dict[str, list[str]]
    features: dict[str, np.ndarray]


@dataclass(frozen=True)
class Settings:
    """What all cells have in common.

    Attributes:
        kind: of the classifier.
        config: its training, but for the augmentation and the share of synthetic tiles.
        selection: how the selected arms choose.
        saw_more: generators that may have learned from all real training tiles.
        out: folder of the experiment.
        judge: the baseline with all real tiles also predicts the synthetic tiles and those that they were made from.
    """

    kind: str
    config: ClassifierConfig
    selection: SelectionConfig
    saw_more: tuple[str, ...]
    out: Path
    device: str = "auto"
    judge: bool = True

    def judges(self, cell: Cell) -> bool:
        """Whether the classifier of a cell says what it sees in synthetic tiles."""
        return self.judge and cell.arm.name == BASELINE and cell.n == ALL


def open_material(places: Places) -> Material:
    """The tiles; decoded once, then read from memory maps."""
    real = TileSet.open(places.real)

    def array(tileset: TileSet, split: str | None) -> TileArray:
        return tileset.array(split, size=places.size, cache=places.cache)

    sets = {TEST: array(real, "test")}
    for name, folder in places.external.items():
        other = TileSet.open(folder)
        fresh, _ = strangers(real, other)
        known = set(other.kept.id[fresh])
        tiles = array(other, None)
        sets[name] = align(tiles.subset([i for i, one in enumerate(tiles.ids) if one in known]), real.classes)
    synthetic, parents = {}, {}
    for name, folder in places.synthetic.items():
        made = TileSet.open(folder)
        synthetic[name] = align(array(made, None), real.classes)
        parents[name] = made.kept.set_index("id").reference.reindex(synthetic[name].ids).fillna("").tolist()
    features = {
        name: np.load(path, mmap_mode="r", allow_pickle=False)
        for name in ("train", "val", *synthetic)
        if (path := places.features / f"{name}.npy").exists()
    }
    return Material(array(real, "train"), array(real, "val"), sets, synthetic, parents, features)


def real_subset(train: TileArray, n: int, seed: int) -> np.ndarray:
    """Positions, ascending, of `n` training tiles of every class, or of all tiles of a class that has fewer.

    Tiles are taken from the patients of a class in turn, in an order drawn by the seed, so that no patient gives two
    before all have given one; and the first n of that order are taken, so that the tiles of a small n are among those
    of a larger one. Which tiles these are does not depend on the order of the array.
    """
    if n == ALL:
        return np.arange(len(train))
    groups = np.array(train.groups if train.groups is not None else train.ids, dtype=object)
    ids = np.array(train.ids, dtype=object)
    chosen: list[np.ndarray] = []
    for label, name in enumerate(train.classes):
        members = np.flatnonzero(train.labels == label)
        members = members[np.argsort(ids[members], kind="stable")]
        rng = numpy_rng(seed, "real tiles", name)
        patients = np.array(sorted(set(groups[members])), dtype=object)
        place = dict(zip(patients, rng.permutation(len(patients)), strict=True))
        members = members[rng.permutation(len(members))]
        given: dict[Any, int] = {}
        turns = np.empty((2, len(members)), np.int64)  # the round in which a tile comes, and its patient's place in it
        for k, tile in enumerate(members):
            patient = groups[tile]
            turns[:, k] = given.get(patient, 0), place[patient]
            given[patient] = given.get(patient, 0) + 1
        chosen.append(members[np.lexsort(turns[::-1])][:n])
    return np.sort(np.concatenate(chosen))


def training_set(
    cell: Cell, material: Material, selection: SelectionConfig = SelectionConfig()
) -> tuple[TileArray, Kept | None]:
    """The training tiles of a cell: real ones are source 0, generators 1, 2, ...; and what a selection kept."""
    arm, kept = cell.arm, None
    picked = real_subset(material.train, cell.n, cell.seed)
    made = [material.synthetic[name] for name in arm.generators]
    if arm.classes:
        labels = [material.train.classes.index(name) for name in arm.classes]
        made = [tiles.subset(np.flatnonzero(np.isin(tiles.labels, labels))) for tiles in made]
    if arm.selected:
        kept = choose(material, picked, arm.generators[0], selection)
        made = [tiles.subset(np.flatnonzero(kept.mask)) for tiles in made]
    if not arm.real:
        tiles, *made = made
    elif len(picked) == len(material.train):
        tiles = material.train
    else:
        tiles = material.train.subset(picked)
    for more in made:
        tiles = tiles.joined(more)
    return tiles, kept


def cell_path(out: Path, key: str) -> Path:
    """The file whose presence says that a cell is whole; its predictions lie beside it as .npz."""
    return out / "cells" / f"{key}.json"


def judged_path(out: Path, seed: int) -> Path:
    """What a classifier that was trained on all real tiles says of the synthetic ones."""
    return out / "judged" / f"r{seed}.npz"


def run_cell(cell: Cell, material: Material, settings: Settings, tick: Callable[[], object] | None = None) -> None:
    """Train and test one cell and write its files, the description last."""
    started = time.monotonic()
    tiles, kept = training_set(cell, material, settings.selection)
    config = replace(
        settings.config,
        augment="classical" if cell.arm.classical else "none",
        share=cell.share if cell.arm.real and cell.arm.generators else None,
    )

    def step(*_: object) -> None:
        check_stop()
        if tick is not None:
            tick()

    model = fit(settings.kind, tiles, material.val, config, seed=cell.seed, tick=step, device=settings.device)
    predict = lambda array: model.logits(np.asarray(array.images)).numpy().astype(np.float32)  # noqa: E731
    if settings.judges(cell):
        judged: dict[str, np.ndarray] = {"temperature": np.float64(model.temperature)}
        for name, made in material.synthetic.items():
            judged[name] = predict(made)
            parents = sorted(set(material.parents[name]) - {""})
            where = [i for i, one in enumerate(material.train.ids) if one in set(parents)]
            if where:
                judged[f"{name} parents"] = predict(material.train.subset(where))
        _save(judged_path(settings.out, cell.seed), judged)
    path = cell_path(settings.out, cell.key)
    _save(path.with_suffix(".npz"), {name: predict(array) for name, array in material.sets.items()})
    fewer = cell.arm.real and len(tiles.labels[_real(tiles, cell)]) < len(material.train)
    record = {
        "key": cell.key,
        "arm": cell.arm.name,
        "n": cell.n,
        "share": cell.share,
        "seed": cell.seed,
        "temperature": float(model.temperature),
        "initialisation": model.initialisation,
        "notes": [*model.notes, *(kept.notes if kept else ())],
        "train_tiles": _counts(tiles, cell),
        "kept": kept.shares if kept else None,
        "generator_saw_more": bool(fewer and set(cell.arm.generators) & set(settings.saw_more)),
        "seconds": round(time.monotonic() - started, 2),
    }
    write_json(path, record)


def cell_worker(places: Places, settings: Settings) -> Callable[[Cell], Cell]:
    """What a process of a pool does: open the tiles once, then run cells."""
    return partial(_work, material=open_material(places), settings=settings)


def _work(cell: Cell, material: Material, settings: Settings) -> Cell:
    run_cell(cell, material, settings)
    return cell


def _real(tiles: TileArray, cell: Cell) -> np.ndarray:
    if not cell.arm.real:
        return np.zeros(len(tiles), bool)
    return np.ones(len(tiles), bool) if tiles.sources is None else tiles.sources == 0


def _counts(tiles: TileArray, cell: Cell) -> dict[str, list[int]]:
    """Real and synthetic tiles a class."""
    real = _real(tiles, cell)
    counts = [np.bincount(tiles.labels[side], minlength=len(tiles.classes)) for side in (real, ~real)]
    return {name: [int(side[i]) for side in counts] for i, name in enumerate(tiles.classes)}


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **arrays)
