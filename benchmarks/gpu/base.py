"""Train the generators that ship, on a GPU, in one call of a few minutes.

    python benchmarks/gpu/base.py --out FOLDER [--autoencoder 90] [--diffusion 200] [--gan 200]
    python benchmarks/gpu/base.py --out FOLDER --tiny --device cpu     # a few tiles and steps: does it run?

The numbers are seconds of training; 0 leaves one out, and the diffusion model then takes the autoencoder that ships.
Runs `histosynth train base` for each, on the same simulated tissue. FOLDER gets the weights, a sheet of each generator
and base.json: device, steps, seconds and tiles a second. To ship them, copy the weights to src/histosynth/assets and
their commands, which are in base.json too, to its README.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from histosynth.core.assets import asset_path
from histosynth.core.checkpoint import read_card
from histosynth.core.device import describe_device, pick_device
from histosynth.study.base import BaseConfig, train_base

NAMES = {"autoencoder": "autoencoder", "diffusion": "diffusion-base", "gan": "gan-base"}
BATCH = {"autoencoder": 16, "diffusion": 32, "gan": 32}
FOREVER = 10_000_000


def one(what: str, seconds: float, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one of them and copy what came of it; gives its row of base.json."""
    small = {"tiles": 54, "steps": 3} if options.tiny else {"steps": FOREVER, "seconds": seconds}
    config = BaseConfig(out=options.runs, workers=options.workers, device=options.device, **small)  # type: ignore[arg-type]
    started = time.monotonic()
    train_base(what, config=config)  # type: ignore[arg-type]
    spent = time.monotonic() - started
    made = options.runs / "assets" / f"{NAMES[what]}-{config.size}.safetensors"
    shutil.copy(made, out / made.name)
    for sheet in sorted((options.runs / what / "samples").glob("*.png"))[-1:]:
        shutil.copy(sheet, out / f"{what}.png")
    card = read_card(made)
    known = {k: card[k] for k in ("command", "parameters", "psnr_db", "ssim", "unseen_hospitals") if k in card}
    rate = card["steps"] * BATCH[what] / (spent if options.tiny else seconds)
    return {"steps": card["steps"], "seconds": round(spent, 1), "tiles_per_second": round(rate, 1), **known}


def main() -> None:
    """Train, copy, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/base-gpu"), help="where the trainings are kept")
    for name, seconds in (("autoencoder", 90.0), ("diffusion", 200.0), ("gan", 200.0)):
        parser.add_argument(f"--{name}", type=float, default=seconds)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that simulate tissue")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"device": describe_device(pick_device(options.device))}
    for what in NAMES:
        seconds = getattr(options, what)
        if seconds <= 0:
            if what == "autoencoder":
                kept = asset_path("autoencoder-64.safetensors")
                (options.runs / "assets").mkdir(parents=True, exist_ok=True)
                shutil.copy(kept, options.runs / "assets" / kept.name)
            continue
        report[what] = one(what, seconds, options.out, options)
        (options.out / "base.json").write_text(json.dumps(report, indent=2) + "\n")  # after each: a limit may strike
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
