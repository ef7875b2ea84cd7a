"""Train a latent diffusion model: from nothing, or by adapting a base with an adapter and LoRA.

One recipe for the compact networks of this project, for PixCell and for Stable Diffusion's U-Net; see `Backbone`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from histosynth.autoencoder.refine import refine_decoder, refinement
from histosynth.autoencoder.train import AutoencoderConfig, train_autoencoder
from histosynth.core.checkpoint import load_state, save_state
from histosynth.core.precision import autocast, half_type, loss_scaler
from histosynth.core.progress import bar, say
from histosynth.core.run import plain
from histosynth.core.seeds import numpy_rng
from histosynth.core.training import Averages, Clock, check_finite, named, pack, rate, unpack
from histosynth.core.types import Encoder
from histosynth.diffusion.align import Alignment
from histosynth.diffusion.backbone import Compact
from histosynth.diffusion.cache import embed, open_cache
from histosynth.diffusion.config import DiffusionConfig, check_config, check_tiles
from histosynth.diffusion.draws import Part, Source
from histosynth.diffusion.lora import describe_lora
from histosynth.diffusion.memory import say_memory
from histosynth.diffusion.model import Bank, LatentDiffusion, save_model
from histosynth.diffusion.report import card_of, save_panels
from histosynth.diffusion.share import save_lora
from histosynth.diffusion.start import choose_trained, halve, start_model, way_of_tuning
from histosynth.diffusion.validation import Best, Validation
from histosynth.diffusion.workers import Workers
from histosynth.tiles.batches import TileArray

__all__ = ["DiffusionConfig", "choose_trained", "train_diffusion"]


def train_diffusion(
    data: TileArray,
    config: DiffusionConfig,
    folder: Path | str,
    *,
    device: str = "auto",
    encoder: Encoder | None = None,
    held_out: TileArray | None = None,
) -> Path:
    """Train a diffusion model; go on where an interrupted run stopped.

    Args:
        data: tiles of `config.size` pixels; classes without tiles stay, and are then only their token.
        config: the settings.
        folder: the run folder. `checkpoints/lora.safetensors` holds what was fine-tuned alone.
        device: where to compute.
        encoder: used instead of the one that `config.encoder` names.
        held_out: tiles of other patients, for `validate_every`.

    Returns:
        The path of checkpoints/diffusion.safetensors, which generation needs nothing else beside (but for the
        weights of a pretrained backbone of others, which are not copied).

    Raises:
        SettingError, DataError: settings or tiles that cannot be used.
        CheckpointError: the start cannot be read or does not fit.
        RunError: the loss is no longer a number, or the folder belongs to another run.
    """
    check_config(config)
    check_tiles(data, config, held_out)
    workers = Workers(device)
    workers.check(config.accumulate, config.autoencoder)
    where = workers.device
    parents = [config.init] if config.init != "none" else []
    settings = plain(config) | {"data": data.digest()}
    with workers.open_run(folder, "train diffusion", settings, parents) as run:
        path: Path = run.checkpoint_path("diffusion")
        if run.resumed and path.exists():
            return path

        # the networks, and what the frozen encoder says of every tile
        encoder = encoder or _load_encoder(config.encoder, device)
        first_stage = lambda: _train_autoencoder(data, config, run.folder / "autoencoder", device)  # noqa: E731
        model, fresh = start_model(data.classes, config, encoder.card, first_stage)
        groups = choose_trained(model, config)  # before the minutes of the decoder: it names wrong LoRA settings
        seconds, refined = config.seconds, run.folder / "decoder"
        learned_here = config.init == "none" and config.autoencoder == "train"  # it knows these tiles already
        if config.decoder and not learned_here and isinstance(model.backbone, Compact):
            with workers.first():
                network = refine_decoder(
                    data, model.backbone.autoencoder, refined, seed=config.seed, device=device,
                    steps=round(config.steps * config.decoder), seconds=seconds and seconds * config.decoder,
                    schedule=config.schedule, save_every=config.save_every,
                    precision="auto" if config.precision == "fp16" else config.precision,
                )  # fmt: skip
            model.backbone.autoencoder = network.requires_grad_(False).eval()
            seconds = seconds and max(1e-6, seconds - refinement(refined)["seconds"])
        half = half_type(where, config.precision)
        if config.half_base and half is not None:
            halve(model, half)
        model.to(where)
        align = Alignment.of(model, encoder, config)
        kept = run.folder / "cache"
        with workers.first():
            raw = embed(kept, data, encoder)
            cache = open_cache(kept, data, model.backbone, raw, config, where, align)
            validation = None
            if config.validate_every and held_out is not None:
                validation = Validation.of(model, held_out, encoder, config, kept / "held-out", where)
        del encoder  # up to 3 GB that are not needed any more
        if fresh:
            model.conditioner.measure(torch.from_numpy(raw).to(where))
        embeddings = model.conditioner.standardise(torch.from_numpy(raw).to(where)).cpu()
        model.bank = _bank(embeddings, data, config)

        modules = model.modules()
        if align and cache.maps is not None:
            align.measure(cache.maps[0])
            modules |= {"align": align.project.to(where)}
            groups.append({"params": list(align.project.parameters()), "peak": config.lr_base})
        parameters = named(modules)
        averages = Averages(parameters, config.ema)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=config.weight_decay)
        scaler = loss_scaler(where, config.precision)
        clock = Clock(config.steps, seconds, config.schedule)
        source = Source(data, cache, embeddings, config, where)
        best = Best()
        if workers.main:
            if isinstance(model.transformer, PeftModel):
                say(describe_lora(model.transformer))
            say_memory(model, config, where)

        step = 0
        if run.resumed and run.state_path.exists():
            state = load_state(run.state_path)
            step = unpack(state, clock, parameters, averages, optimizer)
            if scaler.is_enabled():
                scaler.load_state_dict(state["scaler"])
            best = Best.of(state["best"])
            if validation:
                validation.loss = float(state["val_loss"])
        run.truncate_log(step)
        workers.wait()

        with bar("diffusion", total=clock.length, done=clock.position(step)) as tick:
            while not workers.agree(clock.is_over(step)):
                before = clock.position(step)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate(step, clock.progress(step), config.warmup)

                optimizer.zero_grad()
                terms = torch.zeros(3, dtype=torch.float64)
                for part in workers.mine(source.parts(step)):
                    denoising, classes, aligned = losses(model, part, config, align)
                    loss = denoising + config.ce_weight * classes + config.align * aligned
                    scaler.scale(loss / config.accumulate).backward()
                    terms += torch.stack([denoising, classes, aligned]).detach().double().cpu() / config.accumulate
                terms = workers.add(terms).cpu()
                check_finite(terms.sum().item(), step, "lr_base, lr_lora and lr_adapter")
                workers.add_gradients(parameters.values())
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)
                scaler.step(optimizer)
                scaler.update()
                averages.update(step)
                step += 1

                last = step == config.steps
                validated = validation is not None and (step % config.validate_every == 0 or last)
                if validation and validated:
                    best = _measured(model, validation, best, step, averages)
                if workers.main and (step % 20 == 0 or last or validated):
                    row = {"loss": terms[0].item(), "ce": terms[1].item(), "grad_norm": norm.item(),
                           "lr": optimizer.param_groups[0]["lr"]}  # fmt: skip
                    row |= {"align": terms[2].item()} if align else {}
                    run.log(step, **row | ({"val_loss": validation.loss} if validation else {}))
                if workers.main and step % config.save_every == 0:
                    more = {"scaler": scaler.state_dict(), "best": best.state(),
                            "val_loss": str(validation.loss) if validation else ""}  # fmt: skip
                    save_state(run.state_path, pack(step, clock, parameters, averages, optimizer, **more))
                if workers.main and config.sample_every and step % config.sample_every == 0 and not last:
                    averages.swap()
                    save_panels(run.sample_path(f"step-{step:06d}.png"), model, data, embeddings, config)
                    averages.swap()
                tick(clock.position(step) - before, f"loss {terms[0].item():.4f}")

        if validation and validation.step != step:  # cut by the clock
            best = _measured(model, validation, best, step, averages)
        averages.swap()
        if best.step >= 0:
            best.put_into(parameters)
        if workers.main:
            save_panels(run.sample_path("final.png"), model, data, embeddings, config)
            card = card_of(run, model, data, config, step, parameters, best)
            if way_of_tuning(model, config) != "full":
                save_lora(run.checkpoint_path("lora"), model, card)
            save_model(path, model, card)
            run.finish(checkpoint=path.name, steps=step, parameters=card["parameters"])
        workers.wait()
        return path


def losses(
    model: LatentDiffusion, part: Part, config: DiffusionConfig, align: Alignment | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of the loss on a micro-batch: the weighted denoising error, the cross-entropy of the class that the
    adapter's tokens are read as, and one minus the alignment's cosine."""
    process, where = model.backbone.process, part.clean.device
    context, logits = model.conditioner(part.embeddings, part.labels, part.told_embedding, part.told_class)
    noisy = process.add(part.clean, part.noise, part.levels)
    with autocast(where, config.precision):
        predicted = model.backbone.denoise(noisy, part.levels, context)
    error = (predicted - process.target(part.clean, part.noise, part.levels)).square().mean(dim=(1, 2, 3))
    if config.min_snr:
        error = process.weight(part.levels, config.min_snr) * error
    aligned = align.loss(part.maps) if align else error.new_zeros(())
    return error.mean(), F.cross_entropy(logits, part.labels), aligned


def _measured(model: LatentDiffusion, validation: Validation, best: Best, step: int, averages: Averages) -> Best:
    """The better of the best weights so far and the present averaged ones, by their loss on held-out tiles."""
    averages.swap()
    loss = validation.measure(model, step)
    averages.swap()
    return best.or_better(loss, step, averages)


def _load_encoder(name: str, device: str) -> Encoder:
    from histosynth import encoders

    return encoders.load(name, device)


def _train_autoencoder(data: TileArray, config: DiffusionConfig, folder: Path, device: str) -> Path:
    settings = AutoencoderConfig(
        size=config.size, steps=config.autoencoder_steps, seed=config.seed,
        precision="auto" if config.precision == "fp16" else config.precision,
    )  # fmt: skip
    return train_autoencoder(data, settings, folder, device=device)


def _bank(embeddings: Tensor, data: TileArray, config: DiffusionConfig) -> Bank:
    bank = Bank()
    for label in range(len(data.classes)):
        members = np.flatnonzero(data.labels == label)
        members = numpy_rng(config.seed, "bank", label).permutation(members)[: config.bank]
        bank.values.append(embeddings[members].clone())
        bank.ids.append([data.ids[i] for i in members])
    return bank
