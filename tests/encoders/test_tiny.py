"""tissue-tiny: folding, sizes, and what the shipped weights can do."""

import copy

import numpy as np
import pytest
import torch

from histosynth import encoders
from histosynth.core.assets import asset_path, has_asset
from histosynth.core.checkpoint import read_card
from histosynth.core.errors import CheckpointError, DataError
from histosynth.encoders import tiny
from histosynth.tiles.phantom import make_hospital, make_patient, render

shipped = pytest.mark.skipif(not has_asset(tiny.ASSET), reason="the shipped weights are not in this checkout")


@pytest.fixture(scope="module")
def trained() -> tiny.TinyNetwork:
    """Random weights, with batch statistics that differ from their initial values."""
    torch.manual_seed(0)
    network = tiny.TinyNetwork().train()
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(16, 3, 64, 64))
    return network.eval()


def test_folding_changes_no_feature(trained):
    images = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8)
    encoder = tiny.TissueTiny(copy.deepcopy(trained), "")
    with torch.no_grad():
        expected = trained(images.float() / 127.5 - 1)
    assert torch.allclose(encoder.encode(images), expected, atol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in encoder.network.modules())


def test_sizes(trained):
    encoder = tiny.TissueTiny(copy.deepcopy(trained), "")
    for height, width in ((32, 32), (64, 64), (97, 130), (224, 224)):
        assert encoder.encode(torch.zeros(2, 3, height, width, dtype=torch.uint8)).shape == (2, 256)
    with pytest.raises(DataError, match="at least 32"):
        encoder.encode(torch.zeros(1, 3, 31, 64, dtype=torch.uint8))


def test_a_large_tile_is_averaged_down_not_sampled(trained):
    """A checkerboard of single pixels is grey to an antialiased resize, and black or white to any other."""
    encoder = tiny.TissueTiny(copy.deepcopy(trained), "")
    board = ((torch.arange(256)[:, None] + torch.arange(256)) % 2 * 255).to(torch.uint8).expand(1, 3, -1, -1)
    grey = torch.full((1, 3, 64, 64), 0.0)
    assert torch.allclose(encoder.encode(board), encoder.differentiable(grey), atol=0.05)


def test_missing_weights_say_so(monkeypatch):
    monkeypatch.setattr(tiny, "ASSET", "absent.safetensors")
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        tiny.load()


@shipped
def test_shipped_card():
    path = asset_path(tiny.ASSET)
    assert path.stat().st_size < 3_000_000
    card = read_card(path)
    assert card["kind"] == "encoder" and card["licence"] == "Apache-2.0" and "train_tiny" in card["command"]
    assert card["probe_held_out_hospitals"]["tissue-tiny"] > card["probe_held_out_hospitals"]["colour"]


@shipped
def test_shipped_features_follow_tissue_and_not_stain():
    """The same layouts in two hospitals: a tile's nearest neighbour across them is of its own class."""
    encoder = encoders.load("tissue-tiny", device="cpu")
    classes = ("ADI", "LYM", "MUC", "MUS", "NORM", "TUM")
    sides = []
    for seed in (501, 502):
        patient = make_patient(seed, make_hospital(seed, shift=0.8))
        tiles = [
            render(c, patient=patient, seed=1000 * seed + k, size=64, field_um=112).image
            for c in classes
            for k in range(6)
        ]
        sides.append(encoder.encode(torch.from_numpy(np.stack(tiles).transpose(0, 3, 1, 2).copy())))
    labels = torch.arange(len(classes)).repeat_interleave(6)
    matched = labels[torch.cdist(*sides).argmin(1)] == labels
    assert matched.float().mean() > 0.75


def test_maps_are_those_of_the_network_and_differentiable(trained):
    encoder = tiny.TissueTiny(copy.deepcopy(trained), "")
    images = (torch.rand(2, 3, 64, 64) * 2 - 1).requires_grad_(True)
    maps = encoder.maps(images)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4)]
    network = encoder.network
    features = network.standardise(network.head(maps[-1].mean((2, 3))))
    assert torch.allclose(features, encoder.differentiable(images), atol=1e-5)
    for found in maps:
        (gradient,) = torch.autograd.grad(found.square().sum(), images, retain_graph=True)
        assert (gradient.abs().sum((1, 2, 3)) > 0).all()
    assert [m.shape[-1] for m in encoder.maps(torch.zeros(1, 3, 250, 130))] == [32, 16, 8, 4]
    with pytest.raises(DataError, match="at least 32"):
        encoder.maps(torch.zeros(1, 3, 16, 16))
