"""Prepare: filter, split, stain, size; interruptions, any number of workers, and nothing of the test in training."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from histosynth import cli
from histosynth.core.errors import DataError, RunError, SettingError
from histosynth.core.files import read_json
from histosynth.core.pool import run_tasks
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.images import read_rgb, square
from histosynth.tiles.prepare.pipeline import PrepareConfig, prepare
from histosynth.tiles.quality.metrics import METRICS, quality_table
from histosynth.tiles.quality.thresholds import QualityConfig
from histosynth.tiles.sources.source import Source, import_tiles
from histosynth.tiles.split.assign import SplitConfig
from histosynth.tiles.stain import load_normaliser
from histosynth.tiles.tileset import TileSet
from tests.tiles.conftest import texture

PLAIN = PrepareConfig(quality=QualityConfig(rules="none"))


def stained(seed: int, size: int = 48) -> np.ndarray:
    """A tile of two stains on white, uint8 [size, size, 3]."""
    amounts = np.asarray(texture(seed, size), float)[..., :2] / 255
    od = amounts @ np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]) * 1.5
    od[: size // 4] = 0
    return np.rint(255 * np.exp(-od)).astype(np.uint8)


@pytest.fixture
def source(tmp_path):
    """A CSV of 36 stained tiles of three classes and twelve patients, with a damaged and a white one."""
    root = tmp_path / "source"
    rows = []
    for i, label in enumerate(("A", "B", "C")):
        (root / label).mkdir(parents=True)
        for k in range(12):
            Image.fromarray(stained(100 * i + k)).save(root / label / f"{label}{k:02d}.png")
            rows.append((f"{label}/{label}{k:02d}.png", label, f"p{k}"))
    (root / "B" / "B05.png").write_text("not an image")
    Image.new("RGB", (48, 48), (255, 255, 255)).save(root / "A" / "A03.png")
    pd.DataFrame(rows, columns=["path", "label", "patient"]).to_csv(root / "tiles.csv", index=False)
    return root


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder with their bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_tiles_are_split_measured_and_written_as_they_are(source, tmp_path):
    tileset = prepare(source, tmp_path / "out", PLAIN, workers=1)
    table = tileset.table.set_index("id")
    assert len(table) == 36 and tileset.classes == ("A", "B", "C")
    assert table.reason["B05"].startswith("unreadable") and table.path["B05"] == "" and not table.kept["B05"]
    assert table.kept["A03"], "a white tile is a tile"
    assert np.isfinite(tileset.kept[[f"q_{m}" for m in METRICS]].to_numpy()).all()
    for row in tileset.kept.itertuples():
        assert np.array_equal(read_rgb(tileset.folder / row.path)[0], read_rgb(source / row.source)[0])
    assert tileset.kept.groupby("patient").split.nunique().max() == 1 and set(tileset.kept.split) == {
        "train", "val", "test",
    }  # fmt: skip
    assert tileset.meta["counts"]["read"] == 36 and tileset.meta["counts"]["set_aside"] == {"unreadable": 1}
    assert (table.stain == "").all() and tileset.meta["stain_protocol"] == "not normalised"
    assert not (tmp_path / "out" / "preparing").exists() and not list((tmp_path / "out").rglob("*.tmp*"))
    with pytest.raises(RunError, match="already holds a tile set"):
        prepare(source, tmp_path / "out", PLAIN, workers=1)


def test_metrics_of_a_prepared_set_are_those_of_the_tiles_as_read(source, tmp_path):
    native = prepare(source, tmp_path / "native", PLAIN, workers=1)
    small = prepare(source, tmp_path / "small", PrepareConfig(quality=PLAIN.quality, size=24), workers=1)
    pd.testing.assert_frame_equal(quality_table(small), quality_table(native))
    forgotten = TileSet(native.folder, native.table, {**native.meta, "metrics_version": -1})
    pd.testing.assert_frame_equal(quality_table(forgotten), quality_table(native), rtol=1e-4)
    assert small.digest != native.digest, "other pixels, another digest"
    row = small.kept.iloc[4]
    assert np.array_equal(read_rgb(small.folder / row.path)[0], square(read_rgb(source / row.source)[0], 24))
    assert (small.kept.width == 24).all()


def test_two_workers_an_archive_and_other_chunks_change_no_byte(source, tmp_path):
    config = PrepareConfig(quality=PLAIN.quality, stain="reinhard", size=32)
    packed = tmp_path / "packed" / "source"
    packed.parent.mkdir()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(source.rglob("*.*")):
            archive.write(path, path.relative_to(source).as_posix())
    one = prepare(source, tmp_path / "one", config, workers=1, chunk=7)
    prepare(packed, tmp_path / "two", config, workers=2, chunk=7)
    several = prepare(source, tmp_path / "several", config, workers=1, chunk=256)
    a, b = everything(one.folder), everything(tmp_path / "two")
    message = one.table.reason[one.table.id == "B05"].iloc[0]
    assert str(source) in message and a.keys() == b.keys()
    assert [k for k in a if a[k] != b[k]] == ["tiles.parquet"], "only the path in the message of the damaged tile"
    columns = [c for c in one.table if c != "reason"]
    pd.testing.assert_frame_equal(one.table[columns], TileSet.open(tmp_path / "two").table[columns])
    pd.testing.assert_frame_equal(one.table, several.table)


KILLED = """
import os, signal, sys
from pathlib import Path
from histosynth.tiles.prepare import work
from histosynth.tiles.prepare.pipeline import PrepareConfig, prepare
from histosynth.tiles.quality.thresholds import QualityConfig
source, out, name, after = sys.argv[1:]
real, calls = getattr(work, name), []
def dying(*arguments):
    calls.append(1)
    if len(calls) > int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
setattr(work, name, dying)
prepare(source, out, PrepareConfig(quality=QualityConfig(rules="none"), stain="reinhard"), workers=1, chunk=5)
"""


@pytest.mark.parametrize(
    ("dies_in", "after", "reads_left"),
    [("pixel_digest", 17, 21 + 35), ("write_png", 12, 25), ("_save", 7, 1 + 35)],
    ids=["measuring", "writing", "between chunks"],
)
def test_a_killed_call_goes_on_without_redoing_chunks(source, tmp_path, monkeypatch, dies_in, after, reads_left):
    config = PrepareConfig(quality=PLAIN.quality, stain="reinhard")
    whole = prepare(source, tmp_path / "whole", config, workers=1, chunk=5)
    sample = len(whole.meta["stain_fitted_on"])
    out = tmp_path / "out"
    died = subprocess.run([sys.executable, "-c", KILLED, source, out, dies_in, str(after)], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    (out / ".tiles.12345678.tmp.parquet").write_text("half")
    reads, real = [], Source.rgb
    monkeypatch.setattr(Source, "rgb", lambda self, path: reads.append(path) or real(self, path))
    prepare(source, out, config, workers=1, chunk=5)
    assert len(reads) == reads_left + sample
    assert everything(out) == everything(whole.folder)


def test_a_call_killed_before_its_last_step_is_taken_as_done(source, tmp_path):
    done = prepare(source, tmp_path / "out", PLAIN, workers=1)
    before = everything(done.folder)
    (done.folder / "preparing").mkdir()
    with pytest.raises(RunError, match="prepared otherwise"):
        prepare(source, done.folder, PrepareConfig(quality=PLAIN.quality, size=32), workers=1)
    prepare(source, done.folder, PLAIN, workers=1)
    assert everything(done.folder) == before and not (done.folder / "preparing").exists()


def interrupted(source, out, monkeypatch, after: int, config=PLAIN) -> None:
    real, reads = Source.rgb, []

    def stopping(self, path):
        reads.append(path)
        if len(reads) > after:
            raise KeyboardInterrupt
        return real(self, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Source, "rgb", stopping)
        prepare(source, out, config, workers=1, chunk=5)


def test_other_settings_keep_what_was_measured_and_write_again(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch, 50)
    assert len(list((out / "images").rglob("*.png"))) > 0
    reads, real = [], Source.rgb
    with monkeypatch.context() as patch:
        patch.setattr(Source, "rgb", lambda self, path: reads.append(path) or real(self, path))
        changed = prepare(source, out, PrepareConfig(quality=PLAIN.quality, size=32), workers=1, chunk=5)
    assert len(reads) == 35, "each kept tile once, to be written"
    fresh = prepare(source, tmp_path / "fresh", PrepareConfig(quality=PLAIN.quality, size=32), workers=1, chunk=5)
    assert everything(changed.folder) == everything(fresh.folder)


@pytest.mark.parametrize("name", ["images", "preparing"])
def test_folders_of_something_else_are_never_removed(source, tmp_path, name):
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / "holiday.png").write_text("mine")
    with pytest.raises(RunError, match="holds files of something else"):
        prepare(source, tmp_path / "out", PLAIN, workers=1)
    assert (tmp_path / "out" / name / "holiday.png").read_text() == "mine"


@pytest.mark.parametrize("change", ["a tile more", "another label", "another chunk"])
def test_a_changed_source_is_refused(source, tmp_path, monkeypatch, change):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch, 12)
    table = pd.read_csv(source / "tiles.csv")
    if change == "a tile more":
        table.loc[len(table)] = ["A/A00.png", "A", "p0"]
    elif change == "another label":
        table.loc[0, "label"] = "B"
    table.to_csv(source / "tiles.csv", index=False)
    with pytest.raises(RunError, match="was begun with (sources that have other tiles|another chunk)"):
        prepare(source, out, PLAIN, workers=1, chunk=6 if change == "another chunk" else 5)


def test_a_tile_that_changes_between_the_passes_is_refused(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch, 37)
    Image.fromarray(stained(999)).save(source / "C" / "C11.png")
    with pytest.raises(RunError, match=r"C/C11.png is not the same as when it was measured"):
        prepare(source, out, PLAIN, workers=1, chunk=5)


def test_a_damaged_chunk_is_done_again(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(source, out, monkeypatch, 30)
    first = sorted((out / "preparing" / "read").iterdir())[0]
    first.write_bytes(first.read_bytes()[:100])
    whole = prepare(source, tmp_path / "whole", PLAIN, workers=1, chunk=5)
    prepare(source, out, PLAIN, workers=1, chunk=5)
    assert everything(out) == everything(whole.folder)


def test_quality_rejects_training_tiles_with_the_reason_and_no_others(source, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump({"default": {"white_ratio_max": 0.9}}))
    sides = set()
    for seed in range(12):
        config = PrepareConfig(quality=QualityConfig(rules=str(rules)), split=SplitConfig(seed=seed))
        tileset = prepare(source, tmp_path / f"out{seed}", config, workers=1)
        row = tileset.table.set_index("id").loc["A03"]
        sides.add(row.split)
        assert row.kept == (row.split != "train"), "only training tiles are filtered"
        if not row.kept:
            assert row.reason.startswith("quality: white_ratio 1 above 0.9") and row.path == ""
            assert not list(tileset.folder.rglob("A03.png"))
            saved = yaml.safe_load((tileset.folder / "thresholds.yaml").read_text())
            assert saved["default"]["white_ratio_max"] == 0.9
        if len(sides) > 1 and "train" in sides:
            break
    else:
        pytest.fail("the white tile was always on one side")
    everywhere = QualityConfig(rules=str(rules), splits=("train", "val", "test"))
    tileset = prepare(source, tmp_path / "all", PrepareConfig(quality=everywhere), workers=1)
    assert not tileset.table.set_index("id").kept["A03"]


def with_splits(source: Path) -> pd.DataFrame:
    table = pd.read_csv(source / "tiles.csv")
    number = table.patient.str[1:].astype(int)
    table["split"] = np.select([number < 6, number < 8], ["train", "val"], "test")
    table.to_csv(source / "tiles.csv", index=False)
    return table


def test_test_tiles_move_neither_limits_nor_stain_reference(source, tmp_path):
    table = with_splits(source)
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump({"learn": {"lap_var_min": {}, "entropy_min": {}, "white_ratio_max": {}}}))
    quality = QualityConfig(rules=str(rules), min_tiles=3, quantile=0.4)
    config = PrepareConfig(stain="reinhard", quality=quality)
    first = prepare(source, tmp_path / "first", config, workers=1)
    for row in table[table.split != "train"].itertuples():
        Image.fromarray(255 - texture(1000 + row.Index, 48)).save(source / row.path)
    second = prepare(source, tmp_path / "second", config, workers=1)
    assert first.digest != second.digest
    for name in ("thresholds.yaml", "stain.json"):
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    fitted = second.table.set_index("id").loc[second.meta["stain_fitted_on"]]
    assert (fitted.split == "train").all() and fitted.kept.all()
    assert "fitted on" in second.meta["stain_protocol"] and "training tiles" in second.meta["quality_protocol"]


def test_a_patient_in_two_splits_is_refused(source, tmp_path):
    table = with_splits(source)
    table.loc[0, "patient"] = "p11"
    table.to_csv(source / "tiles.csv", index=False)
    with pytest.raises(DataError, match=r"p11"):
        prepare(source, tmp_path / "out", PLAIN, workers=1)


def test_what_cannot_be_split_is_refused_before_a_tile_is_read(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "rgb", lambda *_: pytest.fail("a tile was read"))
    with pytest.raises(DataError, match="no place for tiles from 'tiles.csv'"):
        prepare(source / "tiles.csv", tmp_path / "a", PrepareConfig(split=SplitConfig(protocol="nct-crc")), workers=1)
    table = pd.read_csv(source / "tiles.csv").assign(split=["train", "test"] * 18)
    table.loc[0, "patient"] = table.patient[1]
    table.to_csv(source / "tiles.csv", index=False)
    with pytest.raises(DataError, match="more than one split: p1"):
        prepare(source / "tiles.csv", tmp_path / "b", PLAIN, workers=1)


@pytest.mark.parametrize("parent", ["train", "test"])
def test_synthetic_tiles_keep_their_reference_and_never_train_beside_a_test_tile(source, tmp_path, parent):
    real = import_tiles(source / "tiles.csv", tmp_path / "real")
    reference, label = real.rows(parent).iloc[0], real.classes[0]
    # named like a real tile, so that both get new ids
    row = {"id": reference.id, "path": reference.path, "label": label, "patient": "none", "split": "train",
           "generator": "gan", "reference": reference.id}  # fmt: skip
    path = tmp_path / "made" / row["path"]
    path.parent.mkdir(parents=True)
    Image.fromarray(numpy_rng(0, "noise").integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(path)
    made = TileSet.create(tmp_path / "made", pd.DataFrame([row]), [label])
    sources = [real.folder, made.folder]
    if parent == "test":
        with pytest.raises(DataError, match="conditioned on"):
            prepare(sources, tmp_path / "out", PLAIN, workers=1)
        return
    kept = prepare(sources, tmp_path / "out", PLAIN, workers=1).kept
    own, theirs = (kept[(kept.origin == name) & (kept.source == row["path"])].iloc[0] for name in ("made", "real"))
    assert own.split == theirs.split == "train" and own.id != theirs.id == own.reference


def test_of_two_copies_the_one_of_the_test_stays(source, tmp_path):
    table = with_splits(source)
    train, test = table[table.split == "train"].path[0], table[table.split == "test"].path.iloc[0]
    (source / train).write_bytes((source / test).read_bytes())
    ids = prepare(source, tmp_path / "out", PLAIN, workers=1).table.set_index("id")
    assert ids.kept[Path(test).stem] and ids.reason[Path(train).stem].startswith("copy: the same pixels as")


@pytest.mark.parametrize("reference", ["train", "tile", "set", "profile"])
def test_stain_references(source, tmp_path, reference):
    base = prepare(source, tmp_path / "base", PLAIN, workers=1)
    tile = source / "A" / "A01.png"
    load_normaliser("macenko").fit(stained(5)[None].transpose(0, 3, 1, 2)).save(tmp_path / "profile.json")
    given = {"train": "train", "tile": tile, "set": base.folder, "profile": tmp_path / "profile.json"}[reference]
    config = PrepareConfig(quality=PLAIN.quality, stain="macenko", stain_reference=str(given), stain_tiles=6)
    tileset = prepare(source, tmp_path / "out", config, workers=1)
    table = tileset.table.set_index("id")
    assert table.stain["A03"] == "unchanged" and table.stain["B05"] == "" and table.stain["C01"] == "normalised"
    counts = tileset.meta["counts"]["stain"]
    assert counts["unchanged"] >= 1 and sum(counts.values()) == 35
    assert (read_rgb(tileset.folder / table.path["A03"])[0] == 255).all(), "a white tile passes through"
    saved = load_normaliser(tileset.folder / "stain.json")
    original = read_rgb(source / "C" / "C01.png")[0]
    expected, _ = saved.transform(original[None].transpose(0, 3, 1, 2))
    assert np.array_equal(read_rgb(tileset.folder / table.path["C01"])[0], expected[0].transpose(1, 2, 0))
    if reference == "profile":
        assert (tileset.folder / "stain.json").read_bytes() == (tmp_path / "profile.json").read_bytes()
    elif reference == "train":
        assert len(tileset.meta["stain_fitted_on"]) == 6


def test_two_sources_share_a_set_and_a_published_protocol_splits_them(tmp_path):
    for name, shift in (("NCT-CRC-HE-100K", 0), ("CRC-VAL-HE-7K", 500)):
        for i, label in enumerate(("STR", "TUM")):
            (tmp_path / name / label).mkdir(parents=True)
            for k in range(8):
                Image.fromarray(stained(shift + 100 * i + k)).save(tmp_path / name / label / f"{label}{k}.png")
    copy = (tmp_path / "CRC-VAL-HE-7K" / "TUM" / "TUM2.png").read_bytes()
    (tmp_path / "NCT-CRC-HE-100K" / "TUM" / "TUM7.png").write_bytes(copy)
    sources = [tmp_path / "NCT-CRC-HE-100K", tmp_path / "CRC-VAL-HE-7K"]
    config = PrepareConfig(quality=PLAIN.quality, split=SplitConfig(protocol="nct-crc"), microns_per_pixel=0.5, size=24)
    tileset = prepare(sources, tmp_path / "out", config, workers=1)
    assert len(tileset.table) == 32 and tileset.table.id.is_unique
    assert ((tileset.table.origin == "CRC-VAL-HE-7K") == (tileset.table.split == "test")).all()
    assert (tileset.kept.split == "test").sum() == 16, "the published test is whole"
    lost = tileset.table[~tileset.table.kept]
    assert lost.origin.tolist() == ["NCT-CRC-HE-100K"] and lost.reason.str.startswith("copy").all()
    assert "nct-crc" in tileset.meta["split_protocol"]
    assert tileset.meta["microns_per_pixel"] == 1.0 and (tileset.kept.mpp == 1.0).all()
    with pytest.raises(DataError, match="given twice"):
        prepare([sources[0], sources[0] / "."], tmp_path / "other", config, workers=1)


def test_a_tile_set_is_a_source_and_keeps_what_it_says_of_its_tiles(source, tmp_path):
    first = prepare(source, tmp_path / "first", PrepareConfig(quality=PLAIN.quality, microns_per_pixel=0.25), workers=1)
    first.table["slide"] = "slide-" + first.table.patient
    TileSet.create(first.folder, first.table, first.classes, licence="CC BY 4.0", microns_per_pixel=0.25)
    second = prepare(first.folder, tmp_path / "second", PrepareConfig(quality=PLAIN.quality, size=24), workers=1)
    assert len(second.table) == 35 and (second.kept.slide == "slide-" + second.kept.patient).all()
    kept = first.table.set_index("id").loc[second.table.id]
    assert second.table.split.tolist() == kept.split.tolist(), "the split is taken over"
    assert second.meta["licence"] == "CC BY 4.0" and second.meta["microns_per_pixel"] == 0.5


def test_a_class_that_would_lose_its_training_tiles_is_an_error_and_the_measurements_stay(source, tmp_path):
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump({"classes": {"B": {"entropy_min": 7.9}}}))
    config = PrepareConfig(quality=QualityConfig(rules=str(rules)))
    with pytest.raises(DataError, match="leaves no training tile of class 'B'"):
        prepare(source, tmp_path / "out", config, workers=1, chunk=10)
    assert len(list((tmp_path / "out" / "preparing" / "read").iterdir())) == 4
    assert len(prepare(source, tmp_path / "out", PLAIN, workers=1, chunk=10).kept) == 35


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrepareConfig(size=3), "size is 3"),
        (PrepareConfig(stain="vahadan"), "vahadan"),
        (PrepareConfig(stain="macenko", stain_reference="nowhere"), "nowhere"),
        (PrepareConfig(stain_reference="nowhere"), "stain is none"),
        (PrepareConfig(quality=QualityConfig(rules="nowhere")), "nowhere"),
        (PrepareConfig(quality=QualityConfig(splits=("training",))), "training"),
        (PrepareConfig(split=SplitConfig(protocol="nct")), "protocol is 'nct'"),
        (PrepareConfig(split=SplitConfig(val=0.6, test=0.6)), "val=0.6"),
        (PrepareConfig(class_table="nowhere"), "nowhere"),
        (PrepareConfig(microns_per_pixel=-1), "microns_per_pixel"),
        (PrepareConfig(stain_tiles=0), "stain_tiles is 0"),
    ],
)
def test_settings_are_checked_before_anything_is_read(source, tmp_path, config, message):
    with pytest.raises(SettingError, match=message):
        prepare(source, tmp_path / "out", config, workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", ["nct-crc", "nct-crc-raw", "ham10000", "ebhi-seg"])
def test_presets_parse_against_the_verb(preset):
    app = cli.build_app()
    tokens = cli._take_config(app, ["tiles", "prepare", "a.zip", "b", "--config", f"prepare/{preset}"])
    command, bound, _ = app.parse_args(tokens, exit_on_error=False)
    assert command.__name__ == "prepare_" and bound.args == (Path("a.zip"), Path("b"))
    given = yaml.safe_load((Path(cli.__file__).parent / "presets" / "prepare" / f"{preset}.yaml").read_text())
    config = bound.arguments["config"]
    assert config.class_table == given["class_table"] and config.stain == given["stain"]
    assert config.quality.rules == given["quality"]["rules"]
    assert config.split.protocol == given.get("split", {}).get("protocol", "")


def test_the_verb_reports_and_an_interruption_exits_with_130(source, tmp_path, monkeypatch, capsys):
    arguments = ["tiles", "prepare", str(source), str(tmp_path / "out"), "--quality.rules", "none", "--workers", "1"]
    real = Source.rgb
    with monkeypatch.context() as patch:
        patch.setattr(Source, "rgb", lambda self, path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
    assert stopped.value.code == 130 and Source.rgb is real
    cli.main(arguments)
    shown = capsys.readouterr().out
    assert "unreadable" in shown and "train" in shown
    assert read_json(tmp_path / "out" / "tileset.json")["made_by"] == "prepare"


def test_a_dead_worker_and_an_interruption_are_clear_and_leave_no_process():
    with pytest.raises(RunError, match="A worker process ended without a word"):
        run_tasks(partial(os._exit, 3), [1], 2, print)

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(partial(partial, abs), range(100), 2, stop)
    done: list[int] = []
    run_tasks(partial(partial, abs), (-n for n in range(50)), 2, done.append)
    assert sorted(done) == list(range(50))


ORPHANS = """
import multiprocessing, threading, time
from functools import partial
from histosynth.core.pool import run_tasks
from histosynth.core.seeds import numpy_rng
def tell():
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.05)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
threading.Thread(target=tell, daemon=True).start()
run_tasks(partial(partial, time.sleep), [60, 60, 60], 2, print)
"""


def test_workers_die_with_a_killed_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"if __name__ == '__main__':\n    exec({ORPHANS!r})\n")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as parent:
        pids = [int(p) for p in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 2
    for _ in range(200):
        alive = [p for p in pids if Path(f"/proc/{p}").exists()] if sys.platform == "linux" else []
        if not alive:
            return
        time.sleep(0.05)
    pytest.fail(f"still running: {alive}")
