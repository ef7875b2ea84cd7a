"""Real tiles stained anew by a diffusion model: their layout stays, colours and texture are drawn again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from histosynth.core.checkpoint import read_card
from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.core.files import sha256_file
from histosynth.core.progress import bar, say
from histosynth.core.seeds import derive, numpy_rng
from histosynth.study.generators import same_making
from histosynth.study.restained import Pairs, read_tiles
from histosynth.tiles.images import write_png
from histosynth.tiles.split.leaks import check_synthetic
from histosynth.tiles.tileset import TileSet, safe_name

if TYPE_CHECKING:
    from torch import Tensor

    from histosynth.diffusion.sample import DiffusionGenerator

Condition = Literal["tile", "bank", "prototype", "own"]
_CHUNK = 32


@dataclass(frozen=True)
class RestainConfig:
    """How tiles are stained anew."""

    strength: float = 0.3
    """How much noise they get, above 0 to 1. A little keeps the tile as it is, 1 keeps nothing of it."""
    split: Literal["train", "val", "test"] = "train"
    """Which real tiles. Of val and test only to look at: training on what is made of them spoils every score."""
    classes: tuple[str, ...] = ()
    """Only these classes; all by default."""
    per_class: int = 0
    """At most so many tiles a class, drawn by the seed; 0 is all."""
    copies: int = 1
    """New tiles of each real one."""
    seed: int = 0
    """Seed; every new tile has its own, derived from this, the real tile and the number of the copy."""
    condition: Condition = "tile"
    """What the model is told beside the class. tile: a training tile, whose stain is taken; bank: a mixture of two, new
    for every tile; prototype: the mean of the class; own: the tile itself."""
    like: str = ""
    """With tile: the id of the training tile whose look all get, instead of one drawn for each."""
    colours: str = "reinhard"
    """With tile: how its colours are put on before the noise, which would keep the old ones: a method of stain
    normalisation (reinhard, macenko, vahadane or anchored), or none."""
    guidance: float = 2.0
    """How much more a tile is made to look like what is told; 1 is no guidance."""
    steps: int = 50
    """Solver steps from pure noise; of these, the share that strength says is run."""
    solver: str = "dpm++"
    """dpm++, ddim, euler-a or ddpm."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 is faster on processors that have it, and makes slightly other pixels."""
    batch_size: int = 16
    """Tiles at a time; changes nothing but the memory."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def sampling(self) -> dict[str, Any]:
        """What `DiffusionGenerator.edit` takes beside tiles, labels, seeds and strength."""
        condition = "bank" if self.condition == "own" else self.condition
        own = {name: getattr(self, name) for name in ("like", "guidance", "steps", "solver", "precision")}
        return own | {"condition": condition}


def restain(
    checkpoint: Path | str, tiles: Path | str, out: Path | str, config: RestainConfig = RestainConfig()
) -> TileSet:
    """Make a synthetic tile set from real tiles by SDEdit; goes on where an interrupted call stopped.

    Each row names the real tile it was made from (`reference`) and its split (`reference_split`), so that leaks are
    found. The description of the set says how much of the layout was kept; restained.png shows it.

    Raises:
        DataError: no tile, tiles smaller than the model's, a class that the model does not know, or no splits.
        SettingError: a setting out of range.
        CheckpointError: the checkpoint is no diffusion model, or cannot be used.
        RunError: `out` holds other files, or tiles made in another way.
    """
    from histosynth.diffusion.sample import DiffusionGenerator
    from histosynth.diffusion.solve import first_step

    checkpoint, out, real = Path(checkpoint), Path(out), TileSet.open(tiles)
    generator = DiffusionGenerator.from_checkpoint(checkpoint, config.device)
    for name, least in (("copies", 1), ("per_class", 0)):
        if getattr(config, name) < least:
            raise SettingError(f"{name} is {getattr(config, name)}.", f"Give {least} or more.")
    first_step(config.steps, config.strength)
    chosen = _chosen(real, generator, config)
    index = {label: i for i, label in enumerate(generator.classes)}
    present = list(dict.fromkeys(chosen.label))
    generator.sample([index[label] for label in present], [0] * len(present), **config.sampling())
    table = _plan(chosen, generator, index, checkpoint, config)
    paint = _painter(real, table, generator.size, config)
    if config.split == "train":
        check_synthetic(real.table, table)
    else:
        say(f"These tiles are made of real {config.split} tiles: look at them, but train on none of them.")
    same_making(out, {"checkpoint": sha256_file(checkpoint), "tiles": real.digest, "restain": _settings(config)})
    embed = _embedder(generator, config)
    todo = table[[not (out / path).exists() for path in table.path]]
    files = dict(zip(real.table.id, real.table.path, strict=True))
    for label in present:
        left = todo[todo.label == label]
        count = int((table.label == label).sum())
        with bar(f"Restain {label}", count, count - len(left)) as tick:
            for at in range(0, len(left), _CHUNK):
                rows = left.iloc[at : at + _CHUNK]
                images = read_tiles(real.folder, [files[i] for i in rows.reference], generator.size)
                made = generator.edit(
                    paint(images, rows), [index[label]] * len(rows), rows.seed.tolist(), config.strength,
                    config.batch_size, embed(images), **config.sampling(),
                )  # fmt: skip
                pixels = (tile for batch in made for tile in batch.permute(0, 2, 3, 1).numpy())
                for path, tile in zip(rows.path, pixels, strict=True):
                    write_png(out / path, tile)
                    tick()
    table["sha256"] = [sha256_file(out / path) for path in table.path]
    pairs = Pairs(real, out, table, generator.size)
    kept = pairs.measure()
    say(pairs.describe(kept))
    card = read_card(checkpoint)
    made_set = TileSet.create(
        out,
        table,
        present,
        made_by="restain",
        synthetic=True,
        generator=generator.card["kind"],
        parents=[table.checkpoint.iloc[0], real.digest],
        licence=card.get("licence", ""),
        size=generator.size,
        trained_on=card.get("trained_on") or {},
        training_data=card.get("data", ""),
        learned_before=card.get("learned_before") or [],
        sampling={"strength": config.strength, **config.sampling()},
        conditioned_on=f"real {config.split} tiles: each tile was made from one",
        layout=kept,
    )
    pairs.sheet(out / "restained.png")
    return made_set


def _chosen(real: TileSet, generator: DiffusionGenerator, config: RestainConfig) -> pd.DataFrame:
    """Rows of the real tiles to be stained anew."""
    rows = real.rows(config.split)
    if real.meta.get("synthetic") or (rows.generator != "").any():
        raise DataError(f"{real.folder} holds synthetic tiles.", "Give real tiles.")
    if not (real.kept.split != "").any():
        raise DataError(
            f"The tile set {real.folder} has no split.", "Split it first (histosynth tiles prepare), or import it anew."
        )
    for name in config.classes:
        if name not in real.classes:
            raise DataError(f"{real.folder} has no class {name!r}.", did_you_mean(name, real.classes))
    rows = rows[rows.label.isin(config.classes or real.classes)]
    for name in dict.fromkeys(rows.label):
        if name not in generator.classes:
            raise DataError(
                f"The checkpoint does not know the class {name!r} of {real.folder}.",
                f"It knows {', '.join(generator.classes)}; give --classes.",
            )
    small = rows[(rows.width > 0) & (rows[["width", "height"]].min(axis=1) < generator.size)]
    if len(small):
        raise DataError(
            f"The tile {small.iloc[0].id!r} has {small.iloc[0].width} x {small.iloc[0].height} px, but the checkpoint "
            f"takes {generator.size} px.",
            "Take a checkpoint of smaller tiles.",
        )
    if config.per_class:
        parts = []
        for label in dict.fromkeys(rows.label):
            own = rows[rows.label == label]
            order = numpy_rng(config.seed, "restain", label).permutation(len(own))[: config.per_class]
            parts.append(own.iloc[np.sort(order)])
        rows = pd.concat(parts) if parts else rows
    if len(rows) == 0:
        raise DataError(f"{real.folder} has no {config.split} tile to stain anew.", "Check its splits and the classes.")
    return rows.reset_index(drop=True)


def _plan(
    chosen: pd.DataFrame, generator: DiffusionGenerator, index: dict[str, int], checkpoint: Path, config: RestainConfig
) -> pd.DataFrame:
    kind, size = generator.card["kind"], generator.size
    rows, numbers = [], dict.fromkeys(chosen.label, 0)
    for tile in chosen.itertuples():
        for copy in range(config.copies):
            k, label = numbers[tile.label], safe_name(str(tile.label))
            numbers[tile.label] += 1
            rows.append({
                "id": f"restained-{label}-{k:05d}", "path": f"images/{label}/gen_{k:04d}.png", "label": tile.label,
                "source": kind, "generator": kind, "format": "PNG", "width": size, "height": size, "kept": True,
                "seed": derive(config.seed, "restain", str(tile.id), copy), "reference": tile.id,
                "reference_split": config.split,
            })  # fmt: skip
    table = pd.DataFrame(rows).assign(checkpoint=sha256_file(checkpoint), **_settings(config))
    if config.condition == "own":
        return table
    labels = [index[label] for label in table.label]
    told = generator.origins(labels, table.seed.tolist(), **config.sampling())
    return table.assign(second_reference=told["reference"])


def _settings(config: RestainConfig) -> dict[str, Any]:
    """What two tiles must share to be of one making."""
    names = ("strength", "condition", "like", "colours", "guidance", "steps", "solver", "precision")
    return {name: getattr(config, name) for name in names}


def _embedder(generator: DiffusionGenerator, config: RestainConfig) -> Any:
    """Gives the raw embeddings of tiles, or None where they are told something else than themselves."""
    if config.condition != "own":
        return lambda images: None
    from histosynth import encoders

    encoder = encoders.load(generator.model.encoder["name"], config.device)
    return lambda images: encoder.encode(images).float().cpu()


def _painter(
    real: TileSet, table: pd.DataFrame, size: int, config: RestainConfig
) -> Callable[[Tensor, pd.DataFrame], Tensor]:
    """Gives tiles the colours of the training tiles that they are told.

    Raises:
        SettingError: an unknown method.
        DataError: a training tile that the tile set does not have.
    """
    from histosynth.tiles.stain import STAINS, load_normaliser

    if config.colours not in STAINS.names():
        raise SettingError(f"colours is {config.colours!r}.", did_you_mean(config.colours, STAINS.names()))
    if config.condition != "tile" or config.colours == "none":
        return lambda images, rows: images
    told = table.assign(reference=table.second_reference)
    known = real.table[real.table.kept].set_index("id").path
    if lost := sorted(set(told.reference) - set(known.index)):
        raise DataError(
            f"The checkpoint's training tile {lost[0]!r} is not in {real.folder}, so its colours are not known.",
            "Give the tile set that the checkpoint was trained on, or set colours to none.",
        )
    check_synthetic(real.table, told)  # a tile of the training may have changed sides since

    def paint(images: Tensor, rows: pd.DataFrame) -> Tensor:
        import torch

        painted = []
        for image, name in zip(images.numpy(), rows.second_reference, strict=True):
            method = load_normaliser(config.colours).fit(read_tiles(real.folder, [known[name]], size).numpy())
            painted.append(method.transform(image[None])[0][0])
        return torch.from_numpy(np.stack(painted))

    return paint
