"""Stain normalisation: milliseconds a 256 px tile on one core, each tile with its own stain vectors, against peers.

    python benchmarks/stain.py [--peer-python PATH] [--tiles N] [--peer-tiles N]

Prints a table and, last, one line of JSON. The peers run in the same call, in turn with ours, in an environment of
their own, because torch-staintools' licence is not commercial (it is never a dependency of this project):

    python -m venv .venv-bench
    .venv-bench/bin/pip install torch torchvision numpy torch-staintools torchstain

Without that environment, or a PATH to another, only our own figures are printed. A peer's first call, which may compile
for minutes, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

import numpy as np  # noqa: E402  (after the number of threads is set)

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("vahadane", "macenko", "anchored", "reinhard")
OTHERS = {"torch-staintools": ("vahadane", "macenko", "reinhard"), "torchstain": ("macenko", "reinhard")}


def milliseconds(act: Callable[[np.ndarray], object], tiles: np.ndarray, repeats: int) -> list[float]:
    """The best of `repeats` times of each tile, given one by one as [1, 3, H, W]."""
    best = [float("inf")] * len(tiles)
    for _ in range(repeats):
        for i in range(len(tiles)):
            start = time.perf_counter()
            act(tiles[i : i + 1])
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best


def simulated(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` tiles of several simulated patients and tissues, and a reference."""
    from histosynth.tiles.phantom import make_hospital, make_patient, render

    def tile(k: int, label: str) -> np.ndarray:
        patient = make_patient(k, make_hospital(k, 0.6))
        return render(label, patient=patient, seed=k, size=256, field_um=128.0).image.transpose(2, 0, 1)

    tissues = ("TUM", "STR", "NORM", "LYM", "MUS", "DEB", "MUC", "ADI")
    return np.stack([tile(k, tissues[k % 8]) for k in range(count)]), tile(99, "TUM")[None]


def ours(tiles: np.ndarray, reference: np.ndarray) -> dict[str, list[float]]:
    """Times of our methods; "one source" is Vahadane with the vectors of the slide given (fit once)."""
    from histosynth.tiles.stain import load_normaliser

    times = {}
    for method in METHODS:
        normaliser = load_normaliser(method).fit(reference)
        times[method] = milliseconds(normaliser.transform, tiles, 5)
        if method == "vahadane":
            source = load_normaliser(method).fit(tiles).profile
            times["vahadane, one source"] = milliseconds(lambda x: normaliser.transform(x, source), tiles, 5)  # noqa: B023
    return times


def peers(path: str) -> Iterator[dict[str, object]]:
    """Runs in the peers' environment: a record for each package and method that can be run there."""
    sys.path.append(str(ROOT / "src"))
    try:
        import histosynth.core.torchvision_hook as hook

        hook.install()
    except ImportError:
        pass  # only needed where torchvision's compiled part does not load
    import torch

    torch.set_num_threads(1)
    data = np.load(path)
    tiles, reference = torch.from_numpy(data["tiles"]), torch.from_numpy(data["reference"])
    for package, methods in OTHERS.items():
        for method in methods:
            try:
                act = _peer(package, method, reference)
                act(tiles[:1])  # anything that a first call compiles is not counted
                repeats = 5 if milliseconds(act, tiles[:1], 1)[0] < 500 else 1
                yield {"package": package, "method": method, "ms": milliseconds(act, tiles, repeats)}
            except (ImportError, AttributeError, RuntimeError) as error:
                yield {"package": package, "method": method, "error": f"{type(error).__name__}: {error}"[:200]}


def _peer(package: str, method: str, reference) -> Callable:
    import torch

    if package == "torch-staintools":
        from torch_staintools.normalizer import NormalizerBuilder

        normaliser = NormalizerBuilder.build(method)
        normaliser.fit(reference.float() / 255)

        def act(tile):
            with torch.no_grad():
                return normaliser(tile.float() / 255)

        return act
    import torchstain

    kind = (
        torchstain.normalizers.MacenkoNormalizer if method == "macenko" else torchstain.normalizers.ReinhardNormalizer
    )
    normaliser = kind(backend="torch")
    normaliser.fit(reference[0])
    options = {"stains": False} if method == "macenko" else {}
    return lambda tile: normaliser.normalize(tile[0], **options)


def main() -> None:
    """Time ours and the peers' and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-bench" / "bin" / "python"))
    parser.add_argument("--tiles", type=int, default=24)
    parser.add_argument("--peer-tiles", type=int, default=3)
    parser.add_argument("--peers", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peers:
        for record in peers(options.peers):
            print(json.dumps(record), flush=True)
        return

    tiles, reference = simulated(options.tiles)
    found = []
    if Path(options.peer_python).exists():
        with tempfile.TemporaryDirectory() as folder:
            np.savez(f"{folder}/tiles.npz", tiles=tiles[: options.peer_tiles], reference=reference)
            command = [options.peer_python, __file__, "--peers", f"{folder}/tiles.npz"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"The peers' environment failed:\n{done.stderr[-500:]}")
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    else:
        print(f"No peers: {options.peer_python} does not exist (see the top of this script).\n")
    times = ours(tiles, reference)

    print(f"{'ms a 256 px tile, one core':<34}{'median':>9}{'mean':>9}{'slowest':>9}{'ratio to ours':>15}")
    for name, values in times.items():
        print(f"{'histosynth ' + name:<34}{np.median(values):9.2f}{np.mean(values):9.2f}{max(values):9.2f}")
    for record in found:
        name = f"{record['package']} {record['method']}"
        if "error" in record:
            print(f"{name:<34} cannot run: {record['error']}")
            continue
        # on the same tiles
        record["ratio"] = float(np.mean(record["ms"]) / np.mean(times[record["method"]][: options.peer_tiles]))
        ms = record["ms"]
        print(f"{name:<34}{np.median(ms):9.2f}{np.mean(ms):9.2f}{max(ms):9.2f}{record['ratio']:14.1f}x")
    summary = {name: {"median_ms": float(np.median(v)), "mean_ms": float(np.mean(v))} for name, v in times.items()}
    print(json.dumps({"ours": summary, "peers": found}))


if __name__ == "__main__":
    main()
