"""Training steps, making tiles, and starting: histosynth's GAN against NVIDIA's StyleGAN2-ADA in PyTorch, on this CPU.

    python benchmarks/gan.py --nvidia FOLDER [--sizes small large] [--rounds N] [--full] [--threads N]

FOLDER holds their code (training/, torch_utils/, dnnlib/), whose licence is non-commercial: it is no dependency and
you bring it yourself. One place that has it is a package of the index:

    pip download slideflow==2.1.0 --no-deps && unzip slideflow-2.1.0-py3-none-any.whl
    python benchmarks/gan.py --nvidia slideflow/gan/stylegan2/stylegan2

Both sides: 64 px, 9 classes, batch 16, the very same weights (their pickle, converted), ADA pipe bgc at p = 0.3, style
mixing 0.9, R1 every 16 steps, no path-length penalty, Adam, averaged generator, the same threads, in turns in one
process. Theirs runs through its own networks, loss and augmentation in the order of its training loop. Two things are
changed from outside: the package is imported without the parts that need slideflow, and the sampling of its warp gets
the gradient of a gradient, which it has for torch 1.7 to 1.9 only. An ordinary step and one with R1 are timed apart and
weighed 15 to 1.

Rows of ours: "same work" is float32 with the band-limited warp, as theirs; "float32" has the plain warp, our default on
a CPU; "as shipped" also has the precision that this processor takes by default. Unlike theirs, ours shows the
discriminator the tiles that the generator has just learned from, in place of new ones. Without FOLDER only ours runs.
Prints tables and writes benchmarks/results/gan.json.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

SIZES = {"small": (4096, 128), "large": (16384, 512)}  # channel_base, channel_max
EDGE, CLASSES, BATCH, P, R1_EVERY = 64, 9, 16, 0.3, 16
GAMMA = 0.0002 * EDGE * EDGE / BATCH
LR, BETAS, MIXING = 0.0025, (0.0, 0.99), 0.9


class Zeros(torch.autograd.Function):
    """Sampling with zeros beyond the edges, differentiable as often as one likes."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = images.shape
        return F.grid_sample(images, grid, align_corners=False)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ZerosBack.apply(gradient, *ctx.saved_tensors, ctx.shape), None


class ZerosBack(torch.autograd.Function):
    """Its adjoint."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, grid: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(grid)
        like = gradient.new_empty(1).expand(shape)
        return torch.ops.aten.grid_sampler_2d_backward(gradient, like, grid, 0, 0, False, [True, False])[0]

    @staticmethod
    def backward(ctx: Any, second: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return Zeros.apply(second, *ctx.saved_tensors), None, None


def import_nvidia(folder: Path) -> dict[str, Any]:
    """Their modules networks, loss, augment and legacy."""
    if not (folder / "training" / "networks.py").is_file():
        sys.exit(f"{folder} has no training/networks.py. Give the folder of StyleGAN2-ADA's code with --nvidia.")
    package = types.ModuleType("stylegan2")  # in place of its __init__, which imports slideflow
    package.__path__ = [str(folder)]
    sys.modules["stylegan2"] = package
    warnings.simplefilter("ignore")
    importlib.import_module("stylegan2.dnnlib")  # first: the other order is a circle
    modules = {name: importlib.import_module(f"stylegan2.training.{name}") for name in ("networks", "loss", "augment")}
    importlib.import_module("stylegan2.torch_utils.ops.grid_sample_gradfix").grid_sample = Zeros.apply
    return modules | {"legacy": importlib.import_module("stylegan2.legacy")}


def nvidia_networks(modules: dict[str, Any], size: str) -> dict[str, torch.nn.Module]:
    """Generator, its average and discriminator, as their `auto` configuration makes them but for the widths."""
    base, most = SIZES[size]
    shared = {"c_dim": CLASSES, "img_resolution": EDGE, "img_channels": 3}
    widths = {"channel_base": base, "channel_max": most, "conv_clamp": 256}
    torch.manual_seed(0)
    generator = modules["networks"].Generator(
        z_dim=512, w_dim=512, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=widths, **shared
    )
    discriminator = modules["networks"].Discriminator(**shared, **widths, epilogue_kwargs={"mbstd_group_size": 4})
    return {"G": generator, "D": discriminator, "G_ema": copy.deepcopy(generator).eval()}


class Nvidia:
    """Their training step."""

    def __init__(self, modules: dict[str, Any], networks: dict[str, torch.nn.Module], augmented: bool = True) -> None:
        self.g, self.d = (copy.deepcopy(networks[name]).train().requires_grad_(False) for name in "GD")
        self.average = copy.deepcopy(networks["G_ema"])
        pipe = None
        if augmented:
            blit, geom = ("xflip", "rotate90", "xint"), ("scale", "rotate", "aniso", "xfrac")
            color = ("brightness", "contrast", "lumaflip", "hue", "saturation")
            pipe = modules["augment"].AugmentPipe(**dict.fromkeys((*blit, *geom, *color), 1)).requires_grad_(False)
            pipe.p.fill_(P)
        self.loss = modules["loss"].StyleGAN2Loss(
            torch.device("cpu"), self.g.mapping, self.g.synthesis, self.d, augment_pipe=pipe,
            style_mixing_prob=MIXING, r1_gamma=GAMMA, pl_weight=0,
        )  # fmt: skip
        ratio = R1_EVERY / (R1_EVERY + 1)
        self.adam_g = torch.optim.Adam(self.g.parameters(), lr=LR, betas=BETAS)
        self.adam_d = torch.optim.Adam(self.d.parameters(), lr=LR * ratio, betas=[b**ratio for b in BETAS])

    def __call__(self, r1: bool, images: torch.Tensor, labels: torch.Tensor) -> None:
        """A step with or without R1, on uint8 images."""
        real = images.float() / 127.5 - 1
        hot = F.one_hot(labels, CLASSES).float()
        phases = [("Gmain", self.g, self.adam_g, 1), ("Dmain", self.d, self.adam_d, 1)]
        if r1:
            phases.append(("Dreg", self.d, self.adam_d, R1_EVERY))
        for name, network, adam, gain in phases:
            z, classes = torch.randn(BATCH, 512), hot[torch.randperm(BATCH)]
            adam.zero_grad(set_to_none=True)
            network.requires_grad_(True)
            self.loss.accumulate_gradients(
                phase=name, real_img=real, real_c=hot, gen_z=z, gen_c=classes, sync=True, gain=gain
            )
            network.requires_grad_(False)
            for parameter in network.parameters():
                if parameter.grad is not None:
                    torch.nan_to_num(parameter.grad, 0, 1e5, -1e5, out=parameter.grad)
            adam.step()
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.g.parameters(), strict=True):
                kept.copy_(new.lerp(kept, 0.999))
            for kept, new in zip(self.average.buffers(), self.g.buffers(), strict=True):
                kept.copy_(new)


def our_config(size: str, **more: Any) -> Any:
    """The same networks and recipe as theirs, in our settings."""
    from histosynth.gan.config import GanConfig

    base, most = SIZES[size]
    return GanConfig(
        size=EDGE, batch=BATCH, channel_base=base, channel_max=most, d_channel_base=0, d_channel_max=0, z_dim=512,
        w_dim=512, label_conditioning="mapping", conv_clamp=256, style_mixing=MIXING, ada="fixed", ada_pipe="bgc",
        ada_p=P, r1_gamma=GAMMA, r1_every=R1_EVERY, lr_g=LR, lr_d=LR, collapse=0, head="",
        noise=True, start="constant", space="pixels", **more,
    )  # fmt: skip


class Ours:
    """Our training step, as `train_gan` calls it."""

    def __init__(self, size: str, init: str, precision: str, fine: bool = False, augmented: bool = True) -> None:
        from histosynth.gan import step as module
        from histosynth.gan.crew import Crew

        config = our_config(size, init=init, precision=precision)
        config = config if augmented else replace(config, ada_p=0.0)
        self.module, self.fine = module, partial(module.augment, fine=fine)
        self.step = module.TrainingStep(config, [f"class-{k:03d}" for k in range(CLASSES)], Crew.join("cpu"), 1000)
        self.step.players.load()
        self.step.players.start(torch.zeros(2, 3, EDGE, EDGE))

    def __call__(self, r1: bool, images: torch.Tensor, labels: torch.Tensor) -> None:
        """A step with or without R1, on uint8 images."""
        usual, self.module.augment = self.module.augment, self.fine
        self.step(0 if r1 else 1, images, labels)
        self.module.augment = usual


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_training(sides: dict[str, Callable[..., None]], rounds: int, warm: bool) -> dict[str, dict[str, float]]:
    """Seconds of both kinds of step, the best of the rounds, the sides in turns; `warm`: after one that is not kept."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (BATCH, 3, EDGE, EDGE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(BATCH) % CLASSES
    best = {name: {"plain": float("inf"), "r1": float("inf")} for name in sides}
    for number in range(rounds + warm):
        for name, step in sides.items():
            for kind in best[name]:
                seconds = timed(lambda step=step, kind=kind: step(kind == "r1", images, labels))
                if number >= warm:
                    best[name][kind] = min(best[name][kind], seconds)
    for row in best.values():
        row["images_per_second"] = BATCH * R1_EVERY / ((R1_EVERY - 1) * row["plain"] + row["r1"])
    return best


def measure_making(checkpoint: Path, theirs: torch.nn.Module | None, rounds: int) -> dict[str, float]:
    """Tiles a second, uint8 in memory, from classes and seeds."""
    from histosynth.gan.sample import GanGenerator

    made = GanGenerator.from_checkpoint(checkpoint, "cpu")
    labels = [k % CLASSES for k in range(BATCH)]

    def ours(precision: str) -> object:
        return list(made.sample(labels, range(BATCH), precision=precision))

    def nvidia() -> object:
        with torch.no_grad():
            z = torch.cat([torch.randn(1, 512, generator=torch.Generator().manual_seed(s)) for s in range(BATCH)])
            images = theirs(z, F.one_hot(torch.tensor(labels), CLASSES).float(), noise_mode="random")
            return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)

    sides = {f"histosynth, {p}": partial(ours, p) for p in ("fp32", "bf16")}
    sides |= {"nvidia": nvidia} if theirs is not None else {}
    best = dict.fromkeys(sides, float("inf"))
    for _ in range(rounds + 2):
        for name, work in sides.items():
            best[name] = min(best[name], timed(work))
    return {name: BATCH / seconds for name, seconds in best.items()}


def start(side: str, file: Path, folder: Path | None) -> None:
    """What a fresh process does up to its first tile."""
    if side == "ours":
        from histosynth.gan.sample import GanGenerator

        next(iter(GanGenerator.from_checkpoint(file, "cpu").sample([0], [0])))
        return
    modules = import_nvidia(folder)
    with file.open("rb") as stream, torch.no_grad():
        network = modules["legacy"].load_network_pkl(stream)["G_ema"]
        network(torch.randn(1, 512), F.one_hot(torch.tensor([0]), CLASSES).float())


def measure_start(files: dict[str, Path], folder: Path | None, rounds: int) -> dict[str, float]:
    """Seconds from starting Python to the first tile."""
    best = dict.fromkeys(files, float("inf"))
    for _ in range(rounds):
        for side, file in files.items():
            command = [sys.executable, __file__, "--start", side, str(file)]
            command += ["--nvidia", str(folder)] if folder else []
            best[side] = min(best[side], timed(partial(subprocess.run, command, check=True, capture_output=True)))
    return best


def largest_difference(checkpoint: Path, theirs: torch.nn.Module) -> float:
    """Between their images and ours from the same weights and codes, without noise."""
    from histosynth.gan.sample import GanGenerator

    network = GanGenerator.from_checkpoint(checkpoint, "cpu").network
    z, labels = torch.randn(4, 512), torch.tensor([0, 3, 5, 8])
    with torch.no_grad():
        wanted = theirs(z, F.one_hot(labels, CLASSES).float(), noise_mode="none")
        return float((network(z, labels, None) - wanted).abs().max())


def bench(
    size: str, modules: dict[str, Any] | None, folder: Path | None, rounds: int, full: bool, scratch: Path
) -> dict[str, Any]:
    """Everything at one size."""
    from histosynth.core.checkpoint import save_checkpoint
    from histosynth.gan.discriminator import Discriminator
    from histosynth.gan.generator import Generator

    result: dict[str, Any] = {}
    checkpoint, files = scratch / f"{size}.safetensors", {"ours": scratch / f"{size}.safetensors"}
    theirs = None
    if modules:
        from histosynth.gan.nvidia.convert import convert

        networks = nvidia_networks(modules, size)
        files["nvidia"] = scratch / f"{size}.pkl"
        with files["nvidia"].open("wb") as stream:
            pickle.dump(networks | {"training_set_kwargs": None, "augment_pipe": None}, stream)
        convert(files["nvidia"], checkpoint)
        theirs = networks["G_ema"]
        result["largest_difference_of_images"] = largest_difference(checkpoint, theirs)
    else:
        shape, classes = our_config(size).shape(CLASSES), [f"class-{k:03d}" for k in range(CLASSES)]
        made = {"G_ema": Generator(shape), "D": Discriminator(shape)}
        tensors = {f"{name}.{k}": v for name, network in made.items() for k, v in network.state_dict().items()}
        card = {"kind": "gan", "shape": vars(shape), "classes": classes, "size": EDGE}
        save_checkpoint(checkpoint, tensors, card)
    init = str(checkpoint)
    quick = size == "large" and not full  # a step takes ten seconds and more: no other rows, no warming up
    sides: dict[str, Callable[..., None]] = {
        "histosynth, same work": Ours(size, init, "fp32", fine=True),
        "histosynth, as shipped": Ours(size, init, "auto"),
    }
    if not quick:
        sides["histosynth, float32"] = Ours(size, init, "fp32")
        sides["histosynth, same work, no ADA"] = Ours(size, init, "fp32", augmented=False)
    if modules:
        sides["nvidia"] = Nvidia(modules, networks)
    if modules and not quick:
        sides["nvidia, no ADA"] = Nvidia(modules, networks, augmented=False)
    counted = sides["histosynth, as shipped"].step.players.networks
    result["parameters"] = {n: sum(p.numel() for p in counted[n].parameters()) for n in ("generator", "discriminator")}
    result["training"] = measure_training(sides, 1 if quick else rounds, warm=not quick)
    result["making_tiles_per_second"] = measure_making(checkpoint, theirs, rounds)
    result["start_seconds"] = measure_start(files, folder, rounds)
    return result


def show(size: str, found: dict[str, Any]) -> None:
    """Tables with the ratio to NVIDIA of the same run."""
    counts = {name: f"{count / 1e6:.2f} M" for name, count in found["parameters"].items()}
    print(f"\n{size}: {EDGE} px, generator {counts['generator']}, discriminator {counts['discriminator']} parameters")
    if "largest_difference_of_images" in found:
        print(f"images from the same weights differ by at most {found['largest_difference_of_images']:.1e}")
    training = found["training"]
    print(f"{'training':32}{'images/s':>10}{'step ms':>10}{'with R1':>10}{'x nvidia':>10}")
    for name, row in training.items():
        peer = training.get("nvidia, no ADA" if "no ADA" in name else "nvidia")
        ratio = f"{row['images_per_second'] / peer['images_per_second']:10.2f}" if peer else ""
        times = f"{row['plain'] * 1000:10.0f}{row['r1'] * 1000:10.0f}"
        print(f"{name:32}{row['images_per_second']:10.1f}{times}{ratio}")
    for title, rates in (("making tiles, a second", found["making_tiles_per_second"]),
                         ("start to first tile, s", found["start_seconds"])):  # fmt: skip
        print(f"{title:32}" + ", ".join(f"{name} {value:.2f}" for name, value in rates.items()))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvidia", type=Path, help="folder of their code")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["small", "large"])
    parser.add_argument("--rounds", type=int, default=2, help="of which the best counts")
    parser.add_argument("--full", action="store_true", help="all rows, rounds and warming up at the large size, too")
    parser.add_argument("--threads", type=int, default=0, help="of every side; 0: as many as torch takes")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gan.json")
    parser.add_argument("--start", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(arguments.start[0], Path(arguments.start[1]), arguments.nvidia)
        return
    os.environ["HISTOSYNTH_QUIET"] = "1"
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for the processes that start anew
    modules = import_nvidia(arguments.nvidia) if arguments.nvidia else None
    result: dict[str, Any] = {"machine": machine(), "batch": BATCH, "ada_p": P, "sizes": {}}
    print(", ".join(str(value) for value in result["machine"].values()))
    if modules is None:
        print("No --nvidia folder: only histosynth is measured.")
    with tempfile.TemporaryDirectory() as scratch:
        for size in arguments.sizes:
            found = bench(size, modules, arguments.nvidia, arguments.rounds, arguments.full, Path(scratch))
            result["sizes"][size] = found
            show(size, found)
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return {"processor": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
