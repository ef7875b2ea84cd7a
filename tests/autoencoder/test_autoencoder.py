"""The first stage: its judge of patches, smooth latents, a decoder that learns other tiles, latents on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from histosynth.autoencoder import refine as refining
from histosynth.autoencoder import train as training
from histosynth.autoencoder.cache import latents_of, symmetries, views_of
from histosynth.autoencoder.critic import PatchCritic, adversarial_term, critic_loss
from histosynth.autoencoder.network import Autoencoder, AutoencoderShape, load_autoencoder
from histosynth.autoencoder.refine import refine_decoder, refinement
from histosynth.autoencoder.train import (
    AutoencoderConfig,
    deviation,
    shrunk_and_turned,
    train_autoencoder,
)
from histosynth.core.checkpoint import load_checkpoint
from histosynth.core.errors import SettingError
from histosynth.tiles.batches import TileArray, turned

CPU = torch.device("cpu")
TINY = {"size": 16, "steps": 8, "batch": 4, "width": 8, "blocks": 1, "save_every": 4, "precision": "fp32"}


def tiles(count: int = 12, seed: int = 0, fine: bool = False) -> TileArray:
    """Tiles of one colour each, or with a texture of two pixels a period on it."""
    rng = np.random.default_rng(seed)
    images = rng.integers(60, 200, (count, 3, 1, 1)) + np.zeros((1, 1, 16, 16))
    if fine:
        images = images + 50 * (np.indices((16, 16)).sum(axis=0) % 2 * 2 - 1)
    labels = np.zeros(count, dtype=np.int64)
    return TileArray(images.clip(0, 255).astype(np.uint8), labels, [f"t{seed}-{i}" for i in range(count)], ("TUM",))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Autoencoder:
    folder = tmp_path_factory.mktemp("start")
    return load_autoencoder(train_autoencoder(tiles(), AutoencoderConfig(**TINY), folder / "run", device="cpu"))[0]


def test_the_critics_loss_is_the_hinge() -> None:
    class Fixed(PatchCritic):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=(1, 2, 3), keepdim=True)

    real, fake = torch.tensor([0.2, 3.0]), torch.tensor([-2.0, 0.5])
    shown = (x[:, None, None, None].expand(2, 3, 8, 8) for x in (real, fake))
    expected = 0.5 * ((0.8 + 0.0) / 2 + (0.0 + 1.5) / 2)
    assert critic_loss(Fixed(), *shown).item() == pytest.approx(expected)


def test_the_critic_pulls_as_hard_as_its_weight_says() -> None:
    torch.manual_seed(0)
    critic, fake = PatchCritic(8).eval(), torch.rand(2, 3, 16, 16, requires_grad=True)
    distance = (fake - 0.5).abs().mean()
    (of_distance,) = torch.autograd.grad(distance, fake, retain_graph=True)
    (of_critic,) = torch.autograd.grad(adversarial_term(critic, fake, distance, 0.3), fake)
    assert of_critic.norm() / of_distance.norm() == pytest.approx(0.3, rel=1e-4)


def test_a_logit_of_the_critic_sees_a_patch() -> None:
    torch.manual_seed(0)
    critic, images = PatchCritic(8).eval(), torch.rand(1, 3, 64, 64, requires_grad=True)
    logits = critic(images)
    assert logits.shape == (1, 1, 16, 16)
    (seen,) = torch.autograd.grad(logits[0, 0, 8, 8], images)
    rows = torch.nonzero(seen.abs().sum(dim=(0, 1, 3))).flatten()
    assert 20 <= rows.max() - rows.min() + 1 <= 36


def test_latents_and_images_are_shrunk_and_turned_alike() -> None:
    config = AutoencoderConfig(equivariance=1.0)
    code = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4), (16, 16), mode="bilinear")
    images = code.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    sizes = set()
    for step in range(12):
        less, small = shrunk_and_turned(code, images, config, step)
        assert small.shape[-1] == 4 * less.shape[-1] and less.shape[-1] % 2 == 0
        # the images are the latents enlarged, and still are
        pooled = torch.nn.functional.avg_pool2d(small, 4)
        assert (pooled - less).abs().mean() < 0.03
        assert (pooled.rot90(1, (2, 3)) - less).abs().mean() > 0.05
        sizes.add(less.shape[-1])
    assert sizes == {8, 10, 12, 14, 16}
    still = shrunk_and_turned(code, images, AutoencoderConfig(equivariance=0.0), 0)
    assert still[0] is code and still[1] is images
    tiny = torch.rand(2, 3, 2, 2)
    assert shrunk_and_turned(tiny, torch.rand(2, 3, 8, 8), config, 0)[0] is tiny


def test_a_refined_decoder_keeps_the_latents_and_learns_the_texture(start: Autoencoder, tmp_path: Path) -> None:
    fine = tiles(24, seed=1, fine=True)
    images = torch.from_numpy(np.array(fine.images))
    refined = refine_decoder(fine, start, tmp_path / "run", steps=400, device="cpu")
    assert refined.name == start.name
    with torch.no_grad():
        truth = images.float() / 127.5 - 1
        assert torch.equal(start.posterior(truth)[0], refined.posterior(truth)[0])
        before, after = ((network.decode(network.encode(images)) - truth).abs().mean() for network in (start, refined))
    assert after < 0.7 * before


def test_every_tile_has_its_own_amount_of_latent_noise(start: Autoencoder) -> None:
    log_variance = torch.full((4000, 4, 2, 2), -6.0)
    config = AutoencoderConfig(part="decoder", init="base", latent_noise=0.8)
    added = (deviation(start, log_variance, config, 3).square() - log_variance.exp()) * start.scale.square()
    assert (added - added[:, :1, :1, :1]).abs().max() < 1e-4  # one amount a tile, in deviations of every channel
    amounts = added[:, 0, 0, 0].clamp_min(0).sqrt()
    assert amounts.square().mean().sqrt() == pytest.approx(0.8, rel=0.05)
    assert amounts.mean() == pytest.approx(0.8 * np.sqrt(2 / np.pi), rel=0.05)  # half a normal distribution
    again, other = (deviation(start, log_variance, config, step) for step in (3, 4))
    assert torch.equal(again, deviation(start, log_variance, config, 3)) and not torch.equal(again, other)
    none = deviation(start, log_variance, AutoencoderConfig(), 3)
    assert torch.equal(none, (0.5 * log_variance).exp())


def test_a_decoder_that_learned_from_noisy_latents_forgives_noise(start: Autoencoder, tmp_path: Path) -> None:
    flat = tiles(24, seed=2)
    settings = TINY | {"steps": 150, "part": "decoder", "init": "start", "held_out": 0.0, "adversarial": 0.0}
    errors = []
    for noise in (0.0, 0.8):
        config = AutoencoderConfig(**settings, latent_noise=noise)
        path = train_autoencoder(flat, config, tmp_path / str(noise), device="cpu", start=start)
        with torch.no_grad():
            network, images = load_autoencoder(path)[0], torch.from_numpy(np.array(flat.images))
            code = network.encode(images)
            code = code + 0.8 * torch.randn(code.shape, generator=torch.Generator().manual_seed(1))
            errors.append((network.decode(code) - (images.float() / 127.5 - 1)).abs().mean().item())
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("given", [{"latent_noise": 0.5}, {"latent_noise": -1.0, "part": "decoder", "init": "base"}])
def test_latent_noise_that_cannot_be_used_is_refused(given: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="latent_noise"):
        train_autoencoder(tiles(), AutoencoderConfig(size=16, **given), tmp_path / "run", device="cpu")  # type: ignore[arg-type]


def test_a_refined_autoencoder_has_the_mean_and_spread_of_its_tiles(start: Autoencoder, tmp_path: Path) -> None:
    dark = tiles(200, seed=5)
    dark = TileArray((dark.images // 3).astype(np.uint8), dark.labels, dark.ids, dark.classes)
    refined = refine_decoder(dark, start, tmp_path / "many", steps=1, device="cpu")
    few = refine_decoder(dark.subset([0]), start, tmp_path / "one", steps=1, device="cpu")
    with torch.no_grad():
        images = torch.from_numpy(np.array(dark.images))
        codes = [network.encode(images) for network in (start, few, refined)]
    off = [code.mean(dim=(0, 2, 3)).abs().max().item() for code in codes]
    assert off[2] < 0.3 * off[0] and 0.8 * off[0] < off[1] < off[0]
    torch.testing.assert_close(codes[2].std(dim=(0, 2, 3)), torch.ones(4), atol=0.35, rtol=0)


def test_a_finished_refinement_is_only_read(
    start: Autoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = refine_decoder(tiles(), start, tmp_path / "run", steps=2, device="cpu")
    monkeypatch.setattr(training, "batch_at", lambda *a, **k: pytest.fail("it was trained again"))
    again = refine_decoder(tiles(), start, tmp_path / "run", steps=2, device="cpu")
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_a_short_refinement_keeps_states_has_full_rates_and_sees_every_tile(
    start: Autoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[AutoencoderConfig] = []
    real = refining.train_autoencoder

    def noted(data: TileArray, config: AutoencoderConfig, folder: Path, **options: object) -> Path:
        asked.append(config)
        return real(data, config, folder, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(refining, "train_autoencoder", noted)
    refine_decoder(tiles(40), start, tmp_path / "run", steps=20, device="cpu")
    (config,) = asked
    assert config.warmup == 2 and config.save_every == 5 and config.held_out == 0.0
    said = refinement(tmp_path / "run")
    assert said["steps"] == 20 and said["seconds"] > 0 and said["stopped_by_clock"] is False
    assert refinement(tmp_path / "none") == {}


@pytest.mark.parametrize(("steps", "seconds", "noise"), [
    (499, None, 0.0), (500, None, 0.8), (10**6, 119.0, 0.0), (10**6, 120.0, 0.8),
])  # fmt: skip
def test_only_a_refinement_with_time_learns_from_noisy_latents(
    steps: int, seconds: float | None, noise: float, start: Autoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked(Exception):
        pass

    def ask(data: TileArray, config: AutoencoderConfig, *rest: object, **more: object) -> Path:
        raise Asked(config.latent_noise)

    monkeypatch.setattr(refining, "train_autoencoder", ask)
    with pytest.raises(Asked) as asked:
        refine_decoder(tiles(), start, tmp_path / "run", steps=steps, seconds=seconds, device="cpu")
    assert asked.value.args == (noise,)


def test_a_killed_training_goes_on_with_the_same_critic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoencoderConfig(adversarial_from=0.0, **TINY)
    whole = train_autoencoder(tiles(), config, tmp_path / "whole", device="cpu")
    taken = training.batch_at

    def killed(*arguments: object, **options: object) -> object:
        if arguments[1] == 6:
            raise KeyboardInterrupt
        return taken(*arguments, **options)

    monkeypatch.setattr(training, "batch_at", killed)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(tiles(), config, tmp_path / "cut", device="cpu")
    monkeypatch.setattr(training, "batch_at", taken)
    cut = train_autoencoder(tiles(), config, tmp_path / "cut", device="cpu")
    one, two = (load_checkpoint(path)[0] for path in (whole, cut))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    plain = train_autoencoder(tiles(), AutoencoderConfig(adversarial=0.0, **TINY), tmp_path / "plain", device="cpu")
    assert not torch.equal(one["decoder.0.weight"], load_checkpoint(plain)[0]["decoder.0.weight"])


def test_latents_on_disk_are_those_of_the_turned_tiles(start: Autoencoder, tmp_path: Path) -> None:
    data = tiles(5, seed=2, fine=True)
    latents, turns = latents_of(tmp_path, data, start, 0, CPU, "fp32")
    assert latents.shape == (8, 5, 4, 4, 4) and latents.dtype == np.float16
    assert np.array_equal(turns, symmetries(5, 8, 0)) and sorted(turns[0]) == list(range(8))
    images = torch.from_numpy(np.array(data.images))
    with torch.no_grad():
        for view in range(8):
            expected = start.encode(turned(images, turns[:, view]))
            np.testing.assert_allclose(latents[view], expected.numpy(), atol=2e-3, rtol=2e-3)
    assert views_of(5) == 8 and views_of(4000) == 2 and views_of(100_000) == 1


def test_latents_are_computed_again_for_other_tiles_or_networks(
    start: Autoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents_of(tmp_path, tiles(5), start, 0, CPU, "fp32")
    with monkeypatch.context() as patch:
        patch.setattr("histosynth.autoencoder.cache.fill", lambda *a: pytest.fail("they were there"))
        latents_of(tmp_path, tiles(5), start, 0, CPU, "fp32")
    torch.manual_seed(1)
    other = Autoencoder(AutoencoderShape(8, 1)).eval()
    other.name = "other"
    first = np.array(latents_of(tmp_path, tiles(5), start, 0, CPU, "fp32")[0])
    assert not np.array_equal(first, latents_of(tmp_path, tiles(5), other, 0, CPU, "fp32")[0])
    assert not np.array_equal(first, latents_of(tmp_path, tiles(5, seed=3), start, 0, CPU, "fp32")[0])
