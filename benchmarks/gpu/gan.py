"""Training steps and making tiles on a GPU: eager, bfloat16, and torch.compile, at 64 and 256 px.

    python benchmarks/gpu/gan.py [--steps N] [--tiny]

One call runs everything: every recipe of networks (small and large) with float32, with bfloat16, and with bfloat16 and
compiled networks. Prints images per second, milliseconds a step, the peak of the GPU's memory, and the seconds
that the first step took (compiling is in it), and writes benchmarks/results/gan-DEVICE.json. A recipe that does not fit
the memory is reported as such. `--tiny` is a trial of the script itself on a CPU, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from histosynth.gan.config import GanConfig
from histosynth.gan.crew import Crew
from histosynth.gan.step import TrainingStep

CLASSES = 9
# name -> size, batch, channel_base, channel_max, code length
RECIPES = {
    "64 px, small": (64, 64, 4096, 128, 256),
    "64 px, large": (64, 64, 16384, 512, 512),
    "256 px, small": (256, 32, 8192, 256, 512),
    "256 px, large": (256, 32, 16384, 512, 512),
}
TINY = {"16 px, tiny": (16, 4, 128, 8, 8)}
WAYS = {"float32": ("fp32", False), "bfloat16": ("bf16", False), "bfloat16, compiled": ("bf16", True)}


def recipe(size: int, batch: int, base: int, most: int, code: int, precision: str) -> GanConfig:
    """StyleGAN2-ADA's: pipe bgc at p = 0.3, R1 every 16 steps, style mixing 0.9."""
    return GanConfig(
        size=size, batch=batch, channel_base=base, channel_max=most, d_channel_base=0, d_channel_max=0, z_dim=code,
        w_dim=code, precision=precision, init="none", conv_clamp=256, style_mixing=0.9, ada="fixed", ada_pipe="bgc",
        ada_p=0.3, collapse=0, head="", noise=True, start="constant", space="pixels",
    )  # fmt: skip


def prepare(config: GanConfig, device: torch.device, compiled: bool) -> TrainingStep:
    """Networks on the device, compiled where asked for; R1 stays eager, since compiled code has no second gradient."""
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # a trial on a CPU traces, and compiles nothing
    step = TrainingStep(config, [f"class-{k}" for k in range(CLASSES)], Crew(device), 1000)
    step.players.start(torch.zeros(4, 3, config.size, config.size, device=device))
    if compiled:
        judge, plain = step.players.discriminator, step.players.discriminator.forward
        quick = torch.compile(plain, backend=backend)
        judge.forward = lambda x, labels, dtype=torch.float32: (plain if _penalised(x) else quick)(x, labels, dtype)
        step.players.generator.forward = torch.compile(step.players.generator.forward, backend=backend)
    return step


def _penalised(images: torch.Tensor) -> bool:
    """R1 alone asks for the gradient of real images: they are leaves, and fake ones are not."""
    return images.requires_grad and images.is_leaf


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def measure(config: GanConfig, device: torch.device, compiled: bool, steps: int) -> dict[str, Any]:
    """One recipe, one way."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step = prepare(config, device, compiled)
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch, 3, config.size, config.size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)
    labels = (torch.arange(config.batch) % CLASSES).to(device)

    def run(count: int, first: int) -> None:
        for number in range(first, first + count):
            step(number, images, labels)

    found: dict[str, Any] = {"first_step_seconds": seconds(lambda: run(1, 0), device)}
    run(2, 1)
    each = seconds(lambda: run(steps, config.r1_every), device) / steps  # whole rounds: one R1 in r1_every steps
    found |= {"step_milliseconds": each * 1000, "images_per_second": config.batch / each}

    average, dtype = step.players.average, step.players.dtype
    z = torch.randn(config.batch, config.z_dim, device=device)
    noise = average.draw_noise(config.batch, torch.Generator(device).manual_seed(0))

    def make(count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                average(z, labels, noise, dtype=dtype)

    make(2)
    found["tiles_per_second"] = config.batch * steps / seconds(lambda: make(steps), device)
    if device.type == "cuda":
        found["peak_gigabytes"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def attempt(config: GanConfig, device: torch.device, compiled: bool, steps: int) -> dict[str, Any]:
    """`measure`, or what kept it from running."""
    try:
        return measure(config, device, compiled, steps)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Everything, in one call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32, help="timed steps, whole rounds of 16")
    parser.add_argument("--tiny", action="store_true", help="try the script on a CPU")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent.parent / "results")
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        parser.exit(2, "This machine has no CUDA GPU. Run it on one, or try the script itself with --tiny.\n")
    os.environ["HISTOSYNTH_QUIET"] = "1"
    device = torch.device("cpu" if arguments.tiny else "cuda:0")
    name = "cpu-tiny" if arguments.tiny else torch.cuda.get_device_name(device)
    recipes, steps = (TINY, 2) if arguments.tiny else (RECIPES, arguments.steps)
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "steps": steps, "recipes": {}}
    print(f"{name}, torch {torch.__version__}")
    print(f"{'':16}{'':20}{'images/s':>10}{'step ms':>10}{'tiles/s':>10}{'first s':>9}{'GB':>7}")
    for title, (size, batch, base, most, code) in recipes.items():
        for way, (precision, compiled) in WAYS.items():
            config = recipe(size, batch, base, most, code, precision)
            config = replace(config, r1_every=2) if arguments.tiny else config
            found = attempt(config, device, compiled, steps)
            result["recipes"].setdefault(title, {"batch": batch})[way] = found
            if "failed" in found:
                print(f"{title:16}{way:20}{found['failed']:>10}")
                continue
            row = (
                found[k] for k in ("images_per_second", "step_milliseconds", "tiles_per_second", "first_step_seconds")
            )
            print(
                f"{title:16}{way:20}" + "".join(f"{v:{w}.1f}" for v, w in zip(row, (10, 10, 10, 9), strict=True)),
                end="",
            )
            print(f"{found.get('peak_gigabytes', 0):7.2f}", flush=True)
    arguments.folder.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    (arguments.folder / f"gan-{slug}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
