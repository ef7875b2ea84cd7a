"""A Stable Diffusion in diffusers' folder layout, tiny and random: the loading code that the real one takes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from histosynth.core.checkpoint import read_card
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.diffusion.lora import lora_tensors
from histosynth.diffusion.sample import DiffusionGenerator
from histosynth.diffusion.share import apply_lora
from histosynth.diffusion.train import train_diffusion
from histosynth.diffusion.unet import UNet
from histosynth.tiles.batches import TileArray
from tests.diffusion.helpers import ColourMeans, tuning


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("stable")
    UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=2,
        norm_num_groups=8,
    ).save_pretrained(path / "unet")
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).save_pretrained(path / "vae")
    DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_pretrained(path / "scheduler")
    return path


def test_it_computes_what_diffusers_computes(folder: Path) -> None:
    model = UNet.open(folder, 16)
    assert (model.latent, model.width, model.whole) == ((4, 8, 8), 24, False)
    assert (model.process.schedule, model.process.prediction) == ("scaled-linear", "epsilon")
    draw = torch.Generator().manual_seed(1)
    noisy, context = torch.randn(3, 4, 8, 8, generator=draw), torch.randn(3, 2, 24, generator=draw)
    levels = torch.tensor([5, 300, 990])
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=draw, dtype=torch.uint8)
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    first = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        expected = network(noisy, levels, context).sample
        torch.testing.assert_close(model.denoise(noisy, levels, context), expected, atol=1e-5, rtol=1e-5)
        latents = first.encode(images.float() / 127.5 - 1).latent_dist.mean * 0.18215
        torch.testing.assert_close(model.encode(images), latents, atol=1e-5, rtol=1e-5)
        decoded = first.decode(latents / 0.18215).sample
        torch.testing.assert_close(model.decode(latents), decoded, atol=1e-5, rtol=1e-5)
    clean = torch.randn(3, 4, 8, 8, generator=draw)
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
    torch.testing.assert_close(
        model.process.add(clean, noisy, levels), scheduler.add_noise(clean, noisy, levels), atol=1e-5, rtol=1e-5
    )


def test_it_is_adapted_by_lora_and_its_weights_are_not_copied(
    folder: Path, tiles: TileArray, encoder: ColourMeans, tmp_path: Path
) -> None:
    config = replace(tuning(folder, steps=3, sample_steps=2), lr_adapter=1e-2)
    path = train_diffusion(tiles, config, tmp_path / "run", device="cpu", encoder=encoder)
    card = read_card(path)
    assert card["backbone"] == "unet" and card["source"]["path"] == str(folder)
    assert path.stat().st_size < (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    one = DiffusionGenerator.from_checkpoint(path, "cpu", "fp32")
    model = apply_lora(path.with_name("lora.safetensors"))
    assert all(v.abs().max() > 0 for n, v in lora_tensors(model.transformer).items() if "lora_B" in n)  # type: ignore[arg-type]
    other = DiffusionGenerator(model, torch.device("cpu"), "fp32")
    latents = one.latents([0, 1], [1, 2], steps=3)
    torch.testing.assert_close(other.latents([0, 1], [1, 2], steps=3), latents, atol=1e-4, rtol=1e-4)
    # diffusers' own reader, on its own network
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    network.load_lora_adapter(str(path.parent / "peft"), prefix="unet", weight_name="pytorch_lora_weights.safetensors")
    noisy, levels, context = torch.randn(2, 4, 8, 8), torch.tensor([5, 600]), torch.randn(2, 3, 24)
    with torch.no_grad():
        read = network(noisy, levels, context).sample
        torch.testing.assert_close(read, model.backbone.denoise(noisy, levels, context), atol=1e-5, rtol=1e-5)
    (batch,) = one.sample([0, 1, 2], [3, 4, 5], steps=2)
    assert batch.shape == (3, 3, 16, 16) and batch.dtype == torch.uint8


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="size is 18"):
        UNet.open(folder, 18)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no .safetensors weights"):
        UNet.open(broken, 16)
    scheduler = broken / "scheduler" / "scheduler_config.json"
    shutil.copytree(folder / "vae", broken / "vae", dirs_exist_ok=True)
    scheduler.write_text(scheduler.read_text().replace('"scaled_linear"', '"unheard_of"'))
    with pytest.raises(CheckpointError, match="unheard_of"):
        UNet.open(broken, 16)
