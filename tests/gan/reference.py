"""The networks once more, slowly, from the equations of the papers: what the fast ones must equal.

Resampling is zero insertion and a full convolution (1912.04958, appendix B); every sample has its own modulated
weights (equations 1 and 3); gains stand where the papers have them. Parameters come from the networks under test.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator

TAPS = (1.0, 3.0, 3.0, 1.0)


def fir(x: Tensor, up: int, down: int, before: int, after: int, gain: float = 1.0) -> Tensor:
    """Insert zeros, pad with zeros, filter with [1, 3, 3, 1] / 8 both ways, keep every `down`th sample."""
    n, c, h, w = x.shape
    y = x.new_zeros(n, c, h * up, w * up)
    y[..., ::up, ::up] = x
    y = F.pad(y, (before, after, before, after))
    line = torch.tensor(TAPS, dtype=x.dtype) / 8 * math.sqrt(gain)
    rows = sum(line[k] * y[..., k : y.shape[-2] - 3 + k, :] for k in range(4))
    both = sum(line[k] * rows[..., k : y.shape[-1] - 3 + k] for k in range(4))
    return both[..., ::down, ::down]


def rectify(x: Tensor, clamp: float | None, gain: float = 1.0) -> Tensor:
    y = torch.where(x > 0, x, 0.2 * x) * math.sqrt(2) * gain
    return y if clamp is None else torch.clamp(y, -clamp * gain, clamp * gain)


def linear(layer: nn.Module, x: Tensor, lr: float = 1.0) -> Tensor:
    return x @ (layer.weight * (lr / math.sqrt(x.shape[1]))).t() + layer.bias * lr


def second_moment(x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(dim=1, keepdim=True) + 1e-8)


def mapping(part: nn.Module, z: Tensor | None, labels: Tensor | None, lr: float) -> Tensor:
    parts = [second_moment(z)] if z is not None else []
    if part.embedding is not None:
        parts.append(second_moment(part.embedding[labels]))
    x = torch.cat(parts, dim=1)
    for layer in part.layers:
        x = rectify(linear(layer, x, lr), None)
    return x


def modulated(conv: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    """One grouped convolution with a group a sample; demodulated weights need no gain."""
    n, inputs, height, width = x.shape
    outputs, _, k, _ = conv.weight.shape
    style = linear(conv.style, w)
    if not conv.demodulate:
        style = style / math.sqrt(inputs * k * k)
    weight = conv.weight[None] * style[:, None, :, None, None]
    if conv.demodulate:
        weight = weight / torch.sqrt((weight**2).sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
    if conv.up and conv.repeat:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    elif conv.up:
        zeros = x.new_zeros(n, inputs, 2 * height - 1, 2 * width - 1)
        zeros[..., ::2, ::2] = x
        flipped = weight.flip((3, 4)).reshape(-1, inputs, k, k)
        wide = F.conv2d(zeros.reshape(1, -1, *zeros.shape[2:]), flipped, padding=k - 1, groups=n)
        return fir(wide.reshape(n, outputs, *wide.shape[2:]), 1, 1, 1, 1, gain=4)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weight.reshape(-1, inputs, k, k), padding=k // 2, groups=n)
    return y.reshape(n, outputs, *y.shape[2:])


def generate(network: Generator, codes: Tensor, noise: Sequence[Tensor] | None) -> Tensor:
    """Synthesis of `stylegan2` shapes from codes [N, layers, w_dim]."""
    clamp, position, planes = network.shape.conv_clamp, 0, iter(noise or ())
    first, image = network.blocks["b4"], None
    x = first.const.expand(len(codes), -1, -1, -1)
    if network.shape.start == "code":
        x = x + linear(first.start, codes[:, 0]).reshape(x.shape)
    for block in network.blocks.values():
        for layer in [getattr(block, name) for name in ("conv0", "conv1") if hasattr(block, name)]:
            x = modulated(layer.conv, x, codes[:, position])
            if noise is not None:
                x = x + next(planes) * layer.noise_strength
            x = rectify(x + layer.bias[None, :, None, None], clamp)
            position += 1
        rgb = modulated(block.to_rgb, x, codes[:, position]) + block.rgb_bias[None, :, None, None]
        rgb = rgb if clamp is None else torch.clamp(rgb, -clamp, clamp)
        image = rgb if image is None else fir(image, 2, 1, 2, 1, gain=4) + rgb
    return image


def convolve(layer: nn.Module, x: Tensor, clamp: float | None, gain: float = 1.0) -> Tensor:
    inputs, k = layer.weight.shape[1], layer.weight.shape[2]
    weight = layer.weight / math.sqrt(inputs * k * k)
    if layer.down:  # the filter first, with the padding of the convolution, then every second place
        wide = fir(F.pad(x, (k // 2,) * 4), 1, 1, 1, 1)
        y = F.conv2d(F.pad(wide, (0, 1, 0, 1)) if k == 1 else wide, weight)[..., ::2, ::2]
        y = y[..., : x.shape[-2] // 2, : x.shape[-1] // 2]
    else:
        y = F.conv2d(x, weight, padding=k // 2)
    return y * gain if layer.bias is None else rectify(y + layer.bias[None, :, None, None], clamp, gain)


def judge(network: Discriminator, images: Tensor, labels: Tensor | None) -> Tensor:
    """Logits of `stylegan2` shapes."""
    shape = network.shape
    clamp, half = shape.d_clamp, math.sqrt(0.5)
    x, image = convolve(network.from_rgb, images, clamp), images
    for name, block in network.blocks.items():
        y = convolve(block.conv0, x, clamp)
        if shape.discriminator == "resnet":
            x = convolve(block.conv1, y, clamp, half) + convolve(block.skip, x, None, half)
        else:
            x = convolve(block.conv1, y, clamp)
        if shape.discriminator == "skip":
            image = fir(image, 1, 2, 1, 1)
            below = f"b{int(name[1:]) // 2}"
            x = x + convolve(network.heads[below], image, None if below == "b4" else clamp)
    if shape.mbstd_channels:
        x = torch.cat([x, batch_deviation(x, shape.mbstd_group or len(x), shape.mbstd_channels)], dim=1)
    x = convolve(network.conv, x, clamp)
    x = rectify(linear(network.dense, x.flatten(1)), None)
    out = linear(network.head, x)
    if shape.conditioning == "mapping":
        return (out * mapping(network.mapping, None, labels, shape.mapping_lr)).sum(1) / math.sqrt(out.shape[1])
    if shape.conditioning == "projection":
        return out[:, 0] + (x * network.embedding[labels]).sum(1) / math.sqrt(x.shape[1])
    return out[:, 0]


def batch_deviation(x: Tensor, group: int, channels: int) -> Tensor:
    """[N, channels, H, W]: sample i belongs to the group of all samples that are equal to i modulo N / group."""
    n, c, h, w = x.shape
    stride, share = n // group, c // channels
    planes = x.new_zeros(n, channels, h, w)
    for i in range(n):
        members = x[i % stride :: stride]
        deviation = torch.sqrt(((members - members.mean(dim=0)) ** 2).mean(dim=0) + 1e-8)
        for k in range(channels):
            planes[i, k] = deviation[k * share : (k + 1) * share].mean()
    return planes
