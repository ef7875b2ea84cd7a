"""The weights that ship: small, with cards, and of use."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from histosynth import encoders
from histosynth.autoencoder.network import load_autoencoder
from histosynth.core.checkpoint import read_card
from histosynth.study.generators import load
from histosynth.tiles.phantom import CLASSES, make_hospital, make_patient, render_batch

ASSETS = sorted(Path(str(files("histosynth") / "assets")).glob("*.safetensors"))
GENERATORS = [p for p in ASSETS if "-base-" in p.name]


@pytest.fixture(scope="module")
def tissue():
    """Tiles of hospitals that no shipped weight has seen, two a class."""
    labels = [*CLASSES, *CLASSES]
    patients = [make_patient(k, make_hospital(70 + k, shift=0.5)) for k in range(len(labels))]
    images, index = render_batch(labels, patients=patients, seeds=range(900, 900 + len(labels)), size=64)
    return torch.from_numpy(images), index


def test_what_ships_is_small_and_documented():
    names = {p.name for p in ASSETS}
    assert {
        "tissue-tiny.safetensors",
        "tissue-mobilenet-64.safetensors",
        "autoencoder-64.safetensors",
        "gan-base-64.safetensors",
        "diffusion-base-64.safetensors",
    } <= names
    assert sum(p.stat().st_size for p in ASSETS) <= 40 * 2**20
    text = Path(str(files("histosynth") / "assets" / "README.md")).read_text()
    for path in ASSETS:
        card = read_card(path)
        assert card["licence"] == "Apache-2.0" and card["command"] and card["trained_on"] and card["steps"] > 0
        row = next(line for line in text.splitlines() if f"`{path.name}`" in line)
        assert set(row.split("`")[3].split()) <= set(card["command"].split()), "page and card name the same command"
        assert "/" not in card["command"].replace("FOLDER/", ""), "a card names no path of somebody's machine"


@pytest.mark.parametrize("path", GENERATORS, ids=lambda p: p.stem)
def test_base_generators_make_varied_tiles_of_plausible_colour(path):
    generator = load(path, "cpu")
    assert generator.classes == CLASSES and generator.size == 64
    labels = [CLASSES.index(c) for c in ("BACK", "LYM", "BACK", "LYM")]
    tiles = torch.cat(list(generator.sample(labels, [1, 2, 3, 4]))).float()
    assert tiles.shape == (4, 3, 64, 64)
    brightness = tiles.mean((1, 2, 3))
    assert brightness[[0, 2]].min() > brightness[[1, 3]].max() + 20, "glass is brighter than lymphocytes"
    assert not torch.equal(tiles[0], tiles[2]) and not torch.equal(tiles[1], tiles[3])


def test_autoencoder_keeps_tissue_of_unseen_hospitals(tissue):
    images, _ = tissue
    model, card = load_autoencoder(next(p for p in ASSETS if p.name == "autoencoder-64.safetensors"))
    with torch.inference_mode():
        back = (model.decode(model.encode(images)).clamp(-1, 1) + 1) * 127.5
    error = (back - images.float()).square().mean((1, 2, 3)).numpy()
    found = float(np.mean(10 * np.log10(255**2 / error)))
    assert found > 25 and abs(found - card["psnr_db"]) < 5


def test_tissue_tiny_tells_classes_of_unseen_hospitals_apart(tissue):
    images, labels = tissue
    features = encoders.load("tissue-tiny").encode(images).numpy()
    distance = np.linalg.norm(features[:9, None] - features[None, 9:], axis=2)
    assert (labels[9:][distance.argmin(1)] == labels[:9]).mean() > 0.6
