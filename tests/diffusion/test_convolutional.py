"""The compact U-Net: what it computes, its fast pass, its training, other sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from histosynth.autoencoder.network import Autoencoder, AutoencoderShape
from histosynth.core.checkpoint import load_checkpoint, read_card
from histosynth.core.errors import SettingError
from histosynth.diffusion import train as train_module
from histosynth.diffusion.backbone import Compact
from histosynth.diffusion.convolutional import UNetDenoiser, UNetShape
from histosynth.diffusion.fast import fast_network
from histosynth.diffusion.memory import activation_bytes
from histosynth.diffusion.model import load_model
from histosynth.diffusion.sample import DiffusionGenerator
from histosynth.diffusion.train import DiffusionConfig, train_diffusion
from histosynth.tiles.batches import TileArray
from tests.diffusion.helpers import UNET, ColourMeans, make_tiles, tuning
from tests.diffusion.test_train import interrupt

SHAPE = UNetShape(width=16, layers=1, heads=2, tokens=2)


def a_network(shape: UNetShape = SHAPE) -> UNetDenoiser:
    torch.manual_seed(0)
    network = UNetDenoiser(shape)
    with torch.no_grad():
        for parameter in network.parameters():  # away from the zeros it starts with
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def arguments(count: int = 3, edge: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    noisy = torch.randn(count, 4, edge, edge, generator=draw)
    context = torch.randn(count, SHAPE.tokens + 1, SHAPE.told, generator=draw)
    return noisy, torch.tensor([999, 500, 3])[:count], context


def test_it_starts_at_zero_and_hears_time_and_context() -> None:
    noisy, levels, context = arguments()
    assert not UNetDenoiser(SHAPE)(noisy, levels, context).any()
    network = a_network()
    with torch.no_grad():
        made = network(noisy, levels, context)
        assert made.shape == noisy.shape and made.dtype == torch.float32
        assert not torch.allclose(made, network(noisy, levels.flip(0), context), atol=1e-3)
        # another token in the place of the first: the mean, which comes with the time, and attention both hear it
        other = context.clone()
        other[:, 0] += 1
        assert not torch.allclose(made, network(noisy, levels, other), atol=1e-3)
        # tokens with the same mean: attention alone
        apart = context.clone()
        apart[:, 0] += 1
        apart[:, 1] -= 1
        assert not torch.allclose(made, network(noisy, levels, apart), atol=1e-4)


def test_no_tile_hears_of_another_one() -> None:
    network, (noisy, levels, context) = a_network(), arguments()
    with torch.no_grad():
        whole = network(noisy, levels, context)
        alone = network(noisy[1:2], levels[1:2], context[1:2])
    torch.testing.assert_close(whole[1:2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("edge", [2, 5, 6, 18])
def test_every_size_works_even_where_it_cannot_be_halved_evenly(edge: int) -> None:
    noisy, levels, context = arguments(2, edge)
    assert a_network()(noisy, levels, context).shape == noisy.shape


def test_the_fast_pass_is_the_same_function() -> None:
    stage = Autoencoder(AutoencoderShape(width=16, blocks=1))
    backbone = Compact(a_network().requires_grad_(False), stage, SHAPE, 32)
    noisy, levels, context = arguments()
    fast, half = fast_network(backbone, None), fast_network(backbone, torch.bfloat16)
    assert fast is not None and half is not None
    told = fast.tell(context, levels)
    for k, level in enumerate(levels):
        own = backbone.denoise(noisy, level.expand(3), context)
        torch.testing.assert_close(told(noisy, k), own, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(told(noisy[:2], k), own[:2], atol=1e-4, rtol=1e-4)
        away = half.tell(context, levels)(noisy, k) - own
        assert away.std() < 0.03 * own.std()


def test_computing_blocks_again_changes_no_gradient_and_needs_less_memory() -> None:
    stage = Autoencoder(AutoencoderShape(width=16, blocks=1))
    found = []
    for again in (False, True):
        network = a_network().train()
        if again:
            network.enable_gradient_checkpointing()
        network(*arguments()).square().mean().backward()
        needed = activation_bytes(Compact(network, stage, SHAPE, 32), 3, 3, half=None, checkpointing=again)
        found.append(([p.grad for p in network.parameters()], needed))
    (plain, memory), (other, less) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert less < 0.6 * memory


def test_a_width_that_does_not_fit_is_named() -> None:
    for width, heads in ((12, 4), (16, 3)):
        with pytest.raises(SettingError, match=f"width is {width} with {heads} heads"):
            UNetDenoiser(UNetShape(width=width, heads=heads))


def test_it_is_the_one_that_is_trained_from_nothing(unet_path: Path) -> None:
    assert DiffusionConfig(init="none").backbone == "unet"
    card = read_card(unet_path)
    assert (card["backbone"], card["architecture"], card["network"]["width"]) == ("compact", "unet", 8)
    backbone = load_model(unet_path).backbone
    assert isinstance(backbone, Compact) and isinstance(backbone.network, UNetDenoiser)
    assert backbone.width == 24
    moved = load_checkpoint(unet_path)[0]
    assert moved["transformer.leave.weight"].abs().max() > 0


def test_an_interrupted_training_ends_bit_for_bit_like_one_that_was_not(
    tiles: TileArray, encoder: ColourMeans, unet_path: Path, autoencoder_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = DiffusionConfig(**UNET, init="none", autoencoder=str(autoencoder_path), lr_base=1e-2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, train_module, at=4)
        train_diffusion(tiles, config, tmp_path / "run", device="cpu", encoder=encoder)
    path = train_diffusion(tiles, config, tmp_path / "run", device="cpu", encoder=encoder)
    whole, again = load_checkpoint(unet_path)[0], load_checkpoint(path)[0]
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_it_goes_on_at_another_size_and_a_tile_depends_on_its_seed_alone(
    unet_path: Path, encoder: ColourMeans, tmp_path: Path
) -> None:
    larger = make_tiles({"STR": 4, "NEW": 3}, size=24)
    config = tuning(unet_path, finetune="full", size=24, steps=2)
    path = train_diffusion(larger, config, tmp_path / "run", device="cpu", encoder=encoder)
    generator = DiffusionGenerator.from_checkpoint(path, "cpu", "fp32")
    alone = generator.latents([1], [7], steps=3)
    many = generator.latents([0, 0, 1, 1], [5, 6, 7, 8], steps=3)
    assert alone.shape == (1, 4, 6, 6)
    assert torch.equal(many[2:3], alone)


def test_alignment_is_for_the_transformer(unet_path: Path, encoder: ColourMeans, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="backbone=transformer"):
        train_diffusion(make_tiles({"STR": 3}), tuning(unet_path, align=0.5), tmp_path, device="cpu", encoder=encoder)
