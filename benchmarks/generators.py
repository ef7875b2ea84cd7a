"""The same tiles and the same minutes, several recipes of a generator: which of them comes nearest to real tiles?

    python benchmarks/generators.py gan|diffusion TILES [--minutes 60] [--arms base,scratch] [--out runs/recipes]

TILES is a folder or a table of labelled tiles with patients. They are imported and split by patient; every recipe
learns from the training patients for the same number of minutes, on the threads that OMP_NUM_THREADS allows, and makes
as many tiles of each class as there are of validation patients, four times over. Fréchet and kernel distance are
taken against the tiles of the validation patients, beside the floor: training tiles in their place, at the same N and
the same mix of classes. Finished recipes are kept in OUT and not trained again. Prints a table, and writes
benchmarks/results/generators-<family>.json and docs/generators-<family>.jpg (a row a class, a block a recipe).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from histosynth import encoders
from histosynth.classify.probe import Probe, fit_probe
from histosynth.core.checkpoint import read_card
from histosynth.core.device import describe_device, pick_device
from histosynth.core.seeds import numpy_rng
from histosynth.evaluate.consistency import label_consistency
from histosynth.evaluate.frechet import frechet
from histosynth.evaluate.kernel import kid
from histosynth.evaluate.settings import Protocol
from histosynth.study.sheets import write_sheet_png
from histosynth.tiles.batches import TileArray
from histosynth.tiles.tileset import TileSet

# the learning rates follow the clock, so that they have fallen when the minutes are over
_CLOCK = "--schedule clock"
RECIPES: dict[str, dict[str, tuple[str, str]]] = {
    "gan": {
        "base": ("From the shipped base", "train gan {tiles} {out} " + _CLOCK),
        "scratch": ("From scratch", "train gan {tiles} {out} --init none " + _CLOCK),
        "stylegan2": (
            "StyleGAN2 networks from scratch",
            "train gan {tiles} {out} --init none --architecture stylegan2 " + _CLOCK,
        ),
        "poc-cgan": (  # PathoDuet's weights cannot be had by everyone
            "poc-cgan (tissue-tiny)",
            "train gan {tiles} {out} --config gan/poc-cgan --size 64 --head tissue-tiny "
            "--perceptual-encoder tissue-tiny --schedule clock",
        ),
    },
    "diffusion": {
        "base": ("Adapter + LoRA + classes", "train diffusion {tiles} {out} --finetune adapter_lora " + _CLOCK),
        "lora": ("LoRA only", "train diffusion {tiles} {out} --finetune lora " + _CLOCK),
        "adapter": ("Adapter only", "train diffusion {tiles} {out} --finetune adapter " + _CLOCK),
        "no-classes": (
            "All weights, without classes",
            "train diffusion {tiles} {out} --finetune full --class-dropout 0.9 --embedding-dropout 0 --ce-weight 0 "
            + _CLOCK,
        ),
        "full": ("All weights", "train diffusion {tiles} {out} --finetune full " + _CLOCK),
        "scratch": ("From scratch", "train diffusion {tiles} {out} --init none " + _CLOCK),
        "transformer": (
            "Transformer from scratch",
            "train diffusion {tiles} {out} --init none --backbone transformer " + _CLOCK,
        ),
    },
}
ENCODERS = ("tissue-tiny", "colour")
COPIES = 4  # synthetic tiles for each validation tile
SIZE = 64


def command(line: str) -> str:
    """Run a histosynth command and give it back."""
    print(f"$ histosynth {line}", flush=True)
    subprocess.run([sys.executable, "-m", "histosynth", *shlex.split(line)], check=True)
    return f"histosynth {line}"


def train(family: str, arm: str, tiles: Path, out: Path, minutes: float, steps: int) -> tuple[Path, str]:
    """The checkpoint of one recipe, and the command that trained it."""
    line = RECIPES[family][arm][1].format(tiles=tiles, out=out / arm)
    line += f" --seconds {minutes * 60:g} --steps {steps}"
    return out / arm / "checkpoints" / f"{family}.safetensors", command(line)


def make(checkpoint: Path, out: Path, like: TileArray) -> TileArray:
    """Synthetic tiles with the classes of `like`, each tile's class COPIES times."""
    sets = []
    for k, (label, count) in enumerate(like.counts().items()):
        if count:
            # a tile follows from the seed, its class and its number: classes can be made one by one
            command(f"generate {checkpoint} {out / str(k)} --classes {shlex.quote(label)} --per-class {COPIES * count}")
            sets.append((k, TileSet.open(out / str(k)).array(size=SIZE)))
    return TileArray(
        np.concatenate([np.asarray(made.images) for _, made in sets]),
        np.concatenate([np.full(len(made), k) for k, made in sets]),
        [f"{k}-{name}" for k, made in sets for name in made.ids],
        like.classes,
    )


def floor_tiles(train: TileArray, like: TileArray, seed: int) -> TileArray:
    """Training tiles with the mix of classes of `like`, as many of each as there are, at most COPIES times."""
    share = min(COPIES, *(n / like.counts()[c] for c, n in train.counts().items() if like.counts()[c]))
    chosen: list[int] = []
    for k, label in enumerate(train.classes):
        order = numpy_rng(seed, "floor", label).permutation(np.flatnonzero(train.labels == k))
        chosen += order[: int(share * like.counts()[label])].tolist()
    return train.subset(chosen)


def scores(real: TileArray, other: TileArray) -> dict[str, Any]:
    """Both distances in both feature spaces, at N = the smaller side."""
    found: dict[str, Any] = {"n": [len(real), len(other)]}
    for name in ENCODERS:
        encoder = encoders.load(name, "cpu")
        sides = [encoder.encode(a.tensor()).numpy() for a in (real, other)]
        protocol = Protocol(kid_size=min(len(s) for s in sides) // 2)
        n = min(len(s) for s in sides)
        equal = [s[numpy_rng(0, "equal", i).permutation(len(s))[:n]] for i, s in enumerate(sides)]
        found[name] = frechet(*equal, protocol) | kid(*sides, protocol)
    return found


def consistency(judge: Probe, tiles: TileArray) -> dict[str, float]:
    """How often the judge names the class of a tile, in all and by class."""
    return label_consistency(judge.probabilities(tiles.images).numpy(), tiles.labels, tiles.classes)


def main() -> None:
    """Train, make, score and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=RECIPES)
    parser.add_argument("tiles", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=1_000_000, help="steps of every recipe, if fewer")
    parser.add_argument("--arms", default="")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    options = parser.parse_args()
    arms = options.arms.split(",") if options.arms else list(RECIPES[options.family])

    tiles = options.out / "tiles"
    if not TileSet.is_tileset(tiles):
        command(f"tiles import {options.tiles} {tiles}")
    tileset = TileSet.open(tiles)
    real = {split: tileset.array(split, size=SIZE) for split in ("train", "val")}
    held = real["val"]
    floor = scores(held, floor_tiles(real["train"], held, 0))
    judge = fit_probe("linear", "tissue-tiny", real["train"], held.subset([]), seed=0, device="cpu")
    table: dict[str, Any] = {"floor": {"title": "Real tiles"} | floor | {"consistency": consistency(judge, held)}}
    sheets = {"Real": by_class(real["train"])}
    for arm in arms:
        folder = options.out / options.family
        checkpoint, line = train(options.family, arm, tiles, folder, options.minutes, options.steps)
        made = make(checkpoint, folder / f"{arm}-tiles", held)
        card = read_card(checkpoint)
        title = RECIPES[options.family][arm][0]
        table[arm] = {
            "title": title, "command": line, "steps": card.get("steps"), "chosen_step": card.get("chosen_step"),
            **scores(held, made), "consistency": consistency(judge, made),
        }  # fmt: skip
        sheets[title] = by_class(made)
        report(options.family, table, options.minutes, tileset, sheets)


def by_class(tiles: TileArray, count: int = 12) -> dict[str, np.ndarray]:
    """The first tiles of every class in a random order."""
    found = {}
    for k, label in enumerate(tiles.classes):
        here = numpy_rng(0, "sheet", label).permutation(np.flatnonzero(tiles.labels == k))[:count]
        found[label] = np.asarray(tiles.images[np.sort(here)])
    return found


def report(family: str, table: dict[str, Any], minutes: float, tileset: TileSet, sheets: dict[str, Any]) -> None:
    """Print the table so far; write it and the picture."""
    head = ["recipe", "steps"] + [f"{what}, {name}" for name in ENCODERS for what in ("Fréchet", "KID x 1000")]
    head.append("consistency")
    rows = [head, ["---"] * len(head)]
    for row in table.values():
        cells = [row["title"], f"{row['steps']:,}" if row.get("steps") else ""]
        for name in ENCODERS:
            cells += [f"{row[name]['frechet']:.1f}", f"{1000 * row[name]['kid']:.1f}"]
        cells.append(f"{row['consistency']['label_consistency']:.1%}")
        rows.append(cells)
    print("\n".join("| " + " | ".join(row) + " |" for row in rows), flush=True)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    result = {"device": describe_device(pick_device("cpu")), "minutes": minutes, "threads": threads, "recipes": table}
    target = Path(f"benchmarks/results/generators-{family}.json")
    target.write_text(json.dumps(result, indent=2) + "\n")
    classes = [{"label": c, "name": c, "colour": tileset.colours[c]} for c in tileset.classes]
    drawn = Path(f"docs/generators-{family}.jpg")
    with tempfile.TemporaryDirectory() as folder:  # a PNG is several times as large
        sheet = Path(folder) / "sheet.png"
        write_sheet_png(sheet, sheets, classes, columns=4, rows=2)
        Image.open(sheet).convert("RGB").save(drawn, quality=85)


if __name__ == "__main__":
    main()
