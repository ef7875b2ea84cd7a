"""The main job: train each generator, make tiles, judge them, and say whether they help a classifier.

Every stage leaves its result on disk and is skipped when it is there, so the same command goes on after a
kill. Minutes become steps by fixed rates, not by measuring the machine: the same settings give the same
figures. Only if a machine is so slow that a stage exceeds its share of the budget does the clock cut it,
and then the report says so.
"""

from __future__ import annotations

import resource
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter

import histosynth
from histosynth.classify.train import ClassifierConfig
from histosynth.core.checkpoint import read_card
from histosynth.core.device import describe_device, pick_device
from histosynth.core.errors import DataError, HistosynthError, SettingError, did_you_mean
from histosynth.core.files import read_json, sha256_file, write_json
from histosynth.core.progress import say
from histosynth.core.run import Run, is_finished
from histosynth.core.seeds import derive
from histosynth.core.types import GeneratorFamily
from histosynth.study import fidelity, utility
from histosynth.study.generators import FAMILIES, GenerateConfig, family, make_tiles
from histosynth.study.report import Pictures, write_report
from histosynth.tiles.batches import TileArray
from histosynth.tiles.sources import ImportConfig, import_tiles
from histosynth.tiles.split import SplitConfig, check_no_straddling
from histosynth.tiles.tileset import SPLITS, TileSet, set_aside

# how the budget is shared: each of the G generators gets an equal part of the first two
_SHARES = {"train": 0.46, "generate": 0.12, "classifiers": 0.34}
_SLACK = 1.35  # a stage may exceed its share by this much before the clock cuts it
_CLASSIFIER_STEPS_PER_SECOND = 12.0
_STEPS = (60, 1500)  # a classifier's fewest and most steps
_TILES = (16, 256)  # synthetic tiles a class, fewest and most
_SHOWN = 8


@dataclass(frozen=True)
class CompareConfig:
    """The main job."""

    out: Path | None = None
    """Folder of the run and its report; runs/compare-NAME-SEED by default. Repeat the command to go on."""
    minutes: float = 25.0
    """Time budget on two CPU cores; sets the numbers of steps and tiles below that are not given."""
    seed: int = 0
    """Seed of the split, of every training and of every tile."""
    size: int = 64
    """Edge length, in pixels, at which everything works (a power of two from 32)."""
    generators: tuple[str, ...] = ("gan", "diffusion")
    """Families to compare (see `histosynth generators`)."""
    init: str = "base"
    """Start from the shipped weights (base), from random numbers (none), or from a checkpoint's path."""
    encoder: str = "tissue-tiny"
    """Encoder of the fidelity scores (see `histosynth encoders`)."""
    classifier_seeds: int = 3
    """Classifiers trained for each arm, each from another seed."""
    classifier_steps: int | None = None
    """Training steps of every classifier."""
    synthetic_per_class: int | None = None
    """Synthetic tiles made for each class."""
    generator_steps: int | None = None
    """Training steps of every generator."""
    val: float = 0.15
    """Share of the tiles for validation, when the tiles bring no split."""
    test: float = 0.25
    """Share of the tiles for the test, when the tiles bring no split."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


@dataclass(frozen=True)
class Plan:
    """Numbers of steps and tiles, and how long a stage may take at most (seconds)."""

    generator_steps: dict[str, int]
    synthetic_per_class: int
    classifier_steps: int
    train_seconds: float


def compare(
    tiles: Path, config: Annotated[CompareConfig, Parameter(name="*")] = CompareConfig()
) -> Path | None:
    """Compare the generators on your tiles and write report.html and report.json.

    Args:
        tiles: a folder of class folders, a folder with a CSV (path, label, patient), a CSV, or a tile set.
    """
    out = config.out or Path("runs") / f"compare-{tiles.resolve().stem}-{config.seed}"
    command = _command("compare", str(tiles), config, out)
    return run_comparison(tiles, out, config, verb="compare", command=command)


def run_comparison(tiles: Path, out: Path, config: CompareConfig, *, verb: str, command: str) -> Path | None:
    """What `compare` and `demo` do; returns the report's path (None when interrupted)."""
    families = _checked(config)
    page = out / "report.html"
    settings = {"tiles": str(tiles), **{k: v for k, v in vars(config).items() if k != "out"}}
    with Run.open(out, verb, settings) as run:
        if run.resumed and is_finished(out) and page.exists():
            say(f"This run is finished. Its report: {page}")
            return page
        started = time.monotonic()
        clock = Clock(out / "costs.json")
        tileset = _tiles(tiles, out, config, clock)
        splits = {s: tileset.array(s, size=config.size, cache=out / "cache") for s in SPLITS}
        warnings = check_usable(splits)
        plan = make_plan(config, families, splits)
        made, described = {}, {}
        for one in families:
            described[one.name] = _make(one, splits["train"], out, config, plan, clock)
            if "error" not in described[one.name]:
                made[one.name] = _synthetic_array(out, one.name, config, tileset)
        with clock("Fidelity"):
            judged, shown = fidelity.judge_all(splits, made, config.encoder, out, config.seed, config.device)
        chosen = utility.arms({n: family(n).title for n in made})
        classifier = ClassifierConfig(steps=plan.classifier_steps)
        seeds = [derive(config.seed, "classifier", k) % 100_000 for k in range(config.classifier_seeds)]
        with clock("Classifiers"):
            utility.run_cells(
                chosen, splits["train"], splits["val"], splits["test"], made, classifier, seeds, out / "cells"
            )
        with clock("Statistics"):
            result = utility.assess(chosen, splits["test"], seeds, out / "cells", config.seed)
        clock.add("Total", time.monotonic() - started)
        found = utility.verdicts(chosen, result["differences"])
        report = {
            "title": f"Do synthetic tiles help? {tileset.meta.get('source', tiles.name)}",
            "verb": verb,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": histosynth.__version__,
            "command": command,
            "seed": config.seed,
            "minutes": config.minutes,
            "data": describe_data(tileset, splits, config),
            "warnings": warnings + _generator_warnings(described, tileset, config),
            "generators": described,
            "fidelity": judged,
            "utility": {"protocol": _protocol(classifier, result, seeds, splits["test"]), **result},
            "verdicts": found,
            "costs": clock.report(described, describe_device(pick_device(config.device))),
        }
        pictures = Pictures(samples=_samples(splits, made, config.seed), **shown)
        write_report(out, report, pictures)
        run.finish(verdicts={v["generator"]: v["word"] for v in found})
    for spoken in found:
        say(spoken["sentence"])
    say(f"Report: {page}")
    return page


def make_plan(config: CompareConfig, families: list[GeneratorFamily], splits: dict[str, TileArray]) -> Plan:
    """Turn minutes into steps and tiles, by the fixed rates of the families."""
    budget = config.minutes * 60
    cost = (config.size / 64) ** 2
    share = budget * _SHARES["train"] / len(families)
    steps = {
        f.name: config.generator_steps or max(20, _round(share * f.steps_per_second / cost)) for f in families
    }
    present = max(1, sum(n > 0 for n in splits["train"].counts().values()))
    slowest = min(f.tiles_per_second for f in families) / cost
    tiles = budget * _SHARES["generate"] / len(families) * slowest / present
    cells = config.classifier_seeds * (2 + 2 * len(families))
    classifier = budget * _SHARES["classifiers"] / cells * _CLASSIFIER_STEPS_PER_SECOND / cost
    return Plan(
        generator_steps=steps,
        synthetic_per_class=config.synthetic_per_class or int(np.clip(_round(tiles), *_TILES)),
        classifier_steps=config.classifier_steps or int(np.clip(_round(classifier), *_STEPS)),
        train_seconds=share * _SLACK,
    )


class Clock:
    """Seconds spent in each stage, kept on disk so that a resumed run reports all of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 2)
        write_json(self._path, self.seconds)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.add(stage, time.monotonic() - start)

    def report(self, described: dict[str, Any], device: str) -> dict[str, Any]:
        """The section "costs" of the report."""
        generators = {n: d.pop("cost") for n, d in described.items() if "cost" in d}
        stages = [{"name": n, "seconds": s} for n, s in self.seconds.items() if n != "Total"]
        return {
            "stages": stages,
            "generators": generators,
            "device": device,
            "total_seconds": self.seconds.get("Total", 0.0),
        }


def check_usable(splits: dict[str, TileArray]) -> list[str]:
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
            warnings.append(
                f"Class {label} has no training tile (too few patients): nothing can be learned of it."
            )
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


def describe_data(tileset: TileSet, splits: dict[str, TileArray], config: CompareConfig) -> dict[str, Any]:
    """The section "data" of the report."""
    kept = tileset.kept
    small = int((kept[["width", "height"]].min(axis=1) < config.size).sum())
    return {
        "source": tileset.meta.get("source", tileset.folder.name),
        "digest": tileset.digest,
        "classes": tileset.meta["classes"],
        "counts": {s: a.counts() for s, a in splits.items()},
        "patients": {s: int(kept[kept.split == s].patient.nunique()) for s in SPLITS},
        "set_aside": set_aside(tileset.table),
        "split_protocol": tileset.meta.get("split_protocol", "as given"),
        "size": config.size,
        "upsampled": small,
        "formats": {str(k): int(v) for k, v in kept.format.value_counts().items()},
        "simulated": bool(tileset.meta.get("simulated", False)),
        "licence": tileset.meta.get("licence", ""),
    }


def _checked(config: CompareConfig) -> list[GeneratorFamily]:
    known = FAMILIES.names()
    for name in config.generators:
        if name not in known:
            raise SettingError(f"generators names {name!r}.", did_you_mean(name, known))
    if not config.generators:
        raise SettingError("generators is empty.", f"Name at least one of {', '.join(known)}.")
    if config.size < 32 or config.size & (config.size - 1):
        raise SettingError(f"size is {config.size}.", "Use a power of two from 32, such as 64.")
    if config.minutes <= 0:
        raise SettingError(f"minutes is {config.minutes}.", "Give a positive number of minutes.")
    if config.classifier_seeds < 1:
        raise SettingError(f"classifier-seeds is {config.classifier_seeds}.", "Use at least 1; 3 is usual.")
    return [family(name) for name in dict.fromkeys(config.generators)]


def _tiles(tiles: Path, out: Path, config: CompareConfig, clock: Clock) -> TileSet:
    if TileSet.is_tileset(tiles):
        tileset = TileSet.open(tiles)
    elif TileSet.is_tileset(out / "tiles"):
        tileset = TileSet.open(out / "tiles")
    else:
        with clock("Import"):
            split = SplitConfig(val=config.val, test=config.test, seed=config.seed)
            tileset = import_tiles(tiles, out / "tiles", ImportConfig(split=split))
    check_no_straddling(tileset.table)
    aside = set_aside(tileset.table)
    if aside:
        say("Set aside: " + ", ".join(f"{n} {reason}" for reason, n in aside.items()))
    return tileset


def _make(
    one: GeneratorFamily, train: TileArray, out: Path, config: CompareConfig, plan: Plan, clock: Clock
) -> dict[str, Any]:
    """Train a generator and make its tiles; a generator that fails is reported and left out."""
    folder, made = out / one.name, out / "synthetic" / one.name
    known = out / f"{one.name}.json"
    if known.exists() and TileSet.is_tileset(made):
        return read_json(known)
    try:
        with clock(f"Train {one.title}"):
            checkpoint = one.train(
                train,
                folder,
                size=config.size,
                steps=plan.generator_steps[one.name],
                seconds=plan.train_seconds,
                seed=derive(config.seed, one.name),
                init=config.init,
                device=config.device,
            )
        present = tuple(c for c, n in train.counts().items() if n)
        generate = GenerateConfig(
            per_class=plan.synthetic_per_class,
            seed=derive(config.seed, "synthetic", one.name),
            classes=present,
            device=config.device,
        )
        with clock(f"Generate {one.title}"):
            make_tiles(checkpoint, made, generate)
    except (SettingError, DataError):
        raise
    except HistosynthError as error:
        say(f"{one.title} failed and is left out: {error}")
        return {"title": one.title, "error": str(error)}
    card = read_card(checkpoint)
    spent = clock.seconds[f"Generate {one.title}"]
    described = {
        "title": one.title,
        **{k: card.get(k) for k in ("parameters", "trainable", "steps", "init", "licence", "parents")},
        "planned_steps": plan.generator_steps[one.name],
        "stopped_by_clock": bool(card.get("stopped_by_clock")),
        "synthetic_per_class": dict.fromkeys(present, plan.synthetic_per_class),
        "checkpoint": sha256_file(checkpoint),
        "cost": {
            "train_seconds": clock.seconds[f"Train {one.title}"],
            "generate_seconds": spent,
            "tiles_per_second": round(len(present) * plan.synthetic_per_class / max(spent, 1e-3), 2),
            "peak_memory_mb": _peak_memory_mb(),
            "checkpoint_mb": round(checkpoint.stat().st_size / 2**20, 2),
        },
    }
    write_json(known, described)
    return described


def _synthetic_array(out: Path, name: str, config: CompareConfig, tileset: TileSet) -> TileArray:
    """Synthetic tiles with the labels of the real set (a class without training tiles has none)."""
    made = TileSet.open(out / "synthetic" / name).array(size=config.size)
    index = np.array([tileset.classes.index(c) for c in made.classes])
    return replace(made, labels=index[made.labels], classes=tileset.classes, groups=None)


def _generator_warnings(described: dict[str, Any], tileset: TileSet, config: CompareConfig) -> list[str]:
    warnings = []
    for one in described.values():
        if "error" in one:
            warnings.append(f"{one['title']} failed and is left out: {one['error']}")
        elif one["stopped_by_clock"]:
            warnings.append(
                f"{one['title']} was stopped by the clock at step {one['steps']} of {one['planned_steps']}: "
                f"repeat with --generator-steps {one['steps']} to get these figures again."
            )
    if config.init == "base":
        text = "The generators start from weights trained on simulated tissue (shipped with histosynth)."
        if tileset.meta.get("simulated"):
            text += (
                " These tiles are simulated too, by the same simulator with other hospitals: what helps here"
                " need not help on real tissue."
            )
        warnings.append(text)
    if "no patients were given" in tileset.meta.get("split_protocol", ""):
        warnings.append("No patients were given: tiles of one patient may be on both sides of the split.")
    small = int((tileset.kept[["width", "height"]].min(axis=1) < config.size).sum())
    if small:
        warnings.append(f"{small} tiles are smaller than {config.size} px and were enlarged.")
    if tileset.kept.format.nunique() > 1 or "JPEG" in set(tileset.kept.format):
        formats = ", ".join(sorted(set(tileset.kept.format)))
        warnings.append(
            f"The tiles were stored as {formats} and synthetic tiles are never JPEG: "
            "compression traces alone can move the fidelity scores."
        )
    return warnings


def _protocol(
    classifier: ClassifierConfig, result: dict[str, Any], seeds: list[int], test: TileArray
) -> dict[str, Any]:
    return {
        "classifier": "MobileNetV2",
        "initialisation": result["arms"][0]["initialisation"],
        "steps": classifier.steps,
        "batch": classifier.batch,
        "width": classifier.width,
        "seeds": seeds,
        "primary": "balanced accuracy",
        "baseline": utility.BASELINE,
        "interval": "95 %, paired bootstrap over patients and training seeds",
        "test_tiles": len(test),
        "test_patients": len(set(test.groups or [])),
        "mixing": "half of the training tiles drawn from each class are synthetic in the mixed arms",
    }


def _samples(
    splits: dict[str, TileArray], made: dict[str, TileArray], seed: int
) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for source, array in {"real": splits["train"], **made}.items():
        rng = np.random.default_rng(derive(seed, "shown", source))
        found[source] = {}
        for i, label in enumerate(array.classes):
            members = np.flatnonzero(array.labels == i)
            picked = rng.permutation(members)[:_SHOWN]
            if len(picked):
                found[source][label] = np.array(array.images[picked])
    return found


def _command(verb: str, tiles: str, config: CompareConfig, out: Path) -> str:
    words = ["histosynth", verb, *([tiles] if tiles else []), "--out", str(out)]
    default = CompareConfig()
    for name, value in vars(config).items():
        if name != "out" and value != getattr(default, name):
            for item in value if isinstance(value, tuple) else (value,):
                words += [f"--{name.replace('_', '-')}", str(item)]
    return shlex.join(words)


def _round(value: float) -> int:
    """Two significant digits, so that plans read well."""
    return int(float(f"{max(value, 0):.2g}"))


def _peak_memory_mb() -> float:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
