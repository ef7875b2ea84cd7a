"""Every network at every size, torchvision's weights in it, and what it starts from."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torchvision import models

from histosynth.classify import network, weights
from histosynth.classify.network import ARCHITECTURES, build
from histosynth.classify.weights import start
from histosynth.core.checkpoint import save_checkpoint
from histosynth.core.errors import CheckpointError, SettingError

_REFERENCE = {
    "mobilenet-v2": models.mobilenet_v2,
    "efficientnet-b0": models.efficientnet_b0,
    "resnet-18": models.resnet18,
}
_WHOLE = {"size": 64, "width": 1.0, "depth": 1.0}
_SMALL = {"size": 64, "width": 0.5, "depth": 0.25}


def _start(model, name, which, shape):
    return start(model, name, which, **shape)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_torchvisions_network_at_full_width(name):
    ours, theirs = build(name, 1000, size=224).eval(), _REFERENCE[name](weights=None).eval()
    ours.load_state_dict(theirs.state_dict())  # every name and shape
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_small_tiles_keep_a_larger_map(name):
    seen = {}
    for size in (64, 96, 128):
        model = build(name, 3, size=size, width=0.25, depth=0.25).eval()
        last = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)][-1]
        last.register_forward_hook(lambda _, __, out, size=size: seen.update({size: out.shape[-1]}))
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 3)
    assert seen == {64: 4, 96: 6, 128: 4}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_residual_blocks_begin_as_the_identity(name):
    model = build(name, 3, size=64)
    zeroed = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) and not m.weight.any()]
    assert len(zeroed) == {"mobilenet-v2": 10, "efficientnet-b0": 9, "resnet-18": 8}[name]


def test_unknown_names_and_shapes_are_refused():
    with pytest.raises(SettingError, match="mobilenet-v2"):
        build("mobilenet-v3", 3, size=64)
    with pytest.raises(SettingError, match="positive"):
        build("resnet-18", 3, size=64, width=0)
    with pytest.raises(SettingError, match=r"width 1\.0"):
        _start(build("resnet-18", 3, **_SMALL), "resnet-18", "imagenet", _SMALL)
    for name, shape in (("resnet-18", _SMALL), ("mobilenet-v2", _WHOLE), ("mobilenet-v2", _SMALL | {"size": 128})):
        with pytest.raises(SettingError, match="weights is 'tissue'"):
            _start(build(name, 3, **shape), name, "tissue", shape)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_imagenet_weights_are_taken_from_the_disk_and_checked(name, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "imagenet_file", lambda _: tmp_path / "none-0000.pth")
    model = build(name, 3, **_WHOLE)
    assert _start(model, name, "auto", _WHOLE) == ("scratch", [])
    # a stand-in in the published form: all tensors, and the file's own hash in its name
    torch.save({k: torch.full_like(v, 0.25) for k, v in _REFERENCE[name]().state_dict().items()}, tmp_path / "plain")
    digest = hashlib.sha256((tmp_path / "plain").read_bytes()).hexdigest()
    good = (tmp_path / "plain").rename(tmp_path / f"weights-{digest[:8]}.pth")
    monkeypatch.setattr(weights, "imagenet_file", lambda _: good)
    found, parents = _start(model, name, "auto", _WHOLE)
    assert found == "imagenet" and "torchvision" in parents[0]
    head = network.architecture_of(name).head
    for key, tensor in model.state_dict().items():  # the head is ours
        assert key.startswith(head) or bool((tensor == tensor.new_tensor(0.25)).all()), key
    assert float(model.get_submodule(head.rstrip("."))(torch.randn(9, _features(name))).detach().std()) > 0
    assert _start(build(name, 3, **_SMALL), name, "auto", _SMALL)[0] != "imagenet"
    assert _start(model, name, "none", _WHOLE)[0] == "scratch"
    good.write_bytes(good.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        _start(model, name, "auto", _WHOLE)


def _features(name: str) -> int:
    return 512 if name == "resnet-18" else 1280


def test_tissue_weights_are_taken_where_they_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "has_asset", lambda _: False)
    assert _start(build("mobilenet-v2", 3, **_SMALL), "mobilenet-v2", "auto", _SMALL)[0] == "scratch"
    nine = build("mobilenet-v2", 9, **_SMALL)
    asset = save_checkpoint(tmp_path / "tissue.safetensors", nine.state_dict(), {"kind": "classifier"}, half=True)
    monkeypatch.setattr(weights, "has_asset", lambda _: True)
    monkeypatch.setattr(weights, "asset_path", lambda _: asset)
    for which in ("auto", "tissue"):
        model = build("mobilenet-v2", 3, **_SMALL)
        found, parents = _start(model, "mobilenet-v2", which, _SMALL)
        assert found == "tissue" and parents == ["tissue-mobilenet-64.safetensors (simulated tissue)"]
        torch.testing.assert_close(model.features[0][0].weight, nine.features[0][0].weight, rtol=1e-3, atol=1e-4)
        assert model.classifier[1].weight.shape[0] == 3
    assert _start(build("mobilenet-v2", 3, **_WHOLE), "mobilenet-v2", "auto", _WHOLE)[0] == "scratch"
    assert _start(build("resnet-18", 3, **_SMALL), "resnet-18", "auto", _SMALL)[0] == "scratch"
    assert _start(build("mobilenet-v2", 3, **_SMALL), "mobilenet-v2", "none", _SMALL)[0] == "scratch"
