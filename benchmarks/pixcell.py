"""PixCell at its full size on this machine: how long a step, a tile and loading take, and how much memory.

    python benchmarks/pixcell.py [--device auto] [--dtype fp32] [--tiles 1] [--json FILE]

The weights are random, in the published layout: time and memory do not depend on their values. The forward pass is
compared with that of diffusers' own network on the same weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from histosynth.core.device import describe_device, pick_device
from histosynth.diffusion.pixcell import PixCell, PixCellGenerator, PixCellShape
from histosynth.diffusion.pixcell.vae import SD35

STEM = "diffusion_pytorch_model.safetensors"


def write_folder(folder: Path) -> torch.nn.Module:
    """Random weights as diffusers writes them, with the extra tensor; returns diffusers' network."""
    from diffusers import AutoencoderKL, PixArtTransformer2DModel  # after histosynth, which mends torchvision's import

    torch.manual_seed(0)
    network = PixArtTransformer2DModel(**PixCellShape().options())
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    network.save_config(folder / "transformer")
    tensors = {**network.state_dict(), "caption_projection.uncond_embedding": torch.randn(1, 1536) / 1536**0.5}
    save_file(tensors, folder / "transformer" / STEM)
    AutoencoderKL(**SD35).save_pretrained(folder / "vae")
    return network.eval()


def peak(device: torch.device) -> float:
    """Most memory so far, GB: of the card, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def timed(work: object, device: torch.device) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--tiles", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "pixcell.json")
    args = parser.parse_args()
    device = pick_device(args.device)
    draw = torch.Generator().manual_seed(1)
    noisy, told = torch.randn(1, 16, 32, 32, generator=draw), torch.randn(1, 1, 1536, generator=draw)
    level = torch.tensor([500])
    with tempfile.TemporaryDirectory() as folder:
        network = write_folder(Path(folder))
        theirs = network(noisy, encoder_hidden_states=told, timestep=level, return_dict=False)[0][:, :16]
        del network
        start = time.perf_counter()
        model = PixCell.load(folder, device=str(device), dtype=args.dtype)
        figures: dict[str, object] = {"loading_s": time.perf_counter() - start}
    ours = model.denoise(noisy, level, told).cpu()
    generator = PixCellGenerator(model)
    batch = generator.micro_batch
    twice = noisy.expand(2 * batch, -1, -1, -1), told.expand(2 * batch, -1, -1)
    model.denoise(twice[0], level, twice[1])  # the first call of a shape prepares kernels
    step = timed(lambda: model.denoise(twice[0], level, twice[1]), device) / batch
    latents = noisy.expand(batch, -1, -1, -1)
    decoding = timed(lambda: generator.decode(latents), device) / batch
    total = timed(lambda: list(generator.sample(None, range(args.tiles), steps=20)), device) / args.tiles
    figures |= {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "tiles_at_a_time": batch,
        "parameters": sum(p.numel() for p in model.transformer.parameters()),
        "largest_difference_from_diffusers": float((ours - theirs).abs().max()),
        "guided_step_s_a_tile": step,
        "decoding_s_a_tile": decoding,
        "tile_s_20_steps_told_nothing": total,
        "tile_s_20_steps_guided_from_step": 20 * step + decoding,
        "peak_gb": peak(device),
    }
    print(model.memory_statement())
    for name, value in figures.items():
        print(f"{name:<36}{value:.4g}" if isinstance(value, float) else f"{name:<36}{value}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
