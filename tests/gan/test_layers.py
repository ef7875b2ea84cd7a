"""The building blocks against independent references."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import upfirdn
from torch.autograd import gradcheck, gradgradcheck

from histosynth.gan.layers import (
    GAIN,
    EqualConv,
    EqualLinear,
    MinibatchStd,
    ModulatedConv,
    activate,
    blur,
    clamped,
    convolve,
    down_2x,
    normalise,
    up_2x,
)
from tests.gan import reference

TAPS = np.array([1.0, 3.0, 3.0, 1.0])


@pytest.mark.parametrize(("up", "repeat"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("demodulate", [False, True])
def test_modulated_convolution_equals_the_grouped_one(up: bool, repeat: bool, demodulate: bool) -> None:
    torch.manual_seed(0)
    conv = ModulatedConv(6, 5, 3, 8, demodulate=demodulate, up=up, repeat=repeat).double()
    x, w = torch.randn(4, 6, 8, 8).double(), torch.randn(4, 8).double()
    torch.testing.assert_close(conv(x, w), reference.modulated(conv, x, w), rtol=1e-9, atol=1e-9)


def test_modulated_convolution_scales_and_shifts() -> None:
    torch.manual_seed(0)
    x, w, shift = torch.randn(2, 6, 4, 4), torch.randn(2, 8), torch.randn(5)
    for demodulate in (False, True):
        conv = ModulatedConv(6, 5, 3, 8, demodulate=demodulate)
        want = 3 * reference.modulated(conv, x, w) + shift[None, :, None, None]
        torch.testing.assert_close(conv(x, w, 3.0, shift), want, rtol=1e-4, atol=1e-5)


def test_a_style_of_zero_gives_zero_and_a_finite_gradient() -> None:
    conv = ModulatedConv(4, 4, 3, 2)
    with torch.no_grad():
        conv.style.bias.zero_()
    w = torch.zeros(1, 2, requires_grad=True)
    y = conv(torch.randn(1, 4, 4, 4), w)
    y.square().sum().backward()
    assert not y.any() and torch.isfinite(w.grad).all()


@pytest.mark.parametrize("up", [False, True])
def test_modulated_convolution_has_second_gradients(up: bool) -> None:
    torch.manual_seed(0)
    conv = ModulatedConv(2, 3, 3, 2, up=up).double()
    x, w = torch.randn(2, 2, 2, 2).double().requires_grad_(), torch.randn(2, 2).double().requires_grad_()
    assert gradcheck(conv, (x, w)) and gradgradcheck(conv, (x, w))


@pytest.mark.parametrize(("size", "kernel", "stride", "pad"), [(4, 3, 1, 1), (5, 3, 2, 0), (4, 4, 2, 1), (3, 1, 1, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolution_has_the_gradients_of_torch(
    size: int, kernel: int, stride: int, pad: int, transposed: bool
) -> None:
    torch.manual_seed(0)
    x, bias = torch.randn(2, 2, size, size).double().requires_grad_(), torch.randn(3).double().requires_grad_()
    weight = torch.randn(*((2, 3) if transposed else (3, 2)), kernel, kernel).double().requires_grad_()
    given = (x, weight, bias)
    peer = F.conv_transpose2d if transposed else F.conv2d
    found = []
    for y in (convolve(*given, stride=stride, pad=pad, transposed=transposed), peer(*given, stride, pad)):
        once = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        first = torch.autograd.grad(y.square().sum(), given, retain_graph=True)  # the way without a second gradient
        torch.testing.assert_close(first, once)
        total = sum(g.square().sum() for g in once)
        found.append((y, *once, *torch.autograd.grad(total, given)))
    torch.testing.assert_close(found[0], found[1])


def test_a_frozen_convolution_passes_its_gradient_on() -> None:
    conv, x = EqualConv(2, 3, 3).requires_grad_(False), torch.randn(1, 2, 4, 4, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad.abs().sum() > 0 and conv.weight.grad is None


def test_demodulated_output_has_unit_variance() -> None:
    torch.manual_seed(0)
    conv = ModulatedConv(64, 64, 3, 8)
    y = conv(torch.randn(2, 64, 32, 32), 3 * torch.randn(2, 8))
    assert 0.9 < y[:, :, 1:-1, 1:-1].std().item() < 1.1


def test_blur_equals_upfirdn() -> None:
    x = torch.randn(2, 3, 9, 9)
    want = upfirdn(TAPS / 8, upfirdn(TAPS / 8, x.numpy(), axis=2), axis=3)  # full convolution: pad 3
    for pad in (1, 2, 3):
        cut = slice(3 - pad, want.shape[2] - 3 + pad)
        np.testing.assert_allclose(blur(x, pad).numpy(), want[:, :, cut, cut], atol=1e-6)


def test_up_2x_equals_upfirdn_with_zeros_beyond_the_edges() -> None:
    x = torch.randn(1, 2, 6, 6)
    want = upfirdn(TAPS / 4, upfirdn(TAPS / 4, x.numpy(), up=2, axis=2), up=2, axis=3)
    np.testing.assert_allclose(up_2x(x).numpy(), want[:, :, 1:13, 1:13], atol=1e-6)


def test_down_2x_equals_upfirdn_with_zeros_beyond_the_edges() -> None:
    x = torch.randn(1, 2, 6, 6)
    want = upfirdn(TAPS / 8, upfirdn(TAPS / 8, x.numpy(), down=1, axis=2), down=1, axis=3)
    np.testing.assert_allclose(down_2x(x).numpy(), want[:, :, 2:8:2, 2:8:2], atol=1e-6)


@pytest.mark.parametrize("resample", [up_2x, down_2x, lambda x: blur(x, 1), lambda x: blur(x, 2)])
def test_filters_have_right_gradients_of_both_orders(resample: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(2, 2, 4, 4, dtype=torch.double, requires_grad=True)
    assert gradcheck(resample, (x,)) and gradgradcheck(resample, (x,))
    # in bfloat16 the gradient is that of the float32 filter, but for rounding
    seed = torch.randn_like(resample(x))
    (exact,) = torch.autograd.grad(resample(x), x, seed)
    (rough,) = torch.autograd.grad(resample(x.bfloat16()), x, seed.bfloat16())
    assert (exact - rough).abs().max() < 0.02 * exact.abs().max()


def test_a_filter_used_in_inference_mode_first_can_be_trained_through() -> None:
    x = torch.randn(1, 37, 4, 4)  # 37: a number of channels that no other test has
    with torch.inference_mode():
        down_2x(x)
    x.requires_grad_()
    down_2x(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("kernel", [1, 3])
def test_downsampling_convolution_equals_the_filter_then_the_convolution(kernel: int) -> None:
    torch.manual_seed(0)
    conv = EqualConv(3, 4, kernel, active=kernel == 3, down=True, gain=0.5, clamp=0.4 if kernel == 3 else None)
    x = torch.randn(2, 3, 8, 8)
    want = reference.convolve(conv, x, 0.8, 0.5)
    torch.testing.assert_close(conv(x), want, rtol=1e-4, atol=1e-5)
    assert conv(x).shape == (2, 4, 4, 4)


def test_clamping_limits_the_value_and_stops_the_gradient() -> None:
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0], requires_grad=True)
    y = clamped(x, 1.0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.tolist() == [-1, -0.5, 0.5, 1] and gradient.tolist() == [0, 1, 1, 0]
    assert clamped(x, None) is x
    torch.testing.assert_close(activate(x.detach().clone(), 1.0), torch.tensor([-0.6, -0.1, 0.5, 1.0]))


def test_equalised_learning_rate() -> None:
    torch.manual_seed(0)
    fast, slow = EqualLinear(512, 512), EqualLinear(512, 512, lr_multiplier=0.01)
    x = torch.randn(64, 512)
    for layer in (fast, slow):  # the same function scale, whatever the multiplier
        assert layer(x).std().item() == pytest.approx(1.0, abs=0.05)
    assert slow.weight.std().item() == pytest.approx(100, rel=0.02)
    # Adam moves every weight by about lr: the effective move of the slow layer is a hundredth
    moved = []
    for layer in (fast, slow):
        before = (layer.weight * layer.weight_gain).detach().clone()
        adam = torch.optim.Adam(layer.parameters(), lr=0.01)
        layer(x).square().sum().backward()
        adam.step()
        moved.append((layer.weight * layer.weight_gain - before).abs().mean().item())
    assert moved[1] / moved[0] == pytest.approx(0.01, rel=0.05)


def test_plain_layers_use_their_weights_as_they_are() -> None:
    torch.manual_seed(0)
    layer, x = EqualLinear(256, 256, bias=1.0, lr_multiplier=0.01, active=True, equalised=False), torch.randn(99, 256)
    want = F.leaky_relu(x @ layer.weight.t() + layer.bias, 0.2)
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)
    assert layer.bias.tolist() == [1.0] * 256
    conv = EqualConv(64, 64, 4, stride=2, equalised=False)
    assert conv(torch.randn(1, 64, 16, 16)).shape == (1, 64, 8, 8)
    assert conv(torch.randn(4, 64, 32, 32)).square().mean().item() == pytest.approx(1.0, abs=0.15)


def test_active_layers_keep_the_mean_square() -> None:
    torch.manual_seed(0)
    assert EqualLinear(256, 256, active=True)(torch.randn(99, 256)).square().mean().item() == pytest.approx(
        1.04, abs=0.1
    )
    y = EqualConv(64, 64, 3)(torch.randn(2, 64, 16, 16))[:, :, 1:-1, 1:-1]
    assert y.square().mean().item() == pytest.approx(1.04, abs=0.1)
    assert pytest.approx(math.sqrt(2)) == GAIN


def test_layers_compute_in_the_dtype_of_their_input() -> None:
    x, w = torch.randn(2, 4, 8, 8), torch.randn(2, 3)
    parts = [
        EqualConv(4, 4, 3, down=True, clamp=1.0),
        lambda x: ModulatedConv(4, 4, 3, 3, up=True)(x, w),
        up_2x,
        down_2x,
    ]
    for part in parts:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert part(x.to(dtype)).dtype == dtype
    conv = EqualConv(4, 4, 3)
    conv(x.bfloat16()).sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def test_memory_layout_does_not_change_the_result() -> None:
    x, conv = torch.randn(2, 4, 8, 8), EqualConv(4, 6, 3, down=True)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv(x), conv(last), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(up_2x(x), up_2x(last))


def test_normalise_gives_unit_mean_square() -> None:
    torch.testing.assert_close(
        normalise(torch.randn(4, 32) * 7).square().mean(dim=1), torch.ones(4), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("count", "limit", "group"), [(8, 4, 4), (6, 4, 3), (5, 4, 1), (1, 4, 1), (3, 4, 3), (6, 0, 6)]
)
@pytest.mark.parametrize("channels", [1, 2])
def test_minibatch_std(count: int, limit: int, group: int, channels: int) -> None:
    x = torch.randn(count, 4, 2, 2)
    y = MinibatchStd(limit, channels)(x)
    torch.testing.assert_close(y[:, :4], x)
    torch.testing.assert_close(y[:, 4:], reference.batch_deviation(x, group, channels))
