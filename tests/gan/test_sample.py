"""Sampling: the same label and seed give the same tile, bit for bit, in any company; latents of every space."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from histosynth.core.checkpoint import load_checkpoint, save_checkpoint
from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.core.types import LatentGenerator
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.latents import between, crossed, span, spherical
from histosynth.gan.sample import GanGenerator, load_discriminator
from tests.gan.helpers import TINY, tiny_shape

CARD = {"classes": ["ADI", "LYM", "TUM"]}


def trained(shape: Shape) -> Generator:
    """A network that uses its noise and knows its means, as a trained one does."""
    torch.manual_seed(0)
    network = Generator(shape)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.endswith("noise_strength"):
                p.fill_(0.3)
            if "to_rgb" in name and "style" not in name:
                p.mul_(0.3)  # within [-1, 1]
    network.mapping.measure_mean(64)
    return network


@pytest.fixture(scope="module")
def maker() -> GanGenerator:
    shape = Shape(size=64, classes=3, channel_base=1024, channel_max=48, z_dim=32, w_dim=24)
    return GanGenerator(trained(shape), CARD, torch.device("cpu"))


@pytest.fixture(scope="module")
def small() -> GanGenerator:
    return GanGenerator(trained(tiny_shape()), CARD, torch.device("cpu"))


def test_protocol(maker: GanGenerator) -> None:
    assert isinstance(maker, LatentGenerator)
    assert maker.classes == ("ADI", "LYM", "TUM") and maker.size == 64
    parameters = set(maker.options)
    assert parameters < set(GanGenerator.sample.__annotations__)


@pytest.mark.parametrize("settings", [{}, {"truncation": 0.6, "truncation_cutoff": 4}, {"precision": "bf16"}])
def test_tiles_do_not_depend_on_the_batch_size(maker: GanGenerator, settings: dict) -> None:
    labels, seeds = [k % 3 for k in range(11)], [7 * k + 1 for k in range(11)]
    whole = torch.cat(list(maker.sample(labels, seeds, 16, **settings)))
    for size in (1, 3, 64):
        parts = list(maker.sample(labels, seeds, size, **settings))
        assert all(len(p) == size for p in parts[:-1])
        assert torch.equal(torch.cat(parts), whole)
    assert whole.dtype == torch.uint8 and whole.shape == (11, 3, 64, 64)


def test_tiles_do_not_depend_on_their_neighbours_or_place(maker: GanGenerator) -> None:
    (alone,) = maker.sample([1], [42])
    for place in range(8):
        labels, seeds = [k % 3 for k in range(8)], [1000 + 17 * k + place for k in range(8)]
        labels[place], seeds[place] = 1, 42
        (batch,) = maker.sample(labels, seeds)
        assert torch.equal(batch[place], alone[0]), place


def test_seed_and_label_both_matter(maker: GanGenerator) -> None:
    a, b, c = next(maker.sample([0, 0, 1], [1, 2, 1]))
    assert not torch.equal(a, b) and not torch.equal(a, c)


def test_bfloat16_tiles_are_nearly_the_same(small: GanGenerator) -> None:
    exact, rough = (next(small.sample([0, 1], [1, 2], precision=p)).float() for p in ("fp32", "bf16"))
    assert 0 < (exact - rough).abs().mean() < 8


def test_truncation_zero_leaves_only_the_noise(small: GanGenerator) -> None:
    wide, narrow = (next(small.sample([0] * 8, range(8), truncation=t)).float() for t in (1.0, 0.0))
    assert narrow.std(dim=0).mean() < wide.std(dim=0).mean()
    codes = small.latents([0, 0], [1, 2], truncation=0.0)
    torch.testing.assert_close(codes[0], codes[1])
    without = next(small.sample([0] * 3, range(3), truncation=0.0, noise="none"))
    assert torch.equal(without[0], without[1]) and torch.equal(without[1], without[2])


def test_the_cutoff_leaves_later_layers_alone(small: GanGenerator) -> None:
    free, pulled = (small.latents([0, 1], [1, 2], t) for t in (1.0, 0.3))
    codes = small.latents([0, 1], [1, 2], 0.3, "w+", truncation_cutoff=3)
    torch.testing.assert_close(codes[:, :3], pulled[:, None].expand(-1, 3, -1))
    torch.testing.assert_close(codes[:, 3:], free[:, None].expand(-1, small.layers - 3, -1))
    tiles = next(small.sample([0, 1], [1, 2], truncation=0.3, truncation_cutoff=3))
    assert torch.equal(tiles, small.decode(codes, [1, 2]))
    everything = next(small.sample([0, 1], [1, 2], truncation=0.3, truncation_cutoff=small.layers))
    assert torch.equal(everything, next(small.sample([0, 1], [1, 2], truncation=0.3)))


def test_truncation_towards_the_mean_of_all_classes(small: GanGenerator) -> None:
    codes = small.latents([0, 1, 2], [1, 2, 3], 0.0, truncation_centre="global")
    torch.testing.assert_close(codes, small.network.mapping.w_avg.expand(3, -1))


def test_every_space_decodes_to_the_tiles_of_sample(small: GanGenerator) -> None:
    labels, seeds = [0, 1, 2], [3, 4, 5]
    tiles = next(small.sample(labels, seeds))
    z, w, plus = (small.latents(labels, seeds, space=s) for s in ("z", "w", "w+"))
    assert z.shape == (3, 8) and w.shape == (3, 12) and plus.shape == (3, small.layers, 12)
    assert torch.equal(small.decode(z, seeds, labels=labels), tiles)
    assert torch.equal(small.decode(z, seeds, labels=labels, space="z"), tiles)
    assert torch.equal(small.decode(w, seeds), tiles) and torch.equal(small.decode(plus, seeds), tiles)


def test_noise_modes(small: GanGenerator) -> None:
    codes = small.latents([0, 0], [1, 2])
    same = codes[:1].expand(2, -1)
    random = small.decode(same, [1, 2], noise="random")
    assert not torch.equal(random[0], random[1])
    for mode in ("constant", "none"):
        one, two = small.decode(same, [1, 2], noise=mode)
        assert torch.equal(one, two)
    assert torch.equal(small.decode(codes), small.decode(codes, noise="constant"))
    given = torch.cat([p.flatten(1) for p in small.network.seeded_noise([1, 2])], dim=1)
    assert torch.equal(small.decode(codes, noise=given), small.decode(codes, [1, 2]))
    quiet = next(small.sample([0, 0], [1, 2], noise="none"))
    assert torch.equal(quiet, small.decode(codes, noise="none"))


def test_synthesise_is_differentiable_and_agrees_with_decode(small: GanGenerator) -> None:
    codes = small.latents([0, 1], [1, 2]).requires_grad_(True)
    images = small.synthesise(codes)
    tiles_again = ((images.detach() + 1) * 127.5).round().clamp(0, 255)
    assert (tiles_again - small.decode(codes.detach()).float()).abs().max() <= 1
    images.mean().backward()
    assert codes.grad is not None and codes.grad.abs().sum() > 0


def test_spherical_interpolation_stays_on_the_sphere() -> None:
    a, b = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    path = between(a, b, 5, "z")
    torch.testing.assert_close(path.norm(dim=1), torch.full((5,), 3.0))
    torch.testing.assert_close(path[2], torch.tensor([3.0, 3.0, 0.0]) / 2**0.5)
    torch.testing.assert_close(path[1] @ a / 9, torch.tensor(torch.pi / 8).cos())
    torch.testing.assert_close(path[[0, -1]], torch.stack([a, b]))
    for end in (a, -a, 2 * a):  # the same and the opposite direction have no circle of their own
        straight = spherical(a[None], end[None], torch.tensor([0.0]))
        torch.testing.assert_close(straight[0], a)
        assert torch.isfinite(between(a, end, 4, "z")).all()
    torch.testing.assert_close(between(a, b, 3, "w")[1], (a + b) / 2)


def test_interpolation_ends_at_its_ends(small: GanGenerator) -> None:
    ends = small.decode(small.latents([0, 2], [5, 6]))
    for space in ("z", "w"):
        tiles = small.interpolate((0, 2), (5, 6), 4, space)
        assert tiles.shape == (4, 3, 32, 32)
        # in z the last step maps another float rounding of the same embedding
        assert (tiles[[0, -1]].float() - ends.float()).abs().max() <= 1
    halfway = small.way((0, 2), (5, 5), 3, "w")[1]
    torch.testing.assert_close(halfway, small.latents([0, 2], [5, 5]).mean(dim=0))


def test_between_classes_the_embedding_is_interpolated(small: GanGenerator) -> None:
    codes = small.way((0, 2), (5, 5), 3, "z", truncation=0.5)
    mapping = small.network.mapping
    half = Generator(small.network.shape).mapping.requires_grad_(False)
    half.load_state_dict(mapping.state_dict())
    half.embedding[1] = (mapping.embedding[0] + mapping.embedding[2]) / 2
    half.w_mean[1] = (mapping.w_mean[0] + mapping.w_mean[2]) / 2
    z = small.latents([0], [5], space="z")
    torch.testing.assert_close(codes[1], half(z, torch.tensor([1]), 0.5)[0])
    assert torch.equal(small.network.mapping.embedding, mapping.embedding)


def test_style_mixing_takes_layers_from_the_columns(small: GanGenerator) -> None:
    rows, columns = [(0, 1), (1, 2)], [(2, 3), (0, 4), (1, 5)]
    left, top = (small.decode(small.latents(*zip(*s, strict=True))) for s in (rows, columns))
    nothing = small.mix(rows, columns, [small.layers - 1])
    everything = small.mix(rows, columns, range(small.layers))
    assert nothing.shape == (2, 3, 3, 32, 32)
    for i in range(2):
        for k in range(3):
            assert torch.equal(everything[i, k], top[k])
            assert not torch.equal(nothing[i, k], top[k])
    mixed = crossed(*(small.latents(*zip(*s, strict=True)) for s in (rows, columns)), small.layers, [0, 1])
    one = mixed[1, 2][None]
    torch.testing.assert_close(one[0, 0], small.latents([1], [5])[0])
    torch.testing.assert_close(one[0, 2], small.latents([1], [2])[0])
    assert torch.equal(small.mix(rows, columns, [0, 1])[1, 2], small.decode(one)[0])
    assert [*span(10, "coarse"), *span(10, "middle"), *span(10, "fine")] == list(range(10))
    assert not torch.equal(left[0], everything[0, 0])


@pytest.mark.parametrize("changes", [
    {"classes": 0}, {"architecture": "lite"}, {"class_embedding": "add"}, {"noise_const": True},
    {"classes": 0, "architecture": "lite", "noise": False},
])  # fmt: skip
def test_other_networks(changes: dict) -> None:
    shape = Shape(**({"size": 16, "classes": 3, **TINY} | changes))
    maker = GanGenerator(trained(shape), CARD, torch.device("cpu"))
    assert maker.classes == (("ADI", "LYM", "TUM") if shape.classes else ("tissue",))
    labels = [len(maker.classes) - 1] * 3
    tiles = torch.cat(list(maker.sample(labels, [1, 2, 3], 2, truncation=0.7, truncation_cutoff=2)))
    assert tiles.shape == (3, 3, 16, 16) and not torch.equal(tiles[0], tiles[1])
    z = maker.latents(labels, [1, 2, 3], space="z")
    plain = next(maker.sample(labels, [1, 2, 3]))
    assert torch.equal(maker.decode(z, [1, 2, 3], labels=labels), plain)
    assert torch.equal(maker.decode(maker.latents(labels, [1, 2, 3], space="w+"), [1, 2, 3]), plain)
    assert maker.interpolate((0, labels[0]), (1, 2), 3, "z").shape == (3, 3, 16, 16)
    assert maker.mix([(0, 1)], [(0, 2)], "fine").shape == (1, 1, 3, 16, 16)
    if not shape.classes:
        assert torch.equal(maker.decode(z, [1, 2, 3], space="z"), plain)


def test_nothing_asked_nothing_made(small: GanGenerator) -> None:
    assert list(small.sample([], [])) == []
    assert small.latents([], []).shape == (0, 12)
    assert small.latents([], [], space="w+").shape == (0, small.layers, 12)
    assert small.decode(torch.empty(0, 12)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda g: g.sample([3], [0]), SettingError, "Label 3"),
    (lambda g: g.sample([-1], [0]), SettingError, "Label -1"),
    (lambda g: g.sample([0, 1], [0]), SettingError, "2 labels came with 1 seeds"),
    (lambda g: g.sample([0], [-5]), SettingError, "Seed -5"),
    (lambda g: g.sample([0.5], [0]), SettingError, "0.5 is not a whole"),
    (lambda g: g.sample([0], [0], truncation=2.0), SettingError, "truncation"),
    (lambda g: g.sample([0], [0], truncation=float("nan")), SettingError, "truncation"),
    (lambda g: g.sample([0], [0], truncation_cutoff=99), SettingError, "truncation_cutoff"),
    (lambda g: g.sample([0], [0], truncation_centre="all"), SettingError, "truncation_centre"),
    (lambda g: g.sample([0], [0], batch_size=0), SettingError, "batch_size"),
    (lambda g: g.sample([0], [0], noise="loud"), SettingError, "noise"),
    (lambda g: g.sample([0], [0], precision="fp8"), SettingError, "precision"),
    (lambda g: g.latents([0], [0], space="x"), SettingError, "space"),
    (lambda g: g.latents([0], [0], truncation_cutoff=2), SettingError, "truncation_cutoff"),
    (lambda g: g.decode(torch.zeros(2, 5)), DataError, r"\(2, 5\)"),
    (lambda g: g.decode(torch.zeros(2, 8)), DataError, "with labels"),
    (lambda g: g.decode(torch.zeros(2, 3, 12)), DataError, r"\(2, 3, 12\)"),
    (lambda g: g.decode(torch.zeros(12)), DataError, "shape"),
    (lambda g: g.decode(torch.zeros(2, 12, dtype=torch.int64)), DataError, "int64"),
    (lambda g: g.decode(torch.tensor([[0.0] * 12, [float("nan")] * 12])), DataError, "Latent 1"),
    (lambda g: g.decode(torch.zeros(2, 12), space="w+"), DataError, "look like w"),
    (lambda g: g.decode(torch.zeros(2, 12), [1]), SettingError, "1 seeds"),
    (lambda g: g.decode(torch.zeros(2, 12), noise="random"), SettingError, "no seeds"),
    (lambda g: g.decode(torch.zeros(2, 12), noise=torch.zeros(2, 5)), DataError, "noise"),
    (lambda g: g.decode(torch.zeros(2, 8), labels=[0, 7]), SettingError, "Label 7"),
    (lambda g: g.interpolate((0, 1), (0, 1), 1), SettingError, "steps"),
    (lambda g: g.mix([], [(0, 0)]), SettingError, "0 x 1"),
    (lambda g: g.mix([(0, 0)], [(0, 0)], "top"), SettingError, "top"),
    (lambda g: g.mix([(0, 0)], [(0, 0)], [50]), SettingError, "50"),
])  # fmt: skip
def test_wrong_requests_are_refused_at_once(small: GanGenerator, call, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        call(small)


def test_checkpoints(tmp_path: Path, small: GanGenerator) -> None:
    judge = Discriminator(small.network.shape)
    shape = {k: getattr(small.network.shape, k) for k in ("size", "classes", *TINY)}
    card = CARD | {"kind": "gan", "shape": shape, "size": 32}
    tensors = {f"G_ema.{k}": v for k, v in small.network.state_dict().items()}
    tensors |= {f"D.{k}": v for k, v in judge.state_dict().items()}
    path = save_checkpoint(tmp_path / "gan.safetensors", tensors, card)
    made = next(GanGenerator.from_checkpoint(path, "cpu").sample([0, 1], [1, 2]))
    assert torch.equal(made, next(small.sample([0, 1], [1, 2])))
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load_discriminator(path, "cpu").features(images), judge.features(images))

    wrong = {
        "diffusion": (tensors, card | {"kind": "diffusion"}),
        "unexpected": (tensors, card | {"shape": shape | {"colour": "blue"}}),
        "size mismatch": (tensors, card | {"shape": shape | {"w_dim": 20}}),
        "const": ({k: v for k, v in tensors.items() if "const" not in k}, card),
    }
    for match, (content, described) in wrong.items():
        other = save_checkpoint(tmp_path / "other.safetensors", content, described)
        with pytest.raises(CheckpointError, match=match):
            GanGenerator.from_checkpoint(other, "cpu")
    assert load_checkpoint(path)[1]["classes"] == ["ADI", "LYM", "TUM"]
    assert replace(small.network.shape) == small.network.shape
