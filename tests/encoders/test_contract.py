"""The contract over the whole table: complete cards, exact remedies, and how every loaded encoder behaves."""

import json
from dataclasses import asdict

import pytest
import torch

from histosynth import encoders
from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.encoders.lpips import BACKBONES
from histosynth.encoders.weights import home, variable
from tests.encoders.random_weights import shrink, small_file

CARDS = encoders.cards()
FROM_FILE = [c.name for c in CARDS if c.files]
LOADED = [n for n in FROM_FILE if "legacy" not in n]  # those differ in the resize alone: test_inception.py


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch, tmp_path):
    """An empty machine: no weights folder, no caches, no variables."""
    for name in ("HISTOSYNTH_WEIGHTS", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "empty" / name.lower()))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "empty" / "hub"))


@pytest.mark.parametrize("card", [*CARDS, *BACKBONES.values()], ids=lambda c: c.name)
def test_every_card_is_complete(card):
    assert card.licence and card.citation and card.source and card.how
    assert not card.gated or (card.url in card.how and "token" in card.how and card.weights in card.how)
    assert card.gated <= (not card.download), "what is gated is never downloaded"
    assert not card.files or (card.optional and card.weights == card.files[0])
    assert ("NC" in card.licence or "non-commercial" in card.licence) == (not card.commercial)
    json.dumps(asdict(card))


def test_the_promised_names():
    promised = (
        "inception-v3 dinov2-s dinov2-b dinov2-l clip uni uni2-h virchow2 h-optimus-0 phikon-v2 pathoduet mobilenet-v2 "
        "tissue-tiny colour"
    )
    assert set(promised.split()) <= {c.name for c in CARDS}


@pytest.mark.parametrize("name", FROM_FILE)
def test_missing_weights_give_the_remedy(name, monkeypatch, tmp_path):
    card = encoders.card(name)
    assert encoders.locate(name) is None
    with pytest.raises(CheckpointError) as error:
        encoders.load(name, "cpu")
    text = str(error.value)
    assert card.weights in text and card.licence in text and f"--weights {name}=FILE" in text
    assert str(home(card)) in text and variable(name) in text and "{" not in text
    with pytest.raises(CheckpointError, match=r"nowhere\.pth, are not there"):
        encoders.load(name, "cpu", weights=tmp_path / "nowhere.pth")
    monkeypatch.setenv(variable(name), str(tmp_path / "elsewhere.pth"))
    with pytest.raises(CheckpointError, match=f"elsewhere.pth .from {variable(name)}., are not there"):
        encoders.load(name, "cpu")


@pytest.mark.parametrize("name", LOADED)
def test_a_loaded_encoder(name, monkeypatch, tmp_path):
    shrink(monkeypatch)
    path = small_file(name, tmp_path)
    encoder = encoders.load(name, "cpu", weights=path)
    encoder.micro_batch = 1  # for speed
    card = encoder.card
    assert isinstance(encoder, encoders.Encoder) and card.name == name and card.dim == encoders.card(name).dim
    images = torch.randint(0, 256, (2, 3, 64, 72), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    found = encoder.encode(images)
    assert found.shape == (2, card.dim) and found.dtype == torch.float32
    assert found.isfinite().all() and not found.requires_grad
    assert (found[0] - found[1]).abs().max() > 1e-3, "these features could not tell two tiles apart"
    assert encoder.encode(images[:0]).shape == (0, card.dim)
    scale = float(found.abs().max())

    floats = (images[:1].float() / 127.5 - 1).requires_grad_()
    same = encoder.differentiable(floats)
    assert torch.allclose(same.detach(), found[:1], atol=2e-5 * scale), "two ways in, one scale"
    (same * torch.randn(same.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert floats.grad.isfinite().all() and (floats.grad.abs().sum((1, 2, 3)) > 0).all()

    for wrong in (images.float() / 255, images[0], images[:, :1]):
        with pytest.raises(DataError):
            encoder.encode(wrong)
    for wrong in (images, images.float(), floats[0]):
        with pytest.raises(DataError):
            encoder.differentiable(wrong)
    assert len(encoder.weights_hash) == 64


def test_features_do_not_depend_on_the_batch(monkeypatch, tmp_path):
    shrink(monkeypatch)
    encoder = encoders.load("dinov2-s", "cpu", weights=small_file("dinov2-s", tmp_path))
    images = torch.randint(0, 256, (5, 3, 40, 40), dtype=torch.uint8)
    encoder.micro_batch = 3
    together = encoder.encode(images)
    alone = torch.cat([encoder.encode(tile[None]) for tile in images])
    encoder.micro_batch = 2
    assert torch.allclose(alone, together, atol=1e-5) and torch.allclose(encoder.encode(images), together, atol=1e-4)


def test_features_are_those_of_whole_float32(monkeypatch, tmp_path):
    """cuDNN's default, TF32, would give other features on a card than on the CPU."""
    seen = []

    class Probe(torch.nn.Module):
        def forward(self, x):
            seen.append(torch.backends.cudnn.allow_tf32)
            return x.new_zeros(len(x), self.dim)

    shrink(monkeypatch)
    encoder = encoders.load("dinov2-s", "cpu", weights=small_file("dinov2-s", tmp_path))
    tiny = encoders.load("tissue-tiny", "cpu")
    before = torch.backends.cudnn.allow_tf32
    for one in (encoder, tiny):
        one.network = Probe()
        one.network.dim = one.card.dim
        one.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32 == before


@pytest.mark.parametrize("name", ["inception-v3", "uni2-h", "pathoduet", "clip", "mobilenet-v2"])
def test_bfloat16_keeps_the_direction(name, monkeypatch, tmp_path):
    shrink(monkeypatch)
    path = small_file(name, tmp_path)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    found = []
    for precision in ("float32", "bfloat16"):
        encoder = encoders.load(name, "cpu", weights=path, precision=precision)
        encoder.micro_batch = 1
        assert encoder.precision == precision
        found.append(encoder.encode(images))
    assert torch.nn.functional.cosine_similarity(*found).min() > 0.999
    assert not torch.equal(*found)


def test_settings_that_an_encoder_cannot_have(tmp_path, monkeypatch):
    with pytest.raises(SettingError, match="'colour' takes no weights"):
        encoders.load("colour", weights=tmp_path / "x")
    with pytest.raises(SettingError, match="takes no precision"):
        encoders.load("tissue-tiny", precision="bfloat16")
    shrink(monkeypatch)
    with pytest.raises(SettingError, match="precision is 'float8'"):
        encoders.load("dinov2-s", "cpu", weights=small_file("dinov2-s", tmp_path), precision="float8")
