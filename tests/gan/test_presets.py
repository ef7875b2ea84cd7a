"""The presets give the recipes that they name, number for number, and their networks can be made."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import histosynth
from histosynth.core.run import plain
from histosynth.gan.augment import PIPES
from histosynth.gan.config import GanConfig
from histosynth.gan.crew import Crew
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator
from histosynth.gan.players import Players
from histosynth.gan.steering import Steering
from tests.gan.helpers import TINY
from tests.gan.test_config import parsed

FOLDER = Path(histosynth.__file__).parent / "presets" / "gan"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

# the hyperparameters of the first conditional GAN, by their names there
POC: dict[str, tuple[str, Any]] = {
    "IMAGE_SIZE": ("size", 256),
    "balance_per_class": ("sampling", "balanced"),
    "SAMPLES_PER_CLASS": ("samples_per_class", 1000),
    "BATCH_SIZE": ("batch", 8),
    "NUM_WORKERS": ("workers", 0),
    "EPOCHS": ("epochs", 50),
    "Z_DIM": ("z_dim", 512),
    "w_dim": ("w_dim", 512),
    "n_layers": ("mapping_depth", 8),
    "z + embed(y)": ("class_embedding", "add"),
    "FMAP_BASE": ("channel_max", 512),
    "noise_weight": ("noise", True),
    "STYLE_MIX_PROB": ("style_mixing", 0.9),
    "output clamp": ("output_clamp", 0.9),
    "const": ("start", "constant"),
    "spectral normalisation": ("architecture", "lite"),
    "projection head": ("label_conditioning", "projection"),
    "duet_extractor": ("head", "pathoduet"),
    "linear duet head": ("head_mode", "features"),
    "logit_base + logit_proj + alpha * logit_duet": ("head_joint", True),
    "USE_LABEL_SMOOTHING": ("loss", "bce"),
    "LABEL_SMOOTHING_REAL": ("label_real", 0.9),
    "LABEL_SMOOTHING_FAKE": ("label_fake", 0.0),
    "R1_EVERY": ("r1_every", 8),
    "R1_GAMMA": ("r1_gamma", 15.0),
    "0.5 * R1_GAMMA * r1, not times R1_EVERY": ("r1_lazy", False),
    "RealStatsEMA m": ("channel_stats_decay", 0.995),
    "LAMBDA_STATS": ("channel_stats", 3e-3),
    "LAMBDA_PERCEPTUAL": ("perceptual", 0.01),
    "perceptual extractor": ("perceptual_encoder", "pathoduet"),
    "MSE(fake_feat, real_feat)": ("paired", True),
    "saturation from": ("saturation_above", 0.6),
    "LAMBDA_SATURATION": ("saturation", 0.05),
    "saturation of the fakes alone": ("saturation_relative", False),
    "LAMBDA_FEATURE_MATCHING": ("feature_matching", 0.1),
    "MIXING_REG_WEIGHT": ("diversity", 0.1),
    "mixing_reg variance": ("diversity_below", 0.1),
    "ADA_STATE p": ("ada_p", 0.0),
    "ADA on the accuracy": ("ada", "accuracy"),
    "ADA_TARGET": ("ada_target", 0.6),
    "ADA_DECAY": ("ada_decay", 0.99),
    "ADA_SPEED": ("ada_rate", 0.20),
    "0.001 * err * ADA_SPEED": ("ada_gain", 0.001),
    "ADA_MAX_P": ("ada_max", 0.12),
    "ADA_FREEZE_UNTIL": ("ada_freeze", 500),
    "ADA_P_CAP_IF_ACC_HI": ("ada_cap", 0.08),
    "acc_ema > 0.9": ("ada_cap_above", 0.9),
    "augmentations": ("ada_pipe", "poc"),
    "DRIFT_EPS": ("drift", 1e-3),
    "EMA decay": ("ema_decay", 0.9995),
    "alpha gate": ("alpha_gate", True),
    "ACC_GATE_HI": ("alpha_on", 0.78),
    "ACC_GATE_LO": ("alpha_off", 0.70),
    "ALPHA_MAX": ("alpha_max", 0.15),
    "ALPHA_DALPHA": ("alpha_step", 1e-4),
    "ALPHA_TAU": ("alpha_tau", 400.0),
    "ALPHA_FREEZE_UNTIL": ("alpha_freeze", 500),
    "DUET_DWELL_STEPS": ("alpha_dwell", 200),
    "saturation detector": ("saturation_guard", True),
    "fake_mean_abs >": ("saturation_limit", 0.75),
    "LAMBDA_PERCEPTUAL times": ("saturation_perceptual", 0.9),
    "LAMBDA_PERCEPTUAL at least": ("saturation_perceptual_min", 0.005),
    "ALPHA_MAX times": ("saturation_alpha", 0.95),
    "ALPHA_MAX at least": ("saturation_alpha_min", 0.1),
    "message every": ("saturation_say_every", 50),
    "LR_G": ("lr_g", 4e-4),
    "LR_D": ("lr_d", 7e-5),
    "LR_D of the duet head": ("lr_head", 7e-5),
    "BETAS 1": ("beta1", 0.0),
    "BETAS 2": ("beta2", 0.99),
    "clip_grad_norm_ G": ("clip_g", 1.0),
    "clip_grad_norm_ D": ("clip_d", 1.0),
    "USE_AMP": ("precision", "fp32"),
    "USE_LR_SCHEDULER": ("lr_schedule", "cosine"),
    "LR_FINAL_RATIO": ("lr_final", 0.01),
    "SAMPLE_EVERY": ("sample_every", 400),
    "SAVE_EVERY": ("save_every", 800),
    "cgan_stepXXXXXX.pt": ("snapshots", True),
    "N_SYNTH_PER_CLASS": ("validate_per_class", 200),
    "no start weights": ("init", "none"),
}


@lru_cache
def preset(name: str) -> GanConfig:
    return parsed(f"train gan TILES RUN --config gan/{name}")


@pytest.mark.parametrize("name", NAMES)
def test_every_line_of_a_preset_reaches_the_settings(name: str) -> None:
    lines = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    settings = plain(preset(name))
    assert {key: settings[key] for key in lines} == lines
    assert parsed(f"train gan TILES RUN --config gan/{name} --seed 7").seed == 7


@pytest.mark.parametrize("name", NAMES)
def test_the_networks_of_a_preset_can_be_made(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        shape = config.shape(9)
        count = sum(p.numel() for p in Generator(shape).parameters())
        assert count > 100_000
        assert sum(p.numel() for p in Discriminator(shape).parameters()) > 100_000
    assert config.ada_pipe in PIPES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_does_not_rest_on_the_defaults(name: str) -> None:
    """The defaults follow what trains best; a recipe that others published stays what it is."""
    wanted = {
        "size", "batch", "init", "head", "noise", "channel_base", "channel_max", "d_channel_base", "d_channel_max",
        "z_dim", "w_dim", "mapping_depth", "label_conditioning", "class_embedding", "start", "style_mixing", "r1_every",
        "ada", "ada_pipe", "ada_target", "lr_g", "lr_d", "architecture", "lr_schedule", "mapping_lr",
    }  # fmt: skip
    assert wanted <= yaml.safe_load((FOLDER / f"{name}.yaml").read_text()).keys()


def test_the_presets_are_those_that_are_documented() -> None:
    assert NAMES == ["poc-cgan", "skin-transfer", "stylegan2-64", "stylegan2-ada-256"]


@pytest.mark.parametrize("name", POC)
def test_the_first_conditional_gan_number_for_number(name: str) -> None:
    setting, value = POC[name]
    assert getattr(preset("poc-cgan"), setting) == value
    assert setting in yaml.safe_load((FOLDER / "poc-cgan.yaml").read_text()), "it must not rest on a default"


def test_the_first_conditional_gan_in_its_networks_guards_and_schedule() -> None:
    config = preset("poc-cgan")
    assert {setting for setting, _ in POC.values()} <= plain(config).keys()
    shape = config.shape(9)
    assert [shape.channels(r) for r in shape.resolutions] == [512, 512, 256, 128, 64, 64, 64]
    assert shape.d_channels(128) == 96  # D_BASE_CH: what the first convolution gives
    pipe = PIPES["poc"]
    assert pipe.flip and 0 < pipe.rotation < 15 and 0 < pipe.shift < 0.05 and not pipe.quarter
    assert pipe.brightness == pipe.contrast == pipe.hue == pipe.saturation == pipe.stain == 0  # color=0.0
    # TOTAL_STEPS_ESTIMATE, of which only the purpose is kept: the cosine ends with the training
    steps = config.length(tiles=77_000, classes=9)
    assert steps == 50 * (9 * 1000 // 8)

    steering = Steering(config)
    gate, ada, saturation = steering.gate, steering.ada, steering.saturation
    assert (gate.high, gate.low, gate.maximum, gate.slew, gate.tau, gate.freeze, gate.dwell) == (
        0.78, 0.70, 0.15, 1e-4, 400.0, 500, 200,
    )  # fmt: skip
    assert (ada.target, ada.speed, ada.max_p, ada.freeze, ada.cap, ada.cap_above) == (
        0.6, 0.20, 0.12, 500, 0.08, 0.9,
    )  # fmt: skip
    assert (saturation.perceptual, saturation.limit, saturation.every) == (0.01, 0.75, 50)
    assert steering.alpha == 0.0


def test_the_rates_of_a_cosine_end_at_their_share() -> None:
    config = GanConfig(
        size=32, init="none", precision="fp32", lr_schedule="cosine", lr_final=0.01, lr_g=4e-4, lr_d=7e-5, head="",
        r1_lazy=False, path_length=0.0, **TINY,
    )  # fmt: skip
    players = Players(config, ("A",), Crew.join("cpu"))
    seen = []
    for progress in (0.0, 0.5, 1.0, 1.5):
        players.set_rates(progress)
        seen.append([players.optimisers[n].param_groups[0]["lr"] for n in ("generator", "discriminator")])
    half = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 2))
    for found, share in zip(seen, (1.0, half, 0.01, 0.01), strict=True):  # after the end it does not rise again
        assert found == pytest.approx([4e-4 * share, 7e-5 * share])


def test_the_skin_recipe() -> None:
    config = preset("skin-transfer")
    wanted = {
        "size": 256, "batch": 16, "r1_gamma": 0.8192, "mapping_depth": 2, "lr_g": 0.0025, "lr_d": 0.0025,
        "channel_base": 16384, "kimg": 50, "workers": 2, "conditional": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.shape(1).classes == 0 and config.length(1000, 1) == 3125
    assert config.save_every * config.batch == 20_000  # a snapshot every five ticks of four thousand tiles
