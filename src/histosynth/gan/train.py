"""Training the conditional GAN: one function, read from top to bottom, that resumes by itself."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from histosynth.core.checkpoint import load_state, save_state
from histosynth.core.device import pick_device
from histosynth.core.errors import DataError, RunError, SettingError
from histosynth.core.progress import bar
from histosynth.core.run import Run, plain
from histosynth.core.seeds import derive
from histosynth.gan.augment import AdaController, augment
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.layers import place
from histosynth.gan.losses import default_r1_gamma, discriminator_loss, generator_loss, r1_penalty
from histosynth.gan.sample import write_grid
from histosynth.gan.transfer import BASE, export, start_from
from histosynth.tiles.batches import TileArray, batch_at

CHECKPOINT = "gan"
_LOGGED = ("loss_g", "loss_d", "real_logit", "fake_logit")


@dataclass(frozen=True)
class GanConfig:
    """Settings of `train gan`. The defaults suit 64 px tiles and a laptop without a GPU."""

    size: int = 64
    """Edge length of the tiles in pixels, a power of two from 16 to 1024."""
    steps: int = 2000
    """Training steps of `batch` tiles each."""
    batch: int = 16
    """Tiles a step."""
    sampling: Literal["balanced", "natural"] = "balanced"
    """balanced: every class has the same share of a batch; natural: as in the set."""
    init: str = "base"
    """base: the shipped weights; none: from scratch; or the path of a GAN checkpoint."""
    seed: int = 0
    """Everything random follows from it."""
    seconds: float | None = None
    """Stop after this many seconds of training (all sessions of this run together)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the convolutions; auto takes bf16 where the processor has it (about twice as fast)."""
    lr_g: float = 0.0025
    """Learning rate of the generator."""
    lr_d: float = 0.0025
    """Learning rate of the discriminator."""
    r1_gamma: float | None = None
    """Weight of the gradient penalty; none: 0.0002 size^2 / batch."""
    r1_every: int = 16
    """Steps from one gradient penalty to the next."""
    ada_target: float = 0.6
    """Where adaptive augmentation holds r_t, the mean sign of the discriminator on real tiles; 0: none."""
    ada_speed: float = 100.0
    """Thousand tiles in which the augmentation probability can go from 0 to 1."""
    ema: float = 5.0
    """Half-life, in thousand tiles, of the averaged generator that is kept."""
    ema_rampup: float = 0.05
    """The half-life is at most this share of the tiles seen so far."""
    style_mixing: float = 0.5
    """Probability that a fake tile takes its fine layers from a second code of its class."""
    freeze_d: int = 0
    """Blocks of the discriminator, from the finest, that do not learn (for very small sets, with init)."""
    channel_base: int = 2048
    """Feature channels at r pixels are channel_base / r, at most channel_max."""
    channel_max: int = 128
    """Most feature channels anywhere."""
    z_dim: int = 256
    """Length of the random code z."""
    w_dim: int = 256
    """Length of the style code w."""
    mapping_depth: int = 2
    """Layers of the mapping network."""
    save_every: int = 250
    """Steps from one resume state to the next."""
    sample_every: int = 500
    """Steps from one picture in samples/ to the next; 0: only at the end."""
    log_every: int = 25
    """Steps from one row of metrics.csv to the next."""

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "lr_g", "lr_d", "r1_every", "save_every", "log_every", "ema")
        for name in positive:
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} is {getattr(self, name)}.", "Use a positive number.")
        for name in ("ada_target", "style_mixing", "ema_rampup"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name} is {getattr(self, name)}.", "Use a number from 0 to 1.")
        if self.sampling not in ("balanced", "natural"):
            raise SettingError(f"sampling is {self.sampling!r}.", "Use balanced or natural.")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise SettingError(f"precision is {self.precision!r}.", "Use auto, fp32 or bf16.")
        self.shape(1)

    def shape(self, classes: int) -> Shape:
        """The shape of the networks for this many classes."""
        return Shape(
            self.size,
            classes,
            self.channel_base,
            self.channel_max,
            self.z_dim,
            self.w_dim,
            self.mapping_depth,
        )


def train_gan(data: TileArray, config: GanConfig, folder: Path | str, *, device: str = "auto") -> Path:
    """Train a conditional GAN on `data` in the run folder `folder`; repeat the call to resume.

    The weights after n steps are the same whether or not the training was killed on the way (CPU).

    Returns:
        the path of the checkpoint: averaged generator ("G_ema."), discriminator ("D.") and card.

    Raises:
        DataError: no tile, or tiles of another size than `config.size`.
        SettingError, CheckpointError: `init` or the device cannot be used.
        RunError: the folder holds another run, or a loss is not finite.
    """
    _check(data, config)
    settings = plain(config) | {"data": data.digest()}
    with Run.open(folder, "train gan", settings, parents=_parents(config)) as run:
        target = run.checkpoint_path(CHECKPOINT)
        if target.is_file():
            return target

        # networks, optimisers, augmentation
        where = pick_device(device)
        dtype = pick_dtype(config.precision, where)
        torch.manual_seed(derive(config.seed, "gan weights"))
        shape = config.shape(len(data.classes))
        generator, discriminator = Generator(shape), Discriminator(shape)
        resuming = run.state_path.exists()
        if config.init != "none" and not resuming:
            start_from(config.init, generator, discriminator, data.classes, config.seed)
        generator, discriminator = place(generator, where), place(discriminator, where)
        average = copy.deepcopy(generator).requires_grad_(False)
        discriminator.freeze_highest(config.freeze_d)
        learning = [p for p in discriminator.parameters() if p.requires_grad]
        fused = where.type in ("cpu", "cuda")
        adam_g = torch.optim.Adam(generator.parameters(), lr=config.lr_g, betas=(0.0, 0.99), fused=fused)
        # lazy regularisation (1912.04958, appendix B): D makes one more step every r1_every
        ratio = config.r1_every / (config.r1_every + 1)
        adam_d = torch.optim.Adam(learning, lr=config.lr_d * ratio, betas=(0.0, 0.99**ratio), fused=fused)
        ada = AdaController(config.ada_target, config.ada_speed, config.batch)
        gamma = config.r1_gamma if config.r1_gamma is not None else default_r1_gamma(config.size, config.batch)
        sums, r1 = dict.fromkeys(_LOGGED, 0.0), 0.0
        step, spent, by_clock = 0, 0.0, False

        # go on where an earlier call stopped
        networks = {"generator": generator, "average": average, "discriminator": discriminator}
        if resuming:
            state = load_state(run.state_path)
            for name, network in networks.items():
                network.load_state_dict(state[name])
            restore_adam(adam_g, state["adam_g"])
            restore_adam(adam_d, state["adam_d"])
            ada.restore(state["ada"])
            sums, r1, step, spent = state["sums"], state["r1"], state["step"], state["seconds"]
            by_clock = state["card"]["stopped_by_clock"]
        run.truncate_log(step)

        started = time.monotonic()
        with bar("Training the GAN", total=config.steps, done=step) as tick:
            while step < config.steps and not by_clock:
                # all that is random in this step follows from (seed, step)
                draw = torch.Generator(where).manual_seed(derive(config.seed, "gan step", step))
                batch = batch_at(data, step, batch_size=config.batch, sampling=config.sampling, seed=config.seed)
                real, labels = to_network(batch.images, where), batch.labels.to(where)

                # generator
                discriminator.requires_grad_(False)
                fake = generator(**_codes(generator, labels, config, draw), dtype=dtype)
                loss_g = generator_loss(discriminator(augment(fake, ada.p, draw), labels, dtype))
                _require_finite(run, step, loss_g=loss_g)
                adam_g.zero_grad()
                loss_g.backward()
                adam_g.step()

                # discriminator, on the same fake tiles: drawing them anew would cost a tenth of the step
                for parameter in learning:
                    parameter.requires_grad_(True)
                real_logits = discriminator(augment(real, ada.p, draw), labels, dtype)
                fake_logits = discriminator(augment(fake.detach(), ada.p, draw), labels, dtype)
                loss_d = discriminator_loss(real_logits, fake_logits)
                _require_finite(run, step, loss_d=loss_d)
                adam_d.zero_grad()
                loss_d.backward()
                adam_d.step()

                # gradient penalty, in float32: a gradient of a gradient loses too much in bfloat16
                if step % config.r1_every == 0:
                    seen = augment(real, ada.p, draw).detach().requires_grad_(True)
                    penalty = r1_penalty(discriminator(seen, labels), seen)
                    _require_finite(run, step, r1=penalty)
                    adam_d.zero_grad()
                    (penalty * (gamma / 2 * config.r1_every)).backward()
                    adam_d.step()
                    r1 = float(penalty.detach())

                if config.ada_target > 0:
                    ada.update(real_logits, step)
                _update_average(average, generator, config, step)
                step += 1

                # books
                logged = (loss_g, loss_d, real_logits.mean(), fake_logits.mean())
                for name, value in zip(_LOGGED, logged, strict=True):
                    sums[name] += float(value.detach()) / config.log_every
                seconds = spent + time.monotonic() - started
                by_clock = config.seconds is not None and seconds >= config.seconds and step < config.steps
                tick(1, f"D {float(loss_d.detach()):.2f}, G {float(loss_g.detach()):.2f}, p {ada.p:.2f}")
                if step % config.log_every == 0:
                    kimg = step * config.batch / 1000
                    run.log(step, kimg=kimg, **sums, r1=r1, ada_p=ada.p, r_t=ada.r_t, seconds=seconds)
                    sums = dict.fromkeys(_LOGGED, 0.0)
                last = by_clock or step == config.steps
                if last or (config.sample_every and step % config.sample_every == 0):
                    write_grid(average, run.sample_path(f"step-{step:06d}.png"))
                if last or step % config.save_every == 0:
                    _require_finite(run, step - 1, weights=_total(networks))
                    state = {name: dict(network.state_dict()) for name, network in networks.items()}
                    state |= {"adam_g": adam_state(adam_g), "adam_d": adam_state(adam_d), "ada": ada.state()}
                    state |= {"sums": sums, "r1": r1, "step": step, "seconds": seconds}
                    card = _card(config, data, networks, step, by_clock) | {"data": settings["data"]}
                    save_state(run.state_path, state | {"card": card})

        export(run.state_path, target)
        run.finish(steps=step, stopped_by_clock=by_clock, ada_p=ada.p, checkpoint=str(target))
    return target


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the convolutions; "auto" is bfloat16 where the processor multiplies it natively."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # newer torch only
        can = torch.cpu.get_capabilities()
        return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32
    return torch.float32


def to_network(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [N, 3, H, W] -> float32 in [-1, 1], channels last."""
    return (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def adam_state(adam: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The running moments of every parameter, in order."""
    return [dict(adam.state[p]) for group in adam.param_groups for p in group["params"]]


def restore_adam(adam: torch.optim.Optimizer, moments: list[dict[str, Tensor]]) -> None:
    """Put `adam_state` back, each moment in the memory layout of its parameter, as the fused kernels need."""
    pairs = [(p, group["fused"]) for group in adam.param_groups for p in group["params"]]
    for (parameter, fused), saved in zip(pairs, moments, strict=True):
        like = {name: torch.empty_like(parameter).copy_(saved[name]) for name in saved if name != "step"}
        if saved:
            like["step"] = saved["step"].to(parameter.device) if fused else saved["step"]
        adam.state[parameter] = like


def _codes(generator: Generator, labels: Tensor, config: GanConfig, draw: torch.Generator) -> dict[str, Any]:
    """The arguments of the generator for one batch of fake tiles with these labels."""
    count = len(labels)
    z, z2 = torch.randn(2, count, config.z_dim, generator=draw, device=draw.device)
    mixed = torch.rand(count, generator=draw, device=draw.device) < config.style_mixing
    cut = torch.randint(1, generator.layers, (count,), generator=draw, device=draw.device)
    crossover = torch.where(mixed, cut, generator.layers)
    noise = generator.draw_noise(count, draw)
    return {"z": z, "labels": labels, "noise": noise, "z2": z2, "crossover": crossover}


@torch.no_grad()
def _update_average(average: Generator, generator: Generator, config: GanConfig, step: int) -> None:
    """Exponential moving average with a half-life in tiles, short at first (2006.06676, appendix C)."""
    seen = (step + 1) * config.batch
    half_life = max(min(config.ema * 1000, config.ema_rampup * seen), 1e-3)
    weight = 1 - 0.5 ** (config.batch / half_life)
    torch._foreach_lerp_(list(average.parameters()), list(generator.parameters()), weight)


def _require_finite(run: Run, step: int, **losses: Tensor) -> None:
    for name, value in losses.items():
        if math.isfinite(float(value.detach())):
            continue
        advice = "Train in a new folder with precision=fp32, or lower lr_g and lr_d."
        if run.state_path.exists():
            rescued = export(run.state_path, run.checkpoint_path(f"{CHECKPOINT}-last-good"))
            advice += f" The last good weights are in {rescued}; init takes that path."
        raise RunError(f"{name} is {float(value.detach())} at step {step}: the training diverged.", advice)


def _total(networks: dict[str, nn.Module]) -> Tensor:
    """A sum that is not finite when any weight is not."""
    return torch.stack([p.detach().sum() for n in networks.values() for p in n.parameters()]).sum()


def _check(data: TileArray, config: GanConfig) -> None:
    if len(data) == 0:
        raise DataError("The training set has no tile.", "Check the split and the quality filter.")
    if data.images.shape[2:] != (config.size, config.size):
        height, width = data.images.shape[2:]
        raise DataError(
            f"The tiles are {height} x {width} px, but size is {config.size}.",
            "Read the tiles at that size, or set size to theirs.",
        )


def _parents(config: GanConfig) -> list[str]:
    return [] if config.init == "none" else [BASE if config.init == "base" else Path(config.init).name]


def _card(
    config: GanConfig, data: TileArray, networks: dict[str, nn.Module], step: int, by_clock: bool
) -> dict[str, Any]:
    shape = config.shape(len(data.classes))
    return {
        "kind": "gan",
        "name": f"gan-{config.size}",
        "config": plain(config),
        "shape": asdict(shape),
        "classes": list(data.classes),
        "size": config.size,
        "parameters": sum(p.numel() for p in networks["average"].parameters()),
        "parameters_discriminator": sum(p.numel() for p in networks["discriminator"].parameters()),
        "trainable": sum(p.numel() for n in ("generator", "discriminator") for p in networks[n].parameters()),
        "init": config.init if config.init in ("base", "none") else Path(config.init).name,
        "steps": step,
        "stopped_by_clock": by_clock,
        "licence": "Apache-2.0",
        "parents": _parents(config),
        "trained_on": {"tiles": len(data), "classes": data.counts()},
        "command": _command(config),
    }


def _command(config: GanConfig) -> str:
    """The command that repeats this training, but for the tiles."""
    words = ["histosynth train gan TILES"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            text = Path(value).name if field.name == "init" else str(value)
            words.append(f"--{field.name.replace('_', '-')} {text}")
    return " ".join(words)
