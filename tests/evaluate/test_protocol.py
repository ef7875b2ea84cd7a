"""The composition: equal N, floors, classes, and answers that JSON can hold."""

import json

import numpy as np
import pytest

from histosynth.core.errors import DataError, SettingError
from histosynth.evaluate import METRICS, Protocol, judge
from histosynth.evaluate import protocol as protocol_module
from histosynth.evaluate.settings import Metric

CLASSES = ("ADI", "LYM", "TUM")
QUICK = Protocol(replicates=6, kid_subsets=20, min_per_class=15)


def tissue(counts, seed, shift=0.0):
    """Features [N, 6] that depend on the class, and labels, in random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return rng.normal(size=(len(labels), 6)) + 3 * np.eye(6)[labels] + shift, labels


def run(train=(60, 40, 50), test=(30, 20, 25), synthetic=(50, 50, 50), shift=0.0, **changes):
    (a, la), (b, lb), (c, lc) = tissue(train, 1), tissue(test, 2), tissue(synthetic, 3, shift)
    settings = {"classes": CLASSES, "encoder": "none", "protocol": QUICK, "seed": 0} | changes
    return judge(a, b, c, la, lb, lc, **settings)[0]


def test_every_score_has_n_interval_and_floor():
    report = run()
    assert report["all"]["n"] == 75
    assert set(report["all"]["scores"]) == {
        "frechet", "kid", "precision", "recall", "density", "coverage", "vendi_ratio", "spread_ratio",
    }  # fmt: skip
    for block in (report["all"], *report["per_class"].values()):
        for score in block["scores"].values():
            assert score["low"] <= score["value"] <= score["high"]
            assert score["floor_low"] <= score["floor"] <= score["floor_high"]
            assert score["n"] == block["n"] and score["better"] in ("lower", "higher", "near one")
    assert report["per_class"]["LYM"]["n"] == 20
    assert report["encoder"] == "none" and report["protocol"]["k"] == 5
    json.dumps(report, allow_nan=False)


def test_both_sides_have_equal_n_and_the_same_mix(monkeypatch):
    seen = []

    def spy(reference, other, protocol, seed):
        seen.append((len(reference), len(other)))
        return {"spy": 0.0}

    monkeypatch.setattr(protocol_module.METRICS, "load", lambda name: Metric(spy, {"spy": "lower"}))
    run(
        train=(60, 40, 5), test=(30, 20, 25), synthetic=(500, 10, 50), protocol=Protocol(metrics=("frechet",))
    )  # fmt: skip
    # the whole set, and ADI, each against synthetic and against train; LYM and TUM have too few
    assert seen == [(45, 45), (45, 45), (30, 30), (30, 30)]


def test_a_shifted_set_is_worse_than_its_floor():
    good, bad = run()["all"]["scores"], run(shift=1.0)["all"]["scores"]
    assert bad["frechet"]["low"] > bad["frechet"]["floor_high"]
    assert bad["kid"]["value"] > bad["kid"]["floor_high"]
    assert bad["coverage"]["value"] < bad["coverage"]["floor"]
    assert good["frechet"]["low"] <= good["frechet"]["floor_high"]
    assert good["frechet"]["floor"] == bad["frechet"]["floor"]


def test_same_seed_same_report():
    assert run() == run()
    assert run(train=(200, 200, 200), seed=1) != run(train=(200, 200, 200), seed=2)


def test_a_class_missing_on_one_side_is_named():
    report = run(synthetic=(50, 0, 50))
    assert report["per_class"]["LYM"] == {"n": 0, "reason": "0 tiles on the smallest side, fewer than 15", "scores": {}}
    assert any("no synthetic tile of LYM" in w for w in report["warnings"])
    with pytest.raises(DataError, match="No class"):
        run(train=(9, 0, 0), synthetic=(0, 9, 0))


def test_two_tiles_only_give_reasons_not_numbers():
    report = run(train=(2, 0, 0), test=(2, 0, 0), synthetic=(2, 0, 0))
    assert report["all"]["scores"] == {} and "fewer than 4" in report["all"]["reason"]
    report = run(train=(5, 0, 0), test=(5, 0, 0), synthetic=(5, 0, 0))
    assert report["all"]["scores"]["coverage"]["value"] is None
    assert "5 neighbours" in report["all"]["scores"]["coverage"]["reason"]
    assert report["all"]["scores"]["frechet"]["value"] is not None
    json.dumps(report, allow_nan=False)


def test_few_tiles_for_the_dimensions_are_a_warning():
    assert any("biased upwards" in w for w in run(test=(3, 3, 3))["warnings"])
    assert not run()["warnings"]


def test_images_add_colour_and_pixel_copies():
    rng = np.random.default_rng(0)
    images = {
        side: rng.integers(0, 256, (n, 3, 16, 16), dtype=np.uint8)
        for side, n in (("train_images", 150), ("test_images", 75), ("synthetic_images", 150))
    }
    images["synthetic_images"] = images["synthetic_images"] // 2
    report = run(**images)
    assert report["colour"]["synthetic"]["od_red_w1"] > 10 * report["colour"]["floor"]["od_red_w1"]
    assert report["copies"]["pixel_equal"] == 0
    json.dumps(report, allow_nan=False)
    assert "pixel_equal" not in run()["copies"] and run()["colour"] is None


def test_refuses_wrong_input():
    (a, la), (b, lb) = tissue((9, 9, 9), 1), tissue((9, 9, 9), 2)
    settings = {"classes": CLASSES, "encoder": "none", "protocol": QUICK}
    with pytest.raises(DataError, match="different dimensions"):
        judge(a, b[:, :4], a, la, lb, la, **settings)
    with pytest.raises(DataError, match="synthetic labels"):
        judge(a, b, a, la, lb, la[:-1], **settings)
    with pytest.raises(DataError, match="run from 0 to 2"):
        judge(a, b, a, la, lb, la, **(settings | {"classes": CLASSES[:2]}))
    with pytest.raises(SettingError, match="frechet"):
        run(protocol=Protocol(metrics=("frechte",)))
    bad = a.copy()
    bad[3] = np.inf
    with pytest.raises(DataError, match=r"train features are not finite .*\(3\)"):
        judge(bad, b, a, la, lb, la, **settings)


def test_every_metric_of_the_table_keeps_the_contract():
    a, _ = tissue((30, 30, 30), 1)
    b, _ = tissue((30, 30, 30), 2)
    for name in METRICS.names():
        metric = METRICS.load(name)
        got = metric.measure(a, b, QUICK, 0)
        assert metric.better.keys() <= got.keys()
        assert all(isinstance(v, float) and np.isfinite(v) for v in got.values())
        assert got == metric.measure(a, b, QUICK, 0)
