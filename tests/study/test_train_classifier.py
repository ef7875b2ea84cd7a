"""`histosynth train classifier` as a user runs it: what it writes is true of the saved file; repeating; presets."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

import histosynth.study.classifier as verb
from histosynth.classify.config import ClassifierConfig, TrainClassifierConfig
from histosynth.classify.fit import load
from histosynth.classify.predictions import read_predictions
from histosynth.classify.scores import scores
from histosynth.cli import _config_path, main
from histosynth.core.errors import RunError
from histosynth.study.classifier import learning_curve, run_training, score
from histosynth.tiles.simulate import PhantomConfig, simulate
from histosynth.tiles.tileset import TileSet

_QUICK = TrainClassifierConfig(
    classifier=ClassifierConfig(steps=6, batch=9, width=0.25, val_every=3), size=32, replicates=50, device="cpu"
)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return simulate(
        tmp_path_factory.mktemp("tiles") / "set", PhantomConfig(per_class=12, patients=9, size=32, val=0.3, test=0.3)
    )


@pytest.fixture(scope="module")
def trained(tiles, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, run_training(tiles.folder, out, _QUICK)


def test_everything_is_written_and_true_of_the_saved_file(tiles, trained):
    out, found = trained
    names = {p.name for p in out.iterdir()}
    assert {"predictions.csv", "confusion.png", "confusion-val.png", "learning-curve.png", "metrics.csv"} <= names
    model = load(out / "checkpoints" / "classifier.safetensors", device="cpu")
    test = tiles.array("test", size=32)
    probs = model.probabilities(np.asarray(test.images)).numpy()
    assert found["test"]["confusion"] == scores(probs, test.labels, tiles.classes)["confusion"]
    written = read_predictions(out / "predictions.csv")
    part = written.of("test")
    np.testing.assert_allclose(part.logits, model.logits(np.asarray(test.images)).numpy(), atol=1e-5)
    assert written.splits == ("val", "test") and part.patients is not None
    assert all((tiles.folder / path).is_file() for path in part.paths)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["results"]["test"]["tiles"] == len(test)
    low, high = found["test"]["intervals"]["balanced_accuracy"]
    assert low <= found["test"]["balanced_accuracy"] <= high
    card = model.card
    assert card["data"] == tiles.digest and str(tiles.folder) not in json.dumps(card)
    assert not (out / "state" / "state.safetensors").exists()
    rows = (out / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,loss,lr,val_loss") and [r.split(",")[0] for r in rows[1:]] == ["3", "6"]
    # simulated tiles never start from weights of the same simulator
    assert model.initialisation == "scratch" and card["config"]["weights"] == "none"


def test_a_finished_run_is_scored_again_and_another_is_refused(tiles, trained, monkeypatch):
    out, found = trained
    monkeypatch.setattr(verb, "fit", lambda *_, **__: pytest.fail("it was trained again"))
    assert run_training(tiles.folder, out, _QUICK) == found
    with pytest.raises(RunError, match="other settings"):
        run_training(tiles.folder, out, replace(_QUICK, seed=1))


def test_a_probe_too(tiles, tmp_path):
    out = tmp_path / "probe"
    main(["train", "classifier", str(tiles.folder), str(out), "--kind", "linear:colour", "--size", "32"])
    assert load(out / "checkpoints" / "classifier.safetensors").card["probe"] == "linear"
    assert not (out / "learning-curve.png").exists()
    assert json.loads((out / "manifest.json").read_text())["results"]["test"]["balanced_accuracy"] > 0.3


def test_a_missing_test_is_no_error(tiles, tmp_path):
    rows = tiles.table[tiles.table.split != "test"]
    for path in rows.path:
        (tmp_path / "set" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / path).write_bytes((tiles.folder / path).read_bytes())
    part = TileSet.create(tmp_path / "set", rows, tiles.classes, made_by="test")
    assert list(run_training(part.folder, tmp_path / "run", _QUICK)) == ["val"]


def test_intervals_need_patients_and_flawless_scores_hold():
    from histosynth.classify.predictions import Predictions

    y = np.arange(30) % 3
    part = Predictions(
        np.repeat("test", 30), [f"{i}.png" for i in range(30)], y, 9 * np.eye(3)[y], ("a", "b", "c"), ["one"] * 30
    )
    found = score(part, 1.0, seed=0, replicates=20)
    assert found["balanced_accuracy"] == 1 and found["patients"] == 1
    assert found["intervals"]["balanced_accuracy"] == [None, None]


def test_the_number_of_threads_changes_nothing(tiles, tmp_path):
    before = torch.get_num_threads()
    images = np.asarray(tiles.array("test", size=32).images)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = tmp_path / str(threads)
            run_training(tiles.folder, out, _QUICK)
            assert torch.get_num_threads() == threads
            found.append(load(out / "checkpoints" / "classifier.safetensors", device="cpu").card)
            found[-1]["logits"] = read_predictions(out / "predictions.csv").logits
    finally:
        torch.set_num_threads(before)
    assert len(images) and np.array_equal(found[0]["logits"], found[1]["logits"])


def test_a_curve_of_one_step_can_be_drawn(tmp_path):
    learning_curve([{"step": 1, "loss": 1.0, "lr": 0.1}], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[1:4] == b"PNG"


def test_the_preset_has_the_values_of_the_first_proof_of_concept(tiles, tmp_path):
    given = yaml.safe_load(_config_path("classify/poc-mobilenet-v2").read_text())
    config = ClassifierConfig(**given.pop("classifier"))
    assert TrainClassifierConfig(classifier=config, **given).kind == "mobilenet-v2"
    assert (config.width, config.depth, config.dropout, config.weights) == (1.0, 1.0, 0.4, "imagenet")
    per_epoch = config.length(10**6, 9) // config.epochs
    assert per_epoch == 300 * 9 / 4 == config.val_every and config.epochs == 15
    assert config.freeze == 2 * per_epoch and config.swa_from == 9 * per_epoch
    assert (config.patience, config.patience_from, config.overfit, config.clip) == (6, 3, 5, 5.0)
    words = ["--config", "classify/poc-mobilenet-v2", "--size", "32", "--classifier.epochs", "1"]
    words += ["--classifier.samples-per-class", "2", "--classifier.weights", "none", "--classifier.val-every", "3"]
    main(["train", "classifier", str(tiles.folder), str(tmp_path / "run"), *words, "--classifier.width", "0.25"])
    assert load(tmp_path / "run" / "checkpoints" / "classifier.safetensors").card["steps"] == 5
