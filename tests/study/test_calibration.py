"""The verb calibrate: fitted on one split, measured on others, the same again, and a page that says what was found."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from histosynth.classify.calibration import Conformal, dice, ece, load_calibrator, nll, softmax
from histosynth.classify.predictions import Predictions, read_predictions, write_predictions
from histosynth.cli import main
from histosynth.core.errors import DataError, SettingError
from histosynth.core.seeds import derive
from histosynth.study.calibration.run import CalibrateConfig, calibrate_predictions

CLASSES = ("ADI", "<MUC>", "STR", "TUM")


def _predictions(sureness=2.0, splits=(("val", 15, 30), ("test", 25, 30), ("external", 6, 30)), shift=1.5, seed=0):
    rng = np.random.default_rng(seed)
    parts = []
    for name, patients, tiles in splits:
        n, groups = patients * tiles, np.repeat([f"{name}-{i}" for i in range(patients)], tiles)
        logits = 1.5 * rng.normal(size=(n, 4))
        y = (softmax(logits).cumsum(1) < rng.random((n, 1))).sum(1).clip(0, 3)
        seen = sureness * logits + (shift * rng.normal(size=(n, 4)) if name == "external" else 0)
        parts.append((np.full(n, name), y, seen, groups))
    split, y, logits, groups = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Predictions(split, np.array([f"{i}.png" for i in range(len(y))]), y, logits, CLASSES, groups)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrate")
    write_predictions(folder / "predictions.csv", _predictions())
    main(["calibrate", str(folder / "predictions.csv"), str(folder / "out"), "--replicates", "100"])
    return folder


def test_numbers_are_of_splits_that_were_not_fitted_on(made):
    report = json.loads((made / "out" / "calibration.json").read_text())
    predictions = read_predictions(made / "predictions.csv")
    assert [(n, s["fitted"]) for n, s in report["splits"].items()] == [
        ("test", False), ("external", False), ("val", True),
    ]  # fmt: skip
    for kind in ("temperature", "vector", "isotonic"):
        calibrator, classes = load_calibrator(made / "out" / "calibrators" / f"{kind}.json")
        assert classes == CLASSES
        again = type(calibrator).fit(predictions.of("val").logits, predictions.of("val").y)
        for name in ("test", "external"):
            part, found = predictions.of(name), report["splits"][name]["measures"][kind]
            assert found["ece"]["value"] == pytest.approx(ece(calibrator(part.logits), part.y))
            assert found["nll"]["value"] == pytest.approx(nll(again(part.logits), part.y))
    test = report["splits"]["test"]
    assert 1.6 < report["calibrators"]["temperature"]["temperature"] < 2.4 and report["chosen"] == "temperature"
    assert test["differences"]["temperature"]["ece_debiased"]["high"] < 0
    assert test["patients"] == 25 and sum(test["counts"].values()) == 750


def test_conformal_sets_are_those_of_the_saved_rules(made):
    saved = json.loads((made / "out" / "conformal.json").read_text())
    report = json.loads((made / "out" / "calibration.json").read_text())
    part = read_predictions(made / "predictions.csv").of("test")
    calibrator, _ = load_calibrator(made / "out" / "calibrators" / "temperature.json")
    u = dice(derive(0, "use"), part.paths.tolist())
    assert len(saved["rules"]) == 6 and saved["classes"] == list(CLASSES)
    for name, rule in saved["rules"].items():
        sets = Conformal.from_json(rule).sets(calibrator(part.logits), u)
        found = report["splits"]["test"]["conformal"][name]
        assert found["coverage"]["value"] == pytest.approx(sets[np.arange(750), part.y].mean())
        assert found["coverage"]["value"] == pytest.approx(0.9, abs=0.06)
    external = report["splits"]["external"]["conformal"]["lac"]["coverage"]["value"]
    assert external < report["splits"]["test"]["conformal"]["lac"]["coverage"]["value"] - 0.03  # the shift is seen


def test_the_page_says_what_was_found(made):
    page = (made / "out" / "calibration.html").read_text()
    assert "&lt;MUC&gt;" in page and "<MUC>" not in page
    assert "It lowers the calibration error on test" in page and "too sure" in page
    assert "histosynth calibrate " in page and "--replicates 100" in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page), "nothing is fetched"
    names = {p.name for p in (made / "out").glob("*.png")}
    assert names == {
        f"reliability-{s}-{k}.png"
        for s in ("test", "external")
        for k in ("none", "temperature", "vector", "isotonic")
    }  # fmt: skip
    assert (made / "out" / "reliability-test-none.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_same_again_and_in_another_order(made, tmp_path):
    first = json.loads((made / "out" / "calibration.json").read_text())
    p = _predictions()
    order = np.random.default_rng(1).permutation(len(p))
    order = order[np.argsort(p.split[order] != "val", kind="stable")]
    shuffled = Predictions(p.split[order], p.paths[order], p.y[order], p.logits[order], CLASSES, p.patients[order])
    calibrate_predictions(shuffled, tmp_path, CalibrateConfig(replicates=100))
    second = json.loads((tmp_path / "calibration.json").read_text())
    for kind, measures in first["splits"]["test"]["measures"].items():
        for name, row in measures.items():
            assert second["splits"]["test"]["measures"][kind][name] == pytest.approx(row, abs=1e-6), (kind, name)
    assert second["splits"]["test"]["conformal"]["aps"]["sizes"] == first["splits"]["test"]["conformal"]["aps"]["sizes"]


def test_a_calibrated_network_is_left_alone(tmp_path):
    calm = _predictions(sureness=1.0, splits=(("val", 15, 20), ("test", 10, 20)), seed=3)
    calibrate_predictions(calm, tmp_path, CalibrateConfig(replicates=100))
    report = json.loads((tmp_path / "calibration.json").read_text())
    assert report["chosen"] == "none" and "No calibrator is clearly better" in report["sentence"]
    assert report["fit"]["cross_validated_nll"]["isotonic"] > report["fit"]["cross_validated_nll"]["none"]


def test_a_patient_on_both_sides_is_refused(tmp_path):
    p = _predictions()
    patients = p.patients.copy()
    patients[p.split == "test"] = np.where(patients[p.split == "test"] == "test-3", "val-2", "other")
    leaked = Predictions(p.split, p.paths, p.y, p.logits, CLASSES, patients)
    with pytest.raises(DataError, match="'val' and 'test' share 1 of their patients: val-2"):
        calibrate_predictions(leaked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_fitted_or_measured_is_refused(tmp_path):
    p = _predictions(splits=(("val", 2, 8), ("test", 2, 20)))
    with pytest.raises(DataError, match="16 tiles"):
        calibrate_predictions(p, tmp_path)
    with pytest.raises(DataError, match="another split"):
        calibrate_predictions(p.of("test"), tmp_path, CalibrateConfig(fit="test"))
    with pytest.raises(DataError, match="'valid'.*val, test"):
        calibrate_predictions(p, tmp_path, CalibrateConfig(fit="valid"))
    for bad in ({"fit": "train"}, {"alpha": 0}, {"bins": 0}, {"replicates": 1}, {"level": 1}):
        with pytest.raises(SettingError, match=next(iter(bad))):
            CalibrateConfig(**bad)
    assert list(tmp_path.iterdir()) == []


def test_few_tiles_without_patients_are_said_to_be_few(tmp_path):
    p = _predictions(splits=(("val", 3, 8), ("test", 2, 20), ("train", 1, 5)))
    alone = Predictions(p.split, p.paths, p.y, p.logits, CLASSES)
    calibrate_predictions(alone, tmp_path, CalibrateConfig(alpha=0.02, replicates=50))
    report = json.loads((tmp_path / "calibration.json").read_text())
    notes = " ".join(report["notes"] + report["splits"]["test"]["notes"])
    for words in (
        "too small to choose",
        "every set holds all classes",
        "No patients are given",
        "fewer than 100",
        "train is left out",
    ):
        assert words in notes
    assert list(report["splits"]) == ["test", "val"]
    assert report["splits"]["test"]["conformal"]["aps"]["coverage"]["value"] == 1
    assert report["conformal"]["rules"]["aps"]["limits"] == [None] * 4
