"""The table of encoders, and the contract that every encoder in it keeps."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from histosynth import encoders
from histosynth.core.assets import has_asset
from histosynth.core.errors import DataError, PluginError, SettingError
from histosynth.core.types import Encoder
from histosynth.encoders.store import weights_hash

NAMES = [c.name for c in encoders.cards() if not c.files]  # those with weight files: test_contract.py


def ready(name: str) -> Encoder:
    if name == "tissue-tiny" and not has_asset("tissue-tiny.safetensors"):
        pytest.skip("the shipped weights are not in this checkout")
    return encoders.load(name, device="cpu")


def test_listing_imports_no_torch():
    code = (
        "import sys; from histosynth import encoders; cards = encoders.cards();"
        "assert 'torch' not in sys.modules; print([c.name for c in cards])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "tissue-tiny" in out and "colour" in out


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(SettingError, match="Did you mean 'tissue-tiny'"):
        encoders.load("tissue-tyni")


def test_a_plug_in_that_is_no_encoder_is_refused(monkeypatch):
    monkeypatch.setattr(encoders.REGISTRY, "load", lambda name: lambda device: object())
    with pytest.raises(PluginError, match="without card"):
        encoders.load("anything")


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    encoder = ready(name)
    card = encoder.card
    assert card == encoders.card(name) and card.licence and card.source
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = encoder.encode(images)
    assert features.shape == (5, card.dim) and features.dtype == torch.float32
    assert not features.requires_grad and features.isfinite().all()
    assert encoder.encode(images[:0]).shape == (0, card.dim)
    # batch size, neighbours and memory layout change nothing
    alone = torch.cat([encoder.encode(tile[None]) for tile in images])
    assert torch.allclose(alone, features, atol=1e-5)
    assert torch.allclose(encoder.encode(images.flip(0)).flip(0), features, atol=1e-5)
    strided = torch.from_numpy(np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())).permute(0, 3, 1, 2)
    assert torch.allclose(encoder.encode(strided), features, atol=1e-5)
    assert weights_hash(encoder) == weights_hash(encoder)
    with pytest.raises(DataError, match="uint8"):
        encoder.encode(images.float())
    with pytest.raises(DataError):
        encoder.encode(images[0])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_images(name):
    encoder = ready(name)
    images = torch.randint(0, 256, (2, 3, 96, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    floats = (images.float() / 127.5 - 1).requires_grad_()
    features = encoder.differentiable(floats)
    assert torch.allclose(features.detach(), encoder.encode(images), atol=1e-5)
    features.square().sum().backward()
    assert floats.grad is not None and floats.grad.isfinite().all()
    assert (floats.grad.abs().sum((1, 2, 3)) > 0).all()
