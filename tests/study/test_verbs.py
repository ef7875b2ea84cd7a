"""The small verbs, each run as a user would, on a tiny simulated tile set; and the README's commands exist."""

import json
import re
from pathlib import Path

import pytest

from histosynth.cli import VERBS, build_app, main
from histosynth.core.checkpoint import read_card
from histosynth.core.registry import Registry
from histosynth.tiles.tileset import TileSet

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    out = tmp_path_factory.mktemp("verbs") / "tiles"
    main(["tiles", "phantom", str(out), "--per-class", "10", "--patients", "6", "--size", "32", "--rare.MUC", "2"])
    return out


def test_phantom_writes_a_split_tile_set(tiles):
    tileset = TileSet.open(tiles)
    assert len(tileset.classes) == 9 and tileset.meta["simulated"]
    assert tileset.kept.groupby("patient").split.nunique().max() == 1
    assert ((tileset.kept.label == "MUC") & (tileset.kept.split == "train")).sum() == 2


def test_train_generate_evaluate(tiles, tmp_path, capfd):
    run, made, scores = tmp_path / "gan", tmp_path / "made", tmp_path / "scores"
    small = ["--size", "32", "--steps", "2", "--batch", "4", "--channel-max", "16", "--z-dim", "16", "--w-dim", "16"]
    main(["train", "gan", str(tiles), str(run), "--init", "none", *small])
    checkpoint = run / "checkpoints" / "gan.safetensors"
    assert read_card(checkpoint)["steps"] == 2
    words = ["generate", str(checkpoint), str(made), "--per-class", "3", "--classes", "TUM", "--classes", "STR"]
    main(words)
    tileset = TileSet.open(made)
    assert tileset.kept.label.value_counts().to_dict() == {"TUM": 3, "STR": 3}
    first = tileset.folder / tileset.kept.path[0]
    before = first.read_bytes()
    first.unlink()
    main(words)
    assert first.read_bytes() == before, "a tile that went missing is made again, the same"
    with pytest.raises(SystemExit) as stop:
        main([*words, "--seed", "1"])
    assert stop.value.code == 2 and "another checkpoint, seed or setting" in capfd.readouterr().err
    options = ["--size", "32", "--encoder", "colour", "--out", str(scores)]
    main(["evaluate", str(tiles), str(made), *options])
    assert json.loads((scores / "report.json").read_text())["generator"]["name"] == "gan"
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(checkpoint), str(tmp_path / "x"), "--classes", "TUMOUR"])
    assert stop.value.code == 2 and "'TUMOUR'" in capfd.readouterr().err


def test_no_generator_learns_from_the_test(tiles, tmp_path, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["train", "gan", str(tiles), str(tmp_path / "gan"), "--split", "test"])
    assert stop.value.code == 2 and "split is 'test'" in capfd.readouterr().err


def test_train_classifier(tiles, tmp_path):
    out = tmp_path / "run"
    main(["train", "classifier", str(tiles), str(out), "--size", "32", "--classifier.steps", "3"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert 0 <= manifest["results"]["test"]["balanced_accuracy"] <= 1
    assert read_card(out / "checkpoints" / "classifier.safetensors")["kind"] == "classifier"


def test_lists(capfd):
    main(["encoders"])
    main(["generators"])
    printed = capfd.readouterr().out
    assert "tissue-tiny" in printed and "diffusion" in printed


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_exists_and_has_help(verb, capfd):
    Registry("verb", {v: target for v, (target, _) in VERBS.items()}).load(verb)
    build_app()([*verb.split(), "--help"], exit_on_error=False)
    assert "Usage" in capfd.readouterr().out


def test_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"\.venv/bin/histosynth (\w+)(?: (\w+))?", text)
    assert len(found) >= 5
    for first, second in found:
        assert first in VERBS or f"{first} {second}" in VERBS
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(f"\n{t}:" in makefile for t in targets)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / link).exists(), link
