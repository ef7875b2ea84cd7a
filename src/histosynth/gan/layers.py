"""Building blocks that generator and discriminator share.

Parameters are float32; a layer computes in the dtype of its input, so the caller chooses bfloat16 or float32
by casting what goes in. Images are [N, C, H, W], best in channels-last memory.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky rectifier
Network = TypeVar("Network", bound=nn.Module)
GAIN = math.sqrt(2.0)  # keeps the variance through it


def normalise(x: Tensor) -> Tensor:
    """Rows of unit mean square (pixel norm of StyleGAN, on [N, C])."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


def activate(x: Tensor, limit: float | None = None) -> Tensor:
    """Leaky rectifier, then the magnitude limited to `limit`; overwrites `x`.

    Without its gain: callers fold sqrt(2) into the small tensors that come before it.
    """
    y = F.leaky_relu_(x, SLOPE)
    return y if limit is None else clamped(y, limit)


def clamped(x: Tensor, limit: float | None) -> Tensor:
    """x, its magnitude limited to `limit`; none: x itself."""
    # the same function as clamp, whose gradient takes four passes over the memory where this takes one
    return x if limit is None else F.hardtanh(x, -limit, limit)


@lru_cache(maxsize=256)
def _taps(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The FIR filter [1, 3, 3, 1] / 8 in both directions, once a channel: [channels, 1, 4, 4]."""
    with torch.inference_mode(False):
        line = torch.tensor([1.0, 3.0, 3.0, 1.0], device=device) / 8
        return torch.outer(line, line).to(dtype).expand(channels, 1, 4, 4)


# The three filters below are one another's transposes, so each one's gradient is another one at the speed of
# its forward kernel, and so is the gradient of that. The gradient of a depthwise convolution, as torch has it,
# is slow in bfloat16 (stride 2: 40 times), and its second gradient runs channel by channel.


class _Blur(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, pad: int) -> Tensor:
        ctx.pad = pad
        return F.conv2d(x, _taps(x.shape[1], x.dtype, x.device), padding=pad, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Blur.apply(grad, 3 - ctx.pad), None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        # bilinear interpolation by two is this very filter, but for the edges, and every backend has a fast kernel
        doubled = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear", align_corners=False)
        return doubled[..., 2:-2, 2:-2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 4 * _Down.apply(grad)


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, _taps(x.shape[1], x.dtype, x.device), padding=1, stride=2, groups=x.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Up.apply(grad / 4)


# A convolution whose second gradients are convolutions again. Those of torch run the gradient of the weights as a
# convolution with kernels as large as the image, which made R1 and the path length a third slower.


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, pad: int, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = (stride, pad, transposed)
        run = F.conv_transpose2d if transposed else F.conv2d
        return run(x, weight, bias, stride, pad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, pad, transposed = ctx.options
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():  # no second gradient is wanted: all three in one kernel call
            sums = [weight.shape[1 if transposed else 0]] if need_bias else None
            return *_gradients(grad, x, weight, sums, ctx.options, ctx.needs_input_grad[:3]), None, None, None
        to_x = _Conv.apply(grad, weight, None, stride, pad, not transposed) if need_x else None
        to_weight = _ConvWeight.apply(grad, x, weight, *ctx.options) if need_weight else None
        return to_x, to_weight, grad.sum(dim=(0, 2, 3)) if need_bias else None, None, None, None


class _ConvWeight(torch.autograd.Function):
    """The gradient of the weights of `_Conv`: bilinear in the gradient of its result and in its input."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, stride: int, pad: int, transposed: bool) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.options = (stride, pad, transposed)
        return _gradients(grad, x, weight, None, ctx.options, (False, True, False))[1]

    @staticmethod
    def backward(ctx: Any, change: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        stride, pad, transposed = ctx.options
        need_grad, need_x = ctx.needs_input_grad[:2]
        to_grad = _Conv.apply(x, change, None, *ctx.options) if need_grad else None
        to_x = _Conv.apply(grad, change, None, stride, pad, not transposed) if need_x else None
        return to_grad, to_x, None, None, None, None


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: list[int] | None,
    options: tuple[int, int, bool],
    wanted: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """The gradients of image, weights and bias (of shape `bias`) that are wanted, from torch's own kernel."""
    stride, pad, transposed = options
    return torch.ops.aten.convolution_backward(
        grad, x, weight, bias, [stride] * 2, [pad] * 2, [1, 1], transposed, [0, 0], 1, wanted
    )


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, pad: int = 0, transposed: bool = False
) -> Tensor:
    """`conv2d`, or `conv_transpose2d` if `transposed`, with fast second gradients.

    The kernel must fit the image at that stride without a remainder, as all of ours do.
    """
    return _Conv.apply(x, weight, bias, stride, pad, transposed)


def blur(x: Tensor, pad: int) -> Tensor:
    """The separable FIR filter [1, 3, 3, 1] / 8, edges zero-padded: [N, C, H + 2 pad - 3, W + 2 pad - 3]."""
    return _Blur.apply(x, pad)


def up_2x(x: Tensor) -> Tensor:
    """Twice the size through the FIR filter [1, 3, 3, 1], zeros beyond the edges (1912.04958)."""
    return _Up.apply(x)


def down_2x(x: Tensor) -> Tensor:
    """Half the size (H and W even) through the FIR filter [1, 3, 3, 1], zeros beyond the edges."""
    return _Down.apply(x)


def place(network: Network, device: torch.device) -> Network:
    """The network on the device, its convolutions in channels-last memory (about a fifth faster on CPUs)."""
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


class EqualLinear(nn.Module):
    """A linear layer with equalised learning rate (1710.10196): N(0, 1) weights, scaled when used.

    `lr_multiplier` slows its learning relative to the rest; StyleGAN's mapping network uses 0.01. Without
    `equalised` the weights are used as they are, and drawn so that the function at the start is the same.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: float = 0.0,
        lr_multiplier: float = 1.0,
        active: bool = False,
        equalised: bool = True,
    ) -> None:
        super().__init__()
        gain = GAIN if active else 1.0
        self.active = active
        self.bias_gain = lr_multiplier * gain if equalised else 1.0
        self.weight_gain = self.bias_gain / math.sqrt(inputs) if equalised else 1.0
        spread = 1 / lr_multiplier if equalised else gain / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * spread)
        self.bias = nn.Parameter(torch.full((outputs,), float(bias) / (lr_multiplier if equalised else 1.0)))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        y = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return activate(y) if self.active else y


class EqualConv(nn.Module):
    """A convolution with equalised learning rate, and bias and rectifier if `active`.

    With `down` the size halves: blur, then stride 2, so that nothing aliases (1912.04958, appendix).
    `gain` multiplies the result, and `clamp` limits its magnitude then. `equalised` as for `EqualLinear`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        active: bool = True,
        down: bool = False,
        *,
        bias: bool | None = None,
        stride: int = 1,
        clamp: float | None = None,
        equalised: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        gain *= GAIN if active else 1.0
        fan = math.sqrt(inputs * kernel * kernel)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) * (1.0 if equalised else gain / fan))
        self.bias = nn.Parameter(torch.zeros(outputs)) if (active if bias is None else bias) else None
        self.kernel, self.down, self.stride, self.clamp, self.active = kernel, down, stride, clamp, active
        self.gain = gain if equalised else 1.0
        self.weight_gain = self.gain / fan if equalised else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H, W], or half of H and W."""
        weight = (self.weight * self.weight_gain).to(x.dtype)
        bias = (self.bias * self.gain).to(x.dtype) if self.bias is not None else None
        pad = (self.kernel - 1) // 2
        if not self.down:
            y = convolve(x, weight, bias, stride=self.stride, pad=pad)
        elif self.kernel == 1:
            y = convolve(down_2x(x), weight, bias)
        else:
            y = convolve(blur(x, pad + 1), weight, bias, stride=2)
        return activate(y, self.clamp) if self.active else clamped(y, self.clamp)


class ModulatedConv(nn.Module):
    """Weight modulation and demodulation (1912.04958, equations 1 and 3) around a shared convolution.

    The paper scales the weights of every sample and runs one grouped convolution. Scaling the input channels
    by the style and the output channels by the demodulation is the same function, and an ordinary
    convolution is several times faster on a CPU. With `up` the size doubles: a transposed convolution
    of stride 2, then blur; or, with `repeat`, every pixel becomes four, then the convolution.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        w_dim: int,
        demodulate: bool = True,
        up: bool = False,
        *,
        repeat: bool = False,
        equalised: bool = True,
    ) -> None:
        super().__init__()
        self.style = EqualLinear(w_dim, inputs, bias=1.0, equalised=equalised)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.weight_gain = 1.0 / math.sqrt(inputs * kernel * kernel)
        self.kernel, self.demodulate, self.up, self.repeat = kernel, demodulate, up, repeat

    def forward(self, x: Tensor, w: Tensor, gain: float = 1.0, shift: Tensor | None = None) -> Tensor:
        """[N, inputs, H, W] and latent [N, w_dim] -> [N, outputs, H, W] times `gain`, plus `shift` [outputs]."""
        style = self.style(w)
        weight = self.weight * self.weight_gain
        scale = None
        if self.demodulate:
            energy = style.square() @ weight.square().sum(dim=(2, 3)).t()
            # the published constant belongs to the weights before their gain
            scale = gain * torch.rsqrt(energy + 1e-8 * self.weight_gain**2)
        else:
            style = style * gain
        y = x * style.to(x.dtype)[:, :, None, None]
        if self.up and not self.repeat:
            # four: the zeros between the samples leave a quarter of the energy of the filter's sum
            y = convolve(y, (4 * weight).to(x.dtype).transpose(0, 1), stride=2, transposed=True)
            y = blur(y, pad=1)
        else:
            y = F.interpolate(y, scale_factor=2, mode="nearest") if self.up else y
            bias = shift.to(x.dtype) if shift is not None and scale is None else None
            y = convolve(y, weight.to(x.dtype), bias, pad=self.kernel // 2)
        if scale is None:
            return y
        scale = scale.to(y.dtype)[:, :, None, None]
        return y * scale if shift is None else torch.addcmul(shift.to(y.dtype)[:, None, None], y, scale)


def group_size(count: int, group: int) -> int:
    """The largest divisor of `count` that is at most `group` (0: `count`)."""
    return max(k for k in range(1, min(group or count, count) + 1) if count % k == 0)


class MinibatchStd(nn.Module):
    """More channels: the mean standard deviation over a group of samples (1710.10196, section 3).

    A discriminator that sees it notices a generator that lacks variety. A group takes every
    (N / size)th sample; its size is the largest divisor of the batch that is at most `group` (0: the batch).
    With several `channels`, each is the mean over its share of the features.
    """

    def __init__(self, group: int = 4, channels: int = 1) -> None:
        super().__init__()
        self.group, self.channels = group, channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C + channels, H, W]."""
        n, _, h, w = x.shape
        size = group_size(n, self.group)
        groups = x.float().reshape(size, n // size, self.channels, -1)
        deviation = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=2)
        planes = deviation.repeat(size, 1).to(x.dtype)[:, :, None, None].expand(n, self.channels, h, w)
        return torch.cat([x, planes], dim=1)
