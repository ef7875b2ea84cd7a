"""Precision, recall, density and coverage at 1536 dimensions: time and memory of ours and of the `prdc` package.

    python benchmarks/neighbours.py [N ...] [--peer-up-to N]

By default 5,000, 10,000 and 20,000 tiles a side; 50000 is the size that must stay below 4 GB. Each run is a process
of its own, whose largest resident memory is the kernel's own count (the features and the libraries are in it; the
row "idle" has only these). The peer holds all distances at once, so it runs up to 10,000 tiles unless told otherwise.
Prints a table and writes benchmarks/results/neighbours.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

DIM, K = 1536, 5


def features(n: int, seed: int) -> np.ndarray:
    """float32 [n, 1536]: clusters and a decaying spectrum, as encoders of tissue give."""
    rng = np.random.default_rng(seed)
    middle = np.random.default_rng(99).normal(size=(9, DIM)).astype(np.float32)
    rows = rng.standard_normal((n, DIM), np.float32)
    rows += middle[rng.integers(9, size=n)]
    rows *= np.arange(1, DIM + 1, dtype=np.float32) ** -0.4
    return rows


def one(which: str, n: int) -> dict[str, object]:
    """Run one of them in this process."""
    real, fake = features(n, 1), features(n, 2) * np.float32(1.02)
    if which == "ours":
        from histosynth.evaluate.coverage import prdc as measure
    elif which == "prdc":
        from prdc import compute_prdc as measure
    else:
        from histosynth.evaluate.coverage import prdc  # noqa: F401 - what importing alone costs

        def measure(*_):
            return {}

    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        values = measure(real, fake, K)
    return {
        "which": which, "n": n, "seconds": time.perf_counter() - start,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "values": {name: float(value) for name, value in values.items()},
    }  # fmt: skip


def main() -> None:
    """Every size in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=[5_000, 10_000, 20_000])
    parser.add_argument("--peer-up-to", type=int, default=10_000)
    parser.add_argument("--one", choices=("ours", "prdc", "idle"), help="run one in this process, at the first size")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.sizes[0])))
        return
    rows = []
    print(f"{'tiles a side':>12} {'':6} {'seconds':>8} {'GB':>6}  values")
    for n in arguments.sizes:
        for which in ("idle", "ours", *(("prdc",) if n <= arguments.peer_up_to else ())):
            command = [sys.executable, __file__, str(n), "--one", which]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append(found)
            values = "  ".join(f"{name} {value:.6f}" for name, value in found["values"].items())
            print(f"{n:>12} {which:6} {found['seconds']:8.1f} {found['gigabytes']:6.2f}  {values}", flush=True)
    out = Path(__file__).parent / "results" / "neighbours.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"dim": DIM, "k": K, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
