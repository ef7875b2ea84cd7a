"""The report, from a fixture: every number below is made up, and the tiles are random textures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from histosynth.core.errors import RunError
from histosynth.study.report import Pictures, render, write_report
from histosynth.study.sheets import encode_sheets, montage, write_sheet_png

CLASSES = (
    ("ADENOCA", "adenocarcinoma", "#C0392B"),
    ("HGIN", "high-grade intraepithelial neoplasia", "#D68910"),
    ("LGIN", "low-grade intraepithelial neoplasia", "#B7950B"),
    ("NORMAL", "normal mucosa", "#1E8449"),
    ("POLYP", "polyp", "#2471A3"),
    ("SERRATED", "serrated adenoma", "#884EA0"),
)
TRAIN = (374, 86, 301, 37, 222, 26)
TEST = (156, 37, 126, 15, 93, 12)
GENERATORS = {"gan": "GAN (StyleGAN2, compact)", "diffusion": "Diffusion (latent transformer)"}


def fixture_report(
    classes: tuple[tuple[str, str, str], ...] = CLASSES, generators: dict[str, str] = GENERATORS, seed: int = 0
) -> dict[str, Any]:
    """FIXTURE: a report with made-up numbers in the shape that `compare` gives."""
    rng = np.random.default_rng(seed)
    labels = [c[0] for c in classes]
    train = dict(zip(labels, (TRAIN * 4)[: len(labels)], strict=True))
    test = dict(zip(labels, (TEST * 4)[: len(labels)], strict=True))
    arms = [_arm("real", "Real", 0.655, train, test, rng)]
    arms.append(_arm("real_classical", "Real + classical augmentation", 0.704, train, test, rng))
    gains = {"gan": 0.004, "diffusion": 0.027}
    made = dict.fromkeys(labels, 120)
    for name, title in generators.items():
        both = {c: train[c] + made[c] for c in labels}
        short = title.split(" (")[0]
        arms.append(_arm(f"real_{name}", f"Real + classical + {short}", 0.704 + gains.get(name, 0), both, test, rng))
    for name, title in generators.items():
        short, level = title.split(" (")[0], 0.47 + 3 * gains.get(name, 0)
        arms.append(_arm(f"{name}_only", f"{short} only", level, made, test, rng))
    differences = []
    for arm in arms:
        if arm["name"] != "real_classical":
            mean = arm["scores"]["balanced_accuracy"]["mean"] - 0.704
            row = {"arm": arm["name"], "baseline": "real_classical", "mean": mean, "low": mean - 0.019,
                   "high": mean + 0.021, "n_tiles": sum(test.values()), "n_patients": 74, "n_seeds": 3}  # fmt: skip
            differences += [row | {"metric": "balanced_accuracy"}, row | {"metric": "macro_f1"}]
    words = {"gan": "no evidence", "diffusion": "helps"}
    verdicts = []
    for name, title in generators.items():
        row = next(d for d in differences if d["arm"] == f"real_{name}")
        verdicts.append({
            "generator": name, "word": words.get(name, "hurts"),
            "sentence": f"FIXTURE sentence on {title.split(' (')[0]}: {100 * row['mean']:+.1f} points of balanced "
            "accuracy on 74 patients that were not seen in training, over 3 classifiers.",
            "mean": row["mean"], "low": row["low"], "high": row["high"],
        })  # fmt: skip
    return {
        "title": "Do synthetic tiles help? FIXTURE, made-up numbers", "verb": "compare",
        "created": "2026-01-05T10:20:30+00:00", "version": "0.1.0",
        "command": "histosynth compare tiles/ --out runs/compare-tiles-0 --minutes 30 --seed 0", "seed": 0,
        "minutes": 30.0,
        "data": {
            "source": "fixture tiles", "digest": "3f" * 32, "size": 64, "upsampled": 0, "formats": {"PNG": 1740},
            "classes": [{"label": c, "name": n, "colour": h} for c, n, h in classes],
            "counts": {"train": train, "val": dict.fromkeys(labels, 40), "test": test},
            "patients": {"train": 180, "val": 44, "test": 74}, "set_aside": {"not an image": 2, "duplicate": 4},
            "split_protocol": "by patient, stratified by class (seed 0)", "simulated": False, "licence": "CC BY 4.0",
        },
        "warnings": [
            "The generators start from weights trained on simulated tissue (shipped with histosynth).",
            "Class SERRATED has only 12 test tiles: its recall is uncertain.",
        ],
        "generators": {
            name: {
                "title": title, "parameters": 4_812_339 if name == "gan" else 9_120_004,
                "trainable": 4_812_339 if name == "gan" else 611_280, "steps": 1900, "planned_steps": 2400,
                "init": "base", "stopped_by_clock": name == "gan", "synthetic_per_class": made,
                "checkpoint": "0a1b2c3d" * 8, "licence": "Apache-2.0",
            }
            for name, title in generators.items()
        },
        "fidelity": {
            "encoder": {"name": "tissue-tiny", "dim": 256, "input_size": 64, "licence": "Apache-2.0", "gated": False,
                        "commercial": True, "source": "trained on simulated tissue"},
            "protocol": {"metrics": ["frechet", "kid", "coverage", "diversity"], "k": 5, "replicates": 40,
                         "level": 0.95},
            "generators": {name: _judged(labels, test, 1.6 - 0.5 * i, rng) for i, name in enumerate(generators)},
        },
        "utility": {
            "protocol": {
                "classifier": "MobileNetV2", "initialisation": "from scratch", "steps": 600, "batch": 32,
                "seeds": [11, 12, 13], "primary": "balanced accuracy", "baseline": "real_classical",
                "interval": "95 %, paired bootstrap over patients and training seeds",
                "test_tiles": sum(test.values()), "test_patients": 74,
            },
            "arms": arms, "differences": differences,
        },
        "verdicts": verdicts,
        "costs": {
            "stages": [
                {"name": "Import", "seconds": 6.2}, {"name": "Train GAN", "seconds": 411.0},
                {"name": "Generate GAN", "seconds": 8.4}, {"name": "Train Diffusion", "seconds": 402.5},
                {"name": "Generate Diffusion", "seconds": 96.0}, {"name": "Fidelity", "seconds": 41.3},
                {"name": "Classifiers", "seconds": 588.0}, {"name": "Statistics", "seconds": 5.1},
            ],
            "generators": {
                name: {"train_seconds": 411.0, "generate_seconds": 8.4 + 80 * i, "tiles_per_second": 85.7,
                       "peak_memory_mb": 1411.2, "checkpoint_mb": 18.4}
                for i, name in enumerate(generators)
            },
            "device": "CPU, 2 cores", "total_seconds": 1563.0,
        },
    }  # fmt: skip


def slim(report: dict[str, Any], drop: tuple[str, ...] = ("confusion", "reliability")) -> dict[str, Any]:
    """The same with fewer charts, which are what takes time."""
    for arm in report["utility"]["arms"]:
        for name in drop:
            del arm[name]
    for judged in report["fidelity"]["generators"].values():
        for part in (judged["all"], *judged["per_class"].values()):
            part["scores"] = {k: v for k, v in part["scores"].items() if k == "kid"}
    return report


def _arm(
    name: str, title: str, level: float, tiles: dict[str, int], test: dict[str, int], rng: np.random.Generator
) -> dict[str, Any]:
    k = len(test)
    recalls = np.clip(level + rng.normal(0, 0.1, k), 0.15, 0.97)
    confusion = np.zeros((k, k), int)
    for i, n in enumerate(test.values()):
        away = np.delete(np.arange(k), i)
        shares = rng.dirichlet(np.full(k - 1, 0.6)) * (1 - recalls[i])
        confusion[i, away] = np.floor(3 * n * shares)
        confusion[i, i] = 3 * n - confusion[i].sum()

    def about(value: float, spread: float | None = 0.03) -> dict[str, float | None]:
        return {
            "mean": value,
            "low": None if spread is None else max(value - spread, 0),
            "high": None if spread is None else min(value + spread, 1),
        }

    edges = np.linspace(0, 1, 11)
    bins = [
        {"low": a, "high": a + 0.1, "confidence": a + 0.06, "accuracy": max(a + 0.06 - 0.1 * a, 0),
         "count": int(30 + 260 * a)}
        for a in edges[2:-1].tolist()
    ]  # fmt: skip
    return {
        "name": name, "title": title, "train_tiles": tiles,
        "scores": {
            "balanced_accuracy": about(level), "macro_f1": about(level - 0.02), "accuracy": about(level + 0.05),
            "auroc": about(0.9, None), "ece": about(0.11, None), "ece_calibrated": about(0.04, None),
            "brier": about(0.41, None),
        },
        "recall": {c: about(float(r), 0.11) for c, r in zip(test, recalls, strict=True)},
        "confusion": confusion.tolist(), "reliability": bins,
        "per_seed": [{"seed": s, "balanced_accuracy": level + d} for s, d in ((11, -0.012), (12, 0.004), (13, 0.01))],
    }  # fmt: skip


def _judged(labels: list[str], test: dict[str, int], worse: float, rng: np.random.Generator) -> dict[str, Any]:
    def score(value: float, floor: float, better: str, n: int) -> dict[str, Any]:
        return {"value": value, "low": value * 0.93, "high": value * 1.07, "floor": floor, "floor_low": floor * 0.94,
                "floor_high": floor * 1.06, "better": better, "n": n}  # fmt: skip

    def scores(n: int) -> dict[str, Any]:
        return {
            "frechet": score(11.2 * worse, 9.8, "lower", n), "kid": score(0.021 * worse, 0.0102, "lower", n),
            "precision": score(0.71 / worse, 0.69, "higher", n), "recall": score(0.62 / worse, 0.7, "higher", n),
            "density": score(0.94 / worse, 0.98, "higher", n), "coverage": score(0.88 / worse, 0.93, "higher", n),
            "vendi_ratio": score(1.02 / worse, 1.01, "near one", n),
            "spread_ratio": score(0.98 / worse, 1.0, "near one", n),
        }  # fmt: skip

    per_class = {}
    for c in labels:
        few = test[c] < 20
        reason = f"{test[c]} tiles on the smallest side, fewer than 20" if few else None
        per_class[c] = {"n": test[c], "reason": reason, "scores": {} if few else scores(test[c])}
    side = {"colour_distance": 0.2, "haematoxylin_w1": 0.03, "eosin_w1": 0.02, "lightness_w1": 1.8}
    return {
        "encoder": "tissue-tiny", "protocol": {"k": 5}, "seed": 0, "prior": "equal shares",
        "counts": {"train": {}, "test": test, "synthetic": {}},
        "all": {"n": 412, "reason": None, "scores": scores(412)}, "per_class": per_class,
        "copies": {"nn_ratio": 1.04, "nn_below_5pct": 0.041, "authenticity": 0.77, "pixel_alarms": 0.008,
                   "pixel_equal": 0.0, "n_train": 1046, "n_held_out": 439, "n_synthetic": 720},
        "colour": {"n": 412, "synthetic": {k: v * worse for k, v in side.items()}, "floor": side},
        "warnings": ["the Fréchet distance rests on 412 tiles a side for 256 dimensions (fewer than twice as many)"],
    }  # fmt: skip


def textures(n: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Random smooth textures, uint8 [n, 3, size, size]."""
    coarse = np.random.default_rng(seed).integers(90, 250, (n, 4, 4, 3), dtype=np.uint8)
    tiles = [np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC)) for c in coarse]
    return np.stack(tiles).transpose(0, 3, 1, 2)


def fixture_pictures(report: dict[str, Any], size: int = 32, count: int = 8) -> Pictures:
    """FIXTURE: textures for every source and class of a fixture report, and a map of random dots."""
    labels = [c["label"] for c in report["data"]["classes"]]
    sources = ["real", *report["generators"]]
    rng = np.random.default_rng(1)
    tiles = textures(2, size)
    return Pictures(
        samples={
            s: {c: textures(count, size, 100 * i + j) for j, c in enumerate(labels)} for i, s in enumerate(sources)
        },
        neighbours={
            g: [(tiles[0], tiles[1], 0.61 + 0.02 * i, labels[i % len(labels)]) for i in range(8)]
            for g in report["generators"]
        },
        embedding={s: rng.normal(size=(60, 2)) for s in sources},
        embedding_labels={s: np.array(labels)[rng.integers(len(labels), size=60)] for s in sources},
    )


class Page(HTMLParser):
    """What a page refers to, which ids it has, its images, and the words it shows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.words = ""
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self._inside = tag
        self.references += [str(given[k]) for k in ("src", "href", "srcset", "action", "data") if k in given]
        if "id" in given:
            self.ids.append(str(given["id"]))
        if tag == "img":
            self.images.append(given)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside != "style":
            self.words += data

    def text(self) -> str:
        return re.sub(r"\s+", " ", self.words)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    report = fixture_report()
    path = write_report(tmp_path_factory.mktemp("run"), report, fixture_pictures(report))
    return path, report, path.read_text(encoding="utf-8")


def test_writes_the_page_and_exactly_the_same_numbers(written: tuple[Path, dict[str, Any], str]) -> None:
    path, report, html = written
    assert path.name == "report.html"
    assert json.loads((path.parent / "report.json").read_text(encoding="utf-8")) == report
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]
    assert len(html) < 6_000_000


def test_opens_offline(written: tuple[Path, dict[str, Any], str]) -> None:
    page = Page(written[2])
    assert page.references
    assert all(r.startswith(("data:image/", "#")) for r in page.references)
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    style = re.search(r"<style>(.*?)</style>", written[2], re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]


def test_contents_lead_somewhere_and_pictures_have_words(written: tuple[Path, dict[str, Any], str]) -> None:
    page = Page(written[2])
    anchors = [r[1:] for r in page.references if r.startswith("#")]
    assert len(anchors) >= 7 and set(anchors) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert page.images and all(image["alt"] for image in page.images)


def test_names_every_class_and_generator_and_says_the_verdict_first(
    written: tuple[Path, dict[str, Any], str],
) -> None:
    _, report, html = written
    text = Page(html).text()
    for label, name, _ in CLASSES:
        assert label in text and name in text
    for title in GENERATORS.values():
        assert title in text
    for verdict in report["verdicts"]:
        assert verdict["sentence"] in text
        assert text.index(verdict["sentence"]) < text.index("class by class")
    assert report["command"] in text
    for warning in report["warnings"]:
        assert warning in text


def test_the_same_report_gives_the_same_page() -> None:
    report = slim(fixture_report(CLASSES[:2], {"gan": GENERATORS["gan"]}))
    assert render(report, fixture_pictures(report)) == render(report, fixture_pictures(report))


def test_hostile_names_are_shown_and_do_nothing() -> None:
    hostile = (
        ("<b>x</b>", '"><script>alert(1)</script>', "red;background:url(//evil)"),
        ("$x^2_$", "{{ 7 * 7 }} & 'so'", "#222222"),
    )
    report = slim(fixture_report(hostile, {"gan": "GAN <i>1</i>"}))
    html = render(report, fixture_pictures(report))
    page = Page(html)
    assert "script" not in page.tags and "evil" not in html
    assert "<b>x</b>" in page.text() and "$x^2_$" in page.text() and "{{ 7 * 7 }}" in page.text()
    assert "GAN <i>1</i>" in page.text()


@pytest.mark.parametrize("count", [2, 20])
def test_few_and_many_classes(count: int) -> None:
    classes = tuple((f"CLASS{i:02d}", f"tissue {i}", f"#{(i * 700_001) % 0xFFFFFF:06X}") for i in range(count))
    report = slim(fixture_report(classes, {"gan": GENERATORS["gan"]}), drop=("reliability",))
    html = render(report, fixture_pictures(report, count=4))
    assert all(c[0] in html for c in classes)
    assert len(html) < 6_000_000


@pytest.mark.parametrize("missing", ["generators", "fidelity", "utility", "verdicts", "costs", "data", "warnings"])
def test_a_missing_section_is_said_to_be_missing(missing: str) -> None:
    report = slim(fixture_report(CLASSES[:2], {"gan": GENERATORS["gan"]}))
    del report[missing]
    assert "Protocol" in render(report, Pictures({}, {}, None, None))


def test_an_empty_report_still_gives_a_page() -> None:
    text = Page(render({"title": "nothing"}, Pictures({}, {}, None, None))).text()
    assert "No verdict" in text and "No classifier was trained" in text and "No generator" in text


def test_a_failed_generator_leaves_its_reason() -> None:
    report = slim(fixture_report(CLASSES[:2], {"gan": GENERATORS["gan"]}))
    report["generators"]["diffusion"] = {"title": "Diffusion", "error": "the disk is full"}
    text = Page(render(report, fixture_pictures(fixture_report(CLASSES[:2], {"gan": "GAN"})))).text()
    assert "Diffusion was not judged: the disk is full" in text
    assert "Failed and is left out: the disk is full" in text


def test_unknown_values_are_named_and_not_invented() -> None:
    report = slim(fixture_report(CLASSES[:2], {"gan": GENERATORS["gan"]}))
    arm = report["utility"]["arms"][1]
    arm["scores"]["auroc"] = {"mean": None, "low": None, "high": None, "reason": "one class has no test tile"}
    arm["recall"]["HGIN"] = {"mean": None, "low": None, "high": None}
    report["data"]["patients"] = {"train": None, "val": None, "test": None}
    report["utility"]["protocol"]["test_patients"] = None
    score = report["fidelity"]["generators"]["gan"]["all"]["scores"]
    score["kid"] = {"value": None, "reason": "fewer than four tiles", "better": "lower", "n": 3}
    report["fidelity"]["generators"]["gan"]["colour"] = None
    report["costs"]["generators"]["gan"]["peak_memory_mb"] = None
    for row in (report["verdicts"][0], report["utility"]["differences"][2]):
        row["low"] = row["high"] = None
    text = Page(render(report, fixture_pictures(report))).text()
    assert "n/a" in text and "one class has no test tile" in text and "fewer than four tiles" in text
    assert "None" not in text and "nan" not in re.findall(r"[a-z]+", text)


def test_a_generator_of_another_package_gets_a_colour_and_a_place() -> None:
    report = slim(fixture_report(CLASSES[:2], {"gan": "GAN", "flow": "Flow matching (plug-in)"}))
    text = Page(render(report, fixture_pictures(report))).text()
    assert "Flow matching (plug-in)" in text and "▲ Flow matching" in text


def test_montage_keeps_pixels_and_leaves_gaps_white() -> None:
    tiles = textures(3, 16)
    sheet = montage(tiles, 2, gap=2)
    assert sheet.shape == (34, 34, 3) and sheet.dtype == np.uint8
    assert np.array_equal(sheet[18:, :16], tiles[2].transpose(1, 2, 0))
    assert (sheet[16:18] == 255).all() and (sheet[18:, 18:] == 255).all()


def test_sheets_are_lossless_while_they_fit_and_small_when_they_do_not() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 3, 160, 160), dtype=np.uint8)
    assert encode_sheets([(noise, 4)], 10_000_000).how == "PNG"
    small = encode_sheets([(noise, 4)], 60_000)
    assert small.uris[0].startswith("data:image/jpeg;base64,") and "scaled from 160 to" in small.how
    assert encode_sheets([], 10).uris == []


def test_sheet_png_for_the_readme(tmp_path: Path) -> None:
    report = fixture_report(CLASSES[:3])
    samples = fixture_pictures(report).samples
    del samples["gan"]["HGIN"]
    path = write_sheet_png(tmp_path / "sheet.png", samples, report["data"]["classes"], GENERATORS, rows=2)
    with Image.open(path) as image:
        assert image.format == "PNG" and 600 < image.width < 2500


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        write_report(tmp_path / "file" / "run", {"title": "x"}, Pictures({}, {}, None, None))
