"""Losses: closed forms, independent formulas, and where the gradients go."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histosynth.core.errors import SettingError
from histosynth.core.types import EncoderCard
from histosynth.encoders.colour import ColourEncoder
from histosynth.gan.losses import (
    ChannelStatistics,
    PathLength,
    discriminator_loss,
    diversity_penalty,
    drift_penalty,
    feature_matching,
    generator_loss,
    perceptual_loss,
    r1_penalty,
    relativistic_loss,
    saturation_penalty,
    spread_penalty,
)


def tiles(n: int = 6, seed: int = 0, size: int = 8) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def slope_agrees(loss: Callable[[Tensor], Tensor], x: Tensor, tolerance: float = 0.01) -> Tensor:
    """The gradient of `loss` at x, which is not zero and agrees with a central difference along itself."""
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(x), x)
    length = float(gradient.norm())
    assert length > 0
    step = 0.01 * float(x.detach().norm())
    with torch.no_grad():
        ends = [float(loss(x + sign * step * gradient / length)) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(length, rel=tolerance)
    return gradient


@pytest.mark.parametrize(("real_label", "fake_label"), [(1.0, 0.0), (0.9, 0.0), (0.8, 0.1)])
@pytest.mark.parametrize("shape", [(7,), (7, 5)])
def test_adversarial_losses_are_cross_entropy(real_label, fake_label, shape) -> None:
    torch.manual_seed(0)
    real, fake = 3 * torch.randn(shape), 3 * torch.randn(shape)
    entropy = F.binary_cross_entropy_with_logits
    expected = entropy(real, torch.full_like(real, real_label)) + entropy(fake, torch.full_like(fake, fake_label))
    torch.testing.assert_close(discriminator_loss(real, fake, real_label, fake_label), expected)
    torch.testing.assert_close(generator_loss(fake), entropy(fake, torch.ones_like(fake)))


def test_logistic_losses_are_finite_far_out_and_least_where_they_should_be() -> None:
    far = torch.tensor([1e4, -1e4])
    assert torch.isfinite(discriminator_loss(far, -far)) and torch.isfinite(generator_loss(far))
    smoothed = torch.linspace(-6, 6, 2401)
    losses = torch.stack([discriminator_loss(x[None], torch.tensor([-50.0]), real_label=0.9) for x in smoothed])
    # smoothing asks for a logit of log(0.9 / 0.1) and no more
    assert float(smoothed[losses.argmin()]) == pytest.approx(math.log(9), abs=0.01)


def test_a_relativistic_fake_has_to_keep_up_with_the_real_tile_beside_it() -> None:
    torch.manual_seed(0)
    real, fake = torch.randn(2, 9, 3, requires_grad=True)
    ahead = real - fake
    entropy = F.binary_cross_entropy_with_logits(ahead, torch.ones_like(ahead))
    torch.testing.assert_close(relativistic_loss(real, fake), entropy)
    # a shift of all logits is nothing; what draws the fakes up is how far they are behind
    torch.testing.assert_close(relativistic_loss(fake + 7, real + 7), relativistic_loss(fake, real))
    (pull,) = torch.autograd.grad(relativistic_loss(fake, real), fake)
    torch.testing.assert_close(pull, -torch.sigmoid(ahead) / ahead.numel())


def test_the_mean_over_all_logits_is_the_mean_over_the_scales() -> None:
    torch.manual_seed(0)
    scales = [torch.randn(4, 16) for _ in range(3)]
    whole = generator_loss(torch.cat(scales, 1))
    torch.testing.assert_close(whole, torch.stack([F.softplus(-s).mean() for s in scales]).mean())


def test_r1_of_a_linear_discriminator_is_its_squared_weight() -> None:
    weight = torch.randn(3, 4, 4)
    x = tiles(5, size=4).requires_grad_(True)
    assert float(r1_penalty((x * weight).sum((1, 2, 3)), x)) == pytest.approx(float(weight.square().sum()), rel=1e-5)


def test_drift_is_the_mean_square() -> None:
    logits = torch.tensor([1.0, -2.0, 3.0])
    assert float(drift_penalty(logits)) == pytest.approx(14 / 3)
    slope_agrees(drift_penalty, logits)


class Linear(nn.Module):
    """w [N, k] -> images [N, 3, 4, 4]; its Jacobian is `matrix`."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        orthogonal = torch.linalg.qr(torch.randn(48, 6, dtype=torch.double))[0]
        self.matrix = nn.Parameter(scale * orthogonal)

    def forward(self, w: Tensor) -> Tensor:
        return (w @ self.matrix.t()).view(-1, 3, 4, 4)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_path_lengths_are_those_of_the_jacobian() -> None:
    torch.manual_seed(0)
    network, path = Linear(), PathLength(decay=0.25, weight=2.0)
    w = torch.randn(5, 6, dtype=torch.double, requires_grad=True)
    penalty = path.penalty(network(w), w, draw())
    noise = torch.randn(5, 3, 4, 4, generator=draw(), dtype=torch.double) / 4  # sqrt(16 pixels)
    lengths = (noise.flatten(1) @ network.matrix).norm(dim=1)
    mean = 0.25 * float(lengths.detach().mean())
    assert path.mean == pytest.approx(mean)
    torch.testing.assert_close(penalty, 2 * (lengths - mean).square().mean())


def test_path_lengths_of_layers_are_averaged_over_them() -> None:
    torch.manual_seed(0)
    path, matrix = PathLength(decay=1.0), torch.randn(48, 6)
    w = torch.randn(2, 3, 6, requires_grad=True)
    factors = torch.tensor([1.0, 2.0, 0.0])
    images = ((w * factors[:, None]).sum(1) @ matrix.t()).view(2, 3, 4, 4)
    path.penalty(images, w, draw())
    noise = torch.randn(2, 48, generator=draw()) / 4
    per_layer = [(f * noise @ matrix).square().sum(1) for f in factors]
    assert path.mean == pytest.approx(float(torch.stack(per_layer).mean(0).sqrt().mean()), rel=1e-5)


def test_the_path_length_penalty_has_a_second_derivative() -> None:
    torch.manual_seed(0)
    network, w = Linear(), torch.randn(4, 6, dtype=torch.double)

    def penalty() -> Tensor:
        code = w.clone().requires_grad_(True)
        path = PathLength(decay=0.0)
        path.restore({"mean": 3.0})
        return path.penalty(torch.tanh(network(code)), code, draw())

    (gradient,) = torch.autograd.grad(penalty(), network.matrix)
    direction = torch.randn_like(network.matrix)
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            network.matrix += sign * 1e-5 * direction
        ends.append(float(penalty().detach()))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-5)


def test_path_length_makes_all_directions_alike() -> None:
    """The minimum of equation 4 is an orthogonal Jacobian: singular values come together."""
    torch.manual_seed(0)
    network, path = Linear(), PathLength(decay=0.1)
    with torch.no_grad():
        network.matrix *= torch.tensor([0.2, 0.5, 1.0, 2.0, 3.0, 4.0])
    before = torch.linalg.cond(network.matrix.detach())
    for step in range(150):
        w = torch.randn(16, 6, dtype=torch.double, generator=draw(step)).requires_grad_(True)
        (gradient,) = torch.autograd.grad(path.penalty(network(w), w, draw(step)), network.matrix)
        with torch.no_grad():
            network.matrix -= 0.3 * gradient
    assert before > 15 and torch.linalg.cond(network.matrix.detach()) < 3


def test_path_length_resumes() -> None:
    torch.manual_seed(0)
    network, whole, half = Linear(), PathLength(), PathLength()
    codes = [torch.randn(3, 6, dtype=torch.double, requires_grad=True) for _ in range(6)]
    for step, w in enumerate(codes):
        whole.penalty(network(w), w, draw(step))
    for step, w in enumerate(codes[:3]):
        half.penalty(network(w), w, draw(step))
    resumed = PathLength()
    resumed.restore(half.state())
    for step, w in enumerate(codes[3:], 3):
        resumed.penalty(network(w), w, draw(step))
    assert resumed.state() == whole.state() and whole.mean > 0


def test_channel_statistics_follow_the_real_tiles_and_pull_the_fakes() -> None:
    statistics, fake = ChannelStatistics(decay=0.9), tiles(seed=1)
    assert float(statistics.penalty(fake)) == 0.0
    bright = 0.2 * tiles(seed=2) + 0.5
    statistics.update(bright)
    assert float(statistics.penalty(bright)) == pytest.approx(0, abs=1e-9)
    unit = ((fake + 1) / 2).transpose(0, 1).flatten(1), ((bright + 1) / 2).transpose(0, 1).flatten(1)
    means, deviations = [u.mean(1) for u in unit], [u.std(1, correction=0) for u in unit]
    expected = F.mse_loss(*means) + F.mse_loss(*deviations)
    torch.testing.assert_close(statistics.penalty(fake), expected, rtol=1e-4, atol=1e-7)
    gradient = slope_agrees(statistics.penalty, fake)
    assert (gradient.sum() < 0).all()  # brighter, please

    statistics.update(fake)
    moved = statistics.state()["mean_0"]
    assert moved == pytest.approx(0.9 * float(means[1][0]) + 0.1 * float(means[0][0]), rel=1e-5)
    again = ChannelStatistics(decay=0.9)
    again.restore(statistics.state())
    assert float(again.penalty(fake)) == float(statistics.penalty(fake))
    again.update(bright)
    statistics.update(bright)
    assert again.state() == statistics.state()


class Smooth:
    """An encoder whose features are smooth functions of the pixels."""

    card = EncoderCard("smooth", 8, 8, "MIT")

    def __init__(self) -> None:
        self.weight = torch.randn(8, 192, generator=draw(7)) / 14

    def encode(self, images: Tensor) -> Tensor:
        return self.differentiable(images.float() / 127.5 - 1)

    def differentiable(self, images: Tensor) -> Tensor:
        return torch.tanh(images.flatten(1) @ self.weight.t())


@pytest.mark.parametrize("paired", [False, True])
def test_the_perceptual_loss_reaches_the_fakes_through_the_encoder(paired) -> None:
    real = tiles(seed=3)
    gradient = slope_agrees(lambda x: perceptual_loss(Smooth(), x, real, paired), tiles(seed=4))
    assert (gradient.abs().sum((1, 2, 3)) > 0).all()
    assert float(perceptual_loss(Smooth(), real, real, paired)) == 0.0
    assert real.grad is None


def test_the_perceptual_loss_compares_batches_and_not_tile_by_tile() -> None:
    real = tiles(seed=3)
    shuffled = real[torch.tensor([3, 4, 5, 0, 1, 2])]
    assert float(perceptual_loss(Smooth(), shuffled, real)) == pytest.approx(0, abs=1e-10)
    assert float(perceptual_loss(Smooth(), shuffled, real, paired=True)) > 0.01
    # fakes that are all alike: the paired loss likes them better than real variety, the other does not
    alike = real.mean(0, keepdim=True).expand_as(real)
    other = perceptual_loss(Smooth(), shuffled, real, paired=True)
    assert perceptual_loss(Smooth(), alike, real, paired=True) < other
    assert float(perceptual_loss(Smooth(), alike, real)) > 0.001


def test_an_encoder_that_cuts_the_gradient_is_refused() -> None:
    class Blind(Smooth):
        @torch.no_grad()
        def differentiable(self, images: Tensor) -> Tensor:
            return super().differentiable(images)

    with pytest.raises(SettingError, match="smooth.*no gradient"):
        perceptual_loss(Blind(), tiles(seed=4).requires_grad_(True), tiles())


def test_the_perceptual_loss_takes_an_encoder_of_the_project() -> None:
    slope_agrees(lambda x: perceptual_loss(ColourEncoder(), x, 0.3 * tiles(seed=3)), 0.8 * tiles(seed=4), 0.1)


def test_feature_matching_of_batch_means_and_of_pairs() -> None:
    torch.manual_seed(0)
    fake, real = torch.randn(4, 5, 2, 2), torch.randn(4, 5, 2, 2, requires_grad=True)
    expected = (fake.mean(0) - real.mean(0)).square().mean()
    torch.testing.assert_close(feature_matching(fake, real), expected.detach())
    torch.testing.assert_close(feature_matching(fake, real, paired=True), (fake - real).square().mean().detach())
    assert float(feature_matching(real.flip(0), real).detach()) == pytest.approx(0, abs=1e-12)
    slope_agrees(lambda x: feature_matching(x, real), fake)
    fake.requires_grad_(True)
    feature_matching(fake, real).backward()
    assert real.grad is None and fake.grad is not None


def test_saturation_counts_from_the_limit_and_spares_classes_that_are_white() -> None:
    assert float(saturation_penalty(torch.full((2, 3, 4, 4), 0.6))) == pytest.approx(0, abs=1e-12)
    white = torch.full((2, 3, 4, 4), 0.9)
    assert float(saturation_penalty(white)) == pytest.approx(0.09, rel=1e-5)
    assert float(saturation_penalty(-white)) == pytest.approx(0.09, rel=1e-5)
    assert float(saturation_penalty(white, real=white)) == 0.0
    assert float(saturation_penalty(white, real=0.8 * white)) == pytest.approx(0.18**2, rel=1e-5)
    assert (slope_agrees(saturation_penalty, white) > 0).all()


def test_diversity_looks_across_the_batch_and_not_inside_the_tile() -> None:
    rich = tiles(1).expand(6, -1, -1, -1)
    assert float(diversity_penalty(rich)) == pytest.approx(0.01, rel=1e-5)
    assert float(diversity_penalty(tiles())) == 0.0
    nearly = rich + 0.05 * tiles(seed=1)
    slope_agrees(diversity_penalty, nearly)
    flat = torch.linspace(-0.5, 0.5, 6)[:, None, None, None].expand(6, 3, 4, 4)
    assert float(diversity_penalty(flat, floor=0.2)) == pytest.approx((0.2 - 7 / 60) ** 2, rel=1e-4)


def test_spread_is_missed_where_tiles_share_a_layout() -> None:
    real = [torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))]
    assert float(spread_penalty(real, real)) < 1e-6
    assert float(spread_penalty([2 * real[0]], real)) == 0.0  # more than real tiles is no fault
    assert float(spread_penalty([real[0] / 2], real)) == pytest.approx(0.25, rel=1e-3)
    alike = [real[0][:1].expand(16, -1, -1, -1)]
    assert float(spread_penalty(alike, real)) == pytest.approx(1.0, abs=0.01)
    assert float(spread_penalty([real[0][:1]], [real[0][:1]])) == 0.0  # one tile has no spread


def test_the_gradient_of_spread_is_finite_for_equal_tiles_and_drives_them_apart() -> None:
    real = [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))]
    fake = (real[0][:1] + 1e-3 * torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(2))).requires_grad_()
    before = spread_penalty([fake], real)
    before.backward()
    assert fake.grad is not None and torch.isfinite(fake.grad).all() and fake.grad.abs().sum() > 0
    assert spread_penalty([(fake - 10 * fake.grad).detach()], real) < before.detach()


def test_spread_is_compared_within_classes_and_sees_one_layout_in_many_colours() -> None:
    draw = torch.Generator().manual_seed(3)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    kinds = 5 * torch.randn(4, 3, 4, 4, generator=draw)[labels]
    real = [kinds + torch.randn(8, 3, 4, 4, generator=draw)]
    copies = [real[0][::2].repeat_interleave(2, dim=0)]  # two equal tiles of every class
    assert float(spread_penalty(copies, real)) < 0.1  # classes differ enough to hide it
    assert float(spread_penalty(copies, real, labels)) == pytest.approx(1.0, abs=0.01)
    tinted = [copies[0] + 2 * torch.randn(8, 3, 1, 1, generator=draw)]  # one layout, other colours
    assert float(spread_penalty(tinted, real, labels)) == pytest.approx(0.5, abs=0.01)
    order = torch.randperm(8, generator=draw)
    fake = [0.5 * real[0]]
    torch.testing.assert_close(
        spread_penalty([fake[0][order]], [real[0][order]], labels[order]), spread_penalty(fake, real, labels)
    )
    assert float(spread_penalty([fake[0][::2]], [real[0][::2]], labels[::2])) == 0.0  # no class has two
