"""Settings of the training: what is refused, how long it lasts, and the command that repeats it."""

from __future__ import annotations

import shlex
from dataclasses import asdict, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from histosynth.cli import _take_config, build_app
from histosynth.core.assets import asset_path
from histosynth.core.checkpoint import read_card, save_checkpoint
from histosynth.core.errors import SettingError
from histosynth.core.run import plain
from histosynth.gan.config import GanConfig
from histosynth.gan.transfer import BASE
from histosynth.gan.usual import SHIPPED


def parsed(command: str) -> GanConfig:
    """The settings that a command line gives."""
    app = build_app()
    tokens = _take_config(app, shlex.split(command))
    return app.parse_args(tokens, exit_on_error=False)[1].arguments["config"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"seconds": -1.0}, "seconds is -1"),
        ({"ada_target": 2.0}, "ada_target is 2.0.*0 to 1"),
        ({"r1_gamma": -1.0}, "r1_gamma is -1"),
        ({"sampling": "odd"}, "sampling is 'odd'.*balanced or natural"),
        ({"precision": "fp8"}, "precision is 'fp8'.*auto, fp32 or bf16"),
        ({"loss": "hinge"}, "loss is 'hinge'.*logistic, bce or relativistic"),
        ({"size": 33}, "size is 33"),
        ({"class_groups": True, "sampling": "natural"}, "class_groups is set with sampling=natural"),
        ({"class_groups": True, "architecture": "lite", "init": "none"}, "class_groups is set with architecture=lite"),
        ({"batch": 9, "accumulate": 2}, "accumulate is 2, which does not divide batch, 9"),
        ({"kimg": 5.0, "epochs": 3}, "kimg is 5.0 and epochs is 3"),
        ({"architecture": "lite", "freeze_d": 1}, "freeze_d"),
        ({"architecture": "lite", "init": "none", "mapping_lr": 0.01}, "mapping_lr is 0.01 with architecture=lite"),
        ({"alpha_gate": True}, "alpha_gate is set without a head.*head=tissue-tiny"),
        ({"head": "", "space": "pixels", "init": "none", "head_joint": True}, "head_joint is set without a head"),
        ({"autoencoder": "own.safetensors", "space": "pixels", "init": "none"}, "autoencoder is 'own.*space=pixels"),
        ({"ada_pipe": "odd"}, "'odd'.*tissue"),
    ],
)
def test_wrong_settings_name_value_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        GanConfig(**changes)


def test_every_setting_is_explained_once() -> None:
    import inspect

    source = inspect.getsource(GanConfig)
    for field in fields(GanConfig):
        assert source.count(f"    {field.name}: ") == 1
        after = source.split(f"    {field.name}: ", 1)[1].split("\n")[1]
        assert after.startswith('    """'), field.name


def test_length_follows_steps_thousand_tiles_or_epochs() -> None:
    assert GanConfig(steps=7).length(tiles=100, classes=3) == 7
    assert GanConfig(kimg=50, batch=16).length(100, 3) == 3125
    # an epoch: all tiles, or a number a class; what is left over for less than a batch is dropped
    assert GanConfig(epochs=2, batch=16).length(100, 3) == 2 * 6
    assert GanConfig(epochs=50, samples_per_class=1000, batch=8).length(5, 9) == 50 * 1125
    assert GanConfig(epochs=1, batch=16).length(3, 1) == 1


def test_shape_takes_every_setting_of_the_networks() -> None:
    config = GanConfig(
        init="none", architecture="stylegan2", channel_base=300, mbstd_group=2, conv_clamp=256.0, noise=False,
        class_embedding="add",
    )  # fmt: skip
    shape = config.shape(4)
    assert (shape.classes, shape.channel_base, shape.mbstd_group, shape.conv_clamp) == (4, 300, 2, 256.0)
    assert shape.noise is False and shape.class_embedding == "add" and shape.output_clamp is None
    assert replace(config, conditional=False).shape(4).classes == 0


@pytest.mark.parametrize("size", [64, 128, 256])
def test_what_is_left_open_follows_from_where_the_networks_work(size: int) -> None:
    names = (
        "space", "loss", "class_groups", "channel_base", "channel_max", "noise", "head", "ada_pipe", "architecture",
        "lr_g", "lr_d", "mapping_lr", "r1_every", "ema",
    )  # fmt: skip

    def settled(**given: Any) -> tuple[object, ...]:
        config = GanConfig(size=size, init="none", **given)
        return tuple(getattr(config, name) for name in names)

    residual, stylegan2 = ("residual", 0.001, 0.001, 1.0, 4, 20.0), ("stylegan2", 0.0025, 0.0025, 0.01, 16, 5.0)
    on_latents = ("latents", "relativistic", True, 16 * size, 64, True, "", "latents", *residual)
    assert settled() == on_latents
    assert settled(sampling="natural") == ("latents", "relativistic", False, *on_latents[3:])
    assert settled(channel_max=48)[3:5] == (12 * size, 48)
    assert settled(channel_base=512, loss="logistic", class_groups=False)[1:5] == ("logistic", False, 512, 64)
    pixels = ("pixels", "logistic", False, 2048, 128, False, "tissue-tiny", "tissue")
    assert settled(space="pixels") == (*pixels, *stylegan2)
    assert settled(space="pixels", architecture="residual") == (*pixels, *residual)
    assert settled(architecture="stylegan2") == (*on_latents[:8], *stylegan2)
    assert settled(architecture="lite", lr_g=1e-4, ema=1.0)[8:] == ("lite", 1e-4, 0.0025, 1.0, 16, 1.0)


def test_pairs_told_apart_are_held_at_another_share_than_real_tiles_known() -> None:
    for changes, target in (
        ({}, 0.95),
        ({"loss": "logistic"}, 0.6),
        ({"space": "pixels"}, 0.6),
        ({"ada_target": 0.0}, 0.0),
    ):
        assert GanConfig(init="none", **changes).ada_target == target


def test_the_command_repeats_the_settings() -> None:
    config = GanConfig(
        size=32, init="none", film=False, noise=True, kimg=1.5, head="pathoduet", head_joint=True, r1_gamma=0.0,
        alpha_gate=True, ada="accuracy", ema_decay=0.999, snapshots=True,
    )  # fmt: skip
    words = config.command()
    assert words.startswith("histosynth train gan TILES RUN ") and "--no-film" in words
    assert parsed(words.removeprefix("histosynth ")) == config
    assert GanConfig(init="/a/b c/gan.safetensors").command().endswith("--init gan.safetensors")


@pytest.mark.parametrize("space", ["latents", "pixels"])
@pytest.mark.parametrize("architecture", ["stylegan2", "residual"])
def test_the_command_names_the_networks_where_they_are_not_the_usual_ones(space: str, architecture: str) -> None:
    config = GanConfig(init="none", space=space, architecture=architecture)
    words = config.command()
    assert parsed(words.removeprefix("histosynth ")) == config
    usual = architecture == ("residual" if space == "latents" else "stylegan2")
    assert ("--architecture" in words, "--lr-g" in words) == (not usual, False)


def test_what_is_known_of_the_shipped_weights_is_what_they_are() -> None:
    shape = read_card(asset_path(BASE))["shape"]
    assert {name: shape[name] for name in SHIPPED} == SHIPPED
    assert GanConfig().shape(shape["classes"]).architecture == GanConfig().architecture == "residual"


def test_parents_are_named_without_their_folder() -> None:
    assert GanConfig(init="none").parents() == []
    assert GanConfig(init="base").parents() == ["gan-base-64.safetensors"]
    assert GanConfig(init="/a/b/mine.safetensors").parents() == ["mine.safetensors"]


@pytest.mark.parametrize("name", ["poc-cgan", "skin-transfer", "stylegan2-64", "stylegan2-ada-256"])
def test_the_command_of_a_preset_repeats_it(name: str) -> None:
    config = parsed(f"train gan TILES RUN --config gan/{name}")
    assert parsed(config.command().removeprefix("histosynth ")) == config


@pytest.mark.parametrize(("start", "noise"), [("constant", True), ("code", False)])
def test_start_and_noise_are_those_of_the_start_weights(start: str, noise: bool, tmp_path: Path) -> None:
    """They change what the other weights make; a training that goes on from them begins with what they make."""
    shape = GanConfig(size=32, init="none", space="pixels", start=start, noise=noise).shape(2)
    card = {"kind": "gan", "classes": ["a", "b"], "shape": asdict(shape)}
    path = save_checkpoint(tmp_path / "start.safetensors", {"a": torch.zeros(1)}, card)
    config = GanConfig(size=32, init=str(path))
    assert (config.start, config.noise) == (start, noise)
    other = GanConfig(size=32, init=str(path), start="code", noise=True)
    assert (other.start, other.noise) == ("code", True)
    command = other.command().removeprefix("histosynth ").replace("start.safetensors", str(path))
    assert parsed(command) == other


def test_the_first_conditional_gan_can_do_without_the_encoder_that_is_not_free() -> None:
    page = (files("histosynth") / "presets/gan/poc-cgan.yaml").read_text()
    without = next(line for line in page.splitlines() if line.endswith(" does without."))
    config = parsed(f"train gan TILES RUN --config gan/poc-cgan {without.strip('# ').removesuffix(' does without.')}")
    assert "pathoduet" not in map(str, plain(config).values())
