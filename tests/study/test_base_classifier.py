"""`histosynth train base classifier`: its file can be shipped, loaded, and started from."""

from __future__ import annotations

import pytest
import torch

from histosynth.classify import weights
from histosynth.classify.model import Classifier
from histosynth.classify.network import build
from histosynth.cli import main
from histosynth.core.checkpoint import read_card
from histosynth.study import base
from histosynth.tiles.phantom import CLASSES


def test_the_file_can_be_started_from(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(base, "_UNSEEN", 18)
    words = ["train", "base", "classifier", "--tiles", "18", "--size", "32", "--out", str(tmp_path), "--device", "cpu"]
    main([*words, "--steps", "2"])
    asset = tmp_path / "assets" / "tissue-mobilenet-32.safetensors"
    card = read_card(asset)
    assert card["command"] == "histosynth train base classifier --tiles 18 --size 32 --seed 0 --steps 2"
    assert card["licence"] == "Apache-2.0" and card["steps"] == 2 and card["unseen_hospitals"]["tiles"] == 18
    assert Classifier.load(asset, device="cpu").classes == CLASSES
    monkeypatch.setattr(weights, "has_asset", lambda _: True)
    monkeypatch.setattr(weights, "asset_path", lambda _: asset)
    shape = {"size": 64, "width": 0.5, "depth": 0.25}
    model = build("mobilenet-v2", 3, **shape)
    assert weights.start(model, "mobilenet-v2", "auto", **shape)[0] == "tissue"
    torch.testing.assert_close(
        model.features[0][0].weight, Classifier.load(asset, device="cpu").model.features[0][0].weight
    )
    with pytest.raises(SystemExit):
        main([*words, "--seconds", "5"])
    assert "steps alone" in capsys.readouterr().err
