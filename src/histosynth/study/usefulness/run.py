"""The experiment from tile sets to the page: check, plan, run the grid, judge the synthetic tiles, write.

OUT/plan.json       what was compared
OUT/sets/*.npz      labels, patients and ids of every test set
OUT/cells/*         a classifier's predictions (.npz) and description (.json, written last)
OUT/judged/*.npz    what classifiers of real tiles say of synthetic ones; OUT/extra.json sums it up
OUT/report.*        the page
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from histosynth import encoders
from histosynth.classify.config import ClassifierConfig
from histosynth.classify.fit import check_kind
from histosynth.classify.weights import for_tiles
from histosynth.core.errors import DataError, SettingError
from histosynth.core.files import atomic_path, write_json
from histosynth.core.progress import say
from histosynth.core.run import Run
from histosynth.study.account import check_usable
from histosynth.study.fidelity import encode
from histosynth.study.generators import FAMILIES, family
from histosynth.study.usefulness.assess import assess
from histosynth.study.usefulness.cells import TEST, Material, Places, Settings, open_material
from histosynth.study.usefulness.grid import run_grid
from histosynth.study.usefulness.judged import judge
from histosynth.study.usefulness.nested import (
    Origin,
    check_alike,
    check_patients,
    check_real,
    origin,
    refuse_shared,
    shared,
    strangers,
)
from histosynth.study.usefulness.page import write_page
from histosynth.study.usefulness.plan import (
    ALL,
    BASELINE,
    Arm,
    UtilityConfig,
    all_arms,
    cells_of,
    choose_arms,
    rare_classes,
    short_name,
    steps_of,
)
from histosynth.tiles.tileset import TileSet

_NO_CELL = ("out", "workers", "ray", "device", "margin", "replicates")  # settings that change no cell


@dataclass(frozen=True)
class Sets:
    """The tile sets of an experiment.

    Attributes:
        synthetic, external: by their names in the experiment.
        titles: of these, for people.
    """

    real: TileSet
    synthetic: dict[str, TileSet]
    external: dict[str, TileSet]
    titles: dict[str, str]


def run_utility(real: Path, synthetic: Sequence[Path], config: UtilityConfig, command: str = "") -> Path:
    """Do synthetic tiles help a classifier on patients it never saw? Repeat the call to go on.

    Args:
        real: a tile set that is split by patient.
        synthetic: tile sets of generators that were trained on its split train.

    Returns:
        The path of the page.

    Raises:
        DataError: tile sets that do not go together, or a test that is not independent of what was learned from.
        SettingError: settings that cannot be used.
        CheckpointError: weights that are missing.
        RunError: the folder holds another experiment.
    """
    run_experiment(real, synthetic, config)
    found = assess(config.out, seed=config.seed, replicates=config.replicates, margin=config.margin)
    page = write_page(config.out, found, command)
    for spoken in found["verdicts"]:
        say(spoken["sentence"])
    say(f"Report: {page}")
    return page


def run_experiment(real: Path, synthetic: Sequence[Path], config: UtilityConfig) -> Path:
    """As `run_utility`, up to the files that its statistics are taken from: the folder with plan.json and the cells."""
    check_kind(config.classifier)
    out = config.out
    sets = open_sets(real, synthetic, config.external)
    everything = [sets.real, *sets.synthetic.values(), *sets.external.values()]
    places = Places(
        real=sets.real.folder,
        synthetic={name: one.folder for name, one in sets.synthetic.items()},
        external={name: one.folder for name, one in sets.external.items()},
        size=config.size,
        features=out / "cache" / "selection",
        cache=None if all(os.access(one.folder, os.W_OK) for one in everything) else out / ".cache",
    )
    # all checks come before the folder is claimed, so that the same command can be mended and repeated
    material = open_material(places)
    origins, notes = check(sets, material, places, config)
    rare = rare_classes(material.train.counts(), config.rare)
    titles = {name: sets.titles[name] for name in sets.synthetic}
    arms = choose_arms(all_arms(titles, rare=rare if len(rare) < len(sets.real.classes) else ()), config.arms)
    arms = _trainable(arms, material, sets.titles, notes)
    numbers = _numbers(config, material.train.counts(), notes)
    seeds = config.cell_seeds()
    cells = cells_of(arms, numbers, config.shares, seeds)
    steps = steps_of(config, len(cells))
    settings = {k: v for k, v in vars(config).items() if k not in _NO_CELL}
    settings |= {"real": str(real), "synthetic": [str(path) for path in synthetic], "steps": steps}
    settings |= {"digests": [one.digest for one in everything]}
    with Run.open(out, "utility", settings, parents=[one.digest for one in everything]) as run:
        plan = {
            **plan_of(sets, material, origins, arms, notes),
            "per_class": list(numbers),
            "shares": list(config.shares),
            "seeds": seeds,
            "rare": rare,
            "classifier": config.classifier,
            "steps": steps,
        }
        write_contract(out, plan, material)
        if any(arm.selected for arm in arms):
            material = _with_features(places, material, arms, config)
        how = Settings(
            kind=config.classifier,
            config=ClassifierConfig(steps=steps, weights=for_tiles(config.weights, sets.real.meta.get("simulated"))),
            selection=config.selection,
            saw_more=tuple(name for name, one in origins.items() if one.saw_real_training),
            out=out,
            device=config.device,
        )
        run_grid(cells, places, how, workers=config.workers, ray=config.ray, material=material)
        if ALL in numbers:
            write_json(out / "extra.json", judge(out, material, seeds))
        run.finish(cells=len(cells))
    return out


def open_sets(real: Path, synthetic: Sequence[Path], external: Sequence[Path] = ()) -> Sets:
    """Open the tile sets and name them: a synthetic one after its generator, others after their folder.

    Raises:
        DataError: no tile set, or none with a class of the real one.
        SettingError: no synthetic set, or one given twice.
    """
    if not synthetic:
        raise SettingError("No synthetic tile set was given.", "histosynth utility REAL SYNTHETIC ... --out OUT")
    given = [Path(path).resolve() for path in (*synthetic, *external)]
    if len(set(given)) < len(given) or Path(real).resolve() in given:
        raise SettingError("A tile set was given twice.", "Give each once.")
    first = TileSet.open(real)
    titles: dict[str, str] = {}
    made, others = {}, {}
    for path in synthetic:
        one = TileSet.open(path)
        kind = str(one.meta.get("generator") or "")
        name = short_name(kind or one.folder.resolve().name, titles)
        title = family(kind).title if kind in FAMILIES.names() else kind or one.folder.resolve().name
        titles[name] = f"{title} ({one.folder.resolve().name})" if title in titles.values() else title
        made[name] = one
    for number, path in enumerate(external, 1):
        others[f"external-{number}"] = TileSet.open(path)
        titles[f"external-{number}"] = Path(path).resolve().name
    for one in (*made.values(), *others.values()):
        if not set(first.classes) & set(one.classes):
            raise DataError(
                f"{one.folder} has the classes {', '.join(one.classes)}, the real set {', '.join(first.classes)}.",
                "Give tile sets with the same class names.",
            )
    return Sets(first, made, others, titles)


def check(sets: Sets, material: Material, places: Places, config: UtilityConfig) -> tuple[dict[str, Origin], list[str]]:
    """Refuse what would make the test dependent on what is learned from; note what weakens the answer.

    Raises:
        DataError: see `nested`; or a split without tiles, or one class only.
    """
    test = material.sets[TEST]
    real = {"train": material.train, "val": material.val, "test": test}
    notes = check_usable(real)
    if sum(n > 0 for n in material.train.counts().values()) < 2:
        raise DataError(
            f"The training tiles of {sets.real.folder} are of one class.", "A classifier needs tiles of two classes."
        )
    check_real(sets.real, real)
    notes += _unnamed(sets.real, "whether one is on two sides")
    if "no patients were given" in (how := str(sets.real.meta.get("split_protocol"))):
        notes.append(f"{sets.real.folder.name} was split {how}.")
    rare_classes(material.train.counts(), config.rare)

    @cache
    def digest(split: str, size: int) -> str:
        if size == config.size and split in real:
            return real[split].digest()
        return sets.real.array(None if split == "whole" else split, size=size, cache=places.cache).digest()

    origins = {}
    for name, one in sets.synthetic.items():
        title, made = sets.titles[name], material.synthetic[name]
        origins[name] = origin(sets.real, one, title, digest, allow_unknown=config.allow_unknown_origin)
        for other in ("val", "test"):
            refuse_shared(
                made,
                real[other],
                f"tiles of {title}",
                f"{other} tiles of {sets.real.folder}",
                "Make them anew without.",
            )
        for set_name, tested in material.sets.items():
            where = "test" if set_name == TEST else sets.titles[set_name]
            if set_name != TEST:
                refuse_shared(made, tested, f"tiles of {title}", f"tiles of {where}", "Make them anew without.")
                check_patients(one, sets.external[set_name], title)
            origins[name], alike = check_alike(
                origins[name], made, tested, title, where, allow_unknown=config.allow_unknown_origin
            )
            notes += [alike] if alike else []
        if origins[name].kind == "other tiles" and shared(made, material.train):
            origins[name] = replace(origins[name], of_training=True)
        missing = [label for label, n in made.counts().items() if not n]
        if missing:
            notes.append(f"{title} has no tile of {', '.join(missing)}: there its arms see real tiles only.")
        if strange := sorted(set(one.classes) - set(sets.real.classes)):
            notes.append(f"Tiles of {title} of the classes {', '.join(strange)} are left out.")
        if (edge := int(one.kept[["width", "height"]].min(axis=1).median())) and edge != config.size:
            notes.append(f"The tiles of {title} are {edge} px on disk and were resized to {config.size} px.")
    for name, one in sets.external.items():
        _, note = strangers(sets.real, one)
        notes += [note] if note else []
        notes += _unnamed(one, "whether training saw theirs")
        for other in ("train", "val"):
            refuse_shared(
                material.sets[name], real[other], f"tiles of {one.folder}", f"{other} tiles", "Leave these out."
            )
    return origins, notes


def plan_of(
    sets: Sets, material: Material, origins: dict[str, Origin], arms: Sequence[Arm], notes: Sequence[str]
) -> dict[str, Any]:
    """What plan.json says of the tiles and arms."""
    return {
        "arms": [
            {
                "name": arm.name,
                "title": arm.title,
                "real": arm.real,
                "generators": list(arm.generators),
                "classical": arm.classical,
                "selected": arm.selected,
                "classes": list(arm.classes),
            }
            for arm in arms
        ],
        "baseline": BASELINE,
        "classes": list(material.train.classes),
        "sets": [
            {
                "name": name,
                "title": "Test patients" if name == TEST else sets.titles[name],
                "tiles": len(tiles),
                "patients": len(set(tiles.groups or tiles.ids)),
            }
            for name, tiles in material.sets.items()
        ],
        "generators": [
            {
                "name": name,
                "title": sets.titles[name],
                "tiles": material.synthetic[name].counts(),
                "origin": {"kind": origins[name].kind, "words": origins[name].words},
                "licence": str(one.meta.get("licence") or ""),
                "checkpoint": next((str(p) for p in one.meta.get("parents") or []), ""),
                "parents": [str(p) for p in one.meta.get("generator_parents") or []],
                "learned_through": [str(p) for p in one.meta.get("learned_through") or []],
                "folder": one.folder.name,
            }
            for name, one in sets.synthetic.items()
        ],
        "source": str(sets.real.meta.get("source") or sets.real.folder.name),
        "simulated": bool(sets.real.meta.get("simulated")),
        "split_protocol": str(sets.real.meta.get("split_protocol") or "as given"),
        "size": material.train.size,
        "train_counts": material.train.counts(),
        "val_counts": material.val.counts(),
        "train_patients": len(set(material.train.groups or material.train.ids)),
        "notes": list(notes),
    }


def write_contract(out: Path, plan: dict[str, Any], material: Material) -> None:
    """Write plan.json and the labels, patients and ids of every test set."""
    write_json(out / "plan.json", plan)
    for name, tiles in material.sets.items():
        with atomic_path(out / "sets" / f"{name}.npz") as temporary, open(temporary, "wb") as stream:
            np.savez(
                stream,
                y=tiles.labels.astype(np.int64),
                groups=np.array(tiles.groups if tiles.groups is not None else tiles.ids, dtype=np.str_),
                ids=np.array(tiles.ids, dtype=np.str_),
            )


def _unnamed(tiles: TileSet, what: str) -> list[str]:
    count = int((tiles.kept.patient == "").sum())
    return [f"{count} tiles of {tiles.folder.name} have no patient: {what} is not known, and they count as one."] * (
        count > 0
    )


def _trainable(arms: Sequence[Arm], material: Material, titles: dict[str, str], notes: list[str]) -> list[Arm]:
    """The arms without those of synthetic tiles alone that are of one class."""
    found = []
    for arm in arms:
        if not arm.real and sum(n > 0 for n in material.synthetic[arm.generators[0]].counts().values()) < 2:
            notes.append(f"{titles[arm.generators[0]]} has tiles of one class: nothing can be trained on them alone.")
        else:
            found.append(arm)
    return found


def _numbers(config: UtilityConfig, counts: dict[str, int], notes: list[str]) -> tuple[int, ...]:
    """Numbers of real tiles a class; without those that are all tiles anyway."""
    largest = max(counts.values())
    same = [n for n in config.numbers if n != ALL and n >= largest and ALL in config.numbers]
    if same:
        notes.append(
            f"No class has more than {largest} training tiles, so {', '.join(map(str, same))} a class would be all."
        )
    return tuple(n for n in config.numbers if n not in same)


def _with_features(places: Places, material: Material, arms: Sequence[Arm], config: UtilityConfig) -> Material:
    """Encode what the selection looks at, once for all cells."""
    wanted = {name: material.synthetic[name] for arm in arms if arm.selected for name in arm.generators}
    arrays = {"train": material.train, "val": material.val, **wanted}
    encoder = None
    for name, tiles in arrays.items():
        path = places.features / f"{name}.npy"
        if path.exists() and len(np.load(path, mmap_mode="r", allow_pickle=False)) == len(tiles):
            continue
        encoder = encoder or encoders.load(config.selection.encoder, config.device)
        values = encode(encoder, tiles, config.out)
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            np.save(stream, values)
    return open_material(places)
