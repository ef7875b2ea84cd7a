"""The overview: what it finds in sets with planted faults, what it says of sound ones, and the page itself."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from histosynth.core.errors import DataError, SettingError
from histosynth.study.overview.page import OverviewConfig, describe, overview, render
from histosynth.study.overview.parts import plain
from histosynth.study.overview.sample import spread
from histosynth.tiles.probes import leakage as probes
from histosynth.tiles.quality.thresholds import QualityConfig
from histosynth.tiles.tileset import TileSet
from tests.study.test_report import Page
from tests.tiles.test_probes import tissue

SMALL = OverviewConfig(
    stain_sample=48, normalise=("reinhard",), sheet=4, quality=QualityConfig(min_tiles=5, quantile=1e-7)
)


def make_set(folder: Path, images: np.ndarray, classes: tuple[str, ...] = ("A", "B"), **columns: object) -> TileSet:
    """A tile set of these tiles, class by turns, a patient every four tiles, every fourth patient a test patient."""
    n = len(images)
    patient = np.arange(n) // 4
    table = pd.DataFrame(
        {
            "id": [f"t{i:03d}" for i in range(n)], "label": [classes[i % len(classes)] for i in range(n)],
            "patient": [f"p{p:02d}" for p in patient], "format": "PNG", "width": images.shape[3],
            "height": images.shape[2], "sha256": [f"{i:x}" for i in range(n)], "source": "x.png",
            "split": [("test", "val", "train", "train")[p % 4] for p in patient],
        }
    ).assign(**columns)  # fmt: skip
    table["path"] = [f"images/{i}.png" for i in table.id]
    (folder / "images").mkdir(parents=True)
    for path, image in zip(table.path, images, strict=True):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / path, compress_level=1)
    return TileSet.create(folder, table, sorted(set(table.label[table.get("kept", table.label != "")])), made_by="test")


def compressed(image: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream)).transpose(2, 0, 1)


def texts(report: dict, level: str = "") -> str:
    return " | ".join(f["text"] for f in report["findings"] if level in ("", f["level"]))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of other things than the probes, which then report nothing."""
    monkeypatch.setattr(probes, "PERMUTATIONS", 3)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> TileSet:
    return make_set(tmp_path_factory.mktemp("sets") / "sound", tissue(96, 0))


@pytest.fixture(scope="module")
def written(sound: TileSet) -> tuple[Path, dict, str]:
    page, report = overview(sound.folder, sound.folder.parent / "out", SMALL)
    return page, report, page.read_text(encoding="utf-8")


def test_the_page_opens_offline_and_holds_the_numbers_of_the_json(written: tuple[Path, dict, str]) -> None:
    path, report, html = written
    assert sorted(p.name for p in path.parent.iterdir()) == ["overview.html", "overview.json"]
    assert json.loads((path.parent / "overview.json").read_text(encoding="utf-8")) == report
    page = Page(html)
    assert all(r.startswith(("data:image/", "#")) for r in page.references) and "script" not in page.tags
    anchors = {r[1:] for r in page.references if r.startswith("#")}
    assert anchors <= set(page.ids) and len(page.ids) == len(set(page.ids))
    assert page.images and all(image["alt"] for image in page.images)
    assert len(html) < 6_000_000
    text = page.text()
    assert all(f["text"] in text for f in report["findings"])
    assert "None" not in text and "nan" not in re.findall(r"[a-z]+", text)


def test_a_sound_set_has_no_warning(written: tuple[Path, dict, str]) -> None:
    _, report, _ = written
    assert texts(report, "warning") == ""
    assert "Neither colour, nor traces of JPEG" in texts(report, "fine") and "No patient has" in texts(report)
    assert report["classes"][0]["tiles"] == {"train": 24, "val": 12, "test": 12}
    assert report["classes"][0]["patients"] == {"train": 12, "val": 6, "test": 6}


def test_the_same_set_gives_the_same_report_with_any_number_of_threads(sound: TileSet, hurried: None) -> None:
    first, second = (
        describe(sound, OverviewConfig(stain_sample=12, sheet=4, sample=30, normalise=(), workers=w))[0] for w in (1, 3)
    )
    assert first | {"created": ""} == second | {"created": ""}
    assert first["probes"]["tiles"] == 30 and first["normalisation"]["tiles"] == 12


def test_planted_faults_come_first(tmp_path: Path) -> None:
    images = tissue(96, 1)
    images[1::2] = [compressed(i, 60) for i in images[1::2]]  # class B
    images[8] = images[80][:, ::-1]  # a copy, mirrored, in another patient and split
    rng = np.random.default_rng(0)
    images[10] = np.clip(images[10].mean() + rng.normal(0, 1, images[10].shape), 0, 255)  # nothing to see
    kept = np.arange(96) != 50
    tileset = make_set(
        tmp_path / "set", images, kept=kept, reason=np.where(kept, "", "unreadable: 50.png is damaged"),
        patient=[f"p{i // 4 if i != 5 else 2:02d}" for i in range(96)],
    )  # fmt: skip
    report, shown = describe(tileset, SMALL)
    warnings = texts(report, "warning")
    assert "Traces of JPEG compression alone reach" in warnings and "(chance 0.50)" in warnings
    assert "1 pair(s) of near-duplicate tiles lie on two sides of the split" in warnings
    assert "1 patient(s) have tiles in more than one split (p02)" in warnings
    assert "1 tile(s) are set aside and never used: 1 unreadable" in texts(report, "note")
    levels = [f["level"] for f in report["findings"]]
    assert levels == sorted(levels, key=("warning", "note", "fine").index)
    assert {shown.pairs[0][2][:7], shown.pairs[0][3][:7]} == {"A · p02", "A · p20"}
    assert shown.worst_rejected and shown.worst[0][1:][0] == "A" and "quality:" in shown.worst[0][2]
    assert report["set_aside"][0]["examples"][0]["reason"] == "unreadable: 50.png is damaged"


def test_a_class_with_its_own_staining_is_reported(tmp_path: Path) -> None:
    images = tissue(96, 2)
    images[1::2] = images[1::2] * np.array([1, 0.86, 1])[:, None, None]
    report, _ = describe(make_set(tmp_path / "set", images), SMALL)
    assert re.search(r"The mean colour alone \(3 numbers\) reaches (0\.9\d|1\.00)", texts(report, "warning"))
    assert "JPEG" not in texts(report, "warning")


def test_a_set_without_splits_and_patients(tmp_path: Path, hurried: None) -> None:
    names = ("<b>x</b>", '"><script>alert(1)</script>')  # that do nothing
    tileset = make_set(tmp_path / "{{ 7 * 7 }}", tissue(40, 3), names, patient="", split="")
    report, shown = describe(tileset, SMALL)
    assert report["patients"] is None and report["splits"] == [""] and not report["probes"]["split"]
    assert "The patients are not known" in texts(report, "warning") and "not split" in texts(report, "note")
    assert report["classes"][0]["training"] == 20
    page = Page(render(report, shown))
    assert "Not split" in page.text() and "script" not in page.tags and "<b>x</b>" in page.text()
    assert "{{ 7 * 7 }}" in page.text()


def test_synthetic_tiles_rare_classes_and_several_sizes(tmp_path: Path, hurried: None) -> None:
    labels = ["A"] * 40 + ["B"] * 7 + ["C"]
    table = {"label": labels, "patient": "", "split": "", "generator": "gan", "format": "PNG"}
    tileset = make_set(tmp_path / "set", tissue(48, 4), **table)
    row = tileset.table.index[0]
    tileset.table.loc[row, ["width", "height"]] = [120, 130]
    Image.fromarray(np.full((130, 120, 3), 240, np.uint8)).save(tileset.folder / tileset.table.path[row])
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(tileset.folder / tileset.table.path[1])
    report, _ = describe(tileset, SMALL)
    assert report["files"]["generators"] == {"gan": 48}
    assert "A has 40 times as many tiles as C (40 against 1)" in texts(report, "note")
    assert "B (7), C (1)" in texts(report, "note") and "more than one size" in texts(report, "note")


def test_a_set_of_test_tiles_alone_gets_a_page_without_limits(tmp_path: Path, hurried: None) -> None:
    report, shown = describe(make_set(tmp_path / "set", tissue(12, 3), split="test"), SMALL)
    assert report["quality"]["rules"] == "none" and report["quality"]["rejected"] == 0
    assert "No limits were asked for" not in (page := Page(render(report, shown)).text())
    assert "No limits: there is no tile to learn them from" in page


def test_one_class_of_white_tiles_still_gives_a_page(tmp_path: Path, hurried: None) -> None:
    images = np.full((12, 3, 48, 48), 255, np.uint8)
    tileset = make_set(tmp_path / "set", images, ("BACK",))
    report, shown = describe(tileset, OverviewConfig(sheet=2, normalise=("vahadane", "macenko")))
    reasons = {p["reason"] for p in report["probes"]["class"]}
    assert reasons == {"fewer than two classes have 3 patients"}
    assert "enough stained tissue" in report["normalisation"]["states"][1]["error"]
    assert report["duplicates"]["across_patients"] == 0  # white tiles are no copies
    assert "n/a" in Page(render(report, shown)).text()


def test_a_tile_that_cannot_be_read_is_counted_and_does_not_stop_the_others(tmp_path: Path, hurried: None) -> None:
    tileset = make_set(tmp_path / "set", tissue(48, 5))
    (tileset.folder / tileset.table.path[3]).write_bytes(b"no image")
    report, _ = describe(tileset, SMALL)
    assert "1 tile(s) of the set can no longer be read" in texts(report, "warning")
    assert report["probes"]["tiles"] == 47


def test_wrong_input_is_named(tmp_path: Path, sound: TileSet, hurried: None) -> None:
    with pytest.raises(DataError, match="not a tile set.*tiles import"):
        overview(tmp_path)
    with pytest.raises(SettingError, match="sheet is 0"):
        OverviewConfig(sheet=0)
    with pytest.raises(SettingError, match="vahadan"):
        describe(sound, OverviewConfig(normalise=("vahadan",)))
    empty = TileSet(sound.folder, sound.table.assign(kept=False), sound.meta)
    with pytest.raises(DataError, match="no usable tile"):
        describe(empty)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("AAAB"), st.sampled_from("pqrs")), min_size=1, max_size=60),
    st.integers(1, 80),
    st.integers(0, 5),
)
def test_a_subset_is_spread_over_classes_and_patients(tiles: list[tuple[str, str]], count: int, seed: int) -> None:
    rows = pd.DataFrame(tiles, columns=["label", "patient"])
    chosen = spread(rows, count, seed, "test")
    assert len(chosen) == len(set(chosen)) == min(count, len(rows))
    taken = rows.iloc[chosen]
    for label, own in rows.groupby("label"):
        mine = taken[taken.label == label]
        # a class gives its share or all that it has, and no patient gives two tiles more than another could
        assert len(mine) >= min(len(own), count // rows.label.nunique())
        used = mine.patient.value_counts().reindex(own.patient.unique(), fill_value=0)
        spare = used[used < own.patient.value_counts().reindex(used.index)]
        assert spare.empty or used.max() - spare.min() <= 1
    assert np.array_equal(chosen, spread(rows, count, seed, "test"))


def test_plain_values_are_json() -> None:
    value = {
        "a": np.float32(1 / 3),
        "b": [np.nan, np.int64(3), np.bool_(True)],
        "c": np.array([[1.5, np.inf]]),
        4: None,
    }
    assert plain(value) == {"a": 0.333333, "b": [None, 3, True], "c": [[1.5, None]], "4": None}
    json.dumps(plain(value), allow_nan=False)
