"""Judge a synthetic tile set against real tiles, without training a generator: what the verb `evaluate` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import histosynth
from histosynth import encoders
from histosynth.classify.config import ClassifierConfig
from histosynth.classify.fit import load as load_classifier
from histosynth.classify.model import Predictor
from histosynth.classify.train import train_classifier
from histosynth.classify.weights import for_tiles
from histosynth.core.checkpoint import read_card
from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.core.files import sha256_file
from histosynth.core.progress import bar, say
from histosynth.core.run import Run
from histosynth.core.seeds import derive
from histosynth.encoders.weights import parse_weights
from histosynth.evaluate import guards
from histosynth.evaluate.protocol import equal_sides, judge
from histosynth.evaluate.settings import Protocol
from histosynth.study import account, fidelity
from histosynth.study.evaluation import facts as evaluation_facts
from histosynth.study.evaluation import measures as evaluation_measures
from histosynth.study.evaluation.measures import Sides
from histosynth.study.evaluation.scorecard import write_card
from histosynth.study.evaluation.verdict import verdict
from histosynth.study.evaluation.view import Shown, write_evaluation
from histosynth.tiles.batches import TileArray
from histosynth.tiles.split.leaks import check_no_straddling
from histosynth.tiles.tileset import TileSet

_METRICS = ("frechet", "frechet_infinity", "kid", "coverage", "diversity")
_EXTREMES = 12
_LARGEST = 256


@dataclass(frozen=True)
class EvaluateConfig:
    """A judgement without training a generator."""

    out: Path = Path("runs/evaluate")
    """Folder of the report; repeat the command to make it anew."""
    encoder: tuple[str, ...] = ("tissue-tiny", "colour")
    """Encoders of the scores, NAME or NAME=WEIGHTS (see `histosynth encoders`); the first also finds copies."""
    weights: tuple[str, ...] = ()
    """Weight files as NAME=FILE, such as uni2-h=pytorch_model.bin or lpips-alex=alexnet.pth; FILE alone where there is
    one encoder."""
    classifier: str = ""
    """Checkpoint of a classifier that was trained on real tiles, or "train": does it see the intended labels?"""
    classifier_steps: int = 300
    """Training steps with --classifier train."""
    checkpoint: Path | None = None
    """The generator's checkpoint, for what the tile set does not say of its training."""
    size: int | None = None
    """Edge length in pixels at which tiles are compared; that of the smaller tiles by default."""
    metrics: tuple[str, ...] = _METRICS
    """Which feature scores to take."""
    variety: tuple[str, ...] = ("lpips-alex", "ms-ssim")
    """Distances between two tiles of a class, NAME or NAME=WEIGHTS: lpips-alex, lpips-vgg, lpips-squeeze, ms-ssim."""
    max_n: int = 10_000
    """At most so many tiles a side in every score."""
    strict: bool = False
    """Take no score when a guard finds something that makes it misleading, such as JPEG against PNG."""
    seed: int = 0
    """Seed of the subsamples, and of the classifier."""
    precision: str = "float32"
    """float32, or bfloat16 for those encoders whose card says that it is safe."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bfloat16"):
            raise SettingError(f"precision is {self.precision!r}.", "Use float32 or bfloat16.")
        if not self.encoder:
            raise SettingError("encoder is empty.", "Name at least one (see `histosynth encoders`).")
        self._weights()
        for name, least in (("classifier_steps", 1), ("max_n", 4), ("size", 8)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"{name} is {value}.", f"Use at least {least}.")

    def with_weights(self, asked: str) -> tuple[str, Path | None]:
        """The name in NAME or NAME=FILE, and its weight file where one was given."""
        name, _, file = asked.partition("=")
        return name, Path(file).expanduser() if file else self._weights().get(name)

    def _weights(self) -> dict[str, Path]:
        names, others = ([asked.partition("=")[0] for asked in side] for side in (self.encoder, self.variety))
        return parse_weights(self.weights, names, others)


def evaluate_sets(real: TileSet, synthetic: TileSet, config: EvaluateConfig, command: str = "") -> Path:
    """Judge a synthetic (or a second real) tile set against the test tiles of a real one.

    Returns:
        The path of report.html; report.json, card.json and card.md lie beside it.

    Raises:
        DataError: no class in common, no train or test split, or a guard that refuses.
        CheckpointError: the weights of every encoder are missing, or a checkpoint is not the right one.
        RunError: the folder cannot be written, or holds something else.
    """
    _check(real, synthetic)
    size = config.size or _usual_size(real, synthetic)
    settings = {"real": str(real.folder), "synthetic": str(synthetic.folder), **vars(config)}
    with Run.open(config.out, "evaluate", settings, parents=[real.digest, synthetic.digest]) as run:
        sides = _sides(real, synthetic, size, config)
        card = evaluation_facts.generator_card(synthetic, config.checkpoint)
        facts = evaluation_facts.facts(
            real, synthetic, sides, size, card, [asked.partition("=")[0] for asked in config.encoder]
        )
        found = guards.inspect(real.kept, synthetic.kept, facts)
        _refuse(found, config.strict)
        report: dict[str, Any] = {
            "title": evaluation_facts.title(real, synthetic, facts),
            "verb": "evaluate",
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": histosynth.__version__,
            "command": command,
            "seed": config.seed,
            "source": str(synthetic.meta.get("generator") or "synthetic"),
            "synthetic_is_real": facts.synthetic_is_real,
            "data": evaluation_facts.describe(real, synthetic, sides, size),
            "generator": evaluation_facts.describe_generator(synthetic, card),
            "skipped": [],
        }
        shown = _scores(report, sides, config)
        n = report["n"]
        found += guards.few_tiles(n, {name: one["dim"] for name, one in report["cards"].items()})
        found.sort(key=lambda f: guards.SEVERITIES.index(f.severity))
        report["guards"] = [f.as_dict() for f in found]
        _measures(report, shown, sides, real, synthetic, config)
        report["verdict"] = verdict(report)
        report["verdicts"] = [{"word": "evaluated", "sentence": report["verdict"]}]  # for the browser pages
        write_card(config.out, report)
        page = write_evaluation(config.out, report, shown)
        run.finish(n=n, guards=[f.guard for f in found])
    say(report["verdict"])
    return page


def _check(real: TileSet, synthetic: TileSet) -> None:
    if not set(real.classes) & set(synthetic.classes):
        raise DataError(
            f"The real tiles have the classes {', '.join(real.classes)}, the synthetic {', '.join(synthetic.classes)}.",
            "Give two tile sets with the same class names.",
        )
    for split in ("train", "test"):
        if not len(real.rows(split)):
            raise DataError(
                f"{real.folder} has no {split} tiles: {len(real.kept)} tiles without that side of a split.",
                "Import it again with a split by patient; scores need real tiles that the generator never saw.",
            )
    if not len(synthetic.kept):
        raise DataError(f"{synthetic.folder} has no tile.", "Generate some, or look at the reasons in its table.")
    check_no_straddling(real.table)


def _usual_size(real: TileSet, synthetic: TileSet) -> int:
    edges = [s.kept[["width", "height"]].min(axis=1).median() for s in (real, synthetic)]
    known = [int(e) for e in edges if e > 0]
    return min([*known, _LARGEST]) if known else 64


def _sides(real: TileSet, synthetic: TileSet, size: int, config: EvaluateConfig) -> Sides:
    def array(tileset: TileSet, split: str | None) -> TileArray:
        writable = os.access(tileset.folder, os.W_OK)
        return tileset.array(split, size=size, cache=None if writable else config.out / "cache")

    train, test = array(real, "train"), array(real, "test")
    made = fidelity.align(array(synthetic, None), real.classes)
    labels = {"train": train.labels, "test": test.labels, "synthetic": made.labels}
    picked = equal_sides(labels, real.classes, Protocol(max_n=config.max_n), config.seed)
    return Sides(train, test, made, {side: np.concatenate(parts) for side, parts in picked.items()})


def _refuse(found: Sequence[guards.Finding], strict: bool) -> None:
    bad = [f for f in found if f.severity == "refused" or (strict and f.severity == "strong")]
    if bad:
        remedies = " ".join(dict.fromkeys(f.remedy for f in bad if f.remedy))
        raise DataError("No score is taken: " + " ".join(f.message for f in bad), remedies)


def _scores(report: dict[str, Any], sides: Sides, config: EvaluateConfig) -> Shown:
    """The feature scores with every encoder that can be had; the first one also gives the pictures."""
    protocol = Protocol(metrics=config.metrics, max_n=config.max_n)
    hopeless = _hopeless(sides)
    report |= {"encoders": {}, "cards": {}, "n": len(sides.picked["test"])}
    shown, missing = Shown(), None
    for asked in config.encoder:
        name, weights = config.with_weights(asked)
        try:
            precision = config.precision if encoders.card(name).bfloat16 else "float32"
            encoder = encoders.load(name, config.device, weights=weights, precision=precision)
        except CheckpointError as error:
            missing = missing or error
            report["skipped"].append({"what": f"encoder {name}", "reason": str(error)})
            continue
        encoded = {
            side: fidelity.encode(encoder, array, config.out)
            for side, array in (
                ("train", sides.train), ("test", sides.test), ("synthetic", sides.synthetic), ("ceiling", hopeless)
            )
        }  # fmt: skip
        first = not report["encoders"]
        pixels = {
            "train_images": np.asarray(sides.train.images),
            "test_images": np.asarray(sides.test.images),
            "synthetic_images": np.asarray(sides.synthetic.images),
            "ceiling_images": hopeless.images,
        }
        judged, pairs = judge(
            encoded["train"],
            encoded["test"],
            encoded["synthetic"],
            sides.train.labels,
            sides.test.labels,
            sides.synthetic.labels,
            classes=sides.train.classes,
            encoder=encoder.card.name,
            ceiling=encoded["ceiling"],
            protocol=protocol,
            seed=config.seed,
            **(pixels if first else {}),
        )
        report["encoders"][name] = judged
        report["cards"][name] = asdict(encoder.card)
        if first:
            shown.pairs = fidelity.pair_pictures(pairs, sides.synthetic, sides.train)
            shown.alarms = [bool(a) for a in pairs.alarm[: len(shown.pairs)]]
            shown.encoded, shown.hopeless = encoded, hopeless.images
            _pictures(report, shown, sides, config.seed)
    if missing and not report["encoders"]:
        raise missing
    return shown


def _hopeless(sides: Sides) -> TileArray:
    picked = sides.train.subset(sides.picked["train"])
    return TileArray(
        evaluation_measures.blurred(picked.images), picked.labels, [f"{i} blurred" for i in picked.ids], picked.classes
    )


def _pictures(report: dict[str, Any], shown: Shown, sides: Sides, seed: int) -> None:
    found = shown.encoded
    reach = evaluation_measures.single_tiles(found["test"], found["train"], found["synthetic"])
    order = np.argsort(reach, kind="stable")
    for name, chosen in (("worst", order[::-1]), ("best", order)):
        shown.tiles[name] = [
            (np.array(sides.synthetic.images[i]), float(reach[i]), sides.synthetic.classes[sides.synthetic.labels[i]])
            for i in chosen[:_EXTREMES]
        ]
    report["single_tiles"] = {
        "median": float(np.median(reach)),
        "worst": [{"id": sides.synthetic.ids[i], "distance": float(reach[i])} for i in order[::-1][:_EXTREMES]],
        "best": [{"id": sides.synthetic.ids[i], "distance": float(reach[i])} for i in order[:_EXTREMES]],
    }
    points = {
        "real": (found["test"], sides.test.labels),
        report["source"]: (found["synthetic"], sides.synthetic.labels),
    }
    shown.map = fidelity.embedding_map(points, sides.train.classes, seed)
    shown.samples = account.samples(sides.test, {report["source"]: sides.synthetic}, seed)


def _measures(
    report: dict[str, Any], shown: Shown, sides: Sides, real: TileSet, synthetic: TileSet, config: EvaluateConfig
) -> None:
    """Everything beside the feature scores."""
    first = next(iter(report["encoders"]))
    report["planted"] = evaluation_measures.planted_copies(sides, config.seed)
    report["staining"], shown.colour = evaluation_measures.staining(sides, config.seed)
    report["nuclei"], shown.nuclei = evaluation_measures.nuclear(sides, shown.hopeless, _microns(real, sides))
    report["variety"], skipped = evaluation_measures.variety(
        sides, [config.with_weights(asked) for asked in config.variety], config.seed, config.device
    )
    report["skipped"] += skipped
    classifier, described = _classifier(sides, real, config)
    report["labels"] = {"reason": "No classifier was given (--classifier CHECKPOINT, or --classifier train)."}
    if classifier is not None:
        report["labels"] = evaluation_measures.labels(sides, classifier, config.seed) | {"classifier": described}
    parents = synthetic.kept.set_index("id").reference.reindex(sides.synthetic.ids).fillna("").tolist()
    report["references"] = evaluation_measures.references(sides, parents, shown.encoded, first, classifier, config.seed)


def _microns(real: TileSet, sides: Sides) -> float | None:
    known, edge = real.meta.get("microns_per_pixel"), real.kept[["width", "height"]].min(axis=1).median()
    return float(known) * float(edge) / sides.test.size if known and edge > 0 else None


def _classifier(sides: Sides, real: TileSet, config: EvaluateConfig) -> tuple[Predictor | None, dict[str, Any]]:
    if not config.classifier:
        return None, {}
    if config.classifier != "train":
        loaded = load_classifier(config.classifier, device=config.device)
        return loaded, {"checkpoint": sha256_file(config.classifier), "trained_on": loaded.card.get("trained_on")}
    path = config.out / "classifier.safetensors"
    weights = for_tiles("auto", real.meta.get("simulated"))
    settings = ClassifierConfig(steps=config.classifier_steps, augment="classical", weights=weights)
    made_from = f"{real.digest} {sides.train.size} {settings} {config.seed}"
    if path.is_file() and read_card(path).get("made_from") == made_from:
        found = load_classifier(path, device=config.device)
    else:
        seed = derive(config.seed, "label classifier")
        val = real.array("val", size=sides.train.size)
        with bar("Train the classifier", settings.steps) as tick:
            found = train_classifier(sides.train, val, settings, seed=seed, tick=tick, device=config.device)
        found.card["made_from"] = made_from
        found.save(path)
    return found, {"checkpoint": path.name, "trained_on": sides.train.counts(), "steps": settings.steps}
