"""The main job: train each generator, make tiles, judge them, and say whether they help a classifier.

Every stage leaves its result on disk and is skipped when it is there, so the same command goes on after a
kill. Minutes become steps by fixed rates, not by measuring the machine: the same settings give the same
figures. Only if a machine is so slow that a stage exceeds its share of the budget does the clock cut it,
and then the report says so.
"""

from __future__ import annotations

import inspect
import resource
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

import histosynth
from histosynth.classify.config import ClassifierConfig
from histosynth.classify.weights import for_tiles
from histosynth.core.checkpoint import read_card
from histosynth.core.device import describe_device, pick_device
from histosynth.core.errors import DataError, HistosynthError, RunError, SettingError, did_you_mean
from histosynth.core.files import read_json, sha256_file, write_json
from histosynth.core.progress import say
from histosynth.core.run import Run, is_finished
from histosynth.core.seeds import derive
from histosynth.core.types import GeneratorFamily
from histosynth.encoders import REGISTRY as ENCODERS
from histosynth.study import fidelity
from histosynth.study.account import check_usable, describe_data, generator_warnings, protocol, samples
from histosynth.study.generators import FAMILIES, GenerateConfig, family, make_tiles
from histosynth.study.plan import Clock, Plan, make_plan
from histosynth.study.report import Pictures, write_report
from histosynth.study.usefulness.assess import assess
from histosynth.study.usefulness.brief import section, train_all
from histosynth.study.validation import validation
from histosynth.tiles.batches import TileArray
from histosynth.tiles.sources.source import ImportConfig, import_tiles
from histosynth.tiles.split.assign import SplitConfig, check_no_straddling, check_shares, check_synthetic
from histosynth.tiles.tileset import SPLITS, TileSet, set_aside


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
    classifier_seeds: int = 5
    """Classifiers trained for each arm, each from another seed."""
    classifier_steps: int | None = None
    """Training steps of every classifier."""
    synthetic_per_class: int | None = None
    """Synthetic tiles made for each class."""
    generator_steps: dict[str, int] = field(default_factory=dict)
    """Training steps of a generator, such as --generator-steps.gan 500."""
    val: float = 0.15
    """Share of the tiles for validation, when the tiles bring no split."""
    test: float = 0.25
    """Share of the tiles for the test, when the tiles bring no split."""
    workers: int | None = None
    """Processes that train classifiers, each on one thread: they change nothing but the time. All processors by
    default, 1 on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def compare(tiles: Path, *, config: Annotated[CompareConfig, Parameter(name="*")] = CompareConfig()) -> Path:
    """Compare the generators on your tiles and write report.html and report.json.

    Args:
        tiles: a folder of class folders, a folder with a CSV (path, label, patient), a CSV, or a tile set.
    """
    out = config.out or Path("runs") / f"compare-{tiles.resolve().stem}-{config.seed}"
    command = spell("compare", [tiles], config, out)
    return run_comparison(tiles, out, config, verb="compare", command=command)


def run_comparison(tiles: Path, out: Path, config: CompareConfig, *, verb: str, command: str) -> Path:
    """What `compare` and `demo` do; returns the report's path."""
    families = _checked(config)
    page = out / "report.html"
    settings = {"tiles": str(tiles), **{k: v for k, v in vars(config).items() if k != "out"}}
    finished = is_finished(out) and page.exists() and not _failures(out)
    with Run.open(out, verb, settings) as run:
        if finished:
            say(f"This run is finished. Its report: {page}")
            return page
        clock = Clock(out / "costs.json")
        tileset = _tiles(tiles, out, config, clock)
        splits = {s: tileset.array(s, size=config.size, cache=out / "cache") for s in SPLITS}
        warnings = check_usable(splits)
        plan = make_plan(
            config.minutes,
            families,
            size=config.size,
            classes=sum(n > 0 for n in splits["train"].counts().values()),
            seeds=config.classifier_seeds,
            generator_steps=config.generator_steps,
            classifier_steps=config.classifier_steps,
            synthetic_per_class=config.synthetic_per_class,
        )
        made, described = {}, {}
        for one in families:
            described[one.name] = _make(one, splits, out, config, plan, clock)
            if "error" not in described[one.name]:
                made[one.name] = _synthetic_array(out, one.name, config, tileset)
        with clock("Fidelity"):
            judged, shown = fidelity.judge_all(splits, made, config.encoder, out, config.seed, config.device)
        weights = for_tiles("auto", tileset.meta.get("simulated"))
        classifier = ClassifierConfig(steps=plan.classifier_steps, weights=weights)
        seeds = [derive(config.seed, "classifier", k) % 100_000 for k in range(config.classifier_seeds)]
        cells = out / "usefulness"
        with clock("Classifiers"):
            train_all(
                tileset,
                {name: out / "synthetic" / name for name in made},
                {name: family(name).title for name in made},
                cells,
                classifier,
                seeds,
                size=config.size,
                cache=out / "cache",
                workers=config.workers,
                device=config.device,
            )
        with clock("Statistics"):
            assessed = assess(cells, seed=config.seed)
            result, found = section(cells, assessed), assessed["verdicts"]
        report = {
            "title": f"Do synthetic tiles help? {tileset.meta.get('source', tiles.name)}",
            "verb": verb,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": histosynth.__version__,
            "command": command,
            "seed": config.seed,
            "minutes": config.minutes,
            "data": describe_data(tileset, splits, config.size),
            "warnings": warnings
            + generator_warnings(described, tileset, config.size, config.init == "base", config.encoder),
            "generators": described,
            "fidelity": judged,
            "utility": {"protocol": protocol(classifier, result["arms"], seeds, splits["test"]), **result},
            "verdicts": found,
            "costs": clock.report(described, describe_device(pick_device(config.device))),
        }
        pictures = Pictures(samples=samples(splits["train"], made, config.seed), **shown)
        write_report(out, report, pictures)
        run.finish(verdicts={v["generator"]: v["word"] for v in found})
    for spoken in found:
        say(spoken["sentence"])
    say(f"Report: {page}")
    return page


def _checked(config: CompareConfig) -> list[GeneratorFamily]:
    known = FAMILIES.names()
    for setting, given in (("generators", config.generators), ("generator-steps", config.generator_steps)):
        for name in given:
            if name not in known:
                raise SettingError(f"{setting} names {name!r}.", did_you_mean(name, known))
    if config.encoder not in ENCODERS.names():
        raise SettingError(f"encoder is {config.encoder!r}.", did_you_mean(config.encoder, ENCODERS.names()))
    check_shares(SplitConfig(val=config.val, test=config.test))
    if not config.generators:
        raise SettingError("generators is empty.", f"Name at least one of {', '.join(known)}.")
    if config.size < 32 or config.size & (config.size - 1):
        raise SettingError(f"size is {config.size}.", "Use a power of two from 32, such as 64.")
    if config.minutes <= 0:
        raise SettingError(f"minutes is {config.minutes}.", "Give a positive number of minutes.")
    counts = {
        "classifier-seeds": config.classifier_seeds,
        "classifier-steps": config.classifier_steps,
        "workers": config.workers,
        "synthetic-per-class": config.synthetic_per_class,
        **{f"generator-steps.{k}": v for k, v in config.generator_steps.items()},
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise SettingError(f"{name} is {value}.", "Use at least 1, or leave it out.")
    return [family(name) for name in dict.fromkeys(config.generators)]


def _failures(out: Path) -> list[str]:
    """Generators that a finished run had to leave out: repeating the command tries them again."""
    generators = read_json(out / "report.json")["generators"]
    return [name for name, described in generators.items() if "error" in described]


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
    record = out / "data.json"
    if record.exists() and read_json(record)["digest"] != tileset.digest:
        raise RunError(
            f"The tiles in {tiles} are not those that the run in {out} began with.",
            "Choose another folder (--out), or bring the tiles back.",
        )
    write_json(record, {"digest": tileset.digest})
    aside = set_aside(tileset.table)
    if aside:
        say("Set aside: " + ", ".join(f"{n} {reason}" for reason, n in aside.items()))
    return tileset


def _make(
    one: GeneratorFamily, splits: dict[str, TileArray], out: Path, config: CompareConfig, plan: Plan, clock: Clock
) -> dict[str, Any]:
    """Train a generator and make its tiles; a generator that fails is reported and left out."""
    folder, made = out / one.name, out / "synthetic" / one.name
    known = out / f"{one.name}.json"
    if known.exists() and TileSet.is_tileset(made):
        return read_json(known)
    train = splits["train"]
    taken = inspect.signature(one.train).parameters
    chosen_by = dict(zip(("validation", "score"), validation(splits["val"], "tissue-tiny", config.device), strict=True))
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
                **{name: value for name, value in chosen_by.items() if name in taken},
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
        if isinstance(error.__cause__, OSError):  # the disk, not the generator: nothing else would work either
            raise
        say(f"{one.title} failed and is left out: {error}")
        return {"title": one.title, "error": str(error)}
    card = read_card(checkpoint)
    spent = clock.seconds[f"Generate {one.title}"]
    described = {
        "title": one.title,
        **{k: card.get(k) for k in ("parameters", "trainable", "steps", "init", "licence", "parents")},
        "planned_steps": plan.generator_steps[one.name],
        "stopped_by_clock": bool(card.get("stopped_by_clock")),
        "learned_through": TileSet.open(made).meta.get("learned_through") or [],
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
    made = TileSet.open(out / "synthetic" / name)
    check_synthetic(tileset.table, made.table)
    return fidelity.align(made.array(size=config.size, cache=out / "cache"), tileset.classes)


def spell(verb: str, given: Sequence[Path | str], config: Any, out: Path | None = None) -> str:
    """The command line that repeats a run: what was given by position, and every setting that is not its default.

    Args:
        out: the folder, for verbs that take it as --out.
    """
    folder = [] if out is None else ["--out", str(out)]
    return shlex.join(["histosynth", verb, *map(str, given), *folder, *_flags(config, type(config)())])


def _flags(config: Any, default: Any, prefix: str = "") -> list[str]:
    words: list[str] = []
    for name, value in vars(config).items():
        usual = getattr(default, name)
        if name == "out" or value == usual:
            continue
        flag = f"--{prefix}{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, dict):
            words += [w for key, item in value.items() for w in (f"{flag}.{key}", str(item))]
        elif is_dataclass(value):
            words += _flags(value, usual, f"{flag[2:]}.")
        else:
            words += [w for item in (value if isinstance(value, tuple) else (value,)) for w in (flag, str(item))]
    return words


def _peak_memory_mb() -> float:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
