"""The residual architecture: the same interface, networks that are easier to fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from histosynth.core.checkpoint import load_checkpoint
from histosynth.core.errors import HistosynthError
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.losses import r1_penalty
from histosynth.gan.nvidia.export import export_nvidia
from histosynth.gan.residual import StyledUnit
from histosynth.gan.sample import GanGenerator
from histosynth.gan.train import train_gan
from tests.gan.helpers import tiles, tiny_config, tiny_shape

RESIDUAL: dict[str, Any] = {"architecture": "residual", "start": "code"}


def residual(size: int = 32, classes: int = 3) -> Shape:
    return replace(tiny_shape(classes, size), **RESIDUAL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_gan(tiles(), tiny_config(**RESIDUAL), tmp_path_factory.mktemp("residual"), device="cpu")


def test_a_unit_equals_its_equation() -> None:
    torch.manual_seed(0)
    unit, x, w, noise = (
        StyledUnit(16, 8, residual()),
        torch.randn(3, 16, 8, 8),
        torch.randn(3, 12),
        torch.randn(3, 1, 8, 8),
    )
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter += 0.1 * torch.randn_like(parameter)

    def normal(y: torch.Tensor) -> torch.Tensor:
        groups = y.reshape(3, 8, 2 * 64)
        centred = groups - groups.mean(dim=2, keepdim=True)
        return (centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()).reshape(y.shape)

    scale, shift = (w @ unit.style.weight.t() + unit.style.bias).reshape(3, 2, 16, 1, 1).unbind(1)
    y = normal(x) * unit.norm0.weight[:, None, None] + unit.norm0.bias[:, None, None]
    y = F.conv2d(y * torch.sigmoid(y), unit.conv0.weight, unit.conv0.bias, padding=1) + noise * unit.noise_strength
    y = normal(y) * (1 + scale) + shift
    wanted = x + F.conv2d(y * torch.sigmoid(y), unit.conv1.weight, unit.conv1.bias, padding=1)
    torch.testing.assert_close(unit(x, w, noise), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [16, 4])
def test_networks_of_any_size_and_the_gradients_of_a_step(channels: int) -> None:
    shape = replace(residual(64), channel_max=16, channel_base=channels * 64)  # narrower towards the image, or not
    torch.manual_seed(0)
    network, judge = Generator(shape), Discriminator(shape)
    assert network.layers == 5 and network.noise_shapes() == [4, 8, 16, 32, 64]
    labels = torch.tensor([0, 1, 2, 2])
    fake = network(torch.randn(4, shape.z_dim), labels, network.draw_noise(4, torch.Generator().manual_seed(0)))
    assert fake.shape == (4, 3, 64, 64)
    (judge(fake, labels).sum() + r1_penalty(judge(fake, labels), fake)).backward()
    unused = [n for net in (network, judge) for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unused


def test_it_fits_codes_to_tiles_in_fewer_steps_than_stylegan2() -> None:
    torch.manual_seed(0)
    wanted = F.interpolate(torch.randn(24, 3, 8, 8), scale_factor=2)
    z, labels = torch.randn(24, 8), torch.zeros(24, dtype=torch.int64)
    left = {}
    for architecture, rates in (("residual", (1e-3, 3e-3)), ("stylegan2", (2.5e-3, 1e-2))):
        for lr in rates:
            torch.manual_seed(1)
            shape = replace(
                tiny_shape(1, 16), architecture=architecture, start="code", channel_max=32, channel_base=512
            )
            network = Generator(shape)
            adam = torch.optim.Adam(network.parameters(), lr=lr, betas=(0.9, 0.99))
            for _ in range(100):
                loss = (network(z, labels, None) - wanted).square().mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
            left[architecture] = min(left.get(architecture, 9.0), float(loss.detach()))
    assert left["residual"] < 0.6 * left["stylegan2"], left


def test_settings_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(HistosynthError, match="conv_clamp is 256.*residual"):
        replace(residual(), conv_clamp=256.0)
    with pytest.raises(HistosynthError, match="start is 'constant'"):
        tiny_config(architecture="residual")


def test_a_tile_does_not_depend_on_its_neighbours(trained: Path) -> None:
    generator = GanGenerator.from_checkpoint(trained, "cpu")
    together = torch.cat(list(generator.sample([0, 1, 2, 1], [5, 6, 7, 8])))
    alone = torch.cat([next(generator.sample([k], [s])) for k, s in zip([0, 1, 2, 1], [5, 6, 7, 8], strict=True)])
    assert torch.equal(together, alone)


def test_transfer_takes_all_but_what_a_larger_tile_adds(trained: Path, tmp_path: Path) -> None:
    larger = train_gan(
        tiles(classes=("LYM", "NEW"), size=64),
        tiny_config(**RESIDUAL, size=64, init=str(trained), steps=1),
        tmp_path / "larger",
        device="cpu",
    )
    new, old = load_checkpoint(larger)[0], load_checkpoint(trained)[0]
    assert {n for n in new if n not in old} == {n for n in new if ".b64." in n}
    with pytest.raises(HistosynthError, match="architecture residual, these settings stylegan2"):
        train_gan(tiles(), tiny_config(init=str(trained), architecture="stylegan2"), tmp_path / "other", device="cpu")


def test_nvidias_networks_are_not_written_from_it(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(HistosynthError, match="architecture=residual, which NVIDIA's networks lack"):
        export_nvidia(trained, tmp_path / "net.pt")
