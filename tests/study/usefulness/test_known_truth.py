"""Where the truth is known, the experiment finds it: true tiles help, wrong labels hurt, copies add nothing.

More hospitals, with a figure: `python benchmarks/known_truth.py`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from histosynth.tiles.images import read_rgb
from histosynth.tiles.tileset import TileSet

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "known_truth.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("known_truth", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["known_truth"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["known_truth"]


def test_the_three_sets_are_what_they_are_called(benchmark, tmp_path):
    world = benchmark.World(train=2, test=2, made=2, patients=6, size=16)
    folders = benchmark.hospital(tmp_path, 3, world)
    real, fresh, shuffled, copies = (TileSet.open(path) for path in (tmp_path / "real", *folders))
    pixels = {
        one.folder.name: {row.sha256: row.label for row in one.kept.itertuples()}
        for one in (fresh, shuffled, copies)
    }  # fmt: skip
    train = real.rows("train")
    assert len(train) == 18 and set(real.kept.patient).isdisjoint(fresh.kept.patient)
    assert pixels["copies"] == {row.sha256: row.label for row in train.itertuples()}
    assert pixels["shuffled"].keys() == pixels["fresh"].keys()
    moved = [pixels["shuffled"][key] != label for key, label in pixels["fresh"].items()]
    assert np.mean(moved) > 0.5 and sorted(shuffled.kept.label) == sorted(fresh.kept.label)
    first = copies.kept.iloc[0]
    assert np.array_equal(read_rgb(copies.folder / first.path)[0], read_rgb(real.folder / train.path.iloc[0])[0])
    # after a stop, what is whole stays and what is not is made anew
    (fresh.folder / "tileset.json").unlink()
    assert benchmark.hospital(tmp_path, 3, world) == folders
    assert [TileSet.open(path).digest for path in folders] == [one.digest for one in (fresh, shuffled, copies)]
    before = (real.folder / "tileset.json").stat().st_mtime_ns
    benchmark.hospital(tmp_path, 3, world)
    assert (real.folder / "tileset.json").stat().st_mtime_ns == before


def test_table_and_figure_say_what_was_right(benchmark, tmp_path):
    row = {"mean": 0.05, "low": 0.02, "high": 0.08, "word": "helps"}
    found = {case: row | {"right": case == "fresh"} for case in benchmark.TRUTH}
    report = {"trials": {"7": found}, "hospitals": 1, "right": {c: int(c == "fresh") for c in benchmark.TRUTH}}
    table = benchmark.table(report)
    assert "fresh tiles of other patients: right in 1 of 1" in table and "labels shuffled: right in 0 of 1" in table
    benchmark.figure(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("hospital", [11, 12])
def test_the_experiment_can_tell(benchmark, tmp_path, hospital):
    report = benchmark.run([hospital], benchmark.SMALL, tmp_path)
    found = report["trials"][str(hospital)]
    assert found["fresh"]["word"] == "helps", found["fresh"]["sentence"]
    assert found["shuffled"]["word"] == "hurts", found["shuffled"]["sentence"]
    assert found["copies"]["word"] in ("no evidence", "no relevant difference"), found["copies"]["sentence"]
