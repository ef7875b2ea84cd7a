"""The lite architecture: the same modules with other options."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.losses import generator_loss, r1_penalty
from tests.gan import reference

LITE = {"architecture": "lite", "class_embedding": "add", "output_clamp": 0.9}


def lite(size: int = 32) -> Shape:
    return Shape(size, 3, 256, 16, 12, 12, 8, **LITE, channel_min=6, d_channel_base=160, d_channel_max=20)


def test_layout_at_256_px() -> None:
    # the published settings: 512 channels at 4 px and at least 64; 96 in the first layer of the discriminator
    widths = {"channel_base": 4096, "channel_max": 512, "channel_min": 64, "z_dim": 512, "w_dim": 512}
    widths |= {"d_channel_base": 12288, "d_channel_max": 768}
    shape = Shape(256, 9, mapping_depth=8, **widths, **LITE)
    assert [shape.channels(r) for r in shape.resolutions] == [512, 512, 256, 128, 64, 64, 64]
    small = Shape(256, 9, mapping_depth=8, **{name: value // 16 for name, value in widths.items()}, **LITE)
    network, judge = Generator(small), Discriminator(small)
    assert network.mapping.embedding.shape == (9, 32) and len(network.mapping.layers) == 8
    assert network.blocks["b4"].const.shape == (1, 32, 4, 4) and not network.blocks["b4"].convs
    assert all(len(block.convs) == 2 for name, block in network.blocks.items() if name != "b4")
    assert network.layers == 12 and network.noise_shapes() == [8, 16, 32, 64, 128, 256]
    heads = [name for name, block in network.blocks.items() if block.to_rgb is not None]
    assert heads == ["b256"] and network.blocks["b256"].to_rgb.weight.shape == (3, 4, 1, 1)
    kernels = [block.parametrizations.weight.original.shape for block in judge.blocks.values()]
    assert [k[0] * 16 for k in kernels] == [96, 192, 384, 768, 768, 768] and {k[2:] for k in kernels} == {(4, 4)}


def test_generator_equals_the_equations() -> None:
    torch.manual_seed(0)
    network, z, labels = Generator(lite()), torch.randn(4, 12), torch.tensor([0, 1, 2, 2])
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("bias", "noise_strength")):
                parameter += 0.2 * torch.randn_like(parameter)
    w = reference.second_moment(z) + network.mapping.embedding[labels]
    for layer in network.mapping.layers:
        w = F.leaky_relu(w @ layer.weight.t() + layer.bias, 0.2)
    torch.testing.assert_close(network.mapping(z, labels), w, rtol=1e-4, atol=1e-5)

    noise, position = network.draw_noise(4, torch.Generator().manual_seed(0)), 0
    x, planes = network.blocks["b4"].const.expand(4, -1, -1, -1), iter(noise)
    for block in list(network.blocks.values())[1:]:
        for layer in (block.conv0, block.conv1):
            style = w @ layer.conv.style.weight.t() + layer.conv.style.bias
            weight = layer.conv.weight[None] * style[:, None, :, None, None]
            weight = weight / (weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8).sqrt()
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if layer is block.conv0 else x
            x = torch.cat([F.conv2d(x[i : i + 1], weight[i], padding=1) for i in range(4)])
            x = x + next(planes) * layer.noise_strength if layer is block.conv1 else x
            x = F.leaky_relu(x + layer.bias[None, :, None, None], 0.2) * math.sqrt(2)
            position += 1
    rgb = F.conv2d(x, block.to_rgb.weight, block.to_rgb.bias)
    want = rgb.tanh().clamp(-0.9, 0.9)
    torch.testing.assert_close(network(z, labels, noise), want, rtol=1e-3, atol=1e-4)
    assert want.abs().max() == 0.9 and position == network.layers


def test_noise_starts_at_nothing_and_the_class_is_visible_but_small() -> None:
    torch.manual_seed(0)
    network, z = Generator(lite()), torch.randn(2, 12)
    labels, others = torch.tensor([0, 1]), torch.tensor([1, 2])
    quiet = network(z, labels, None)
    assert torch.equal(quiet, network(z, labels, network.const_noise()))
    change = (network.mapping(z, labels) - network.mapping(z, others)).abs().mean()
    assert 0 < change < 0.2 * network.mapping(z, labels).std()


def test_the_discriminator_adds_the_projection_and_keeps_spectral_norm_one() -> None:
    torch.manual_seed(0)
    shape = lite()
    judge, images = Discriminator(shape), torch.randn(4, 3, 32, 32)
    labels = torch.tensor([0, 1, 2, 2])
    for _ in range(100):  # the power iteration goes on at every use
        judge(images, labels)
    judge.eval()
    for layer in [*judge.blocks.values(), judge.dense, judge.head]:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item() == pytest.approx(1.0, abs=0.02)
    x = images
    for layer in judge.blocks.values():
        x = F.leaky_relu(F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1), 0.2)
    torch.testing.assert_close(judge.features(images), x, rtol=1e-4, atol=1e-5)
    feature = F.leaky_relu(x.flatten(1) @ judge.dense.weight.t() + judge.dense.bias, 0.2)
    base = (feature @ judge.head.weight.t() + judge.head.bias)[:, 0]
    side = (feature * judge.embedding[labels]).sum(dim=1) / math.sqrt(shape.d_channels(4))
    torch.testing.assert_close(judge(images, labels), base + side, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["projection", "mapping", "none"])
def test_all_parameters_learn(conditioning: str) -> None:
    shape = Shape(32, 3, 256, 16, 12, 12, 8, **LITE, label_conditioning=conditioning, d_mapping_depth=2)
    network, judge = Generator(shape), Discriminator(shape)
    z, labels = torch.randn(3, 12), torch.tensor([0, 1, 2])
    fake = network(z, labels, network.draw_noise(3, torch.Generator().manual_seed(0)), dtype=torch.bfloat16)
    assert fake.dtype == torch.float32
    generator_loss(judge(fake, labels, torch.bfloat16)).backward()
    assert all(p.grad is not None for n in (network, judge) for p in n.parameters())
    judge.zero_grad()
    real = torch.randn(3, 3, 32, 32, requires_grad=True)
    r1_penalty(judge(real, labels), real).backward()
    first = judge.blocks["b32"].parametrizations.weight.original.grad
    assert torch.isfinite(first).all() and first.abs().sum() > 0
    judge.freeze_highest(1)
    assert not judge.blocks["b32"].parametrizations.weight.original.requires_grad
    assert judge.blocks["b16"].parametrizations.weight.original.requires_grad
