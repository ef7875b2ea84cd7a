"""The score by which trainings choose their weights, and the verb that hands it to them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from histosynth import encoders
from histosynth.cli import main
from histosynth.core.checkpoint import read_card
from histosynth.core.errors import SettingError
from histosynth.study import validation as module
from histosynth.study.validation import KidScore, validation
from tests.gan.helpers import tiles


def test_the_score_is_the_unbiased_kid() -> None:
    data = tiles(per_class=3)
    real, fake = torch.from_numpy(data.images[:5]), torch.from_numpy(data.images[5:])
    encoder = encoders.load("colour")
    x, y = (encoder.encode(images).double().numpy() for images in (real, fake))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    def within(z: np.ndarray) -> float:
        return np.mean([kernel(z[i], z[j]) for i, j in product(range(len(z)), repeat=2) if i != j])

    wanted = within(x) + within(y) - 2 * np.mean([kernel(a, b) for a, b in product(x, y)])
    score = KidScore("colour", "cpu")
    assert score(real, fake) == pytest.approx(wanted, rel=1e-5)
    assert score.name == "KID on colour"


def test_the_real_tiles_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    score, seen = KidScore("colour", "cpu"), []
    encode = score._network.encode
    monkeypatch.setattr(score._network, "encode", lambda images: seen.append(len(images)) or encode(images))
    images = torch.from_numpy(tiles().images)
    real = images[:8]
    for fake in (images[8:12], images[12:]):
        score(real, fake)
    assert seen == [8, 4, 6]


def test_too_few_tiles_choose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(module, "say", said.append)
    assert validation(tiles(per_class=5), "colour", "cpu") == (None, None)
    assert "15 validation tiles are too few" in said[0]
    data, score = validation(tiles(), "colour", "cpu")
    assert data is not None and len(data) == 18 and score is not None
    with pytest.raises(SettingError, match="colur"):
        validation(tiles(), "colur", "cpu")


def test_the_verb_chooses_on_the_split_val(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTOSYNTH_QUIET", "1")
    source = str(tmp_path / "tiles")
    main(["tiles", "phantom", source, "--per-class", "10", "--patients", "8", "--size", "32", "--val", "0.4"])
    preset = ["--config", "gan/stylegan2-64", "--size", "32", "--steps", "4", "--batch", "4", "--channel-max", "8"]
    main(["train", "gan", source, str(tmp_path / "run"), *preset, "--validate-every", "2"])
    card = read_card(tmp_path / "run" / "checkpoints" / "gan.safetensors")
    assert card["chosen_on"] == "val" and card["chosen_by"] == "KID on tissue-tiny"
    assert [step for step, _ in card["validation"]] == [2, 4] and card["chosen_step"] in (2, 4)
    assert card["chosen_score"] == min(score for _, score in card["validation"]) and "chosen_note" not in card
    assert card["config"]["style_mixing"] == 0.5 and card["config"]["head"] == ""
