"""Teach the decoder of an autoencoder the texture of other tiles; the latents, and what was trained on them, stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from histosynth.autoencoder.network import Autoencoder, load_autoencoder, save_autoencoder
from histosynth.autoencoder.train import AutoencoderConfig, latent_statistics, train_autoencoder
from histosynth.core.checkpoint import read_card
from histosynth.core.precision import Precision
from histosynth.core.training import Schedule
from histosynth.tiles.batches import TileArray

_REFINED = Path("checkpoints") / "refined.safetensors"
_NOISE = 0.8
"""Chosen on EBHI-Seg's validation patients among 0, 0.4 and 0.8, on latents of both generators."""
_NOISE_FROM = 500, 120.0
"""Steps, and seconds where they are capped, from which there is noise: a decoder that has little time only blurs."""
_PRIOR_TILES = 20
"""Tiles that the statistics of the start are worth, beside those of the tiles at hand."""


def refine_decoder(
    data: TileArray,
    start: Autoencoder,
    folder: Path | str,
    *,
    steps: int,
    seconds: float | None = None,
    schedule: Schedule = "steps",
    precision: Precision = "auto",
    seed: int = 0,
    save_every: int = 250,
    device: str = "auto",
) -> Autoencoder:
    """An autoencoder with the same latents whose decoder has learnt the texture of these tiles.

    A decoder that has seen other tissue blurs what it does not know, and one that has seen the latents of real tiles
    alone draws a grid into those of a generator: given time (500 steps), this one learns to read noisy ones, too. The
    encoder stays as it is; shift and scale become those of these tiles, so that networks of other tissue meet latents
    of the mean and spread that they know (few tiles move them little). The run in `folder` goes on where it stopped,
    and is only read when it is done: several processes may call this after the first one has. Torch's global
    generators stay as they were.

    Raises:
        as `train_autoencoder`.
    """
    final = Path(folder) / _REFINED
    least, short = _NOISE_FROM
    noise = _NOISE if steps >= least and (seconds is None or seconds >= short) else 0.0
    with torch.random.fork_rng():
        if not final.exists():
            config = AutoencoderConfig(
                size=data.size, steps=max(1, steps), part="decoder", init="start", lr=5e-4, adversarial_from=0.1,
                batch=max(1, min(16, 16 * 128**2 // data.size**2)), warmup=min(100, max(1, steps // 10)),
                colour_jitter=False, held_out=0.0, latent_noise=noise, save_every=max(1, min(save_every, steps // 4)),
                seed=seed, seconds=seconds, schedule=schedule, precision=precision,
            )  # fmt: skip
            network, card = load_autoencoder(train_autoencoder(data, config, folder, device=device, start=start))
            mean, variance, tiles = latent_statistics(network, data, torch.device("cpu"), seed)
            share = tiles / (tiles + _PRIOR_TILES)
            network.shift.copy_(torch.lerp(network.shift, mean, share))
            before = network.scale.square().reciprocal()
            network.scale.copy_(torch.lerp(before, variance, share).clamp_min(1e-8).rsqrt())
            save_autoencoder(final, network, card)
        return load_autoencoder(final)[0]


def refinement(folder: Path | str) -> dict[str, Any]:
    """What the card of a refined decoder says: {"steps", "seconds", "stopped_by_clock"}; empty where there is none."""
    final = Path(folder) / _REFINED
    card = read_card(final) if final.exists() else {}
    return {name: card[name] for name in ("steps", "seconds", "stopped_by_clock") if name in card}
