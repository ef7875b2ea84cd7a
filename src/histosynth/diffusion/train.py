"""Train a latent diffusion model: from nothing, or by adapting a base with an adapter and LoRA."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histosynth.core.assets import asset_path
from histosynth.core.checkpoint import load_state, save_state
from histosynth.core.device import pick_device
from histosynth.core.errors import DataError, SettingError
from histosynth.core.progress import bar
from histosynth.core.run import Run, plain
from histosynth.core.seeds import derive, numpy_rng, torch_generator
from histosynth.core.types import Encoder
from histosynth.diffusion.adapter import carry_over
from histosynth.diffusion.autoencoder import Autoencoder, check_size, load_autoencoder, to_uint8
from histosynth.diffusion.cache import open_cache
from histosynth.diffusion.lora import ATTENTION, attach_lora
from histosynth.diffusion.model import AUTOENCODER, Bank, LatentDiffusion, load_model, new_model, save_model
from histosynth.diffusion.noise import Noising, spread_levels
from histosynth.diffusion.panels import save_panel
from histosynth.diffusion.precision import Precision, autocast
from histosynth.diffusion.sample import GUIDANCE, run_solver
from histosynth.diffusion.share import save_lora
from histosynth.diffusion.train_autoencoder import AutoencoderConfig, train_autoencoder
from histosynth.diffusion.training import Averages, Clock, Schedule, check_finite, count, named, pack, rate, unpack
from histosynth.diffusion.transformer import TransformerShape, denoise
from histosynth.tiles.batches import Sampling, TileArray, batch_at

Finetune = Literal["adapter_lora", "lora", "adapter", "full"]


@dataclass(frozen=True)
class DiffusionConfig:
    """Settings of `train_diffusion`."""

    size: int = 64
    """Edge of a tile in pixels, a multiple of 8."""
    steps: int = 2000
    """Training steps."""
    batch: int = 32
    """Tiles a step."""
    init: str = "base"
    """Where to start: "base" (shipped, nine tissue classes), "none" (random weights) or a checkpoint's path."""
    autoencoder: str = "base"
    """With init=none: "base", "train" (on these tiles, first) or a path. Otherwise the start's own is used."""
    autoencoder_steps: int = 2000
    """Steps of autoencoder=train."""
    encoder: str = "tissue-tiny"
    """The frozen encoder whose embeddings condition the denoiser."""
    finetune: Finetune = "adapter_lora"
    """What is trained of a start: "adapter_lora", "adapter", "lora" or "full". With init=none, always all."""
    lora_rank: int = 8
    """Rank of the low-rank matrices."""
    lora_alpha: float = 16.0
    """Scale of the low-rank change, over the rank."""
    lora_targets: tuple[str, ...] = ATTENTION
    """Layers that get low-rank matrices, by the end of their names."""
    lr_base: float = 5e-4
    """Peak learning rate of the denoiser's own weights (init=none or finetune=full)."""
    lr_lora: float = 1e-3
    """Peak learning rate of the low-rank matrices."""
    lr_adapter: float = 5e-4
    """Peak learning rate of the adapter and the class tokens."""
    warmup: int = 100
    """Steps until the learning rates have their peaks."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    sampling: Sampling = "balanced"
    """"balanced" (every class the same share) or "natural"."""
    cfg_dropout: float = 0.1
    """Share of tiles told nothing, for classifier-free guidance."""
    class_dropout: float = 0.1
    """Share of tiles told the embedding only."""
    embedding_dropout: float = 0.1
    """Share of tiles told the class only."""
    ce_weight: float = 0.05
    """Weight of the cross-entropy that keeps classes apart in the adapter's tokens."""
    min_snr: float = 5.0
    """Clamp of the signal-to-noise weight of the loss."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones saved."""
    bank: int = 256
    """Training embeddings kept a class, from which generation draws its conditions."""
    width: int = 256
    """Channels of the denoiser (a start brings its own)."""
    layers: int = 6
    """Blocks of the denoiser (a start brings its own)."""
    heads: int = 4
    """Attention heads of the denoiser (a start brings its own)."""
    tokens: int = 4
    """Context tokens made of an embedding (a start brings its own)."""
    seed: int = 0
    """Seed of everything random."""
    seconds: float | None = None
    """Wall-clock cap, or none."""
    schedule: Schedule = "steps"
    """The learning rate falls to zero over the "steps", or over the cap's "clock"."""
    save_every: int = 250
    """Steps between resume states."""
    sample_every: int = 1000
    """Steps between panels of reference and synthetic tiles; 0 for only the last."""
    precision: Precision = "auto"
    """Arithmetic: "auto", "fp32" or "bf16"."""


def train_diffusion(
    data: TileArray,
    config: DiffusionConfig,
    folder: Path | str,
    *,
    device: str = "auto",
    encoder: Encoder | None = None,
) -> Path:
    """Train a diffusion model; go on where an interrupted run stopped.

    Args:
        data: tiles of `config.size` pixels; classes without tiles stay, and are then only their token.
        config: the settings.
        folder: the run folder. `checkpoints/lora.safetensors` holds what was fine-tuned alone.
        device: where to compute.
        encoder: used instead of the one that `config.encoder` names.

    Returns:
        The path of checkpoints/diffusion.safetensors, which generation needs nothing else beside.

    Raises:
        SettingError, DataError: settings or tiles that cannot be used.
        CheckpointError: the start cannot be read or does not fit.
        RunError: the loss is no longer a number, or the folder belongs to another run.
    """
    _check(data, config)
    where = pick_device(device)
    parents = [config.init] if config.init != "none" else []
    settings = plain(config) | {"data": data.digest()}
    with Run.open(folder, "train diffusion", settings, parents=parents) as run:
        path = run.checkpoint_path("diffusion")
        if run.resumed and path.exists():
            return path

        # the networks, and what of them is trained
        encoder = encoder or _load_encoder(config.encoder, device)
        torch.manual_seed(derive(config.seed, "diffusion", "weights"))
        model, fresh = _start(data, config, encoder, run.folder, device)
        clock = Clock(config.steps, config.seconds, config.schedule)
        model.to(where)
        cache = open_cache(
            run.folder / "cache", data, model.autoencoder, encoder,
            seed=config.seed, device=where, precision=config.precision,
        )  # fmt: skip
        if fresh:
            model.conditioner.measure(torch.from_numpy(cache.embeddings))
        embeddings = model.conditioner.standardise(torch.from_numpy(cache.embeddings).to(where)).cpu()
        model.bank = _bank(embeddings, data, config)
        groups = choose_trained(model, config)
        parameters = named(model.modules())
        averages = Averages(parameters, config.ema)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=config.weight_decay)
        noising = Noising(where)
        order = _positions(data)

        step = 0
        if run.resumed and run.state_path.exists():
            step = unpack(load_state(run.state_path), clock, parameters, averages, optimizer)
        run.truncate_log(step)

        with bar("diffusion", total=clock.length, done=clock.position(step)) as tick:
            while not clock.is_over(step):
                before = clock.position(step)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate(step, clock.progress(step), config.warmup)

                # everything random in this step follows from the seed and the step's number
                rng = numpy_rng(config.seed, "diffusion step", step)
                tiles = _tiles_at(order, step, config)
                clean = cache.batch(tiles, rng.integers(0, len(cache.latents), config.batch)).to(where)
                levels = spread_levels(config.batch, rng).to(where)
                lot = torch.from_numpy(rng.random(config.batch)).to(where)
                noise = torch.randn(clean.shape, generator=torch_generator(config.seed, "noise", step)).to(where)
                labels = torch.from_numpy(data.labels[tiles].astype(np.int64)).to(where)

                # one draw a tile decides what it is told: nothing, the embedding, the class, or both
                nothing = lot < config.cfg_dropout
                no_class = lot < config.cfg_dropout + config.class_dropout
                no_embedding = nothing | (lot > 1 - config.embedding_dropout)
                context, logits = model.conditioner(embeddings[tiles].to(where), labels, ~no_embedding, ~no_class)
                with autocast(where, config.precision):
                    v = denoise(model.transformer, noising.add(clean, noise, levels), levels, context)
                error = (v - noising.target(clean, noise, levels)).square().mean(dim=(1, 2, 3))
                denoising = (noising.weight(levels, config.min_snr) * error).mean()
                classes = F.cross_entropy(logits, labels)
                loss = denoising + config.ce_weight * classes
                check_finite(loss.item(), step, "lr_base, lr_lora and lr_adapter")

                optimizer.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)
                optimizer.step()
                averages.update(step)
                step += 1

                if step % 20 == 0 or step == config.steps:
                    run.log(step, loss=denoising.item(), ce=classes.item(), grad_norm=norm.item(),
                            lr=optimizer.param_groups[0]["lr"])  # fmt: skip
                if step % config.save_every == 0:
                    save_state(run.state_path, pack(step, clock, parameters, averages, optimizer))
                if config.sample_every and step % config.sample_every == 0 and step < config.steps:
                    averages.swap()
                    _panel(run, f"step-{step:06d}.png", model, data, embeddings, config)
                    averages.swap()
                tick(clock.position(step) - before, f"loss {denoising.item():.4f}")

        averages.swap()
        _panel(run, "final.png", model, data, embeddings, config)
        card = _card(run, model, data, config, step, parameters)
        if config.init != "none" and config.finetune != "full":
            save_lora(run.checkpoint_path("lora"), model, card)
        save_model(path, model, card)
        run.finish(checkpoint=path.name, steps=step, parameters=card["parameters"])
        return path


def choose_trained(model: LatentDiffusion, config: DiffusionConfig) -> list[dict[str, Any]]:
    """Freeze and thaw as `config.finetune` says, attach LoRA, and give AdamW's parameter groups.

    "lora" also trains the class tokens: a class that the start did not have could not be told otherwise.

    Raises:
        SettingError: a LoRA target that matches nothing.
    """
    mode = "full" if config.init == "none" else config.finetune
    model.transformer.requires_grad_(mode == "full").train()
    model.conditioner.requires_grad_(mode in ("full", "adapter", "adapter_lora")).train()
    model.conditioner.class_tokens.requires_grad_(True)
    model.autoencoder.requires_grad_(False).eval()
    if mode in ("lora", "adapter_lora"):
        model.transformer = attach_lora(model.transformer, config.lora_rank, config.lora_alpha, config.lora_targets)
    lr = config.lr_base if mode == "full" else config.lr_lora
    peaks = {"transformer": lr, "conditioner": config.lr_adapter}
    groups = []
    for name, module in model.modules().items():
        trained = [p for p in module.parameters() if p.requires_grad]
        if trained:
            groups.append({"params": trained, "peak": peaks[name]})
    return groups


def _check(data: TileArray, config: DiffusionConfig) -> None:
    check_size(config.size, patch=2)
    if len(data) == 0:
        raise DataError("The training set has no tile.", "Check the split and the quality filter.")
    if data.size != config.size:
        raise DataError(
            f"The tiles have {data.size} px, but size is {config.size}.", "Import the tiles at that size, or set size."
        )
    for name in ("steps", "batch", "save_every", "bank", "layers", "tokens", "width", "heads"):
        if getattr(config, name) < 1:
            raise SettingError(f"{name} is {getattr(config, name)}.", "Give a positive number.")
    if config.finetune not in ("adapter_lora", "lora", "adapter", "full"):
        raise SettingError(f"finetune is {config.finetune!r}.", "Use adapter_lora, lora, adapter or full.")
    shares = (config.cfg_dropout, config.class_dropout, config.embedding_dropout)
    if min(shares) < 0 or sum(shares) > 1:
        raise SettingError(
            f"cfg_dropout, class_dropout and embedding_dropout are {shares}.", "Give shares that add up to at most 1."
        )


def _load_encoder(name: str, device: str) -> Encoder:
    from histosynth import encoders

    return encoders.load(name, device)


def _start(
    data: TileArray, config: DiffusionConfig, encoder: Encoder, folder: Path, device: str
) -> tuple[LatentDiffusion, bool]:
    """The model before training, and whether its adapter is new (and must measure its embeddings)."""
    told = {"name": encoder.card.name, "dim": encoder.card.dim}
    if config.init == "none":
        shape = TransformerShape(config.width, config.layers, config.heads, config.tokens)
        autoencoder = _autoencoder(data, config, folder, device)
        return new_model(shape, autoencoder, told, data.classes, config.size), True
    start = load_model(config.init)
    for name in ("width", "layers", "heads", "tokens"):
        default = DiffusionConfig.__dataclass_fields__[name].default
        if getattr(config, name) not in (default, getattr(start.shape, name)):
            raise SettingError(
                f"{name} is {getattr(config, name)}, but the start {config.init!r} has {getattr(start.shape, name)}.",
                f"Leave {name} out, or set init=none.",
            )
    model = new_model(start.shape, start.autoencoder, told, data.classes, config.size)
    model.transformer.load_state_dict(start.transformer.state_dict())
    kept = carry_over(start.conditioner.state_dict(), start.classes, data.classes, config.seed)
    if told == start.encoder:
        model.conditioner.load_state_dict(kept)
        return model, False
    if config.finetune == "lora":
        raise SettingError(
            f"encoder is {told['name']!r} with finetune=lora, but the start's adapter knows {start.encoder['name']!r}.",
            "Use finetune=adapter_lora, which trains a new adapter, or the start's encoder.",
        )
    # another encoder speaks another language: the adapter starts anew, the class tokens need not
    own = model.conditioner.state_dict()
    foreign = {k for k in own if k.startswith(("adapter.", "mean", "deviation", "head."))}
    model.conditioner.load_state_dict({k: own[k] if k in foreign else kept[k] for k in own})
    return model, True


def _autoencoder(data: TileArray, config: DiffusionConfig, folder: Path, device: str) -> Autoencoder:
    if config.autoencoder == "base":
        return load_autoencoder(asset_path(AUTOENCODER))[0]
    if config.autoencoder != "train":
        return load_autoencoder(config.autoencoder)[0]
    settings = AutoencoderConfig(
        size=config.size, steps=config.autoencoder_steps, seed=config.seed, precision=config.precision
    )
    return load_autoencoder(train_autoencoder(data, settings, folder / "autoencoder", device=device))[0]


def _positions(data: TileArray) -> TileArray:
    """The set with its tiles' positions for ids and no pixels, so that batches of positions can be had."""
    none = np.zeros((len(data), 3, 1, 1), dtype=np.uint8)
    return TileArray(none, data.labels, [str(i) for i in range(len(data))], data.classes)


def _tiles_at(order: TileArray, step: int, config: DiffusionConfig) -> np.ndarray:
    batch = batch_at(order, step, batch_size=config.batch, sampling=config.sampling, seed=config.seed, augment=False)
    return np.array([int(i) for i in batch.ids])


def _bank(embeddings: Tensor, data: TileArray, config: DiffusionConfig) -> Bank:
    bank = Bank()
    for label in range(len(data.classes)):
        members = np.flatnonzero(data.labels == label)
        members = numpy_rng(config.seed, "bank", label).permutation(members)[: config.bank]
        bank.values.append(embeddings[members].clone())
        bank.ids.append([data.ids[i] for i in members])
    return bank


def _panel(
    run: Run, name: str, model: LatentDiffusion, data: TileArray, embeddings: Tensor, config: DiffusionConfig
) -> None:
    """A row a class: four training tiles, their round trip through the autoencoder, and four tiles made
    from their embeddings."""
    rng = numpy_rng(config.seed, "panel")
    picks = [rng.permutation(np.flatnonzero(data.labels == k))[:4] for k in np.unique(data.labels)]
    tiles = np.concatenate(picks)
    edge = config.size // 4
    shape = (len(tiles), model.shape.channels, edge, edge)
    noise = torch.randn(shape, generator=torch_generator(config.seed, "panel noise"))
    labels = torch.from_numpy(data.labels[tiles].astype(np.int64))
    model.transformer.eval()
    told = torch.ones(len(tiles), dtype=torch.bool)
    parts = zip(noise.split(16), embeddings[tiles].split(16), labels.split(16), told.split(16), strict=True)
    made = [run_solver(model, *part, guidance=GUIDANCE, steps=20, precision=config.precision) for part in parts]
    model.transformer.train()
    device = next(model.conditioner.parameters()).device
    images = torch.from_numpy(np.array(data.images[tiles]))
    with torch.no_grad(), autocast(device, config.precision):
        trip = to_uint8(model.autoencoder.decode(model.autoencoder.encode(images.to(device)))).cpu()
        synthetic = to_uint8(model.autoencoder.decode(torch.cat(made).to(device))).cpu()
    rows, at = [], 0
    for pick in picks:
        part = slice(at, at + len(pick))
        rows.append(torch.cat([images[part], trip[part], synthetic[part]]))
        at += len(pick)
    save_panel(run.sample_path(name), rows)


def _card(
    run: Run,
    model: LatentDiffusion,
    data: TileArray,
    config: DiffusionConfig,
    step: int,
    trained: dict[str, nn.Parameter],
) -> dict[str, Any]:
    parts = {name: count(module.parameters()) for name, module in model.modules().items()}
    parts["autoencoder"] = count(model.autoencoder.parameters())
    return {
        "kind": "diffusion",
        "name": run.folder.name,
        "config": json.loads(json.dumps(plain(config))),
        "parameters": sum(parts.values()),
        "parameters_of": parts,
        "trainable": count(trained.values()),
        "init": config.init if config.init in ("base", "none") else Path(config.init).name,
        "steps": step,
        "stopped_by_clock": step < config.steps,
        "licence": "Apache-2.0",
        "parents": run.manifest["parents"],
        "trained_on": {"tiles": len(data), "per_class": data.counts()},
        "data": run.manifest["settings"]["data"],
        "command": "histosynth train diffusion",
    }
