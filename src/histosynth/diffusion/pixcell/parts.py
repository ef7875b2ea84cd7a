"""What lies beside a transformer: its noising process and its autoencoder, and the number format to compute in."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from histosynth.core.errors import CheckpointError, SettingError, did_you_mean
from histosynth.diffusion.noise import LEVELS, Process
from histosynth.diffusion.pixcell.cards import CARDS, locate
from histosynth.diffusion.pixcell.files import Weights, find_weights, json_object, resolve
from histosynth.diffusion.pixcell.shape import PixCellShape
from histosynth.diffusion.pixcell.vae import load_vae, vae_options

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def number_format(dtype: torch.dtype | str) -> torch.dtype:
    """fp32, bf16 or fp16 as torch's dtype.

    Raises:
        SettingError: another one.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise SettingError(f"dtype is {dtype!r}.", did_you_mean(dtype, DTYPES))
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise SettingError(f"dtype is {dtype}.", "Use float32, bfloat16 or float16.")
    return dtype


def find_vae(
    given: str | Path | None, weights: Weights, shape: PixCellShape, token: str | None
) -> tuple[AutoencoderKL | None, tuple[Path, ...]]:
    """The autoencoder that was given, else the one beside the transformer, else where its card is found; its files.

    Raises:
        CheckpointError: one that was given, or is there, cannot be used.
    """
    own = weights.folder / "vae"
    if given is not None:
        source = resolve(given, ("vae",), token)
    elif own.is_dir() and any(own.glob("*.safetensors")):
        source = own
    else:
        if (own / "config.json").is_file():  # PixCell's folders describe the autoencoder without holding it
            vae_options(json_object(own / "config.json"), own / "config.json")
        source = locate(CARDS["sd35-vae"])
    if source is None:
        return None, ()
    found = find_weights(source, "vae")
    return load_vae(found, shape.channels, CARDS["sd35-vae"]), found.files


def read_process(path: Path) -> Process:
    """The noising process of a scheduler_config.json; PixCell's own where there is none.

    Raises:
        CheckpointError: one that the solvers here do not know.
    """
    if not path.is_file():
        return Process("linear", "epsilon")
    config = json_object(path)
    schedule = config.get("beta_schedule", "linear")
    prediction = config.get("prediction_type", "epsilon")
    levels = config.get("num_train_timesteps", LEVELS)
    if schedule not in _SCHEDULES or prediction not in _PREDICTIONS or levels != LEVELS or config.get("trained_betas"):
        raise CheckpointError(
            f"{path} has beta_schedule {schedule!r}, prediction_type {prediction!r}, {levels!r} levels.",
            "PixCell's are linear, epsilon and 1000, without trained_betas.",
        )
    betas = [config.get(name, default) for name, default in (("beta_start", 1e-4), ("beta_end", 0.02))]
    if not all(isinstance(b, float) for b in betas):
        raise CheckpointError(f"{path} has betas from {betas[0]!r} to {betas[1]!r}.", "They are 0.0001 and 0.02.")
    try:
        return Process(_SCHEDULES[schedule], _PREDICTIONS[prediction], *betas)  # type: ignore[arg-type]
    except SettingError as error:
        raise CheckpointError(f"{path}: {error.message}", "They are 0.0001 and 0.02.") from error
