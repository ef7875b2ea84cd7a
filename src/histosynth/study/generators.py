"""The families of generators, and how experiments make a synthetic tile set with one."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd

from histosynth.core.checkpoint import read_card, training_tiles
from histosynth.core.errors import CheckpointError, DataError, RunError, SettingError
from histosynth.core.files import read_json, sha256_file, write_json
from histosynth.core.progress import bar, say
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
# settings that every generator has; the others go to those that declare them (`options`)
_COMMON = ("per_class", "seed", "classes", "batch_size", "device")


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
    """Only these classes; by default all that the generator has learned from tiles."""
    batch_size: int = 16
    """Tiles at a time; changes nothing but the speed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    truncation: float = 1.0
    """GAN: 1 for the learned variety; less pulls tiles towards the mean of their class."""
    truncation_cutoff: int | None = None
    """GAN: how many layers, from the coarsest, truncation changes; all by default."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is faster on processors that have it, and makes slightly other pixels. auto: fp32 for a GAN; bf16 for
    diffusion where the processor has it."""
    guidance: float = 2.0
    """Diffusion: how much more a tile is made to look like what it is told; 1 is no guidance."""
    guidance_from: int = 0
    """Diffusion: guidance acts from this noise level (0 is clean) ..."""
    guidance_to: int = 999
    """Diffusion: ... to this one (999 is pure noise); outside it does not, which keeps more variety."""
    steps: int = 20
    """Diffusion: steps of the solver."""
    solver: str = "dpm++"
    """Diffusion: dpm++, ddim, euler-a or ddpm."""
    condition: str = "bank"
    """Diffusion: what a tile is told beside its class. bank: a mixture of two training tiles; tile: one training tile;
    prototype: the mean of the class; interpolate: on the way from one training tile to another."""
    like: str = ""
    """Diffusion, tile and interpolate: the id of a training tile, instead of one drawn by the seed."""
    towards: str = ""
    """Diffusion, interpolate: the class of the other tile; the tile's own class by default."""
    share: float = 0.5
    """Diffusion, interpolate: how far towards the other tile, 0 to 1."""

    def sampling(self, generator: Generator) -> dict[str, Any]:
        """The settings that this generator's `sample` takes beside labels and seeds, as `options` declares them.

        Raises:
            SettingError: one was changed that the generator does not take.
        """
        known: dict[str, Any] = getattr(generator, "options", {})
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _COMMON}
        changed = [f.name for f in fields(self) if f.name in own and own[f.name] != f.default]
        if wrong := [name for name in changed if name not in known]:
            raise SettingError(
                f"{wrong[0]} is {own[wrong[0]]}, but a generator of kind {generator.card.get('kind')!r} takes none.",
                f"Leave it out; it takes {', '.join(sorted(set(own) & set(known))) or 'no setting of this kind'}.",
            )
        return known | {name: own[name] for name in changed}


def make_tiles(checkpoint: Path | str, out: Path | str, config: GenerateConfig = GenerateConfig()) -> TileSet:
    """Make a synthetic tile set; goes on where an interrupted call stopped.

    Every tile's row names the generator, the checkpoint's hash and the tile's seed, from which it can be
    made again.

    Raises:
        DataError: a class that the generator does not know, or fewer than one tile a class.
        SettingError: a setting that this generator does not take, or out of its range.
        CheckpointError: the checkpoint cannot be used.
        RunError: `out` holds other files, or tiles of another checkpoint or seed.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    generator = load(checkpoint, config.device)
    chosen = config.classes or _learned(generator)
    unknown = [c for c in chosen if c not in generator.classes]
    if unknown:
        raise DataError(
            f"The generator {checkpoint} does not know the class {unknown[0]!r}.",
            f"It knows {', '.join(generator.classes)}.",
        )
    if config.per_class < 1:
        raise DataError(f"per-class is {config.per_class}.", "Ask for at least one tile a class.")
    sampling = config.sampling(generator)
    index = {label: i for i, label in enumerate(generator.classes)}
    if sampling:  # what cannot be made is refused before the folder is
        generator.sample([index[label] for label in chosen], [0] * len(chosen), **sampling)
    changed = {k: v for k, v in sampling.items() if v != generator.options[k]} if sampling else {}
    same_making(out, {"checkpoint": sha256_file(checkpoint), "seed": config.seed} | changed)
    table = _plan(generator, chosen, checkpoint, config, sampling)
    todo = table[[not (out / p).exists() for p in table.path]]
    for label in chosen:
        left = todo[todo.label == label]
        with bar(f"Make {label} ({generator.card['kind']})", config.per_class, config.per_class - len(left)) as tick:
            for start in range(0, len(left), _CHUNK):
                rows = left.iloc[start : start + _CHUNK]
                images = generator.sample(
                    [index[label]] * len(rows), rows.seed.tolist(), batch_size=config.batch_size, **sampling
                )
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
        learned_before=card.get("learned_before") or [],
        generator_parents=card.get("parents") or [],
        sampling=sampling,
        learned_through=sorted({one["name"] for one in (card.get("encoders") or {}).values()}),
        conditioned_on=f"features of {bank} of its training tiles" if bank else "",
    )


def _learned(generator: Generator) -> tuple[str, ...]:
    """Its classes, without those that it only has a name of: no training tile showed what they look like."""
    counts = training_tiles(generator.card.get("trained_on")).get("per_class") or {}
    bare = [label for label in generator.classes if counts.get(label) == 0]
    if not bare or len(bare) == len(generator.classes):
        return generator.classes
    say(f"Left out, since the generator was trained on no tile of them: {', '.join(bare)}. (--classes asks for them.)")
    return tuple(label for label in generator.classes if label not in bare)


def same_making(out: Path, making: dict[str, Any]) -> None:
    """Refuse to fill up a folder with tiles that are not of one making."""
    path = out / "making.json"
    if not path.exists():
        claim(out)
        write_json(path, making)
    elif read_json(path) != making:
        raise RunError(
            f"The folder {out} holds tiles of another checkpoint, seed or setting.",
            "Choose a new folder, or delete that one.",
        )


def _plan(
    generator: Generator,
    classes: tuple[str, ...],
    checkpoint: Path,
    config: GenerateConfig,
    sampling: dict[str, Any],
) -> pd.DataFrame:
    kind, size = generator.card["kind"], generator.size
    rows = [
        {
            "id": f"{kind}-{safe_name(label)}-{k:05d}",
            "path": f"images/{safe_name(label)}/gen_{k:04d}.png",
            "label": label, "source": kind, "generator": kind, "format": "PNG", "width": size, "height": size,
            "seed": derive(config.seed, "tile", label, k), "kept": True,
        }
        for label in classes
        for k in range(config.per_class)
    ]  # fmt: skip
    known = {name: value for name, value in sampling.items() if value is not None}
    table = pd.DataFrame(rows).assign(checkpoint=sha256_file(checkpoint), **known)
    origins = getattr(generator, "origins", None)
    if origins:  # which real tiles it was shown for each
        labels = [generator.classes.index(label) for label in table.label]
        table = table.assign(**origins(labels, table.seed.tolist(), **sampling))
    return table
