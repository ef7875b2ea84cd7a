"""The building blocks against independent references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import upfirdn

from histosynth.gan.layers import (
    GAIN,
    EqualConv,
    EqualLinear,
    MinibatchStd,
    ModulatedConv,
    blur,
    normalise,
    up_2x,
)

TAPS = np.array([1.0, 3.0, 3.0, 1.0])


def grouped_reference(conv: ModulatedConv, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Equations 1 and 3 of StyleGAN2 as written: every sample has its own weights."""
    n = len(x)
    style = conv.style(w)
    weight = conv.weight[None] * conv.weight_gain * style[:, None, :, None, None]
    if conv.demodulate:
        weight = weight / (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
    outputs, inputs, k = weight.shape[1], weight.shape[2], weight.shape[3]
    if not conv.up:
        flat = x.reshape(1, -1, *x.shape[2:])
        y = F.conv2d(flat, weight.reshape(-1, inputs, k, k), padding=k // 2, groups=n)
        return y.view(n, outputs, *y.shape[2:])
    zeros = torch.zeros(n, inputs, 2 * x.shape[2] - 1, 2 * x.shape[3] - 1)
    zeros[:, :, ::2, ::2] = x
    kernels = weight.flip((3, 4)).reshape(-1, inputs, k, k)
    y = F.conv2d(zeros.reshape(1, -1, *zeros.shape[2:]), kernels, padding=k - 1, groups=n)
    y = y.view(n * outputs, 1, *y.shape[2:])
    taps = torch.from_numpy(np.outer(TAPS, TAPS) / 64 * 4).float()[None, None]
    return F.conv2d(y, taps, padding=1).view(n, outputs, 2 * x.shape[2], 2 * x.shape[3])


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_convolution_equals_the_grouped_one(up: bool, demodulate: bool) -> None:
    torch.manual_seed(0)
    conv = ModulatedConv(6, 5, 3, 8, demodulate=demodulate, up=up)
    x, w = torch.randn(4, 6, 8, 8), torch.randn(4, 8)
    torch.testing.assert_close(conv(x, w), grouped_reference(conv, x, w), rtol=1e-4, atol=1e-5)


def test_demodulated_output_has_unit_variance() -> None:
    torch.manual_seed(0)
    conv = ModulatedConv(64, 64, 3, 8)
    y = conv(torch.randn(2, 64, 32, 32), 3 * torch.randn(2, 8))
    assert 0.9 < y[:, :, 1:-1, 1:-1].std().item() < 1.1


def test_blur_equals_upfirdn() -> None:
    x = torch.randn(2, 3, 9, 9)
    want = upfirdn(TAPS / 8, upfirdn(TAPS / 8, x.numpy(), axis=2), axis=3)  # full convolution: pad 3
    np.testing.assert_allclose(blur(x, 3).numpy(), want, atol=1e-6)
    np.testing.assert_allclose(blur(x, 1).numpy(), want[:, :, 2:-2, 2:-2], atol=1e-6)


def test_up_2x_equals_upfirdn_with_replicated_edges() -> None:
    x = torch.randn(1, 2, 6, 6)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    want = upfirdn(TAPS / 4, upfirdn(TAPS / 4, padded, up=2, axis=2), up=2, axis=3)
    np.testing.assert_allclose(up_2x(x).numpy(), want[:, :, 5:17, 5:17], atol=1e-6)


def test_downsampling_convolution_equals_upfirdn() -> None:
    conv = EqualConv(2, 2, 1, active=False, down=True)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(2)[:, :, None, None] / conv.weight_gain)
    x = torch.randn(1, 2, 8, 8)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    want = upfirdn(TAPS / 8, upfirdn(TAPS / 8, padded, down=1, axis=2), down=1, axis=3)[:, :, 3:-3:2, 3:-3:2]
    np.testing.assert_allclose(conv(x).detach().numpy(), want, atol=1e-6)


def test_equalised_learning_rate() -> None:
    torch.manual_seed(0)
    fast, slow = EqualLinear(512, 512), EqualLinear(512, 512, lr_multiplier=0.01)
    x = torch.randn(64, 512)
    for layer in (fast, slow):  # the same function scale, whatever the multiplier
        assert layer(x).std().item() == pytest.approx(1.0, abs=0.05)
    assert slow.weight.std().item() == pytest.approx(100, rel=0.02)
    # Adam moves every weight by about lr: the effective move of the slow layer is a hundredth
    for layer in (fast, slow):
        before = layer.weight * layer.weight_gain
        adam = torch.optim.Adam(layer.parameters(), lr=0.01)
        layer(x).square().sum().backward()
        adam.step()
        layer.moved = (layer.weight * layer.weight_gain - before).abs().mean().item()
    assert slow.moved / fast.moved == pytest.approx(0.01, rel=0.05)


def test_active_layers_keep_the_mean_square() -> None:
    torch.manual_seed(0)
    assert EqualLinear(256, 256, active=True)(torch.randn(99, 256)).square().mean().item() == pytest.approx(
        1.04, abs=0.1
    )
    y = EqualConv(64, 64, 3)(torch.randn(2, 64, 16, 16))[:, :, 1:-1, 1:-1]
    assert y.square().mean().item() == pytest.approx(1.04, abs=0.1)
    assert pytest.approx(math.sqrt(2)) == GAIN


def test_normalise_gives_unit_mean_square() -> None:
    torch.testing.assert_close(
        normalise(torch.randn(4, 32) * 7).square().mean(dim=1), torch.ones(4), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("count", "group"), [(8, 4), (6, 3), (5, 1), (1, 1), (3, 3)])
def test_minibatch_std(count: int, group: int) -> None:
    x = torch.randn(count, 4, 2, 2)
    y = MinibatchStd(4)(x)
    assert y.shape == (count, 5, 2, 2)
    for first in range(0, count, group):
        want = x[first : first + group].var(dim=0, unbiased=False).add(1e-8).sqrt().mean()
        torch.testing.assert_close(y[first : first + group, 4], want.expand(group, 2, 2))
