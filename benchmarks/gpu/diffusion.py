"""Peak memory and time of a training step of PixCell-256 with adapter and LoRA, beside the calculation.

    python benchmarks/gpu/diffusion.py [--steps 4] [--json FILE]
    python benchmarks/gpu/diffusion.py --tiny --device cpu     # a few thousand weights: does it run?

The transformer has random weights, which take what trained ones take. Every row is the preset
diffusion/pixcell-256-lora with one thing changed; latents and embeddings come from memory, as they come from the cache
in a training. On a CPU there is no peak to read, and the column stays empty.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import histosynth
from histosynth.core.device import describe_device, pick_device
from histosynth.core.precision import half_type, loss_scaler
from histosynth.core.training import Averages, named
from histosynth.diffusion.cache import Cache
from histosynth.diffusion.config import DiffusionConfig
from histosynth.diffusion.draws import Source
from histosynth.diffusion.memory import TrainingMemory, training_memory
from histosynth.diffusion.model import LatentDiffusion, with_conditioner
from histosynth.diffusion.noise import Process
from histosynth.diffusion.pixcell.model import PixCell
from histosynth.diffusion.pixcell.shape import PixCellShape
from histosynth.diffusion.pixcell.transformer import PixCellTransformer, grid_positions
from histosynth.diffusion.pixcell.vae import build_vae
from histosynth.diffusion.pixcell_backbone import PixCellBackbone
from histosynth.diffusion.start import choose_trained, halve
from histosynth.diffusion.train import losses
from histosynth.tiles.batches import TileArray

PRESET = Path(histosynth.__file__).parent / "presets" / "diffusion" / "pixcell-256-lora.yaml"
RESULTS = Path(__file__).parents[1] / "results" / "gpu_diffusion.json"
TINY = PixCellShape(latent=4, layers=2, heads=2, head_dim=8, dim=12)
TILES = 16
ROWS: dict[str, dict[str, Any]] = {
    "the preset": {},
    "4 tiles at once": {"accumulate": 1},
    "without checkpointing": {"checkpointing": False},
    "without checkpointing, 4 tiles at once": {"checkpointing": False, "accumulate": 1},
    "bf16": {"precision": "bf16"},
    "weights in float32": {"half_base": False},
}


def random_pixcell(shape: PixCellShape) -> LatentDiffusion:
    """A PixCell of this shape with random weights, and its autoencoder."""
    with torch.device("meta"):
        network = PixCellTransformer(shape)
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.normal_(std=0.02)
    network.pos_embed.pos_embed = grid_positions(shape)
    small = {"block_out_channels": (4, 4, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    vae = build_vae(small if shape is TINY else None)
    process = Process("linear", "epsilon")
    backbone = PixCellBackbone(PixCell(network.eval(), vae, shape, process, torch.randn(1, shape.dim), {}), {})
    return with_conditioner(backbone, {"name": "uni2-h", "dim": shape.dim}, list("abcdefghi"), shape.size)


def measure(
    shape: PixCellShape, config: DiffusionConfig, device: torch.device, steps: int
) -> tuple[TrainingMemory, float, float | None]:
    """What the calculation says, seconds a step, and the peak in bytes that torch allocated (on CUDA)."""
    torch.manual_seed(0)
    model = random_pixcell(shape)
    groups = choose_trained(model, config)
    half = half_type(device, config.precision)
    if config.half_base and half is not None:
        halve(model, half)
    expected = training_memory(model, config, device)
    model.to(device)
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(1, TILES, *model.backbone.latent)).astype(np.float16)
    none = np.zeros((TILES, 3, 1, 1), np.uint8)
    data = TileArray(none, np.arange(TILES) % 9, [str(i) for i in range(TILES)], tuple("abcdefghi"))
    embeddings = torch.randn(TILES, shape.dim)
    source = Source(data, Cache(latents, embeddings.numpy()), embeddings, config, device)
    parameters = named(model.modules())
    averages, scaler = Averages(parameters, config.ema), loss_scaler(device, config.precision)
    optimizer = torch.optim.AdamW(groups, lr=1e-4)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = float("inf")
    for step in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        for part in source.parts(step):
            denoising, classes, _ = losses(model, part, config)
            scaler.scale((denoising + config.ce_weight * classes) / config.accumulate).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)
        scaler.step(optimizer)
        scaler.update()
        averages.update(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = min(taken, time.perf_counter() - start)
    peak = float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
    return expected, taken, peak


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args(arguments)
    device = pick_device(settings.device)
    shape = TINY if settings.tiny else PixCellShape()
    preset = DiffusionConfig(**yaml.safe_load(PRESET.read_text()))
    if settings.tiny:
        preset = replace(preset, size=shape.size)
    print(f"{describe_device(device)}, torch {torch.__version__}; bytes in GB")
    print(f"{'':42}{'calculated':>12}{'of it torch':>13}{'peak':>8}{'s a step':>10}")
    rows = []
    for name, changes in ROWS.items():
        expected, taken, peak = measure(shape, replace(preset, **changes), device, settings.steps)
        # the calculation without what torch does not allocate, and without the first stage, which is not at work here
        of_torch = expected.total - expected.overhead - max(expected.first_stage - expected.activations, 0)
        said = "" if peak is None else f"{peak / 1e9:.2f}"
        print(f"{name:42}{expected.total / 1e9:12.2f}{of_torch / 1e9:13.2f}{said:>8}{taken:10.3f}", flush=True)
        rows.append({"row": name, "calculated": expected.total, "calculated_of_torch": of_torch, "peak": peak,
                     "seconds": taken})  # fmt: skip
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found = {"device": describe_device(device), "torch": torch.__version__, "tiny": settings.tiny, "rows": rows}
    target = settings.json or (RESULTS if device.type == "cuda" and not settings.tiny else None)
    if target:
        target.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
