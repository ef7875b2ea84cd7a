"""Sampling: the same label and seed give the same tile, bit for bit, in any company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from histosynth.core.checkpoint import load_checkpoint, save_checkpoint
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.core.types import LatentGenerator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.sample import GanGenerator
from histosynth.gan.train import train_gan
from tests.gan.helpers import tiles, tiny_config


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> GanGenerator:
    torch.manual_seed(0)
    shape = Shape(size=64, classes=3, channel_base=1024, channel_max=48, z_dim=32, w_dim=32)
    network = Generator(shape)
    with torch.no_grad():  # a trained network uses its noise
        for name, p in network.named_parameters():
            if name.endswith("noise_strength"):
                p.fill_(0.3)
    network.mapping.measure_mean(64)
    return GanGenerator(network, {"classes": ["ADI", "LYM", "TUM"]}, torch.device("cpu"))


def test_protocol(maker: GanGenerator) -> None:
    assert isinstance(maker, LatentGenerator)
    assert maker.classes == ("ADI", "LYM", "TUM") and maker.size == 64


@pytest.mark.parametrize("truncation", [1.0, 0.6])
def test_tiles_do_not_depend_on_the_batch_size(maker: GanGenerator, truncation: float) -> None:
    labels, seeds = [k % 3 for k in range(19)], [7 * k + 1 for k in range(19)]
    whole = torch.cat(list(maker.sample(labels, seeds, 16, truncation)))
    for size in (1, 3, 64):
        parts = list(maker.sample(labels, seeds, size, truncation))
        assert all(len(p) == size for p in parts[:-1])
        assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.uint8 and whole.shape == (19, 3, 64, 64)


def test_tiles_do_not_depend_on_their_neighbours_or_place(maker: GanGenerator) -> None:
    (alone,) = maker.sample([1], [42])
    for place in range(16):
        labels, seeds = [k % 3 for k in range(16)], [1000 + 17 * k + place for k in range(16)]
        labels[place], seeds[place] = 1, 42
        (batch,) = maker.sample(labels, seeds)
        assert torch.equal(batch[place], alone[0]), place


def test_seed_and_label_both_matter(maker: GanGenerator) -> None:
    a, b, c = next(maker.sample([0, 0, 1], [1, 2, 1]))
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_truncation_zero_leaves_only_the_noise(maker: GanGenerator) -> None:
    wide, narrow = (next(maker.sample([0] * 8, range(8), truncation=t)).float() for t in (1.0, 0.0))
    assert narrow.std(dim=0).mean() < wide.std(dim=0).mean()
    codes = maker.latents([0, 0], [1, 2], truncation=0.0)
    torch.testing.assert_close(codes[0], codes[1])


def test_latents_decode_to_the_tiles_of_sample(maker: GanGenerator) -> None:
    labels, seeds = [0, 1, 2], [3, 4, 5]
    codes = maker.latents(labels, seeds)
    assert codes.shape == (3, 32) and codes.dtype == torch.float32
    assert torch.equal(maker.decode(codes, seeds), next(maker.sample(labels, seeds)))
    layered = codes[:, None].expand(-1, maker.network.layers, -1)
    assert torch.equal(maker.decode(layered), maker.decode(codes))


def test_synthesise_is_differentiable_and_agrees_with_decode(maker: GanGenerator) -> None:
    codes = maker.latents([0, 1], [1, 2]).requires_grad_(True)
    images = maker.synthesise(codes)
    tiles_again = ((images.detach() + 1) * 127.5).round().clamp(0, 255)
    assert (tiles_again - maker.decode(codes.detach()).float()).abs().max() <= 1
    images.mean().backward()
    assert codes.grad is not None and codes.grad.abs().sum() > 0


def test_nothing_asked_nothing_made(maker: GanGenerator) -> None:
    assert list(maker.sample([], [])) == []
    assert maker.latents([], []).shape == (0, 32)
    assert maker.decode(torch.empty(0, 32)).shape == (0, 3, 64, 64)


def test_wrong_requests_are_refused_at_once(maker: GanGenerator) -> None:
    with pytest.raises(SettingError, match="Label 3"):
        maker.sample([3], [0])
    with pytest.raises(SettingError, match="2 labels came with 1 seeds"):
        maker.sample([0, 1], [0])
    with pytest.raises(SettingError, match="truncation"):
        maker.sample([0], [0], truncation=2.0)
    with pytest.raises(SettingError, match="batch_size"):
        maker.sample([0], [0], batch_size=0)


def test_checkpoint_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTOSYNTH_QUIET", "1")
    path = train_gan(tiles(), tiny_config(steps=2), tmp_path / "run", device="cpu")
    first = next(GanGenerator.from_checkpoint(path, "cpu").sample([0, 1, 2], [1, 2, 3]))
    tensors, card = load_checkpoint(path)
    copy = save_checkpoint(tmp_path / "copy.safetensors", tensors, card)
    assert torch.equal(first, next(GanGenerator.from_checkpoint(copy, "cpu").sample([0, 1, 2], [1, 2, 3])))
    other = save_checkpoint(tmp_path / "other.safetensors", tensors, card | {"kind": "diffusion"})
    with pytest.raises(CheckpointError, match="diffusion"):
        GanGenerator.from_checkpoint(other, "cpu")
