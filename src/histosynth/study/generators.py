"""The families of generators, and how experiments make a synthetic tile set with one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pandas as pd

from histosynth.core.checkpoint import read_card
from histosynth.core.errors import CheckpointError, DataError, RunError
from histosynth.core.files import read_json, sha256_file, write_json
from histosynth.core.progress import bar
from histosynth.core.registry import Registry
from histosynth.core.seeds import derive
from histosynth.core.types import Generator, GeneratorFamily
from histosynth.tiles.images import write_png
from histosynth.tiles.tileset import TileSet, claim, safe_name

FAMILIES = Registry(
    "generator",
    {
        "gan": "histosynth.gan.family:FAMILY",
        "diffusion": "histosynth.diffusion.family:FAMILY",
    },
    "histosynth.generators",
)
_CHUNK = 64


def family(name: str) -> GeneratorFamily:
    """The family called `name`.

    Raises:
        SettingError: there is none (near names are suggested).
    """
    return cast(GeneratorFamily, FAMILIES.load(name))


def load(checkpoint: Path | str, device: str = "auto") -> Generator:
    """The generator in a checkpoint, of whatever family its card names.

    Raises:
        CheckpointError: the file is missing, damaged or not ours.
    """
    kind = str(read_card(checkpoint).get("kind"))
    if kind not in FAMILIES.names():
        raise CheckpointError(
            f"{checkpoint} is a checkpoint of kind {kind!r}, not a generator.",
            f"Give one of kind {' or '.join(FAMILIES.names())}.",
        )
    return family(kind).load(Path(checkpoint), device)


@dataclass(frozen=True)
class GenerateConfig:
    """What to make."""

    per_class: int = 100
    """Tiles a class."""
    seed: int = 0
    """Seed; every tile has its own, derived from this, its class and its number."""
    classes: tuple[str, ...] = ()
    """Only these classes; all that the generator knows by default."""
    batch_size: int = 16
    """Tiles at a time; changes nothing but the speed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def make_tiles(checkpoint: Path | str, out: Path | str, config: GenerateConfig = GenerateConfig()) -> TileSet:
    """Make a synthetic tile set; goes on where an interrupted call stopped.

    Every tile's row names the generator, the checkpoint's hash and the tile's seed, from which it can be
    made again.

    Raises:
        DataError: a class that the generator does not know, or fewer than one tile a class.
        CheckpointError: the checkpoint cannot be used.
        RunError: `out` holds other files, or tiles of another checkpoint or seed.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    generator = load(checkpoint, config.device)
    chosen = config.classes or generator.classes
    unknown = [c for c in chosen if c not in generator.classes]
    if unknown:
        raise DataError(
            f"The generator {checkpoint} does not know the class {unknown[0]!r}.",
            f"It knows {', '.join(generator.classes)}.",
        )
    if config.per_class < 1:
        raise DataError(f"per-class is {config.per_class}.", "Ask for at least one tile a class.")
    _same_making(out, {"checkpoint": sha256_file(checkpoint), "seed": config.seed})
    table = _plan(generator, chosen, checkpoint, config)
    todo = table[[not (out / p).exists() for p in table.path]]
    index = {label: i for i, label in enumerate(generator.classes)}
    with bar(f"Make tiles ({generator.card['kind']})", len(table), len(table) - len(todo)) as tick:
        for start in range(0, len(todo), _CHUNK):
            rows = todo.iloc[start : start + _CHUNK]
            labels = [index[label] for label in rows.label]
            images = generator.sample(labels, rows.seed.tolist(), batch_size=config.batch_size)
            tiles = (tile for batch in images for tile in batch.permute(0, 2, 3, 1).cpu().numpy())
            for path, tile in zip(rows.path, tiles, strict=True):
                write_png(out / path, tile)
                tick()
    table["sha256"] = [sha256_file(out / p) for p in table.path]
    card = read_card(checkpoint)
    bank = sum(len(ids) for ids in card.get("bank_ids") or [])
    return TileSet.create(
        out,
        table,
        chosen,
        made_by="generate",
        synthetic=True,
        generator=generator.card["kind"],
        parents=[table.checkpoint.iloc[0]],
        licence=generator.card.get("licence", ""),
        size=generator.size,
        trained_on=card.get("trained_on") or {},
        training_data=card.get("data", ""),
        generator_parents=card.get("parents") or [],
        conditioned_on=f"features of {bank} of its training tiles" if bank else "",
    )


def _same_making(out: Path, making: dict[str, str | int]) -> None:
    """Refuse to fill up a folder with tiles that are not of one making."""
    path = out / "making.json"
    if not path.exists():
        claim(out)
        write_json(path, making)
    elif read_json(path) != making:
        raise RunError(
            f"The folder {out} holds tiles of another checkpoint or seed.", "Choose a new folder, or delete that one."
        )


def _plan(generator: Generator, classes: tuple[str, ...], checkpoint: Path, config: GenerateConfig) -> pd.DataFrame:
    kind, size = generator.card["kind"], generator.size
    rows = [
        {
            "id": f"{kind}-{safe_name(label)}-{k:05d}",
            "path": f"images/{safe_name(label)}/gen_{k:05d}.png",
            "label": label, "source": kind, "generator": kind, "format": "PNG", "width": size, "height": size,
            "seed": derive(config.seed, "tile", label, k), "kept": True,
        }
        for label in classes
        for k in range(config.per_class)
    ]  # fmt: skip
    return pd.DataFrame(rows).assign(checkpoint=sha256_file(checkpoint))
