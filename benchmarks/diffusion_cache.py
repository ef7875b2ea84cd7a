"""A training step with cached latents and embeddings against one that computes both anew.

    python benchmarks/diffusion_cache.py [--steps 3] [--batch 2] [--device cpu] [--json FILE]

The prototype ran UNI2-h and the autoencoder of Stable Diffusion 3.5 in every step. Here both are built at their full
size with random weights (which cost what trained ones cost), and the same tiles of 256 px go through the same step of
adapter and LoRA on two denoisers: the compact transformer at 16 latent channels, and PixCell-256. In turns, in 16 bits
where the machine computes in them. Needs about 6 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from histosynth.core.device import describe_device, pick_device
from histosynth.core.precision import half_type
from histosynth.diffusion.backbone import Compact
from histosynth.diffusion.cache import Cache
from histosynth.diffusion.config import DiffusionConfig
from histosynth.diffusion.draws import Source
from histosynth.diffusion.model import LatentDiffusion, with_conditioner
from histosynth.diffusion.noise import Process
from histosynth.diffusion.pixcell.model import PixCell
from histosynth.diffusion.pixcell.shape import PixCellShape
from histosynth.diffusion.pixcell.transformer import PixCellTransformer, grid_positions
from histosynth.diffusion.pixcell.vae import build_vae
from histosynth.diffusion.pixcell_backbone import PixCellBackbone
from histosynth.diffusion.start import choose_trained
from histosynth.diffusion.train import losses
from histosynth.diffusion.transformer import TransformerShape, build_transformer
from histosynth.encoders.vit import build
from histosynth.tiles.batches import TileArray

SIZE, TILES, DIM = 256, 8, 1536
TOLD = {"name": "uni2-h", "dim": DIM}
ANEW = "UNI2-h and the autoencoder, every step"
RESULTS = Path(__file__).parent / "results" / "diffusion_cache.json"


class Wide(Compact):
    """The compact transformer on the latents of Stable Diffusion 3.5."""

    latent = (16, SIZE // 8, SIZE // 8)


def filled(network: nn.Module) -> Any:
    """Small random weights (and buffers), drawn once and not a second time by the network's own start."""
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.02)
    return network


def pixcell(kind: torch.dtype, device: torch.device) -> LatentDiffusion:
    """PixCell-256 and its autoencoder with random weights, ready for adapter and LoRA."""
    with torch.device("meta"):
        network = PixCellTransformer()
    network = filled(network.to_empty(device="cpu").to(kind))
    network.pos_embed.pos_embed = grid_positions(PixCellShape())
    vae = build_vae().to(kind)
    whole = PixCell(network, vae.requires_grad_(False), PixCellShape(), Process("linear", "epsilon"),
                    torch.randn(1, DIM) / DIM**0.5, {})  # fmt: skip
    backbone = PixCellBackbone(whole.to(device), {})
    return with_conditioner(backbone, TOLD, list("abcdefghi"), SIZE).to(device)


def compact(like: LatentDiffusion, device: torch.device) -> LatentDiffusion:
    """The compact transformer of today's default shape on the same latents."""
    shape = TransformerShape(channels=16)
    first: Any = like.autoencoder
    backbone = Wide(build_transformer(shape, SIZE // 8), first, shape, SIZE)
    backbone.network.to(device)
    model = with_conditioner(backbone, TOLD, list("abcdefghi"), SIZE)
    model.conditioner.to(device)
    return model


def step(model: LatentDiffusion, source: Source, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step of the recipe."""
    for part in source.parts(number):
        denoising, classes, _ = losses(model, part, source.config)
        (denoising + source.config.ce_weight * classes).backward()
    optimizer.step()
    optimizer.zero_grad()


def timed(label: str, call: Any, steps: int, device: torch.device) -> float:
    """Seconds a call, the best of several, after one to warm up."""
    best = float("inf")
    for number in range(steps + 1):
        start = time.perf_counter()
        call(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number or steps == 0:
            best = min(best, time.perf_counter() - start)
    print(f"{label:52}{best:9.3f} s", flush=True)
    return best


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=RESULTS)
    settings = parser.parse_args()
    device = pick_device(settings.device)
    kind = half_type(device, "auto") or torch.float32
    torch.manual_seed(0)
    big = pixcell(kind, device)
    small = compact(big, device)
    with torch.device("meta"):
        encoder = build("uni2-h")
    encoder = filled(encoder.to_empty(device="cpu").to(kind)).eval().requires_grad_(False).to(device)
    vae = big.backbone

    config = DiffusionConfig(size=SIZE, batch=settings.batch, init="pixcell-256", precision="auto", bank=1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (TILES, 3, SIZE, SIZE), dtype=np.uint8)
    data = TileArray(images, np.arange(TILES) % 9, [str(i) for i in range(TILES)], tuple("abcdefghi"))

    @torch.no_grad()
    def embed(some: Tensor) -> Tensor:
        scaled = torch.nn.functional.interpolate(some.float() / 255, (224, 224), mode="bilinear", antialias=True)
        return encoder(scaled.to(device, kind))

    def anew(number: int) -> None:
        part = torch.from_numpy(images[: settings.batch])
        vae.encode(part.to(device))
        embed(part)

    def once(part: Tensor) -> np.ndarray:
        return vae.encode(part.to(device)).float().cpu().numpy().astype(np.float16)

    print(f"{describe_device(device)}, {str(kind).removeprefix('torch.')}, {settings.batch} tiles of {SIZE} px a step")
    rows = {ANEW: timed(ANEW, anew, settings.steps, device)}
    with tempfile.TemporaryDirectory() as folder:
        latents = np.concatenate([once(torch.from_numpy(images[i : i + 2])) for i in range(0, TILES, 2)])[None]
        np.save(Path(folder) / "latents.npy", latents)
        kept = Cache(np.load(Path(folder) / "latents.npy", mmap_mode="r"), np.zeros((TILES, DIM), np.float32))
        embeddings = torch.randn(TILES, DIM)
        for name, model in (("compact", small), ("PixCell-256", big)):
            groups = choose_trained(model, config)
            optimizer = torch.optim.AdamW(groups, lr=1e-4)
            source = Source(data, kept, embeddings, config, device)
            label = f"{name}: a step from the cache"
            rows[label] = timed(label, partial(step, model, source, optimizer), settings.steps, device)
    ratios = {n: 1 + rows[ANEW] / rows[f"{n}: a step from the cache"] for n in ("compact", "PixCell-256")}
    for name, ratio in ratios.items():
        print(f"{name}: a step without the cache takes {ratio:.1f} times as long")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GB")
    found = {"seconds": rows, "times_as_long": ratios, "peak_gb": peak, "batch": settings.batch,
             "device": describe_device(device), "cores": os.cpu_count(), "torch": torch.__version__}  # fmt: skip
    settings.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
