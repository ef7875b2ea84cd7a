"""The experiment on disk: its files, resuming, workers, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from histosynth.core.errors import DataError, RunError, SettingError
from histosynth.study.usefulness import grid
from histosynth.study.usefulness.plan import SelectionConfig, UtilityConfig
from histosynth.study.usefulness.run import run_experiment, run_utility
from histosynth.tiles.tileset import TileSet
from tests.study.usefulness.conftest import CLASSES, SIZE, draw, made, write_set

TOY = {
    "per_class": (2, "all"),
    "seeds": 2,
    "steps": 3,
    "size": SIZE,
    "weights": "none",
    "workers": 1,
    "selection": SelectionConfig(encoder="colour"),
}
FEW = TOY | {"arms": ("real", "real_gan"), "per_class": ("all",)}


def run(world, out, **settings):
    synthetic = [world["gan"].folder, world["diffusion"].folder]
    return run_experiment(
        world["real"].folder,
        synthetic,
        UtilityConfig(out=out, external=(world["external"].folder,), **(TOY | settings)),
    )


def cells(out):
    """What every cell says, without the clock; and its predictions."""
    found = {}
    for path in sorted((out / "cells").glob("*.json")):
        said = json.loads(path.read_text())
        said.pop("seconds")
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as archive:
            found[path.stem] = said, dict(archive)
    return found


def same(first, second):
    assert first.keys() == second.keys()
    for key, (said, arrays) in first.items():
        assert said == second[key][0]
        assert all(np.array_equal(arrays[name], second[key][1][name]) for name in arrays)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    return run(world, tmp_path_factory.mktemp("utility") / "run")


def test_the_files_are_what_the_statistics_read(finished, world):
    plan = json.loads((finished / "plan.json").read_text())
    assert plan["classes"] == list(CLASSES) and plan["per_class"] == [2, 0] and plan["rare"] == ["C"]
    assert [s["name"] for s in plan["sets"]] == ["test", "external-1"] and plan["steps"] == 3
    assert {g["name"]: g["origin"]["kind"] for g in plan["generators"]} == {"gan": "nested", "diffusion": "nested"}
    assert plan["train_counts"] == {"A": 27, "B": 27, "C": 9} and plan["train_patients"] == 9
    for described in plan["sets"]:
        with np.load(finished / "sets" / f"{described['name']}.npz", allow_pickle=False) as archive:
            assert len(archive["y"]) == len(archive["ids"]) == described["tiles"]
            assert len(set(archive["groups"])) == described["patients"]
    found = cells(finished)
    assert len(found) == 2 * (2 * 9 + 2)
    for key, (said, arrays) in found.items():
        assert said["key"] == key and {"test", "external-1"} == set(arrays)
        assert arrays["test"].shape == (54, 3) and arrays["test"].dtype == np.float32
        arm = next(a for a in plan["arms"] if a["name"] == said["arm"])
        assert said["generator_saw_more"] == (said["n"] == 2 and bool(arm["generators"]))
        assert (said["kept"] is not None) == arm["selected"]
        real = 0 if not arm["real"] else said["n"] or plan["train_counts"]["C"]
        assert said["train_tiles"]["C"][0] == real
    assert found["real_all-n2-s50-r9898"][0]["train_tiles"]["A"] == [2, 20]
    assert found["real_gan_rare-n2-s50-r9898"][0]["train_tiles"] == {"A": [2, 0], "B": [2, 0], "C": [2, 12]}
    assert found["gan_only-n0-s100-r9898"][0]["share"] == 1.0


def test_what_classifiers_of_real_tiles_say_of_synthetic_ones(finished):
    extra = json.loads((finished / "extra.json").read_text())
    assert set(extra["trts"]) == {"gan", "diffusion", "real"} and extra["pairs"] == {}
    for name, tiles in (("gan", 36), ("diffusion", 24), ("real", 54)):
        one = extra["trts"][name]
        assert one["tiles"] == tiles and np.sum(one["confusion"]) == 2 * tiles
        shares = np.diag(one["confusion"]) / np.sum(one["confusion"], axis=1)
        assert one["per_class"] == pytest.approx(dict(zip(CLASSES, shares, strict=True)))
        assert one["label_consistency"] == pytest.approx(shares.mean())


def test_a_finished_experiment_is_not_repeated_and_a_missing_cell_is(finished, world, tmp_path, monkeypatch):
    out = shutil.copytree(finished, tmp_path / "run")
    wanted = cells(finished)
    trained = []
    monkeypatch.setattr(grid, "run_cell", lambda *a, _usual=grid.run_cell: (trained.append(a[0].key), _usual(*a))[1])
    run(world, out, margin=0.05, replicates=500)
    assert trained == []
    lost = ["gan_only-n0-s100-r9898", "real-n2-s0-r86984"]
    (out / "cells" / f"{lost[0]}.json").unlink()
    (out / "cells" / f"{lost[1]}.npz").unlink()
    (out / "judged" / "r9898.npz").unlink()
    run(world, out)
    assert sorted(trained) == sorted([*lost, "real_classical-n0-s0-r9898"])
    same(cells(out), wanted)


def test_a_failure_in_the_middle_keeps_whole_cells_and_the_same_command_goes_on(finished, world, tmp_path, monkeypatch):
    out = tmp_path / "broken"
    usual, left = grid.run_cell, [5]

    def fails(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        usual(*arguments)

    monkeypatch.setattr(grid, "run_cell", fails)
    with pytest.raises(KeyboardInterrupt):
        run(world, out)
    assert len(cells(out)) == 5 and not (out / "extra.json").exists()
    monkeypatch.undo()
    run(world, out)
    same(cells(out), cells(finished))


def test_other_settings_or_other_tiles_in_a_used_folder_are_refused(finished, world, tmp_path):
    for changed, message in (({"steps": 4}, "steps: 3 then, 4 now"), ({"shares": (0.25,)}, "shares")):
        with pytest.raises(RunError, match=message):
            run(world, finished, **changed)
    other = made(tmp_path / "gan", world["real"], seed=77)
    with pytest.raises(RunError, match="synthetic|digests"):
        run({**world, "gan": other}, finished)


@pytest.mark.parametrize("ray", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_results_do_not_depend_on_the_number_of_processes(world, tmp_path, ray):
    if ray:
        pytest.importorskip("ray")
    run(world, tmp_path / "one", **FEW)
    run(world, tmp_path / "two", **(FEW | {"workers": 2, "ray": ray}))
    same(cells(tmp_path / "one"), cells(tmp_path / "two"))


@pytest.mark.skipif(bool(__import__("importlib").util.find_spec("ray")), reason="ray is installed")
def test_ray_that_is_not_installed_is_named(world, tmp_path):
    with pytest.raises(SettingError, match=r"pip install 'histosynth\[ray\]'"):
        run(world, tmp_path / "out", **(FEW | {"ray": True}))


def test_a_leak_is_refused_before_the_folder_is_made(world, tmp_path):
    leaky = made(tmp_path / "leaky", world["real"], split="test")
    with pytest.raises(DataError, match="was trained on the test tiles"):
        run({**world, "gan": leaky}, tmp_path / "out")
    real, rng = world["real"], np.random.default_rng(0)
    stolen = np.array(real.array("test", size=SIZE).images[0]).transpose(1, 2, 0)[::-1]
    rows = [{"label": label, "generator": "gan"} for label in CLASSES]
    nested = {"training_data": real.array("train", size=SIZE).digest(), "size": SIZE}
    tiles = [stolen, draw("B", rng), draw("C", rng)]
    copied = write_set(tmp_path / "copied", rows, tiles, synthetic=True, generator="gan", **nested)
    with pytest.raises(DataError, match="1 of the tiles of GAN are among the test tiles"):
        run({**world, "gan": copied}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_origin_that_was_allowed_is_written_down(world, tmp_path):
    silent = made(tmp_path / "silent", None)
    out = run({**world, "gan": silent}, tmp_path / "out", **(FEW | {"allow_unknown_origin": True}))
    generators = json.loads((out / "plan.json").read_text())["generators"]
    assert [g["origin"]["kind"] for g in generators] == ["unknown", "nested"]
    assert "not recorded" in generators[0]["origin"]["words"]


def test_pairs_of_a_real_tile_and_the_tile_made_from_it(world, tmp_path):
    real, rng = world["real"], np.random.default_rng(0)
    parents = real.rows("train").groupby("label").head(4)
    rows = [{"label": r.label, "generator": "gan", "reference": r.id} for r in parents.itertuples()]
    nested = {"training_data": real.array("train", size=SIZE).digest(), "size": SIZE}
    tiles = [draw(r["label"], rng) for r in rows]
    twins = write_set(tmp_path / "twins", rows, tiles, synthetic=True, generator="gan", **nested)
    out = run({**world, "gan": twins}, tmp_path / "out", **FEW)
    pairs = json.loads((out / "extra.json").read_text())["pairs"]
    assert set(pairs) == {"gan"} and pairs["gan"]["pairs"] == 12 and pairs["gan"]["seeds"] == 2
    with np.load(out / "judged" / "r9898.npz") as one, np.load(out / "judged" / "r86984.npz") as two:
        train = [i for i in real.array("train", size=SIZE).ids if i in set(parents.id)]
        made_ids = TileSet.open(twins.folder).array(size=SIZE).ids
        parent = {i: r["reference"] for i, r in zip((r["id"] for r in rows), rows, strict=True)}
        rates = [
            np.mean([a["gan"][k].argmax() == a["gan parents"][train.index(parent[i])].argmax()
                     for k, i in enumerate(made_ids)])
            for a in (one, two)
        ]  # fmt: skip
    assert pairs["gan"]["pair_consistency"] == pytest.approx(np.mean(rates))


def test_sets_that_do_not_go_together_are_named(world, tmp_path):
    real, gan = world["real"].folder, world["gan"].folder
    config = UtilityConfig(out=tmp_path / "out", **FEW)
    with pytest.raises(SettingError, match="No synthetic"):
        run_experiment(real, [], config)
    with pytest.raises(SettingError, match="twice"):
        run_experiment(real, [gan, gan], config)
    with pytest.raises(DataError, match="not a tile set"):
        run_experiment(tmp_path, [gan], config)
    rng = np.random.default_rng(0)
    other = write_set(tmp_path / "x", [{"label": "Z", "generator": "g"}], [draw("A", rng)], classes=("Z",))
    with pytest.raises(DataError, match="has the classes Z"):
        run_experiment(real, [other.folder], config)


@pytest.mark.slow
def test_a_kill_in_the_middle_of_the_grid_leaves_whole_cells(finished, world, tmp_path):
    out = tmp_path / "killed"
    words = [
        sys.executable,
        "-m",
        "histosynth",
        "utility",
        *(str(world[n].folder) for n in ("real", "gan", "diffusion")),
    ]
    words += ["--external", str(world["external"].folder), "--per-class", "2", "--per-class", "all", "--seeds", "2"]
    words += ["--steps", "3", "--size", str(SIZE), "--weights", "none", "--workers", "2", "--out", str(out)]
    words += ["--selection.encoder", "colour"]
    process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 120
    while len(list((out / "cells").glob("*.json"))) < 4 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(3)  # its workers end by themselves
    done = cells(out)
    assert 4 <= len(done) < 32
    assert not [p for p in (out / "cells").glob("*.json") if not p.with_suffix(".npz").exists()]
    same(done, {key: value for key, value in cells(finished).items() if key in done})
    run(world, out)
    same(cells(out), cells(finished))


def test_tiles_of_an_external_set_cannot_stand_for_synthetic_ones(world, tmp_path):
    array = world["external"].array(size=SIZE)
    rows = [{"label": array.classes[label], "patient": f"new{k}"} for k, label in enumerate(array.labels)]
    stolen = write_set(tmp_path / "stolen", rows, [t.transpose(1, 2, 0) for t in np.asarray(array.images)])
    with pytest.raises(DataError, match="of the tiles of stolen are among the tiles of elsewhere"):
        run({**world, "gan": stolen}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copies_of_training_tiles_are_marked_where_few_real_tiles_are_given(world, tmp_path):
    train, rng = world["real"].array("train", size=SIZE), np.random.default_rng(99)
    rows = [{"label": train.classes[label], "patient": f"new{k}"} for k, label in enumerate(train.labels)]
    copies = write_set(tmp_path / "copies", rows, [t.transpose(1, 2, 0) for t in np.asarray(train.images)])
    rows = [{"label": label, "patient": f"new{k}"} for k in range(4) for label in CLASSES]
    fresh = write_set(tmp_path / "fresh", rows, [draw(row["label"], rng) for row in rows])
    config = UtilityConfig(out=tmp_path / "out", **(TOY | {"arms": ("real_copies", "real_fresh"), "seeds": 1}))
    out = run_experiment(world["real"].folder, [copies.folder, fresh.folder], config)
    marks = {(c["arm"], c["n"]): c["generator_saw_more"] for c, _ in cells(out).values()}
    assert marks["real_copies", 2] and not any(on for key, on in marks.items() if key != ("real_copies", 2))


def test_synthetic_tiles_of_one_class_have_no_arm_of_their_own(world, tmp_path):
    rng = np.random.default_rng(99)
    nested = {"training_data": world["real"].array("train", size=SIZE).digest(), "size": SIZE}
    rows = [{"label": "A", "generator": "gan"} for _ in range(4)]
    single = write_set(tmp_path / "single", rows, [draw("A", rng) for _ in rows], synthetic=True, **nested)
    config = UtilityConfig(out=tmp_path / "out", **(TOY | {"seeds": 1, "per_class": ("all",)}))
    out = run_experiment(world["real"].folder, [single.folder], config)
    plan = json.loads((out / "plan.json").read_text())
    assert [a["name"] for a in plan["arms"]] == [
        "real", "real_classical", "real_single", "real_single_selected", "real_single_rare",
    ]  # fmt: skip
    assert any("nothing can be trained on them alone" in note for note in plan["notes"])


def test_a_test_set_of_one_class_has_a_page(world, tmp_path):
    rng = np.random.default_rng(99)
    rows = [{"label": "A", "patient": f"new{k}"} for k in range(4)]
    single = write_set(tmp_path / "single", rows, [draw("A", rng) for _ in rows])
    config = UtilityConfig(out=tmp_path / "out", external=(single.folder,), replicates=100, **FEW)
    run_utility(world["real"].folder, [world["gan"].folder], config)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    own = [row for row in report["differences"] if row["set"] == "external-1"]
    assert {row["metric"] for row in own} >= {"balanced_accuracy", "ece"} and all(
        row["metric"] != "auroc" for row in own
    )


def test_unusual_minutes_and_tile_sets_of_one_name(world, tmp_path):
    with pytest.raises(SettingError, match="'mobilnet-v2'.*mobilenet-v2"):
        run(world, tmp_path / "out", classifier="mobilnet-v2")
    for minutes in (float("nan"), float("inf"), 0.0):
        with pytest.raises(SettingError, match="minutes"):
            UtilityConfig(minutes=minutes)
    sets = [made(tmp_path / side / "tiles", world["real"], seed=k, count=4) for k, side in enumerate("ab")]
    again = made(tmp_path / "c" / "tiles", world["real"], seed=9, count=4)
    config = UtilityConfig(out=tmp_path / "out", **(FEW | {"seeds": 1, "arms": ("real_gan",)}))
    run_experiment(world["real"].folder, [one.folder for one in sets], config)
    shutil.rmtree(sets[0].folder)
    shutil.copytree(again.folder, sets[0].folder)
    with pytest.raises(RunError, match="digests"):
        run_experiment(world["real"].folder, [one.folder for one in sets], config)


def test_tiles_without_patients_are_named(world, tmp_path):
    rng = np.random.default_rng(98)
    rows = [
        {"label": label, "split": split} for split in ("train", "val", "test") for label in CLASSES for _ in "12345"
    ]
    words = "by group of near-duplicate tiles, because no patients were given: scores may be too good"
    real = write_set(tmp_path / "real", rows, [draw(r["label"], rng) for r in rows], split_protocol=words)
    loose = [{"label": label} for label in CLASSES]
    other = write_set(tmp_path / "loose", loose, [draw(r["label"], rng) for r in loose])
    config = UtilityConfig(out=tmp_path / "out", external=(other.folder,), **(FEW | {"seeds": 1}))
    out = run_experiment(real.folder, [made(tmp_path / "gan", real).folder], config)
    notes = json.loads((out / "plan.json").read_text())["notes"]
    assert "45 tiles of real have no patient: whether one is on two sides is not known, and they count as one." in notes
    assert "3 tiles of loose have no patient: whether training saw theirs is not known, and they count as one." in notes
    assert f"real was split {words}." in notes
