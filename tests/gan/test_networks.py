"""Generator, discriminator and losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from histosynth.core.errors import SettingError
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.layers import place
from histosynth.gan.losses import default_r1_gamma, discriminator_loss, generator_loss, r1_penalty
from tests.gan import reference
from tests.gan.helpers import TINY, tiny_shape

# the options in which networks of StyleGAN2 and StyleGAN2-ADA differ
VARIANTS = {
    "ours": {},
    "ada": {"label_conditioning": "mapping", "conv_clamp": 256.0, "noise_const": True, "d_mapping_depth": 3},
    "clamped": {"conv_clamp": 0.7, "mapping_depth": 4, "label_conditioning": "mapping", "cmap_dim": 5},
    "unconditional": {"classes": 0},
    "start from the code": {"start": "code"},
    "skip": {"discriminator": "skip", "conv_clamp": 0.9, "mbstd_channels": 2, "mbstd_group": 0},
    "orig": {"discriminator": "orig", "label_conditioning": "none", "mbstd_group": 2},
    "no statistics": {"mbstd_channels": 0, "mapping_lr": 1.0},
    "wide discriminator": {"d_channel_base": 512, "d_channel_max": 24, "d_conv_clamp": 0.5, "channel_min": 10},
}


def variant(name: str, size: int = 32) -> Shape:
    return Shape(**{"size": size, "classes": 3} | TINY | VARIANTS[name])


def networks(shape: Shape) -> tuple[Generator, Discriminator, torch.Tensor, torch.Tensor]:
    """Both networks with every bias and strength moved off its start, and codes and labels for four tiles."""
    torch.manual_seed(0)
    pair = Generator(shape), Discriminator(shape)
    with torch.no_grad():
        for network in pair:
            for parameter in network.parameters():
                if parameter.ndim <= 1:
                    parameter += 0.3 * torch.randn_like(parameter)
    return *pair, torch.randn(4, shape.z_dim), torch.tensor([0, 2, 1, 2])


@pytest.mark.parametrize("name", VARIANTS)
def test_generator_equals_the_equations(name: str) -> None:
    shape = variant(name)
    network, _, z, labels = networks(shape)
    w = reference.mapping(network.mapping, z, labels, shape.mapping_lr)
    torch.testing.assert_close(network.mapping(z, labels), w, rtol=1e-4, atol=1e-5)
    codes = w[:, None] + 0.3 * torch.randn(4, network.layers, shape.w_dim)  # each layer must read its own
    for noise in (None, network.const_noise(), network.draw_noise(4, torch.Generator().manual_seed(0))):
        want = reference.generate(network, codes, noise)
        torch.testing.assert_close(network.synthesise(codes, noise), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_discriminator_and_its_penalty_equal_the_equations(name: str) -> None:
    shape = variant(name)
    _, judge, _, labels = networks(shape)
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    found, parameters = [], list(judge.parameters())
    for logits in (judge(images, labels), reference.judge(judge, images, labels)):
        penalty = r1_penalty(logits, images)
        gradients = torch.autograd.grad(penalty, parameters, allow_unused=True, materialize_grads=True)
        found.append((logits, penalty, gradients))
    (fast, penalty, gradients), (slow, want, wanted) = found
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(penalty, want, rtol=1e-3, atol=1e-6)
    assert sum(bool(g.any()) for g in wanted) > 10
    for one, two in zip(gradients, wanted, strict=True):
        assert (one - two).abs().max() <= 1e-3 * two.abs().max() + 1e-7


def test_path_lengths_and_their_gradients_equal_the_equations() -> None:
    network, _, z, labels = networks(variant("ada"))
    noise, direction = network.const_noise(), torch.randn(4, 3, 32, 32)
    found = []
    parameters = list(network.parameters())
    for synthesise in (network.synthesise, lambda w, n: reference.generate(network, w, n)):
        w = network.codes(z, labels)
        (slope,) = torch.autograd.grad((synthesise(w, noise) * direction).sum(), w, create_graph=True)
        lengths = slope.square().sum(dim=2).mean(dim=1).sqrt()
        total = lengths.square().sum()
        found.append((lengths, torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert sum(bool(g.any()) for g in found[1][1]) > 20
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert (one - two).abs().max() <= 1e-3 * two.abs().max() + 1e-6


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("architecture", ["stylegan2", "lite"])
def test_every_size(size: int, architecture: str) -> None:
    shape = Shape(size, 2, 64, 8, 4, 4, architecture=architecture, channel_min=2)
    network, judge = Generator(shape), Discriminator(shape)
    with torch.inference_mode():
        images = network(torch.randn(1, 4), torch.tensor([1]), network.const_noise())
        assert images.shape == (1, 3, size, size) and torch.isfinite(images).all()
        assert judge(images, torch.tensor([1])).shape == (1,)


@pytest.mark.parametrize("size", [16, 32, 128])
def test_shapes_and_gradients(size: int) -> None:
    shape = tiny_shape(size=size)
    network, judge = Generator(shape), Discriminator(shape)
    z, labels = torch.randn(2, shape.z_dim), torch.tensor([0, 2])
    images = network(z, labels, network.draw_noise(2, torch.Generator().manual_seed(0)))
    assert images.shape == (2, 3, size, size) and images.dtype == torch.float32
    generator_loss(judge(images, labels)).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert judge.features(images).shape == (2, shape.channels(4), 4, 4)


def test_bfloat16_is_close_to_float32() -> None:
    torch.manual_seed(0)
    shape = tiny_shape()
    network, judge = Generator(shape), Discriminator(shape)
    z, labels = torch.randn(4, shape.z_dim), torch.tensor([0, 1, 2, 0])
    exact, rough = network(z, labels, None), network(z, labels, None, dtype=torch.bfloat16)
    assert rough.dtype == torch.float32
    assert (exact - rough).abs().mean() < 0.05 * exact.std()
    judged = judge(exact, labels, torch.bfloat16)
    assert judged.dtype == torch.float32
    torch.testing.assert_close(judged, judge(exact, labels), rtol=0.1, atol=0.1)


def test_the_class_reaches_both_networks() -> None:
    torch.manual_seed(0)
    shape = tiny_shape()
    network, judge = Generator(shape), Discriminator(shape)
    z = torch.randn(1, shape.z_dim)
    a, b = (network(z, torch.tensor([k]), None) for k in (0, 1))
    assert (a - b).abs().max() > 1e-3
    assert judge(a, torch.tensor([0])).item() != judge(a, torch.tensor([1])).item()


def test_style_mixing_uses_the_second_code_from_the_crossover_on() -> None:
    torch.manual_seed(0)
    shape = tiny_shape()
    network = Generator(shape)
    z, z2, labels = torch.randn(2, shape.z_dim), torch.randn(2, shape.z_dim), torch.tensor([0, 1])
    end = torch.full((2,), network.layers)
    torch.testing.assert_close(network(z, labels, None, z2, end), network(z, labels, None))
    torch.testing.assert_close(network(z, labels, None, z2, end * 0), network(z2, labels, None))
    mixed = network(z, labels, None, z2, torch.tensor([2, network.layers]))
    assert (mixed[0] - network(z, labels, None)[0]).abs().max() > 1e-3


def test_truncation_pulls_towards_the_class_mean() -> None:
    torch.manual_seed(0)
    network = Generator(tiny_shape())
    network.mapping.measure_mean(draws=256)
    z, labels = torch.randn(3, 8), torch.tensor([0, 1, 2])
    w, mean = network.mapping(z, labels), network.mapping.w_mean
    torch.testing.assert_close(network.mapping(z, labels, 0.0), mean)
    torch.testing.assert_close(network.mapping(z, labels, 0.5), (w + mean) / 2)


def test_truncation_of_the_coarse_layers_towards_either_mean() -> None:
    network, _, z, labels = networks(variant("ours"))
    network.mapping.measure_mean(draws=64)
    w, means = network.mapping(z, labels), network.mapping.w_mean
    torch.testing.assert_close(network.mapping.w_avg, means.mean(dim=0))
    torch.testing.assert_close(network.codes(z, labels), w[:, None].expand(-1, network.layers, -1))
    near = network.codes(z, labels, 0.25, cutoff=3)
    torch.testing.assert_close(near[:, :3], (means[labels] + (w - means[labels]) / 4)[:, None].expand(-1, 3, -1))
    assert torch.equal(near[:, 3:], network.codes(z, labels)[:, 3:])
    far = network.codes(z, labels, 0.25, centre="global")
    torch.testing.assert_close(far[:, -1], network.mapping.w_avg + (w - network.mapping.w_avg) / 4)
    torch.testing.assert_close(network.mapping(z, labels, 0.25, "global"), far[:, 0])


def test_an_unconditional_network_reads_no_label() -> None:
    network, judge, z, _ = networks(variant("unconditional"))
    network.mapping.measure_mean(draws=64)
    assert network.mapping.w_mean.shape == (1, 12) and judge.embedding is None
    images = network.synthesise(network.codes(z, None, 0.5), None)
    assert torch.equal(judge(images, None), judge(images, torch.tensor([7, 8, 9, 10])))


def test_weights_from_before_the_global_mean_still_load() -> None:
    network, *_ = networks(variant("ours"))
    network.mapping.measure_mean(draws=64)
    state = network.state_dict()
    del state["mapping.w_avg"]
    fresh = Generator(variant("ours"))
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.mapping.w_avg, network.mapping.w_avg)


def test_noise_is_random_constant_or_none() -> None:
    network, _, z, labels = networks(variant("ours"))
    draw = [network(z, labels, network.draw_noise(4, torch.Generator().manual_seed(k))) for k in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.allclose(draw[0], draw[2])
    same = [network(z, labels, network.const_noise()) for _ in range(2)]
    assert torch.equal(*same) and not torch.allclose(same[0], network(z, labels, None))
    torch.testing.assert_close(network(z, labels, network.seeded_noise([0] * 4)), same[0])
    stored = Generator(variant("ada"))
    again = Generator(variant("ada"))
    assert not torch.equal(stored.const_noise()[-1], again.const_noise()[-1])
    again.load_state_dict(stored.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(stored.const_noise(), again.const_noise(), strict=True))


def test_a_network_without_noise_inputs() -> None:
    shape = Shape(32, 3, **TINY, noise=False)
    network = Generator(shape)
    assert network.noise_shapes() == [] and not any("noise" in name for name, _ in network.named_parameters())
    z, labels = torch.randn(2, 8), torch.tensor([0, 1])
    images = [network(z, labels, noise) for noise in (None, network.const_noise(), network.seeded_noise([1, 2]))]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


def test_placing_changes_the_layout_only() -> None:
    network, judge, z, labels = networks(variant("ada"))
    before = network(z, labels, None)
    logits = judge(before, labels)
    network, judge = place(network, torch.device("cpu")), place(judge, torch.device("cpu"))
    torch.testing.assert_close(network(z, labels, None), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(judge(before, labels), logits, rtol=1e-4, atol=1e-5)


def test_r1_equals_finite_differences_and_has_the_right_gradient() -> None:
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 1)).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.double, requires_grad=True)
    value = r1_penalty(judge(x).squeeze(1), x)

    def numeric(step: float = 1e-5) -> float:
        total = 0.0
        with torch.no_grad():
            for i in range(x[0].numel()):
                bump = torch.zeros(16, dtype=torch.double)
                bump[i] = step
                move = bump.view(1, 1, 4, 4)
                total += ((judge(x + move) - judge(x - move)) / (2 * step)).square().mean().item()
        return total

    assert value.item() == pytest.approx(numeric(), rel=1e-6)
    weight = judge[0].weight
    (gradient,) = torch.autograd.grad(value, weight)
    with torch.no_grad():
        weight[0, 0, 1, 1] += 1e-4
        up = numeric()
        weight[0, 0, 1, 1] -= 2e-4
        down = numeric()
    assert gradient[0, 0, 1, 1].item() == pytest.approx((up - down) / 2e-4, rel=1e-3)


def test_r1_runs_through_the_real_discriminator() -> None:
    shape = tiny_shape()
    judge = Discriminator(shape)
    x = torch.rand(4, 3, 32, 32).requires_grad_(True)
    r1_penalty(judge(x, torch.tensor([0, 1, 2, 0])), x).backward()
    gradient = judge.from_rgb.weight.grad
    assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_losses_are_the_logistic_ones() -> None:
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    one, zero = torch.ones(2), torch.zeros(2)
    entropy = F.binary_cross_entropy_with_logits
    torch.testing.assert_close(generator_loss(fake), entropy(fake, one))
    torch.testing.assert_close(discriminator_loss(real, fake), entropy(real, one) + entropy(fake, zero))
    assert default_r1_gamma(64, 16) == pytest.approx(0.0512)


def test_freezing_the_finest_blocks() -> None:
    judge = Discriminator(tiny_shape())
    judge.freeze_highest(1)
    frozen = {name.split(".")[0] for name, p in judge.named_parameters() if not p.requires_grad}
    assert frozen == {"from_rgb", "blocks"}
    assert not judge.blocks["b32"].conv0.weight.requires_grad
    assert judge.blocks["b16"].conv0.weight.requires_grad


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 48}, {"size": 8}, {"size": 2048}, {"classes": -1}, {"mapping_depth": 0}, {"mapping_lr": 0.0},
        {"architecture": "stylegan3"}, {"label_conditioning": "film"}, {"class_embedding": "sum"},
        {"discriminator": "resnext"}, {"conv_clamp": 0.0}, {"output_clamp": -1.0}, {"mbstd_channels": 3},
        {"mbstd_group": -1}, {"cmap_dim": -1},
    ],
)  # fmt: skip
def test_impossible_shapes_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(bad))):
        Shape(**bad)
