"""The words follow the intervals, only the primary comparison gives a verdict, and the made-up effects are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from histosynth.core.errors import DataError, SettingError
from histosynth.core.files import read_json, write_json
from histosynth.study.replicates import Replicated, draw
from histosynth.study.usefulness.assess import assess
from histosynth.study.usefulness.curves import readable, worth
from tests.study.usefulness.contract import CLASSES, RARE, made_up

REPLICATES = 300


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """A GAN whose tiles do nothing and a diffusion model whose tiles help, rare classes most of all."""
    out = tmp_path_factory.mktemp("experiment")
    gains = {"gan": 0.0, "diffusion": 0.4}
    made_up(out, gains, numbers=(5, 20, 0), shares=(0.3, 0.6), external=True, rare_gain=0.3)
    return assess(out, seed=1, replicates=REPLICATES) | {"out": out}


def test_the_verdict_is_taken_at_all_tiles_and_the_share_nearest_to_a_half(found):
    assert found["primary"] == {
        "test": "test", "n": 0, "share": 0.6, "baseline": "real_classical", "metric": "balanced_accuracy",
    }  # fmt: skip
    gan, diffusion = found["verdicts"]
    assert gan["generator"] == "gan" and gan["word"] in ("no evidence", "no relevant difference")
    assert diffusion["word"] == "helps" and diffusion["low"] > 0 and diffusion["sentence"].startswith("DIFFUSION helps")
    json.dumps({k: v for k, v in found.items() if k != "out"}, allow_nan=False)


def test_scores_and_differences_are_those_of_the_logits(found):
    out = found["out"]
    y = np.load(out / "sets" / "test.npz")["y"]

    def by_hand(arm: str, n: int, share: int) -> list[float]:
        files = [out / "cells" / f"{arm}-n{n}-s{share}-r{seed}.npz" for seed in found["seeds"]]
        return [balanced_accuracy_score(y, np.load(f)["test"].argmax(axis=1)) for f in files]

    baseline, arm = by_hand("real_classical", 5, 0), by_hand("real_diffusion", 5, 30)
    wanted = {"arm": "real_diffusion", "n": 5, "share": 0.3, "set": "test"}
    score = next(r for r in found["scores"] if wanted.items() <= r.items())
    assert score["per_seed"]["balanced_accuracy"] == pytest.approx(arm)
    assert score["train_tiles"]["HGIN"] == [5.0, 120.0] and score["generator_saw_more"]
    recalls = [score["recall"][label]["mean"] for label in RARE]
    assert score["scores"]["rare_recall"]["mean"] == pytest.approx(np.mean(recalls))
    wanted |= {"metric": "balanced_accuracy", "against": "real_classical"}
    row = next(r for r in found["differences"] if wanted.items() <= r.items())
    assert row["mean"] == pytest.approx(np.mean(arm) - np.mean(baseline))
    assert row["low"] < row["mean"] < row["high"] and row["seeds"] == 3 and row["patients"] == 40


def test_every_secondary_comparison_is_adjusted_for_its_family(found):
    families = {}
    for row in found["differences"]:
        families.setdefault(row["family"], []).append(row)
    assert len(families["primary"]) == 2 and len(families["classes"]) == 2 * len(CLASSES)
    assert len(families["scores"]) == 2 * 4 and len(families["sets"]) == 2
    # 3 numbers x 2 shares x (two generators, both, two selected), two arms of synthetic tiles, less two primary ones
    assert len(families["conditions"]) == 3 * 2 * 5 + 2 - 2
    for name, rows in families.items():
        for row in rows:
            if name is None:
                assert row["p"] is None and row["p_adjusted"] is None
            else:
                assert row["p_adjusted"] >= row["p"] and row["looks"] == (1 if name == "primary" else len(rows))
    assert {r["against"] for r in families[None]} == {"real", "real_classical"}
    assert found["gains"]["diffusion"]["better"] and not found["gains"]["gan"]["better"]
    assert not found["gains"]["diffusion"]["worse"]


def test_tiles_that_hurt_are_found_to_hurt(tmp_path):
    made_up(tmp_path, {"gan": -0.6}, numbers=(0,), saw_more=False)
    found = assess(tmp_path, seed=0, replicates=REPLICATES)
    assert found["verdicts"][0]["word"] == "hurts"
    assert not any("learned from more" in c["text"] for c in found["cautions"])
    assert "one point" in found["worth"]["reason"]


def test_without_all_real_tiles_the_largest_number_decides_and_that_is_said(tmp_path):
    made_up(tmp_path, {"gan": 0.2}, numbers=(5, 20))
    found = assess(tmp_path, seed=0, replicates=REPLICATES)
    assert found["primary"]["n"] == 20 and found["verdicts"][0]["generator_saw_more"]
    assert (
        found["cautions"][0]["severity"] == "strong" and "learned from more real tiles" in found["cautions"][0]["text"]
    )


def test_a_seed_with_a_missing_cell_is_left_out_and_named(tmp_path):
    made_up(tmp_path, {"gan": 0.2}, numbers=(5, 0))
    (tmp_path / "cells" / "real_gan-n0-s50-r8.json").unlink()
    found = assess(tmp_path, seed=0, replicates=REPLICATES)
    assert found["seeds"] == [3, 11] and any("seed 8" in c["text"] for c in found["cautions"])
    for path in (tmp_path / "cells").glob("real_gan-n0-*.json"):
        path.unlink()
    assert assess(tmp_path, seed=0, replicates=REPLICATES)["verdicts"] == []  # nobody has run what decides
    for path in (tmp_path / "cells").glob("*.json"):
        path.unlink()
    with pytest.raises(DataError, match="no finished cell"):
        assess(tmp_path, seed=0)


def test_damaged_files_are_named(tmp_path):
    made_up(tmp_path, {"gan": 0.2}, numbers=(0,))
    cell = tmp_path / "cells" / "real-n0-s0-r3.npz"
    whole = cell.read_bytes()
    cell.write_bytes(whole[:100])
    with pytest.raises(DataError, match=r"real-n0-s0-r3\.npz cannot be read"):
        assess(tmp_path, seed=0, replicates=REPLICATES)
    np.savez(cell, test=np.full((320, 6), np.nan))
    with pytest.raises(DataError, match=r"real-n0-s0-r3\.npz has logits .* all finite"):
        assess(tmp_path, seed=0, replicates=REPLICATES)
    cell.write_bytes(whole)
    with pytest.raises(SettingError, match="margin is -1"):
        assess(tmp_path, seed=0, margin=-1)
    with pytest.raises(DataError, match=r"plan\.json does not exist"):
        assess(tmp_path / "elsewhere", seed=0)


def test_the_same_seed_gives_the_same_result_and_cautions_tell_of_what_is_weak(tmp_path):
    plan = made_up(tmp_path, {"gan": 0.2}, numbers=(0,), patients=4, per_patient=12, seeds=(1, 2))
    plan["generators"][0]["origin"] = {"kind": "unknown", "words": "nobody says"}
    plan["notes"] = ["Provenance was not checked."]
    write_json(tmp_path / "plan.json", plan)
    cell = tmp_path / "cells" / "real-n0-s0-r1.json"
    write_json(cell, read_json(cell) | {"notes": ["Temperature could not be fitted."]})
    first, again = (assess(tmp_path, seed=4, replicates=REPLICATES) for _ in range(2))
    assert first == again
    assert first["verdicts"] != assess(tmp_path, seed=5, replicates=REPLICATES)["verdicts"]
    said = " ".join(f"{c['severity']}: {c['text']}" for c in first["cautions"])
    for words in ("strong: The origin of GAN is not known", "strong: Test patients has 4 patients", "warning: 2 seeds",
                  "warning: Provenance", "note: Temperature"):  # fmt: skip
        assert words in said
    severities = [c["severity"] for c in first["cautions"]]
    assert severities == sorted(severities, key=["strong", "warning", "note"].index)


def test_what_tiles_are_worth_is_read_off_the_baselines_curve(rng):
    groups, runs = np.repeat(np.arange(20), 3), 3
    draws = draw(groups, runs, 400, rng)

    def score(mean: float) -> Replicated:
        return Replicated(np.full(runs, mean), mean + rng.normal(0, 0.01, (400, runs)))

    curve = [score(m) for m in (0.5, 0.6, 0.7, 0.8)]
    rows = worth((5, 10, 20, 40), curve, {"same": (5, score(0.5)), "double": (5, score(0.6)), "more": (20, score(0.9)),
                                          "middle": (10, score(0.65))}, draws)  # fmt: skip
    same, double, more, middle = rows
    assert double["tiles"] == pytest.approx(5) and double["low"] < 5 < double["high"] and double["off"] == ""
    assert middle["tiles"] == pytest.approx(np.sqrt(200) - 10)
    assert same["tiles"] == pytest.approx(0) and same["low_off"] == "below"
    assert more["tiles"] == pytest.approx(20) and more["off"] == "above" and more["high_off"] == "above"


def test_which_curves_can_be_read():
    assert readable([0.5, 0.6, 0.595, 0.7], 0.02) == ""
    assert "falls" in readable([0.5, 0.6, 0.55, 0.7], 0.02)
    assert "less than 2 points" in readable([0.5, 0.51], 0.02)


def test_a_folder_of_cells_that_the_plan_does_not_name_is_refused(tmp_path: Path):
    plan = made_up(tmp_path, {"gan": 0.2}, numbers=(0,))
    plan["arms"] = [a for a in plan["arms"] if a["name"] != "gan_only"]
    write_json(tmp_path / "plan.json", plan)
    with pytest.raises(DataError, match="gan_only"):
        assess(tmp_path, seed=0)


def test_a_class_of_few_patients_is_described_and_never_called_better(found, tmp_path):
    out = tmp_path / "few"
    shutil.copytree(found["out"], out)
    assert "SERRATED" in found["gains"]["diffusion"]["better"]
    with np.load(out / "sets" / "test.npz") as archive:
        arrays = dict(archive)
    own = np.flatnonzero(arrays["y"] == CLASSES.index("SERRATED"))
    arrays["groups"][own] = np.where(np.arange(len(own)) % 2, "test-00", "test-01")
    np.savez(out / "sets" / "test.npz", **arrays)
    few = assess(out, seed=1, replicates=REPLICATES)
    rows = [r for r in few["differences"] if r["class"] == "SERRATED" and r["family"] == "classes"]
    assert rows and all(r["p"] is None and r["p_adjusted"] is None for r in rows)
    assert few["gains"]["diffusion"]["looks"] == 2 * (len(CLASSES) - 1), "what has no p-value is no look"
    assert "SERRATED" not in few["gains"]["diffusion"]["better"]
    assert any("SERRATED are of 2 patients only" in c["text"] for c in few["cautions"])
    assert not any("patients only. A change of its recall" in c["text"] for c in found["cautions"])
