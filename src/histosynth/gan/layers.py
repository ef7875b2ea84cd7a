"""Building blocks that generator and discriminator share.

Parameters are float32; a layer computes in the dtype of its input, so the caller chooses bfloat16 or float32
by casting what goes in. Images are [N, C, H, W], best in channels-last memory.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky rectifier
Network = TypeVar("Network", bound=nn.Module)
GAIN = math.sqrt(2.0)  # keeps the variance through it


def normalise(x: Tensor) -> Tensor:
    """Rows of unit mean square (pixel norm of StyleGAN, on [N, C])."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


def activate(x: Tensor) -> Tensor:
    """Leaky rectifier without its gain: callers fold sqrt(2) into the small tensors that come before it."""
    return F.leaky_relu(x, SLOPE)


def up_2x(x: Tensor) -> Tensor:
    """Twice the size through the FIR filter [1, 3, 3, 1], zeros beyond the edges (1912.04958).

    Bilinear interpolation by two is this very filter, and every backend has a fast kernel for it.
    """
    doubled = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear", align_corners=False)
    return doubled[..., 2:-2, 2:-2]


def blur(x: Tensor, pad: int) -> Tensor:
    """The separable FIR filter [1, 3, 3, 1] / 8, edges zero-padded: [N, C, H + 2 pad - 3, W + 2 pad - 3].

    At stride one: the strided depthwise kernels have no fast bfloat16 gradient on CPUs (40 times slower).
    """
    channels = x.shape[1]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device) / 8
    kernel = torch.outer(taps, taps).to(x.dtype).expand(channels, 1, 4, 4)
    return F.conv2d(x, kernel, padding=pad, groups=channels)


def place(network: Network, device: torch.device) -> Network:
    """The network on the device, its convolutions in channels-last memory (about a fifth faster on CPUs)."""
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


class EqualLinear(nn.Module):
    """A linear layer with equalised learning rate (1710.10196): N(0, 1) weights, scaled when used.

    `lr_multiplier` slows its learning relative to the rest; StyleGAN's mapping network uses 0.01.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: float = 0.0, lr_multiplier: float = 1.0, active: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((outputs,), float(bias) / lr_multiplier))
        self.active = active
        self.bias_gain = lr_multiplier * (GAIN if active else 1.0)
        self.weight_gain = self.bias_gain / math.sqrt(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs] -> [N, outputs]."""
        y = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return activate(y) if self.active else y


class EqualConv(nn.Module):
    """A convolution with equalised learning rate, and bias and rectifier if `active`.

    With `down` the size halves: blur, then stride 2, so that nothing aliases (1912.04958, appendix).
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, active: bool = True, down: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if active else None
        self.kernel, self.down = kernel, down
        self.gain = GAIN if active else 1.0
        self.weight_gain = self.gain / math.sqrt(inputs * kernel * kernel)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H, W], or half of H and W."""
        weight = (self.weight * self.weight_gain).to(x.dtype)
        bias = (self.bias * self.gain).to(x.dtype) if self.bias is not None else None
        if self.down:
            pad = (self.kernel - 1) // 2
            y = F.conv2d(blur(x, pad + 1), weight, bias, stride=2)
        else:
            y = F.conv2d(x, weight, bias, padding=self.kernel // 2)
        return activate(y) if self.bias is not None else y


class ModulatedConv(nn.Module):
    """Weight modulation and demodulation (1912.04958, equations 1 and 3) around a shared convolution.

    The paper scales the weights of every sample and runs one grouped convolution. Scaling the input channels
    by the style and the output channels by the demodulation is the same function, and an ordinary
    convolution is several times faster on a CPU. With `up` the size doubles: a transposed convolution
    of stride 2, then blur.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, w_dim: int, demodulate: bool = True, up: bool = False
    ) -> None:
        super().__init__()
        self.style = EqualLinear(w_dim, inputs, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.weight_gain = 1.0 / math.sqrt(inputs * kernel * kernel)
        self.kernel, self.demodulate, self.up = kernel, demodulate, up

    def forward(self, x: Tensor, w: Tensor, gain: float = 1.0) -> Tensor:
        """[N, inputs, H, W] and latent [N, w_dim] -> [N, outputs, H, W] times `gain`."""
        style = self.style(w)
        weight = self.weight * self.weight_gain
        scale = None
        if self.demodulate:
            energy = style.square() @ weight.square().sum(dim=(2, 3)).t()
            scale = gain * torch.rsqrt(energy + 1e-8)
        else:
            style = style * gain
        y = x * style.to(x.dtype)[:, :, None, None]
        if self.up:
            # four: the zeros between the samples leave a quarter of the energy of the filter's sum
            y = F.conv_transpose2d(y, (4 * weight).to(x.dtype).transpose(0, 1), stride=2)
            y = blur(y, pad=1)
        else:
            y = F.conv2d(y, weight.to(x.dtype), padding=self.kernel // 2)
        return y if scale is None else y * scale.to(y.dtype)[:, :, None, None]


class MinibatchStd(nn.Module):
    """One more channel: the mean standard deviation over a group of samples (1710.10196, section 3).

    A discriminator that sees it notices a generator that lacks variety. A group takes every
    (N / size)th sample; its size is the largest divisor of the batch that is at most `group`.
    """

    def __init__(self, group: int = 4) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C + 1, H, W]."""
        n, _, h, w = x.shape
        size = max(k for k in range(1, min(self.group, n) + 1) if n % k == 0)
        groups = x.float().reshape(size, n // size, -1)
        deviation = (groups.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=1)
        plane = deviation.repeat(size).to(x.dtype).view(n, 1, 1, 1).expand(n, 1, h, w)
        return torch.cat([x, plane], dim=1)
