"""A GAN on latents: what it settles, that it resumes, starts, grows and makes tiles like one on pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from histosynth.autoencoder.network import Autoencoder, load_autoencoder
from histosynth.autoencoder.refine import refine_decoder
from histosynth.autoencoder.train import AutoencoderConfig, train_autoencoder
from histosynth.core.checkpoint import load_checkpoint, read_card
from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.gan import step as stepping
from histosynth.gan.augment import PIPES, augment
from histosynth.gan.config import GanConfig
from histosynth.gan.feed import Feed
from histosynth.gan.generator import Generator
from histosynth.gan.nvidia.export import export_nvidia
from histosynth.gan.projector import ProjectSettings, project
from histosynth.gan.sample import GanGenerator
from histosynth.gan.train import train_gan
from tests.gan.helpers import tiles, tiny_config


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTOSYNTH_QUIET", "1")


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = AutoencoderConfig(size=32, steps=4, batch=4, width=8, blocks=1, precision="fp32")
    return train_autoencoder(tiles(), config, tmp_path_factory.mktemp("first") / "run", device="cpu")


def on_latents(first_stage: Path, **changes: Any) -> GanConfig:
    return tiny_config(
        **({"space": "latents", "autoencoder": str(first_stage), "decoder": 0.4, "start": "code"} | changes)
    )


@pytest.fixture(scope="module")
def trained(first_stage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_gan(tiles(), on_latents(first_stage), tmp_path_factory.mktemp("gan") / "run", device="cpu")


def test_auto_means_latents_where_nothing_needs_pixels() -> None:
    plain = GanConfig()
    assert (plain.space, plain.head, plain.ada_pipe, plain.noise) == ("latents", "", "latents", True)
    assert GanConfig(size=32).space == "latents"
    for changes in ({"size": 32}, {"head": "tissue-tiny"}, {"perceptual": 1.0}, {"ada_pipe": "bgc"},
                    {"architecture": "lite"}):  # fmt: skip
        assert GanConfig(init="none", **changes).space == "pixels", changes
    small = GanConfig(size=32, init="none")
    assert (small.head, small.ada_pipe, small.noise) == ("tissue-tiny", "tissue", False)
    assert GanConfig(head="").space == "latents" and GanConfig(noise=False).noise is False
    assert plain.command() == "histosynth train gan TILES RUN"
    assert "--space pixels" in GanConfig(perceptual=1.0, init="none").command()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "tissue-tiny"}, "head is set with space=latents"),
        ({"saturation": 1.0}, "saturation is set"),
        ({"ada_pipe": "tissue"}, "ada_pipe is set"),
        ({"size": 16}, "size is 16 on latents"),
        ({"decoder": 1.0}, "decoder is 1.0"),
        ({"autoencoder": "other.safetensors"}, "autoencoder is 'other.safetensors' with init=base"),
    ],
)
def test_what_needs_pixels_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        GanConfig(**({"space": "latents"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 16}, "size is 16: this works on pixels"),
        ({"head": "tissue-tiny"}, "head is set.*Set init=none"),
        ({"architecture": "lite"}, "architecture is set"),
        ({"space": "pixels"}, "the shipped weights on latents"),
    ],
)
def test_pixels_do_not_start_from_the_shipped_weights(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        GanConfig(**changes)


def test_auto_follows_the_start(trained: Path, first_stage: Path, tmp_path: Path) -> None:
    followed = GanConfig(init=str(trained), size=32)
    assert (followed.space, followed.architecture, followed.lr_g) == ("latents", "residual", 0.001)
    pixels = train_gan(tiles(), tiny_config(steps=1), tmp_path / "pixels", device="cpu")
    followed = GanConfig(init=str(pixels), size=64)
    assert (followed.space, followed.architecture, followed.lr_g) == ("pixels", "stylegan2", 0.0025)
    older = on_latents(first_stage, architecture="stylegan2", steps=1, decoder=0.0)
    older = train_gan(tiles(), older, tmp_path / "older", device="cpu")
    followed = tiny_config(init=str(older), steps=1)
    assert (followed.space, followed.architecture) == ("latents", "stylegan2")
    train_gan(tiles(), followed, tmp_path / "newer", device="cpu")
    with pytest.raises(CheckpointError, match=r"networks of pixels, these settings of latents.*space=pixels"):
        train_gan(tiles(), tiny_config(init=str(pixels), space="latents"), tmp_path / "run", device="cpu")


def test_others_read_the_refined_decoder_and_write_nothing(trained: Path, first_stage: Path) -> None:
    folder = trained.parents[1] / "decoder"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    start, state = load_autoencoder(first_stage)[0], torch.get_rng_state()
    one = refine_decoder(tiles(), start, folder, steps=99)
    assert torch.equal(state, torch.get_rng_state())
    held = GanGenerator.from_checkpoint(trained, "cpu").network.autoencoder
    assert held is not None and torch.equal(one.scale, held.scale)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert read_card(trained)["decoder"]["steps"] == 2


def test_a_killed_training_ends_like_one_that_was_not(
    trained: Path, first_stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stepping.TrainingStep.__call__

    def killed(self: Any, step: int, *arguments: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt
        made(self, step, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stepping.TrainingStep, "__call__", killed)
        train_gan(tiles(), on_latents(first_stage), tmp_path / "run", device="cpu")
    again = train_gan(tiles(), on_latents(first_stage), tmp_path / "run", device="cpu")
    one, two = (load_checkpoint(path)[0] for path in (trained, again))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_checkpoint_holds_its_autoencoder(trained: Path, first_stage: Path) -> None:
    given, card = load_autoencoder(first_stage)[0], read_card(trained)
    held = GanGenerator.from_checkpoint(trained, "cpu").network.autoencoder
    assert isinstance(held, Autoencoder)
    assert held.name == card["latent_space"] == given.name
    own, theirs = held.state_dict(), given.state_dict()
    assert all(torch.equal(own[k], theirs[k]) for k in own if k.startswith(("encoder.", "coarse_in.")))
    assert not torch.equal(own["decoder.0.weight"], theirs["decoder.0.weight"])  # it was refined
    assert card["learned_before"] == [{"data": tiles().digest(), "size": 32}]
    assert card["trainable"] < card["parameters"] + card["parameters_discriminator"]


def test_latents_are_made_and_judged_and_tiles_come_out(trained: Path) -> None:
    maker = GanGenerator.from_checkpoint(trained, "cpu")
    network: Generator = maker.network
    codes = maker.latents([0, 1, 2], [5, 6, 7])
    with torch.no_grad():
        canvas = network.paint(codes, None)
        assert canvas.shape == (3, 4, 8, 8)
        assert network.autoencoder is not None
        torch.testing.assert_close(network.synthesise(codes, None), network.autoencoder.decode(canvas))
    together = torch.cat(list(maker.sample([0, 1, 2], [5, 6, 7], batch_size=3)))
    alone = torch.cat([next(iter(maker.sample([k], [5 + k]))) for k in range(3)])
    assert together.shape == (3, 3, 32, 32) and together.dtype == torch.uint8
    assert torch.equal(together, alone)


def test_the_feed_gives_the_latents_of_the_tiles_that_were_drawn(first_stage: Path) -> None:
    data, config = tiles(), on_latents(first_stage)
    # latents that say which tile and which view they are
    marks = np.zeros((2, len(data), 4, 8, 8), np.float16)
    marks[:, :, 0] = np.arange(len(data))[None, :, None, None]
    marks[:, :, 1] = np.arange(2)[:, None, None, None]
    views = set()
    with Feed(data, config, 6) as pixels, Feed(data, config, 6, latents=(marks, np.zeros((len(data), 2)))) as latents:
        for step in range(6):
            one, two = pixels(step), latents(step)
            assert one.ids == two.ids and torch.equal(one.labels, two.labels)
            assert [data.ids[int(k)] for k in two.images[:, 0, 0, 0]] == two.ids
            views |= set(two.images[:, 1, 0, 0].int().tolist())
    assert views == {0, 1}


def test_another_training_starts_from_it_with_other_classes_and_a_larger_size(trained: Path, tmp_path: Path) -> None:
    config = tiny_config(init=str(trained), steps=2, decoder=0.0, start="code")
    path = train_gan(tiles(classes=("TUM", "NEW")), config, tmp_path / "run", device="cpu")
    assert read_card(path)["latent_space"] == read_card(trained)["latent_space"]
    old, new = load_checkpoint(trained)[0], load_checkpoint(path)[0]
    assert torch.equal(old["G_ema.autoencoder.decoder.0.weight"], new["G_ema.autoencoder.decoder.0.weight"])
    larger = replace(config, size=64)
    grown = train_gan(tiles(size=64), larger, tmp_path / "large", device="cpu")
    assert next(iter(GanGenerator.from_checkpoint(grown, "cpu").sample([0], [1]))).shape == (1, 3, 64, 64)


def test_weights_of_pixels_are_no_start_for_latents(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"networks of latents, these settings of pixels.*space=latents"):
        train_gan(tiles(), tiny_config(init=str(trained), space="pixels", start="code"), tmp_path / "run", device="cpu")


def test_a_tile_is_found_again_through_the_decoder(trained: Path) -> None:
    maker = GanGenerator.from_checkpoint(trained, "cpu")
    target = next(iter(maker.sample([1], [3])))
    found = project(maker, target, ProjectSettings(steps=20, perceptual=0.0, encoder="none"))
    assert found.trace[0, -1] < found.trace[0, 0]


def test_nvidias_networks_make_no_latents(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="makes latents"):
        export_nvidia(trained, tmp_path / "out.pt")


def test_latents_are_moved_scaled_and_cut_but_not_coloured() -> None:
    x = torch.randn(64, 4, 16, 16)
    changed = augment(x, 1.0, torch.Generator().manual_seed(0), "latents")
    assert changed.shape == x.shape and not torch.equal(changed, x)
    only = replace(PIPES["none"], brightness=0.2, contrast=0.3)
    y = augment(x, 1.0, torch.Generator().manual_seed(0), only)
    # one lift and one factor a sample: the same straight line in all channels
    slope = (y[:, :, 0, 1] - y[:, :, 0, 0]) / (x[:, :, 0, 1] - x[:, :, 0, 0])
    torch.testing.assert_close(slope, slope[:, :1].expand_as(slope), rtol=1e-3, atol=1e-3)
    assert slope[:, 0].std() > 0.1
    with pytest.raises(DataError, match="RGB"):
        augment(x, 0.5, torch.Generator().manual_seed(0), "tissue")
