"""What `GanConfig` refuses: numbers out of range, words that it does not know, settings that do not go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from histosynth.core.errors import SettingError
from histosynth.core.settings import check_settings
from histosynth.gan.augmentation.pipe import find_pipe

if TYPE_CHECKING:
    from histosynth.gan.config import GanConfig

_POSITIVE = (
    "steps", "kimg", "epochs", "samples_per_class", "seconds", "batch", "accumulate", "alpha_tau", "r1_every",
    "path_length_every", "ada_speed", "lr_g", "lr_d", "lr_head", "ema", "mapping_lr", "saturation_say_every",
    "validate_per_class", "validate_draws", "save_every", "log_every",
)  # fmt: skip
_NOT_NEGATIVE = (
    "workers", "freeze_d", "d_channel_base", "d_channel_max", "mbstd_group", "output_clamp", "conv_clamp",
    "alpha_max", "alpha_step", "alpha_freeze", "alpha_dwell", "r1_gamma", "drift", "path_length",
    "channel_stats", "perceptual", "saturation", "feature_matching", "diversity", "spread", "ada_gain", "ada_rate",
    "ada_freeze", "clip_g", "clip_d", "saturation_perceptual_min", "saturation_alpha_min", "d_stop_steps",
    "collapse_stop", "validate_every", "patience", "sample_every",
)  # fmt: skip
_SHARES = (
    "style_mixing", "alpha_on", "alpha_off", "label_real", "label_fake", "channel_stats_decay", "ada_p", "ada_target",
    "ada_max", "ada_decay", "ada_cap", "ada_cap_above", "beta1", "beta2", "lr_final", "ema_rampup", "ema_decay",
    "saturation_perceptual", "saturation_alpha", "d_stop_acc", "d_stop_ema", "collapse",
)  # fmt: skip


def check(config: GanConfig, of_pixels: Sequence[str]) -> None:
    """Refuse settings that cannot be used.

    Args:
        config: with everything that auto stands for in its place.
        of_pixels: the settings in use that need pixels.

    Raises:
        SettingError: names the setting, its value and the remedy.
    """
    check_settings(config, positive=_POSITIVE, not_negative=_NOT_NEGATIVE, shares=_SHARES)
    if config.kimg is not None and config.epochs is not None:
        raise SettingError(f"kimg is {config.kimg} and epochs is {config.epochs}.", "Give one of them.")
    if config.batch % config.accumulate:
        raise SettingError(
            f"accumulate is {config.accumulate}, which does not divide batch, {config.batch}.", "Use a divisor."
        )
    if config.class_groups and (config.sampling != "balanced" or config.architecture == "lite"):
        of = "sampling=natural" if config.sampling != "balanced" else "architecture=lite"
        raise SettingError(
            f"class_groups is set with {of}.", "Leave it out; it is for balanced sampling, and lite does not use it."
        )
    for name, unused in (("freeze_d", 0), ("mapping_lr", 1)):
        value = getattr(config, name)
        if config.architecture == "lite" and value != unused:
            raise SettingError(f"{name} is {value} with architecture=lite.", "Leave it out; lite does not use it.")
    for name in ("alpha_gate", "head_joint"):
        if getattr(config, name) and not config.head:
            raise SettingError(f"{name} is set without a head.", "Leave it out, or set head, such as head=tissue-tiny.")
    if config.start == "constant" and config.architecture == "residual":
        raise SettingError(
            "start is 'constant' with architecture=residual, which has no constant.",
            "Use start=code, or architecture=stylegan2 with init=none.",
        )
    find_pipe(config.ada_pipe)
    if config.space == "latents" and of_pixels:
        raise SettingError(f"{of_pixels[0]} is set with space=latents.", "Leave it out, or set space=pixels.")
    if not 0 <= config.decoder < 1:
        raise SettingError(f"decoder is {config.decoder}.", "Give a share from 0 to below 1.")
    if config.autoencoder != "base" and config.space == "pixels":
        raise SettingError(
            f"autoencoder is {config.autoencoder!r} with space=pixels.", "Leave it out, or set space=latents."
        )
    if config.autoencoder != "base" and config.init != "none":
        raise SettingError(
            f"autoencoder is {config.autoencoder!r} with init={config.init}, which brings its own.",
            "Leave autoencoder out, or set init=none.",
        )
    if config.space == "pixels" and config.init == "base":
        why = f"size is {config.size}" if config.size < 32 else "space=pixels is set"
        if of_pixels or config.architecture == "lite":
            why = f"{(*of_pixels, 'architecture')[0]} is set"
        raise SettingError(f"{why}: this works on pixels, and the shipped weights on latents.", "Set init=none.")
