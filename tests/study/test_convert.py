"""`histosynth convert` of a classifier, as a user runs it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from histosynth.classify.config import ClassifierConfig
from histosynth.classify.fit import fit
from histosynth.cli import main
from histosynth.tiles.batches import TileArray


def test_a_classifier_becomes_torchscript(tmp_path, monkeypatch, capsys):
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    tiles = TileArray(images, np.arange(12) % 2, [str(i) for i in range(12)], ("A", "B"))
    config = ClassifierConfig(steps=1, batch=4, width=0.25, weights="none")
    model = fit("mobilenet-v2", tiles, tiles, config, seed=0, device="cpu")
    model.save(tmp_path / "net.safetensors")
    said: list[str] = []
    monkeypatch.setattr("histosynth.study.verbs.convert.say", said.append)
    main(["convert", str(tmp_path / "net.safetensors"), str(tmp_path / "net.ts")])
    assert "uint8 [N, 3, 32, 32]" in said[0] and "TorchScript" in said[1]
    with torch.no_grad():
        found = torch.jit.load(str(tmp_path / "net.ts"))(tiles.tensor())
    torch.testing.assert_close(found, model.logits(images))
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "net.safetensors"), str(tmp_path / "b.ts"), "--classes", "A,B"])
    assert "its card has its classes" in capsys.readouterr().err
