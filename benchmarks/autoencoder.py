"""What the shipped autoencoder keeps of a tile: PSNR and SSIM of the round trip, at 64 and 128 px.

    python benchmarks/autoencoder.py [TILES] [--seconds 420] [--json FILE]

First on simulated tissue of hospitals that it never saw. Then, with TILES (a tile set), on the validation tiles: as
shipped, and after its decoder learned the texture of the training tiles for `--seconds`, as every training of a
generator begins (0: not at all).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from histosynth.autoencoder.figures import round_trip_figures
from histosynth.autoencoder.network import AUTOENCODER, load_autoencoder
from histosynth.autoencoder.refine import refine_decoder
from histosynth.core.assets import asset_path
from histosynth.core.device import describe_device
from histosynth.tiles.simulate import BaseTissueConfig, base_tissue
from histosynth.tiles.tileset import TileSet

CPU = torch.device("cpu")
SIZES = (64, 128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path, nargs="?", help="a tile set of real tissue")
    parser.add_argument("--seconds", type=float, default=420.0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/autoencoder.json"))
    options = parser.parse_args()
    shipped = load_autoencoder(asset_path(AUTOENCODER))[0]
    result: dict[str, Any] = {"device": describe_device(CPU), "threads": torch.get_num_threads()}

    def note(what: str, size: int, tiles: int, figures: dict[str, float]) -> None:
        print(f"{what}, {size} px, {tiles} tiles: {figures['psnr_db']} dB, SSIM {figures['ssim']}", flush=True)
        result[f"{what}, {size} px"] = {"tiles": tiles, **figures}

    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            unseen = base_tissue(
                BaseTissueConfig(tiles=252, size=size, hospitals=20, seed=BaseTissueConfig.seed + 1), Path(folder), 1
            )
            note("simulated, unseen hospitals", size, len(unseen), round_trip_figures(shipped, unseen.images, CPU))
        for size in SIZES if options.tiles else ():
            train, val = (TileSet.open(options.tiles).array(split, size=size) for split in ("train", "val"))
            note("real, as shipped", size, len(val), round_trip_figures(shipped, val.images, CPU))
            if not options.seconds:
                continue
            refined = refine_decoder(
                train, shipped, Path(folder) / str(size), steps=1_000_000, seconds=options.seconds, schedule="clock"
            )
            note(
                f"real, decoder refined for {options.seconds:g} s", size, len(val),
                round_trip_figures(refined, val.images, CPU),
            )  # fmt: skip
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
