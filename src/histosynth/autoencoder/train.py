"""Train the autoencoder whose latents the diffusion model learns."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from histosynth.autoencoder.cache import chunk_of
from histosynth.autoencoder.critic import PatchCritic, adversarial_term, critic_loss
from histosynth.autoencoder.figures import round_trip, round_trip_figures, save_panel
from histosynth.autoencoder.network import (
    AUTOENCODER,
    Autoencoder,
    AutoencoderShape,
    check_size,
    load_autoencoder,
    save_autoencoder,
    to_signed,
)
from histosynth.core.assets import asset_path
from histosynth.core.checkpoint import learned_before, load_state, save_state
from histosynth.core.device import pick_device
from histosynth.core.errors import DataError, SettingError
from histosynth.core.precision import Precision, autocast
from histosynth.core.progress import bar
from histosynth.core.run import Run, plain
from histosynth.core.seeds import derive, numpy_rng, torch_generator
from histosynth.core.settings import check_settings
from histosynth.core.training import (
    Averages,
    Clock,
    Schedule,
    check_finite,
    count,
    moments_of,
    named,
    pack,
    rate,
    restore_moments,
    unpack,
)
from histosynth.tiles.batches import TileArray, batch_at


@dataclass(frozen=True)
class AutoencoderConfig:
    """Settings of `train_autoencoder`."""

    size: int = 64
    """Edge of a tile in pixels, a multiple of 4."""
    steps: int = 3000
    """Training steps."""
    batch: int = 16
    """Tiles a step."""
    init: str = "none"
    """Where to start: "none" (random), "base" (the shipped autoencoder) or a checkpoint's path."""
    part: Literal["all", "decoder"] = "all"
    """What to train: "decoder" keeps the latent space, so that networks trained on it still fit."""
    width: int = 48
    """Channels at half resolution (for init=none)."""
    blocks: int = 2
    """Residual blocks at each resolution (for init=none)."""
    lr: float = 1e-3
    """Peak learning rate."""
    warmup: int = 100
    """Steps until the learning rate has its peak."""
    detail: float = 1.0
    """Weight of the Laplacian pyramid term, which keeps edges and chromatin sharp."""
    kl_weight: float = 2e-3
    """Weight of the Kullback-Leibler term, which keeps latents compact and tolerant of small errors."""
    adversarial: float = 0.3
    """Weight of a judge of patches, against the gradient of the rest of the loss: what keeps texture sharp where the
    latents cannot say it exactly."""
    adversarial_from: float = 0.3
    """Share of the training after which the judge is heard; it learns from half of that on."""
    equivariance: float = 0.5
    """Share of the steps in which latents are shrunk and turned, and must give the shrunk and turned tiles (EQ-VAE,
    Kouzelis et al. 2025): smoother latents, which are easier to learn. For part=all."""
    latent_noise: float = 0.0
    """Noise on the latents that the decoder learns from, in deviations of them: each tile has its own amount, from half
    a normal distribution of this deviation. A decoder that expects it forgives the errors of a generator (Zheng et al.
    2025, 2510.11690). For part=decoder."""
    colour_jitter: bool = True
    """Vary colours widely, so that stains not seen in training survive the round trip."""
    held_out: float = 0.05
    """Share of the tiles kept for the figures in the card (none when there are fewer than 20 tiles)."""
    ema: float = 0.995
    """Decay of the averaged weights, which are the ones saved."""
    seed: int = 0
    """Seed of everything random."""
    seconds: float | None = None
    """Wall-clock cap, or none."""
    schedule: Schedule = "steps"
    """The learning rate falls to zero over the "steps", or over the cap's "clock"."""
    save_every: int = 500
    """Steps between resume states."""
    precision: Precision = "auto"
    """Arithmetic: "auto", "fp32" or "bf16"."""


def train_autoencoder(
    data: TileArray,
    config: AutoencoderConfig,
    folder: Path | str,
    *,
    device: str = "auto",
    start: Autoencoder | None = None,
) -> Path:
    """Train an autoencoder; go on where an interrupted run stopped.

    Args:
        data: tiles of `config.size` pixels.
        config: the settings.
        folder: the run folder.
        device: where to compute.
        start: the network to go on from, a copy of it, instead of what `config.init` names.

    Returns:
        The path of checkpoints/autoencoder.safetensors. Its card has psnr_db (peak 255, of images
        averaged) and ssim (Wang et al. 2004) of the round trip of held-out tiles (of other patients, where the
        patients are known), and how many tiles and patients those are.

    Raises:
        SettingError, DataError: settings or tiles that cannot be used.
        RunError: the loss is no longer a number, or the folder belongs to another run.
    """
    _check(data, config)
    where = pick_device(device)
    with Run.open(folder, "train autoencoder", config, parents=[config.init] if config.init != "none" else []) as run:
        path = run.checkpoint_path("autoencoder")
        if run.resumed and path.exists():
            return path
        train, test = split_apart(data, config)

        torch.manual_seed(derive(config.seed, "autoencoder", "weights"))
        model = (copy.deepcopy(start) if start else _start(config)).to(where).train().requires_grad_(True)
        for into in (model.encoder, model.coarse_in):
            into.requires_grad_(config.part == "all")
        parameters = named({"autoencoder": model})
        averages = Averages(parameters, config.ema)
        optimizer = torch.optim.AdamW(parameters.values(), config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        critic = PatchCritic().to(where) if config.adversarial else None
        judging = None if critic is None else torch.optim.AdamW(critic.parameters(), config.lr, betas=(0.5, 0.99))
        clock = Clock(config.steps, config.seconds, config.schedule)
        step = 0
        if run.resumed and run.state_path.exists():
            state = load_state(run.state_path)
            step = unpack(state, clock, parameters, averages, optimizer)
            if critic is not None and judging is not None:
                critic.load_state_dict(state["critic"])
                restore_moments(judging, state["critic_moments"])
        run.truncate_log(step)

        with bar("autoencoder", total=clock.length, done=clock.position(step)) as tick:
            while not clock.is_over(step):
                before, progress = clock.position(step), clock.progress(step)
                for group in optimizer.param_groups:
                    group["lr"] = config.lr * rate(step, progress, config.warmup)
                batch = batch_at(train, step, batch_size=config.batch, sampling="natural", seed=config.seed)
                images = to_signed(batch.images)
                if config.colour_jitter:
                    images = vary_colours(images, derive(config.seed, "colours", step))
                images = images.to(where)

                with autocast(where, config.precision):
                    mean, log_variance = model.posterior(images)
                    noise = torch.randn(mean.shape, generator=torch_generator(config.seed, "posterior", step))
                    code = mean + deviation(model, log_variance, config, step) * noise.to(where)
                    if config.part == "all":
                        code, images = shrunk_and_turned(code, images, config, step)
                    output = model.pixels(code)
                absolute = (output - images).abs().mean()
                detail = laplacian_distance(output, images)
                # KL(N(m, v) || N(0, 1)) a latent number = (m^2 + v - 1 - log v) / 2
                divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
                distance = absolute + config.detail * detail
                loss = distance + config.kl_weight * divergence
                if critic is not None and progress >= config.adversarial_from:
                    critic.requires_grad_(False)
                    with autocast(where, config.precision):
                        loss = loss + adversarial_term(critic, output, distance, config.adversarial)
                    critic.requires_grad_(True)
                check_finite(loss.item(), step, "lr")

                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
                optimizer.step()
                averages.update(step)
                if critic is not None and judging is not None and progress >= config.adversarial_from / 2:
                    for group in judging.param_groups:
                        group["lr"] = config.lr * rate(step, progress, config.warmup)
                    judging.zero_grad()
                    with autocast(where, config.precision):
                        judged = critic_loss(critic, images, output)
                    judged.backward()
                    judging.step()
                step += 1

                if step % 25 == 0 or step == config.steps:
                    run.log(step, l1=absolute.item(), detail=detail.item(), kl=divergence.item())
                if step % config.save_every == 0:
                    more = {}
                    if critic is not None and judging is not None:
                        more = {"critic": dict(critic.state_dict()), "critic_moments": moments_of(judging)}
                    save_state(run.state_path, pack(step, clock, parameters, averages, optimizer, **more))
                tick(clock.position(step) - before, f"l1 {absolute.item():.4f}")

        averages.swap()
        model.eval()
        if config.part == "all":
            _normalise_latents(model, train, where, config)
            model.name = f"{derive(config.seed, _fingerprint(model)):016x}"
        figures = round_trip_figures(model, (test if len(test) else train).images[:256], where)
        _panel(run, model, test if len(test) else train, where, config)
        card: dict[str, Any] = {
            "name": run.folder.name,
            "config": plain(config),
            "classes": list(data.classes),
            "size": config.size,
            "parameters": count(model.parameters()),
            "steps": step,
            "seconds": round(clock.elapsed(), 1),
            "stopped_by_clock": step < config.steps,
            "held_out_tiles": len(test),
            "held_out_patients": len(set(test.groups)) if test.groups is not None else None,
            **figures,
            "licence": "Apache-2.0",
            "parents": run.manifest["parents"],
            "trained_on": {"tiles": len(train)},
            "data": data.digest(),
            "learned_before": learned_before(config.init),
            "command": "histosynth train autoencoder",
        }
        save_autoencoder(path, model.cpu(), card)
        run.finish(checkpoint=path.name, **figures)
        return path


def deviation(model: Autoencoder, log_variance: Tensor, config: AutoencoderConfig, step: int) -> Tensor:
    """Standard deviation, unscaled, of what is added to the mean of a latent: the posterior's, and `latent_noise`."""
    if not config.latent_noise:
        return (0.5 * log_variance).exp()
    draw = torch_generator(config.seed, "latent noise", step)
    amount = config.latent_noise * torch.randn(len(log_variance), 1, 1, 1, generator=draw).to(log_variance.device)
    return (log_variance.exp() + (amount / model.scale).square()).sqrt()


def shrunk_and_turned(code: Tensor, images: Tensor, config: AutoencoderConfig, step: int) -> tuple[Tensor, Tensor]:
    """Latents [N, C, h, w] and images [N, 3, H, W], in some steps both shrunk and turned alike.

    The share of those steps is `config.equivariance`; the new edge is an even number of latents, half of the old one
    or more.
    """
    rng = numpy_rng(config.seed, "equivariance", step)
    edge, turns = code.shape[-1], int(rng.integers(4))
    if rng.random() >= config.equivariance or edge < 4:
        return code, images
    small = max(2, 2 * int(rng.integers(edge // 4, edge // 2 + 1)))  # even, for the pyramid of the loss
    size = small * images.shape[-1] // edge
    shrunk = [F.interpolate(x, (n, n), mode="bilinear", antialias=True) for x, n in ((code, small), (images, size))]
    return shrunk[0].rot90(turns, (2, 3)), shrunk[1].rot90(turns, (2, 3))


def vary_colours(images: Tensor, seed: int) -> Tensor:
    """Random gain, gamma and mixing of the colour channels, a tile at a time; [-1, 1] in and out."""
    rng = np.random.default_rng(seed)
    n = len(images)
    gamma = torch.from_numpy(np.exp(rng.normal(0, 0.25, (n, 3, 1, 1)))).float()
    gain = torch.from_numpy(np.exp(-np.abs(rng.normal(0, 0.15, (n, 3, 1, 1))))).float()
    mixing = torch.from_numpy(np.eye(3) + rng.normal(0, 0.12, (n, 3, 3))).float()
    mixing = mixing / mixing.sum(dim=2, keepdim=True)  # white stays white
    light = torch.einsum("nij,njhw->nihw", mixing, images * 0.5 + 0.5).clamp(0, 1)
    varied = gain * light.clamp_min(1e-4) ** gamma * 2 - 1
    plain_share = torch.from_numpy(rng.random(n) < 0.4)[:, None, None, None]
    return torch.where(plain_share, images, varied)


def laplacian_distance(a: Tensor, b: Tensor, levels: int = 3) -> Tensor:
    """Mean absolute difference of Laplacian pyramids (Burt and Adelson 1983), box filtered, summed over levels."""
    difference = a - b  # the pyramid is linear: that of the difference is the difference of the two
    total = difference.new_zeros(())
    for _ in range(levels):
        if min(difference.shape[-2:]) < 2:
            break
        coarse = F.avg_pool2d(difference, 2)
        total = total + (difference - F.interpolate(coarse, scale_factor=2, mode="nearest")).abs().mean()
        difference = coarse
    return total


def _check(data: TileArray, config: AutoencoderConfig) -> None:
    check_size(config.size)
    if len(data) == 0:
        raise DataError("The training set has no tile.", "Check the split and the quality filter.")
    if data.size != config.size:
        raise DataError(
            f"The tiles have {data.size} px, but size is {config.size}.", "Import the tiles at that size, or set size."
        )
    check_settings(config, counts=("steps", "batch", "save_every", "width", "blocks"), not_negative=("latent_noise",))
    if config.latent_noise and config.part != "decoder":
        raise SettingError(f"latent_noise is {config.latent_noise} with part 'all'.", "Set part to decoder.")
    if config.part == "decoder" and config.init == "none":
        raise SettingError("part is 'decoder' with init 'none'.", "Give init=base or a checkpoint to start from.")


def _start(config: AutoencoderConfig) -> Autoencoder:
    if config.init == "none":
        return Autoencoder(AutoencoderShape(config.width, config.blocks))
    return load_autoencoder(asset_path(AUTOENCODER) if config.init == "base" else config.init)[0]


def split_apart(data: TileArray, config: AutoencoderConfig) -> tuple[TileArray, TileArray]:
    """A seeded share of the tiles apart, for the figures only: whole patients where they are known.

    Without patients, tiles of one patient may stand on both sides, and the figures are a little too good.
    """
    kept = min(512, int(len(data) * config.held_out)) if len(data) >= 20 else 0
    if kept == 0:
        return data, data.subset([])
    rng = numpy_rng(config.seed, "held out")
    if data.groups is None:
        order = rng.permutation(len(data))
        return data.subset(np.sort(order[kept:])), data.subset(np.sort(order[:kept]))
    groups = np.array(data.groups)
    out = np.zeros(len(data), dtype=bool)
    for name in rng.permutation(np.unique(groups)):
        mine = groups == name
        if out.sum() + mine.sum() <= max(kept, 1) or not out.any():
            out |= mine
        if out.sum() >= kept:
            break
    if out.all():
        return data, data.subset([])
    return data.subset(np.flatnonzero(~out)), data.subset(np.flatnonzero(out))


def _normalise_latents(model: Autoencoder, data: TileArray, where: torch.device, config: AutoencoderConfig) -> None:
    """Set shift and scale so that each channel of the latents has mean 0 and deviation 1."""
    mean, variance, _ = latent_statistics(model, data, where, config.seed)
    model.shift.copy_(mean)
    model.scale.copy_(1 / variance.sqrt().clamp_min(1e-4))


@torch.no_grad()
def latent_statistics(
    model: Autoencoder, data: TileArray, where: torch.device, seed: int
) -> tuple[Tensor, Tensor, int]:
    """Mean and variance of the channels of unscaled latents, [C, 1, 1] each, and of how many tiles they are."""
    picked = numpy_rng(seed, "latent statistics").permutation(len(data))[:512]
    means = []
    chunk = chunk_of(data.size)
    for at in range(0, len(picked), chunk):
        images = torch.from_numpy(np.array(data.images[np.sort(picked[at : at + chunk])]))
        means.append(model.posterior(to_signed(images).to(where))[0])
    code = torch.cat(means)
    mean, variance = code.mean(dim=(0, 2, 3)), code.var(dim=(0, 2, 3), unbiased=False)
    return mean[:, None, None], variance[:, None, None], len(picked)


def _panel(run: Run, model: Autoencoder, data: TileArray, where: torch.device, config: AutoencoderConfig) -> None:
    picked = numpy_rng(config.seed, "panel").permutation(len(data))[:16]
    images = torch.from_numpy(np.array(data.images[picked]))
    output = round_trip(model, images, where)
    rows = [torch.cat([images[i : i + 8], output[i : i + 8]]) for i in range(0, len(images), 8)]
    save_panel(run.sample_path("round-trip.png"), rows)


def _fingerprint(model: Autoencoder) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(("decoder.", "coarse_out.")):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
