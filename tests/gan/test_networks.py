"""Generator, discriminator and losses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from histosynth.core.errors import SettingError
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.losses import default_r1_gamma, discriminator_loss, generator_loss, r1_penalty
from tests.gan.helpers import tiny_shape


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


@pytest.mark.parametrize("bad", [{"size": 48}, {"size": 8}, {"classes": 0}, {"mapping_depth": 0}])
def test_impossible_shapes_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(SettingError, match=next(iter(bad))):
        Shape(**bad)
