"""Start weights: what fits is taken over, what is new begins without effect, what cannot fit is refused."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from histosynth.core.checkpoint import save_checkpoint
from histosynth.core.errors import CheckpointError
from histosynth.gan import transfer as module
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.layers import up_2x
from histosynth.gan.sample import render
from histosynth.gan.transfer import start_from, transfer
from tests.gan.helpers import TINY, tiny_shape

CLASSES = ("ADI", "LYM", "TUM")
BASE = Shape(size=16, classes=3, **TINY)


def networks(shape: Shape, seed: int = 0) -> tuple[Generator, Discriminator]:
    torch.manual_seed(seed)
    generator, discriminator = Generator(shape).requires_grad_(False), Discriminator(shape).requires_grad_(False)
    for network in (generator, discriminator):  # as after a training: no bias or strength is still 0
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    generator.mapping.measure_mean(32)
    return generator, discriminator.eval()


def checkpoint(folder: Path, shape: Shape, classes: tuple[str, ...] = CLASSES, card: dict | None = None) -> Path:
    generator, discriminator = networks(shape, seed=1)
    tensors = {f"G_ema.{k}": v for k, v in generator.state_dict().items()}
    tensors |= {f"D.{k}": v for k, v in discriminator.state_dict().items()}
    content = {"kind": "gan", "classes": list(classes), "shape": asdict(shape)} | (card or {})
    return save_checkpoint(folder / "start.safetensors", tensors, content)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(module, "say", lines.append)
    return lines


def inputs(size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    images = torch.rand(4, 3, size, size, generator=draw) * 2 - 1
    return torch.randn(4, 8, generator=draw), torch.tensor([0, 1, 2, 0]), images


@pytest.mark.parametrize("changes", [{}, {"class_embedding": "add"}, {"label_conditioning": "mapping"},
                                     {"architecture": "lite"}])  # fmt: skip
def test_labels_begin_without_effect(tmp_path: Path, changes: dict, said: list[str]) -> None:
    shape = replace(BASE, **changes)
    path = checkpoint(tmp_path, replace(shape, classes=0), ())
    old_g, old_d = networks(replace(shape, classes=0), seed=1)
    new_g, new_d = networks(shape, seed=2)
    start_from(str(path), new_g, new_d, CLASSES, seed=0)
    z, labels, images = inputs()
    torch.testing.assert_close(new_g(z, labels, None), old_g(z, None, None), atol=2e-3, rtol=0)
    torch.testing.assert_close(new_d(images, labels), old_d(images, None), atol=2e-3, rtol=0)
    difference = render(new_g, labels, [1, 2, 3, 4]).float() - render(old_g, [0] * 4, [1, 2, 3, 4]).float()
    assert difference.abs().max() <= 1
    torch.testing.assert_close(new_g.mapping.w_mean, old_g.mapping.w_mean.expand(3, -1))
    assert "labels begin without effect" in said[0]

    # and they can be learnt: every class pulls at its own embedding
    embedding = new_g.mapping.embedding
    assert embedding is not None
    embedding.requires_grad_(True)
    new_g(z[:1], labels[1:2], None).square().sum().backward()
    assert embedding.grad is not None and embedding.grad[1].abs().sum() > 0 and not embedding.grad[0].any()
    own = new_d.embedding if new_d.embedding is not None else new_d.mapping.embedding
    own.requires_grad_(True)
    new_d(images[:1], labels[1:2]).sum().backward()
    assert own.grad[1].abs().sum() > 0 and not own.grad[0].any()


@pytest.mark.parametrize("changes", [{}, {"class_embedding": "add"}, {"label_conditioning": "mapping"}])
def test_without_labels_it_begins_as_the_average_class(changes: dict) -> None:
    shape = replace(BASE, **changes)
    plain = replace(shape, classes=0)
    old_g, old_d = networks(shape, seed=1)
    new_g, new_d = networks(plain, seed=2)
    for old, new in ((old_g, new_g), (old_d, new_d)):
        transfer(new, dict(old.state_dict()), shape, CLASSES, (), seed=0)
    z, _, images = inputs()
    every = torch.stack([old_d(images, torch.full((4,), k)) for k in range(3)])
    torch.testing.assert_close(new_d(images, None), every.mean(dim=0), atol=1e-5, rtol=1e-4)

    # the first layer of the mapping is linear in the class before its rectifier: exact there
    first, code = new_g.mapping.layers[0], z * z.square().mean(dim=1, keepdim=True).add(1e-8).rsqrt()
    seen = []
    old_first = old_g.mapping.layers[0]
    old_first.active = first.active = False
    for k in range(3):
        row = old_g.mapping.embedding[k]
        unit = row if old_g.mapping.add else row * row.square().mean().add(1e-8).rsqrt()
        seen.append(old_first(code + unit if old_g.mapping.add else torch.cat([code, unit.expand(4, -1)], dim=1)))
    torch.testing.assert_close(first(code), torch.stack(seen).mean(dim=0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(new_g.mapping.w_mean, old_g.mapping.w_mean.mean(dim=0, keepdim=True))


def test_another_way_to_see_the_class(tmp_path: Path, said: list[str]) -> None:
    path = checkpoint(tmp_path, BASE)
    old_g, old_d = networks(BASE, seed=1)
    shape = replace(BASE, label_conditioning="mapping", d_mapping_depth=2)
    new_g, new_d = networks(shape, seed=2)
    start_from(str(path), new_g, new_d, CLASSES, seed=0)
    z, labels, images = inputs()
    torch.testing.assert_close(new_g(z, labels, None), old_g(z, labels, None))
    every = torch.stack([old_d(images, torch.full((4,), k)) for k in range(3)]).mean(dim=0)
    torch.testing.assert_close(new_d(images, labels), every, atol=2e-3, rtol=0)
    assert "mapping" in said[0]


def test_classes_follow_their_names(tmp_path: Path, said: list[str]) -> None:
    path = checkpoint(tmp_path, BASE)
    old_g, old_d = networks(BASE, seed=1)
    shape = replace(BASE, classes=4)
    made = []
    for seed in (0, 0, 1):
        new_g, new_d = networks(shape, seed=2)
        start_from(str(path), new_g, new_d, ("TUM", "NEW", "ADI", "OTHER"), seed=seed)
        made.append(new_g.mapping.embedding.clone())
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    z, _, images = inputs()
    torch.testing.assert_close(new_g(z, torch.full((4,), 2), None), old_g(z, torch.zeros(4, dtype=torch.long), None))
    torch.testing.assert_close(new_d(images, torch.zeros(4, dtype=torch.long)), old_d(images, torch.full((4,), 2)))
    for before, after in ((old_g.mapping.embedding, new_g.mapping.embedding), (old_d.embedding, new_d.embedding)):
        for k in (1, 3):
            apart = torch.cdist(after[k : k + 1], before).mean()
            assert 0.5 * torch.pdist(before).mean() < apart < 2 * torch.pdist(before).mean()
        assert not torch.equal(after[1], after[3])
    assert "NEW, OTHER" in said[1] and "LYM" in said[2]


@pytest.mark.parametrize("architecture", ["stylegan2", "lite"])
def test_a_larger_network_begins_as_the_smaller_one(tmp_path: Path, architecture: str, said: list[str]) -> None:
    small, large = (replace(BASE, size=s, architecture=architecture, channel_base=512) for s in (16, 32))
    path = checkpoint(tmp_path, small)
    old_g, _ = networks(small, seed=1)
    new_g, new_d = networks(large, seed=2)
    own = new_d.blocks["b32"].state_dict()
    start_from(str(path), new_g, new_d, CLASSES, seed=0)
    z, labels, _ = inputs()
    w = old_g.mapping(z, labels)
    torch.testing.assert_close(new_g.mapping(z, labels), w)
    if architecture == "stylegan2":
        # enlarged by the filter of the image path; the new image head adds its bias only
        bias = new_g.blocks["b32"].rgb_bias[:, None, None]
        torch.testing.assert_close(new_g.synthesise(w, None), up_2x(old_g.synthesise(w, None)) + bias)
    old_block, new_block = (g.blocks["b16"].state_dict() for g in (old_g, new_g))
    for name in old_block.keys() & new_block.keys():
        assert torch.equal(new_block[name], old_block[name]), name
    for name, value in new_d.blocks["b32"].state_dict().items():
        assert torch.equal(value, own[name])
    assert "anew" in said[0] and "blocks.b32" in said[0]


def test_a_smaller_network_keeps_the_common_layers(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, tiny_shape())
    old_g, old_d = networks(tiny_shape(), seed=1)
    new_g, new_d = networks(BASE, seed=2)
    start_from(str(path), new_g, new_d, CLASSES, seed=0)
    assert torch.equal(new_g.blocks["b16"].conv1.conv.weight, old_g.blocks["b16"].conv1.conv.weight)
    assert torch.equal(new_d.blocks["b8"].conv0.weight, old_d.blocks["b8"].conv0.weight)


def test_the_rate_of_the_mapping_network_may_differ(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, replace(BASE, mapping_lr=0.1))
    old_g, _ = networks(replace(BASE, mapping_lr=0.1), seed=1)
    new_g, new_d = networks(BASE, seed=2)
    start_from(str(path), new_g, new_d, CLASSES, seed=0)
    z, labels, _ = inputs()
    torch.testing.assert_close(new_g.mapping(z, labels), old_g.mapping(z, labels))


def test_the_global_random_state_stays(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, replace(BASE, classes=0), ())
    generator, discriminator = networks(BASE)
    torch.manual_seed(5)
    start_from(str(path), generator, discriminator, CLASSES, seed=0)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize(("changes", "match"), [
    ({"channel_base": 128}, "channel_base 256.*channel_base 128"),
    ({"z_dim": 16}, "z_dim 8.*z_dim 16"),
    ({"w_dim": 16}, "w_dim"),
    ({"mapping_depth": 5}, "mapping_depth=2"),
    ({"d_channel_max": 8}, "d_channel_max"),
    ({"architecture": "lite"}, "architecture"),
])  # fmt: skip
def test_another_width_is_refused(tmp_path: Path, changes: dict, match: str) -> None:
    generator, discriminator = networks(replace(BASE, **changes))
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        start_from(str(checkpoint(tmp_path, BASE)), generator, discriminator, CLASSES, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())


def test_classes_known_by_number_only_are_all_new(tmp_path: Path, said: list[str]) -> None:
    path = checkpoint(tmp_path, BASE, ())
    generator, discriminator = networks(BASE)
    start_from(str(path), generator, discriminator, CLASSES, seed=0)
    assert "ADI, LYM, TUM" in said[1]


def test_weights_without_a_discriminator(tmp_path: Path, said: list[str]) -> None:
    old_g, _ = networks(BASE, seed=1)
    tensors = {f"G_ema.{k}": v for k, v in old_g.state_dict().items()}
    card = {"kind": "gan", "classes": list(CLASSES), "shape": asdict(BASE)}
    path = save_checkpoint(tmp_path / "g.safetensors", tensors, card)
    generator, discriminator = networks(BASE, seed=2)
    before = discriminator.head.weight.clone()
    start_from(str(path), generator, discriminator, CLASSES, seed=0)
    assert torch.equal(discriminator.head.weight, before) and "no discriminator" in said[0]


def test_wrong_files_name_the_remedy(tmp_path: Path) -> None:
    pair: tuple[Generator, nn.Module] = networks(BASE)
    for name, match in (("gone.safetensors", "does not exist"), ("net.pkl", "histosynth convert"), ("", "is a folder")):
        with pytest.raises(CheckpointError, match=match):
            start_from(str(tmp_path / name), *pair, CLASSES, seed=0)
    path = checkpoint(tmp_path, BASE, card={"kind": "diffusion"})
    with pytest.raises(CheckpointError, match="diffusion"):
        start_from(str(path), *pair, CLASSES, seed=0)
    path = checkpoint(tmp_path, BASE, card={"shape": {"size": "huge"}})
    with pytest.raises(CheckpointError, match="start.safetensors"):
        start_from(str(path), *pair, CLASSES, seed=0)


def test_a_rate_that_lite_does_not_use_leaves_its_weights(tmp_path: Path) -> None:
    lite = replace(BASE, architecture="lite", mapping_lr=0.01)
    old_g, _ = networks(lite, seed=1)
    new_g, new_d = networks(replace(lite, mapping_lr=1.0), seed=2)
    start_from(str(checkpoint(tmp_path, lite)), new_g, new_d, CLASSES, seed=0)
    z, labels, _ = inputs()
    assert torch.equal(new_g.mapping(z, labels), old_g.mapping(z, labels))


def test_a_map_of_the_code_and_noise_begin_without_effect(tmp_path: Path, said: list[str]) -> None:
    plain = replace(BASE, start="constant", noise=False)
    old_g, _ = networks(plain, seed=1)
    new_g, new_d = networks(replace(BASE, start="code", noise=True), seed=2)
    start_from(str(checkpoint(tmp_path, plain)), new_g, new_d, CLASSES, seed=0)
    z, labels, _ = inputs()
    noise = new_g.draw_noise(4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(new_g(z, labels, noise=noise), old_g(z, labels, noise=None))
    assert "anew: blocks.b4" in said[0] and "no place" not in said[0]


def test_what_the_file_has_and_the_settings_have_no_place_for_is_said(tmp_path: Path, said: list[str]) -> None:
    rich = replace(BASE, start="code", noise=True)
    start_from(str(checkpoint(tmp_path, rich)), *networks(replace(BASE, noise=False)), CLASSES, seed=0)
    assert "no place: noise, blocks.b4.start)" in said[0]
    start_from(str(checkpoint(tmp_path, tiny_shape())), *networks(BASE), CLASSES, seed=0)
    assert "no place" not in said[-1], "layers of a larger size are not missed"
