"""The FID network against pytorch-fid's and torch-fidelity's, with the same random weights; the resizes."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from histosynth import encoders
from histosynth.core.errors import CheckpointError
from histosynth.encoders import inception
from histosynth.encoders.door import Door
from tests.encoders.random_weights import inception_file, spread


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return inception_file(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def tiles():
    return torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def relative(one, two):
    return float((one - two).abs().max() / two.abs().max())


def test_the_same_features_as_pytorch_fid(file, tiles, monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *_, **__: torch.load(file, weights_only=True))
    with torch.no_grad():
        theirs = peer.InceptionV3([3]).eval()(tiles.float() / 255)[0].flatten(1)
    encoder = encoders.load("inception-v3-legacy", "cpu", weights=file)
    encoder.micro_batch = 2
    assert relative(encoder.encode(tiles), theirs) <= 1e-5


def test_the_same_features_as_torch_fidelity(file, tiles):
    peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network = peer.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(file))
    theirs = network(tiles[:1])[0]
    encoder = encoders.load("inception-v3-legacy-tf", "cpu", weights=file)
    encoder.micro_batch = 1
    assert relative(encoder.encode(tiles[:1]), theirs) <= 1e-5


def test_its_pools_are_not_those_of_torchvision():
    torch.manual_seed(0)
    layers = spread(inception.build())
    x = torch.randn(1, 3, 75, 75)
    seen: list[Any] = []
    layers.avgpool.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(1)))
    with torch.no_grad():
        layers.eval()(x)
        assert relative(inception.FidInception(layers)(x), seen[0]) > 1e-3


@pytest.mark.parametrize("size", [64, 224, 299, 512])
@pytest.mark.parametrize("filter_", ["bicubic", "bilinear"])
def test_the_antialiased_resize_is_that_of_pillow_on_floats(size, filter_):
    tiles = np.random.default_rng(size).integers(0, 256, (2, 3, size, size + 8), dtype=np.uint8)
    door = Door(299, filter_, (0.0,) * 3, (1.0,) * 3)
    ours = door(torch.from_numpy(tiles).float()).numpy()
    how = Image.Resampling[filter_.upper()]
    pillow = [
        [np.asarray(Image.fromarray(c.astype(np.float32)).resize((299, 299), how)).clip(0, 255) for c in tile]
        for tile in tiles
    ]
    assert np.abs(ours - np.array(pillow)).max() <= 0.05


def test_the_old_resize_of_tensorflow():
    peer = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    tiles = torch.rand(2, 3, 50, 331, generator=torch.Generator().manual_seed(0)) * 255
    theirs = peer.interpolate_bilinear_2d_like_tensorflow1x(tiles, size=(299, 299), align_corners=False)
    ours = Door(299, "legacy-tf", (0.0,) * 3, (1.0,) * 3)(tiles)
    assert (ours - theirs).abs().max() < 1e-3


def test_only_the_antialiased_resize_averages_a_fine_texture():
    board = (torch.arange(700)[:, None] + torch.arange(700)).remainder(2).float().expand(1, 3, -1, -1) * 255
    contrast = {n: float((d(board) * d.std[0])[..., 9:-9, 9:-9].std()) for n, d in inception.DOORS.items()}
    assert contrast["inception-v3"] < 5
    assert contrast["inception-v3-legacy"] > 40 and contrast["inception-v3-legacy-tf"] > 40


def test_another_inception_is_refused(tmp_path):
    from torchvision.models.inception import Inception3

    path = tmp_path / "inception_v3_google.pth"
    with torch.device("meta"):
        shapes = Inception3(num_classes=1000, aux_logits=True, init_weights=False).state_dict()
    # stored as views of one number, so that the file is small
    torch.save({k: torch.zeros(()).expand(v.shape) for k, v in shapes.items()}, path)
    with pytest.raises(CheckpointError, match=r"unknown \(AuxLogits.*another shape \(fc.*with 1000 outputs"):
        encoders.load("inception-v3", "cpu", weights=path)
