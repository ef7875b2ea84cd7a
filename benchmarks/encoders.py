"""From PNG files to Inception features: histosynth against torch-fidelity, pytorch-fid and clean-fid.

    python benchmarks/encoders.py [--tiles 64] [--repeats 3] [--json FILE]

Every side decodes the same files, resizes them its own way and runs the same random weights on all cores, in turns and
in one process. Prints milliseconds a tile (the best of the repeats), how many times as long each peer takes,
and how far features are from those of the peer with the same resize.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from histosynth import encoders
from histosynth.encoders import inception
from histosynth.encoders.store import encode_all
from histosynth.tiles.images import read_rgb, write_png

EDGE = 224
BATCH = 16


class Files:
    """PNG files as lazily decoded tiles, uint8 [n, 3, H, W] a slice."""

    def __init__(self, paths: list[Path], workers: int) -> None:
        self.paths, self.pool = paths, ThreadPoolExecutor(workers)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, which: slice) -> np.ndarray:
        tiles = self.pool.map(lambda path: read_rgb(path)[0], self.paths[which])
        return np.stack(list(tiles)).transpose(0, 3, 1, 2)


def make_tiles(folder: Path, count: int) -> list[Path]:
    """Smooth colours with grain, as PNG files: decoding and resizing cost what they cost for tissue."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(90, 255, (count, 12, 12, 3), dtype=np.uint8)
    paths = []
    for i, pattern in enumerate(coarse):
        large = torch.from_numpy(pattern).permute(2, 0, 1)[None].float()
        large = torch.nn.functional.interpolate(large, (EDGE, EDGE), mode="bicubic")[0]
        grain = torch.from_numpy(rng.normal(0, 8, (3, EDGE, EDGE))).float()
        tile = (large + grain).clamp(0, 255).byte().permute(1, 2, 0).numpy()
        paths.append(folder / f"{i:05d}.png")
        write_png(paths[-1], tile)
    return paths


def random_file(folder: Path) -> Path:
    """Random weights that keep the size of the signal, as the file of FID."""
    torch.manual_seed(0)
    layers = inception.build()
    for layer in layers.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    path = folder / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(layers.state_dict(), path)
    return path


def ours(name: str, precision: str, weights: Path, paths: list[Path], cores: int) -> Callable[[], np.ndarray]:
    encoder = encoders.load(name, "cpu", weights=weights, precision=precision)
    return lambda: encode_all(encoder, Files(paths, cores))


def torch_fidelity(weights: Path, paths: list[Path], cores: int) -> Callable[[], np.ndarray]:
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    network = create_feature_extractor(
        "inception-v3-compat", ["2048"], cuda=False, verbose=False, feature_extractor_weights_path=str(weights)
    )

    def run() -> np.ndarray:
        found = extract_featuresdict_from_input_id(
            1, network, input1=str(paths[0].parent), cuda=False, batch_size=BATCH, verbose=False, save_cpu_ram=False
        )
        return found["2048"].numpy()

    return run


def pytorch_fid_network(weights: Path, **settings: bool) -> torch.nn.Module:
    from pytorch_fid import inception as peer

    peer.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
    return peer.InceptionV3([3], **settings).eval()


def pytorch_fid(weights: Path, paths: list[Path], cores: int) -> Callable[[], np.ndarray]:
    from pytorch_fid.fid_score import get_activations

    network = pytorch_fid_network(weights)
    return lambda: get_activations(paths, network, BATCH, 2048, "cpu", num_workers=cores)


def clean_fid(weights: Path, paths: list[Path], cores: int) -> Callable[[], np.ndarray]:
    from cleanfid.fid import get_folder_features

    # its own network is a script of the same layers, which needs a download
    network = pytorch_fid_network(weights, resize_input=False, normalize_input=False)

    def features(grey: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return network((grey - 128) / 128)[0].flatten(1)

    return lambda: get_folder_features(
        str(paths[0].parent), features, cores, batch_size=BATCH, device="cpu", mode="clean", verbose=False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cores)
    os.environ["HISTOSYNTH_QUIET"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiles").mkdir()
        paths, weights = make_tiles(folder / "tiles", settings.tiles), random_file(folder)
        same = weights, paths, cores
        sides = {
            "histosynth, float32": ours("inception-v3", "float32", *same),
            "histosynth, bfloat16": ours("inception-v3", "bfloat16", *same),
            "histosynth, resize of torch-fidelity": ours("inception-v3-legacy-tf", "float32", *same),
            "histosynth, resize of pytorch-fid": ours("inception-v3-legacy", "float32", *same),
        }
        peers = {"torch_fidelity": torch_fidelity, "pytorch_fid": pytorch_fid, "cleanfid": clean_fid}
        sides |= {module: make(*same) for module, make in peers.items() if find_spec(module)}
        found = {side: run() for side, run in sides.items()}  # also warms up
        times: dict[str, float] = {}
        for _ in range(settings.repeats):
            for side, run in sides.items():
                start = time.perf_counter()
                run()
                times[side] = min(times.get(side, float("inf")), (time.perf_counter() - start) / len(paths) * 1000)
    report(times, found, cores, settings)


def report(times: dict[str, float], found: dict[str, np.ndarray], cores: int, settings: argparse.Namespace) -> None:
    peers = [p for p in ("torch_fidelity", "pytorch_fid", "cleanfid") if p in times]
    print(f"{settings.tiles} tiles of {EDGE} px, {cores} cores, torch {torch.__version__}")
    print(f"{'':38}{'ms a tile':>10}" + "".join(f"{'x ' + p:>18}" for p in peers))
    for side, value in times.items():
        print(f"{side:38}{value:10.1f}" + "".join(f"{times[p] / value:18.2f}" for p in peers))
    pairs = {
        "torch_fidelity": "histosynth, resize of torch-fidelity",
        "pytorch_fid": "histosynth, resize of pytorch-fid",
        "cleanfid": "histosynth, float32",
    }
    agreement = {p: float(np.abs(found[p] - found[pairs[p]]).max() / np.abs(found[p]).max()) for p in peers}
    one, two = found["histosynth, float32"], found["histosynth, bfloat16"]
    cosine = float(((one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)).min())
    print("largest difference to the peer with the same resize, relative:", agreement)
    print(f"bfloat16 to float32, smallest cosine: {cosine:.6f}")
    missing = [p for p in ("torch_fidelity", "pytorch_fid", "cleanfid") if p not in times]
    if missing:
        print("not installed, so not measured:", ", ".join(missing))
    if settings.json:
        settings.json.write_text(json.dumps({"ms": times, "agreement": agreement, "cosine_bfloat16": cosine}, indent=1))


if __name__ == "__main__":
    main()
