"""Seconds a tile: generation here against the stock pipeline of diffusers, on the same weights.

    python benchmarks/diffusion.py [--checkpoint base] [--tiles 16] [--steps 20] [--repeats 3] [--quick]

The peer is diffusers' PixArtAlphaPipeline with its DPMSolverMultistepScheduler and float32, given the checkpoint's
denoiser, its autoencoder and contexts made beforehand; a transformer computes there with diffusers' own attention. Ours
also draws and makes the contexts.
Both use the same noise, steps and guidance, in turns in one process, and end with uint8 pixels. They are timed one
tile at a time and in batches. Prints the best of the repeats and the ratios, how far the tiles of the two are apart in
float32, and what the size of a micro-batch changes; writes benchmarks/results/diffusion.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HISTOSYNTH_QUIET"] = "1"

import diffusers
import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from histosynth.core.device import describe_device
from histosynth.core.precision import half_type
from histosynth.core.seeds import torch_generator
from histosynth.diffusion.conditions import Teller
from histosynth.diffusion.model import LatentDiffusion, load_model
from histosynth.diffusion.sample import DiffusionGenerator
from histosynth.diffusion.solve import context_of

GUIDANCE = 2.0
RESULT = Path("benchmarks/results/diffusion.json")


class Told(torch.nn.Module):
    """The checkpoint's denoiser behind the arguments of the pipeline."""

    def __init__(self, model: LatentDiffusion) -> None:
        super().__init__()
        self.model, self.device, self.dtype = model, torch.device("cpu"), torch.float32
        channels, edge, _ = model.backbone.latent
        self.config = SimpleNamespace(in_channels=channels, out_channels=channels, sample_size=edge)

    def forward(self, latents: Tensor, encoder_hidden_states: Tensor, timestep: Tensor, **rest: Any) -> Any:
        levels = timestep.expand(len(latents))
        return (self.model.backbone.denoise(latents, levels, encoder_hidden_states),)


class FirstStage(torch.nn.Module):
    """The checkpoint's autoencoder behind the arguments of the pipeline."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder, self.device = autoencoder, torch.device("cpu")
        self.config = SimpleNamespace(scaling_factor=1.0, block_out_channels=(1, 1, 1))  # a quarter of the edge

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.autoencoder.decode(latents),)


class Stock:
    """diffusers' pipeline around a checkpoint."""

    def __init__(self, model: LatentDiffusion, steps: int) -> None:
        from diffusers import PixArtAlphaPipeline  # needs the torchvision hook, which importing histosynth installs

        if hasattr(model.transformer, "set_attn_processor"):
            model.transformer.set_attn_processor(AttnProcessor2_0())  # what diffusers builds it with
        self.pipeline = PixArtAlphaPipeline(
            None, None, FirstStage(model.autoencoder), Told(model),
            model.backbone.process.solver("dpm++", steps),
        )  # fmt: skip
        self.pipeline.set_progress_bar_config(disable=True)
        self.steps = steps

    def __call__(self, noise: Tensor, told: Tensor, untold: Tensor) -> np.ndarray:
        """uint8 [N, H, W, 3]."""
        ones = torch.ones(told.shape[:2], dtype=torch.long)
        made = self.pipeline(
            prompt=None, negative_prompt=None, num_inference_steps=self.steps, guidance_scale=GUIDANCE, latents=noise,
            prompt_embeds=told, prompt_attention_mask=ones, negative_prompt_embeds=untold,
            negative_prompt_attention_mask=ones, use_resolution_binning=False, output_type="np",
        )  # fmt: skip
        return (made.images * 255).round().astype(np.uint8)


def contexts(model: LatentDiffusion, labels: list[int], seeds: list[int]) -> tuple[Tensor, Tensor]:
    """Told and untold, as the generator makes them."""
    tell = Teller(model.bank, model.classes, "bank")
    drawn = [tell(label, seed).embedding for label, seed in zip(labels, seeds, strict=True)]
    embeddings = torch.stack([e for e in drawn if e is not None])
    with torch.no_grad():
        context = context_of(model, embeddings, torch.tensor(labels), torch.ones(len(labels), dtype=torch.bool))
        return context, model.conditioner.untold(len(labels)).contiguous()


def best(run: Callable[[], Any], seconds: dict[str, float], name: str, tiles: int) -> None:
    start = time.perf_counter()
    run()
    seconds[name] = min(seconds.get(name, float("inf")), (time.perf_counter() - start) / tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="base")
    parser.add_argument("--tiles", type=int, default=16, help="tiles of a batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few tiles, no file: to see that it runs")
    options = parser.parse_args()
    count = 4 if options.quick else options.tiles
    repeats = 1 if options.quick else options.repeats
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    torch.set_num_threads(threads)

    stock = Stock(load_model(options.checkpoint), options.steps)
    cpu = torch.device("cpu")
    model = load_model(options.checkpoint)
    formats = ["fp32"] + (["bf16"] if half_type(cpu, "auto") is torch.bfloat16 else [])
    ours = {name: DiffusionGenerator(model, cpu, name) for name in formats}  # type: ignore[arg-type]
    ours["without the fast pass, fp32"] = DiffusionGenerator(model, cpu, "fp32", fast=False)
    labels = [k % len(model.classes) for k in range(count)]
    seeds = list(range(count))
    noise = torch.stack([torch.randn(model.backbone.latent, generator=torch_generator(s)) for s in seeds])
    told, untold = contexts(model, labels, seeds)

    def batch(generator: DiffusionGenerator, n: int) -> Tensor:
        return torch.cat(
            list(generator.sample(labels[:n], seeds[:n], batch_size=n, guidance=GUIDANCE, steps=options.steps))
        )

    one: dict[str, float] = {}
    many: dict[str, float] = {}
    for _ in range(repeats + 1):  # the first also warms up
        best(lambda: stock(noise[:1], told[:1], untold[:1]), one, "diffusers", 1)
        best(lambda: stock(noise, told, untold), many, "diffusers", count)
        for name, generator in ours.items():
            best(lambda: batch(generator, 1), one, name, 1)  # noqa: B023
            best(lambda: batch(generator, count), many, name, count)  # noqa: B023
    micro: dict[str, float] = {}
    for size in (1, 2, 4) if options.quick else (1, 2, 4, 8, 16):
        for name in formats:
            generator = DiffusionGenerator(model, cpu, name, micro_batch=size)  # type: ignore[arg-type]
            batch(generator, 1)
            best(lambda: batch(generator, count), micro, f"{size}, {name}", count)  # noqa: B023

    theirs = torch.from_numpy(stock(noise, told, untold)).permute(0, 3, 1, 2).int()
    apart = (batch(ours["fp32"], count).int() - theirs).abs()
    result = {
        "machine": describe_device(cpu), "threads": threads, "tiles": count, "steps": options.steps, "size": model.size,
        "diffusers": diffusers.__version__, "torch": torch.__version__,
        "seconds_a_tile_alone": one, "seconds_a_tile_in_batches": many,
        "ratio_alone": {name: one["diffusers"] / value for name, value in one.items()},
        "ratio_in_batches": {name: many["diffusers"] / value for name, value in many.items()},
        "seconds_a_tile_by_micro_batch": micro,
        "grey_levels_apart_fp32": {"mean": apart.float().mean().item(), "largest": int(apart.max())},
    }  # fmt: skip
    print(f"{count} tiles of {model.size} px, {options.steps} steps, guidance {GUIDANCE}, {threads} threads")
    print(f"{'':30}{'alone, s':>10}{'ratio':>8}{'batch, s a tile':>17}{'ratio':>8}")
    for name in one:
        print(f"{name:30}{one[name]:10.3f}{one['diffusers'] / one[name]:8.2f}{many[name]:17.3f}"
              f"{many['diffusers'] / many[name]:8.2f}")  # fmt: skip
    print("seconds a tile by the size of a micro-batch:", {k: round(v, 3) for k, v in micro.items()})
    print("grey levels between the tiles of the two in float32:", result["grey_levels_apart_fp32"])
    if not options.quick:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
