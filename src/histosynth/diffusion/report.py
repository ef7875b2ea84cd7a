"""What a training leaves for people: panels of reference and synthetic tiles, and the checkpoint's card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from histosynth.autoencoder.cache import chunk_of
from histosynth.autoencoder.network import to_uint8
from histosynth.autoencoder.refine import refinement
from histosynth.core.checkpoint import learned_before
from histosynth.core.precision import autocast
from histosynth.core.run import plain
from histosynth.core.seeds import numpy_rng, torch_generator
from histosynth.core.training import count
from histosynth.diffusion.config import DiffusionConfig
from histosynth.diffusion.model import LatentDiffusion
from histosynth.diffusion.panels import control_panel
from histosynth.diffusion.sample import run_solver
from histosynth.diffusion.validation import Best
from histosynth.tiles.batches import TileArray


def save_panels(
    path: Path, model: LatentDiffusion, data: TileArray, embeddings: Tensor, config: DiffusionConfig
) -> None:
    """A row a class: four training tiles, their round trip through the autoencoder, and four tiles made
    from their embeddings (standardised, float [N, dim])."""
    rng = numpy_rng(config.seed, "panel")
    picks = [rng.permutation(np.flatnonzero(data.labels == k))[:4] for k in np.unique(data.labels)]
    tiles = np.concatenate(picks)
    noise = torch.randn((len(tiles), *model.backbone.latent), generator=torch_generator(config.seed, "panel noise"))
    labels = torch.from_numpy(data.labels[tiles].astype(np.int64))
    told = torch.ones(len(tiles), dtype=torch.bool)
    chunk = min(16, chunk_of(data.size))
    parts = zip(*(v.split(chunk) for v in (noise, embeddings[tiles], labels, told)), strict=True)
    model.transformer.eval()
    made = [
        run_solver(model, *part, guidance=config.guidance, steps=config.sample_steps, precision=config.precision)
        for part in parts
    ]
    model.transformer.train()
    device = next(model.conditioner.parameters()).device
    images = torch.from_numpy(np.array(data.images[tiles]))
    with torch.no_grad(), autocast(device, config.precision):
        trips = [model.backbone.encode(part.to(device)) for part in images.split(chunk)]
        trip = torch.cat([to_uint8(model.backbone.decode(part)).cpu() for part in trips])
        synthetic = torch.cat([to_uint8(model.backbone.decode(part.to(device))).cpu() for part in made])
    counts = [len(pick) for pick in picks]
    sides = {"real": images, "autoencoder": trip, "synthetic": synthetic}
    names = [data.classes[k] for k in np.unique(data.labels)]
    control_panel(path, names, {title: tiles.split(counts) for title, tiles in sides.items()})


def card_of(
    run: Any,
    model: LatentDiffusion,
    data: TileArray,
    config: DiffusionConfig,
    step: int,
    trained: dict[str, nn.Parameter],
    best: Best,
) -> dict[str, Any]:
    """The card of a trained model; what loading needs is added by `save_model`."""
    chosen = {"chosen_on": "held-out tiles", "chosen_step": best.step, "val_loss": best.loss} if best.step >= 0 else {}
    parts = {name: count(module.parameters()) for name, module in model.modules().items()}
    # what is learnt from a model of others is theirs to license
    licence = (
        model.backbone.card().get("backbone_card", {}).get("licence", "Apache-2.0" if model.backbone.whole else "")
    )
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
        "decoder": refinement(run.folder / "decoder"),
        **chosen,
        "licence": licence,
        "parents": run.manifest["parents"],
        "trained_on": {"tiles": len(data), "per_class": data.counts()},
        "data": run.manifest["settings"]["data"],
        "learned_before": learned_before(config.init, config.autoencoder if config.init == "none" else "none"),
        "command": "histosynth train diffusion",
    }
