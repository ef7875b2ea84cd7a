"""The autoencoder, the noising process and the conditioner, each against what defines it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from histosynth.autoencoder.figures import psnr, ssim
from histosynth.autoencoder.network import Autoencoder, check_size, load_autoencoder, to_signed, to_uint8
from histosynth.autoencoder.train import laplacian_distance, vary_colours
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.diffusion.adapter import Conditioner, carry_over
from histosynth.diffusion.model import Bank
from histosynth.diffusion.noise import LEVELS, Noising, solver, spread_levels
from histosynth.diffusion.sample import draw_condition
from histosynth.diffusion.transformer import TransformerShape, build_transformer, denoise
from histosynth.tiles.batches import TileArray


def test_latents_of_the_training_tiles_have_mean_zero_and_deviation_one(
    tiles: TileArray, autoencoder_path: Path
) -> None:
    model, card = load_autoencoder(autoencoder_path)
    latents = model.encode(tiles.tensor())
    assert latents.shape == (len(tiles), 4, 4, 4)
    # the statistics were taken on the same tiles but for the one held out
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
    assert {"psnr_db", "ssim", "held_out_tiles"} <= card.keys() and card["held_out_tiles"] == 1


def test_the_linear_paths_start_by_keeping_the_colour_of_each_block(rng: np.random.Generator) -> None:
    colours = torch.from_numpy(rng.integers(0, 256, (2, 3, 4, 4), dtype=np.uint8))
    images = colours.repeat_interleave(4, 2).repeat_interleave(4, 3)
    model = Autoencoder()
    with torch.no_grad():
        code = model.coarse_in(to_signed(images))[:, :4]
        assert torch.equal(to_uint8(model.coarse_out(code)), images)


def test_pixels_survive_the_change_of_range() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_signed(values)), values)


def test_ssim_and_psnr_agree_with_their_definitions(rng: np.random.Generator) -> None:
    a = rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-40, 40, a.shape), 0, 255).astype(np.uint8)

    def blur(z: np.ndarray) -> np.ndarray:  # an independent Gaussian, cut to where no edge is padded
        smooth = gaussian_filter(z.astype(np.float64), (0, 0, 1.5, 1.5), truncate=3.5)
        return smooth[:, :, 5:-5, 5:-5]

    x, y = a.astype(np.float64), b.astype(np.float64)
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 2.55**2, 7.65**2
    expected = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    one, other = torch.from_numpy(a), torch.from_numpy(b)
    assert ssim(one, other) == pytest.approx(expected.mean(), abs=1e-4)
    assert ssim(one, one) == pytest.approx(1)
    error = ((x - y) ** 2).mean(axis=(1, 2, 3))
    assert psnr(one, other) == pytest.approx((10 * np.log10(255**2 / error)).mean(), abs=1e-3)


def test_the_detail_term_sees_edges_and_not_a_shift_of_colour() -> None:
    flat = torch.zeros(1, 3, 16, 16)
    assert laplacian_distance(flat, flat + 0.5) == pytest.approx(0, abs=1e-6)
    board = flat + 0.5 * (torch.arange(16) % 2)
    assert laplacian_distance(flat, board) > 0.2


def test_varied_colours_stay_in_range_and_white_stays_light() -> None:
    white = torch.ones(64, 3, 8, 8)
    varied = vary_colours(white, 1)
    assert varied.shape == white.shape and varied.abs().max() <= 1
    assert varied.mean() > 0.7 and torch.equal(varied, vary_colours(white, 1))


@pytest.mark.parametrize("size", [0, 6, 20])
def test_sizes_that_do_not_divide_are_refused(size: int) -> None:
    with pytest.raises(SettingError, match=f"size is {size}"):
        check_size(size, patch=2)


def test_the_noising_keeps_variance_and_v_gives_back_the_clean_latents() -> None:
    noising = Noising(torch.device("cpu"))
    levels = torch.arange(0, LEVELS, 111)
    clean, noise = torch.randn(len(levels), 4, 2, 2), torch.randn(len(levels), 4, 2, 2)
    noisy, v = noising.add(clean, noise, levels), noising.target(clean, noise, levels)
    a, s = noising.a[levels], noising.s[levels]
    torch.testing.assert_close(a**2 + s**2, torch.ones_like(a))
    torch.testing.assert_close(a * noisy - s * v, clean, atol=1e-5, rtol=1e-5)
    weight = noising.weight(torch.arange(LEVELS), 5.0)
    assert weight.min() >= 0 and weight.max() <= 5 / 6 + 1e-6


def test_the_solver_finds_a_point_mass() -> None:
    """With one possible image the best v is known exactly, and any number of steps must end on the image."""
    truth = torch.randn(1, 4, 2, 2)
    scheduler = solver(8)
    noising = Noising(torch.device("cpu"))
    x = torch.randn(1, 4, 2, 2)
    for level in scheduler.timesteps:
        a, s = noising.a[level], noising.s[level]
        x = scheduler.step(a * (x - a * truth) / s - s * truth, level, x, return_dict=False)[0]
    torch.testing.assert_close(x, truth, atol=1e-3, rtol=1e-3)


def test_a_batch_of_levels_covers_the_range_evenly(rng: np.random.Generator) -> None:
    levels = spread_levels(10, rng)
    assert sorted((levels // 100).tolist()) == list(range(10))


def test_the_denoiser_starts_at_zero_and_hears_time_and_context() -> None:
    torch.manual_seed(0)
    model = build_transformer(TransformerShape(width=32, layers=1, heads=2, tokens=2), 4)
    noisy, context = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 32)
    levels = torch.tensor([5, 900])
    with torch.no_grad():
        assert denoise(model, noisy, levels, context).abs().max() == 0
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        out = denoise(model, noisy, levels, context)
        assert not torch.allclose(out, denoise(model, noisy, levels.flip(0), context))
        assert not torch.allclose(out, denoise(model, noisy, levels, context.flip(0)))
    with pytest.raises(SettingError, match="heads"):
        build_transformer(TransformerShape(width=30, heads=4), 4)


def test_what_is_not_told_cannot_matter() -> None:
    torch.manual_seed(0)
    conditioner = Conditioner(dim=6, classes=3, width=8, tokens=2)
    one, other = torch.randn(2, 6), torch.randn(2, 6)
    labels, none = torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool)
    context, logits = conditioner(one, labels)
    assert context.shape == (2, 3, 8) and logits.shape == (2, 3)
    assert torch.equal(conditioner(one, labels, none)[0], conditioner(other, labels, none)[0])
    assert torch.equal(conditioner(one, labels, None, none)[0], conditioner(one, labels.flip(0), None, none)[0])
    assert torch.equal(conditioner(one, labels, none, none)[0], conditioner.untold(2))
    # the head reads the embedding alone
    assert torch.equal(logits, conditioner(one, labels.flip(0))[1])


def test_standardising_survives_one_tile_and_constant_features() -> None:
    conditioner = Conditioner(dim=3, classes=1, width=8, tokens=1)
    conditioner.measure(torch.ones(1, 3))
    assert torch.isfinite(conditioner.standardise(torch.ones(1, 3))).all()
    conditioner.measure(torch.tensor([[0.0, 1, 5], [2, 1, 5]]))
    assert conditioner.standardise(torch.tensor([[0.0, 1, 5]])).tolist() == [[-1, 0, 0]]


def test_classes_of_the_same_name_keep_their_token() -> None:
    torch.manual_seed(0)
    old = Conditioner(dim=6, classes=3, width=8, tokens=2).state_dict()
    new = carry_over(old, ("STR", "TUM", "LYM"), ("LYM", "POLYP", "STR", "CYST"), seed=1)
    for name in ("class_tokens.weight", "head.weight", "head.bias"):
        assert len(new[name]) == 4
        assert torch.equal(new[name][0], old[name][2]) and torch.equal(new[name][2], old[name][0])
        assert not torch.equal(new[name][1], new[name][3])
        torch.testing.assert_close(new[name][1], old[name].mean(dim=0), atol=1.0, rtol=0)
    again = carry_over(old, ("STR", "TUM", "LYM"), ("POLYP",), seed=1)
    assert torch.equal(again["head.weight"][0], new["head.weight"][1])  # whatever stands beside it
    one = carry_over(Conditioner(6, 1, 8, 2).state_dict(), ("A",), ("B",), seed=1)
    assert all(torch.isfinite(v).all() for v in one.values())


def test_conditions_keep_the_spread_of_their_class() -> None:
    values = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * 2 + 3
    bank = Bank([values, values[:1], torch.empty(0, 4)])
    drawn = torch.stack([d for s in range(400) if (d := draw_condition(bank, 0, s, noise=0.0)) is not None])
    torch.testing.assert_close(drawn.mean(0), values.mean(0), atol=0.4, rtol=0)
    torch.testing.assert_close(drawn.std(0), values.std(0), atol=0.4, rtol=0)
    nearest = torch.cdist(drawn, values).min(dim=1).values
    assert (nearest > 0.1).float().mean() > 0.8  # few are a training embedding
    assert torch.equal(draw_condition(bank, 1, 7, noise=0.0), values[0])  # type: ignore[arg-type]
    assert draw_condition(bank, 2, 7) is None


def test_a_file_that_is_no_autoencoder_is_refused(tuned_path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="kind 'diffusion'"):
        load_autoencoder(tuned_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_autoencoder(tmp_path / "none.safetensors")
