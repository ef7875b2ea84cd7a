"""Zero-shot tiles: PixCell is shown real training tiles and draws new ones, without any training here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError, did_you_mean
from histosynth.core.files import sha256_file
from histosynth.core.progress import bar, say
from histosynth.core.seeds import derive, numpy_rng
from histosynth.core.settings import check_settings
from histosynth.core.types import Encoder
from histosynth.study.generators import same_making
from histosynth.study.references import References, open_references
from histosynth.tiles.images import square, write_png
from histosynth.tiles.split.leaks import check_synthetic
from histosynth.tiles.tileset import TileSet, safe_name

if TYPE_CHECKING:
    from torch import Tensor

    from histosynth.diffusion.pixcell import PixCell, PixCellGenerator

Condition = Literal["reference", "prototype", "between", "nothing"]
_CHUNK = 32


@dataclass(frozen=True)
class PixCellConfig:
    """What PixCell is shown and how it draws."""

    weights: str | None = None
    """PixCell's folder, weight file or repository of Hugging Face; by default where its card is found."""
    vae: str | None = None
    """The same for the autoencoder of Stable Diffusion 3.5."""
    token: str | None = None
    """Read token for gated repositories; the variable HF_TOKEN by default."""
    encoder: str = "uni2-h"
    """What turns reference tiles into embeddings; PixCell was trained with uni2-h."""
    encoder_weights: Path | None = None
    """The encoder's weight file; by default where its card is found."""
    per_class: int = 50
    """Tiles a class."""
    seed: int = 0
    """Seed; every tile has its own, derived from this, its class and its number."""
    classes: tuple[str, ...] = ()
    """Only these classes; all that have reference tiles by default. One without any is drawn from nothing."""
    only: tuple[str, ...] = ()
    """Only these reference tiles, by id."""
    condition: Condition = "reference"
    """reference (a tile each, in turn), prototype (the mean embedding of a class), between (from one tile towards
    another of its class), or nothing (no tile at all)."""
    share: float = 0.5
    """With between: how far towards the other tile, 0 to 1."""
    pool: int = 200
    """At most so many reference tiles a class, drawn by the seed."""
    guidance: float = 2.0
    """How much more a tile is made to look like its condition; 1 is no guidance."""
    steps: int = 20
    """Steps of the solver."""
    solver: Literal["dpm++", "ddim", "euler-a", "ddpm"] = "dpm++"
    """How the noise is removed."""
    micro_batch: int | None = None
    """Tiles in the networks at a time; 1 on a CPU, 8 on CUDA. Another number changes how pixels are rounded."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the networks; fp16 halves the memory on a CUDA card."""
    vae_tiling: bool = False
    """Decode large tiles in overlapping parts, for little memory."""
    attention_slicing: bool = False
    """Compute attention a head at a time, for little memory."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def draw_zero_shot(
    references: Path | str, out: Path | str, config: PixCellConfig = PixCellConfig(), *, encoder: Encoder | None = None
) -> TileSet:
    """Make a synthetic tile set from reference tiles; goes on where an interrupted call stopped.

    Each row names the reference tile (`reference`; with between also `second_reference`), the seed and the weights.

    Args:
        references: a tile set (its training tiles are shown), or a folder of class folders or of tiles.
        out: folder of the new tile set.
        encoder: instead of the one that the settings name.

    Raises:
        DataError: a reference tile outside the training split, no tile, or a class that is not there.
        CheckpointError: weights that are missing (with the remedy) or cannot be used.
        SettingError: a setting out of range.
        RunError: `out` holds other files, or tiles made in another way.
    """
    from histosynth.diffusion.pixcell import Memory, PixCell, PixCellGenerator
    from histosynth.diffusion.pixcell.sample import check_encoder

    _check(config)
    shown = open_references(references, config.only)
    classes = config.classes or tuple(dict.fromkeys(shown.table.label))
    unknown = [label for label in classes if label not in shown.classes]
    if unknown and config.condition != "nothing":
        raise DataError(f"{references} has no class {unknown[0]!r}.", did_you_mean(unknown[0], shown.classes))
    chosen = _chosen(shown.table, classes, config)
    memory = Memory(vae_tiling=config.vae_tiling, attention_slicing=config.attention_slicing)
    model = PixCell.load(
        config.weights, vae=config.vae, token=config.token, device=config.device, dtype=config.dtype, memory=memory
    )
    generator = PixCellGenerator(model, micro_batch=config.micro_batch)
    generator.check(config.guidance, config.steps, config.solver)
    say(f"{model.memory_statement()} Licence: {model.card['licence']}, not for commercial use.")
    out = Path(out)
    if any(len(rows) for rows in chosen.values()):
        encoder = encoder or _load_encoder(config)
        check_encoder(model, encoder)
    table = _plan(chosen, config, model)
    same_making(out, _making(config, model, generator, encoder, chosen))
    if shown.real is not None:
        check_synthetic(shown.real, table)
    todo = table[[not (out / path).exists() for path in table.path]]
    told = _Told(shown, chosen, config, model, encoder, todo)
    del encoder  # its gigabytes are free while PixCell draws
    for label in classes:
        rows = todo[todo.label == label]
        with bar(f"Make {label} (PixCell)", config.per_class, config.per_class - len(rows)) as tick:
            for path, tile in _tiles(generator, rows, told, config):
                write_png(out / path, tile)
                tick()
    table["sha256"] = [sha256_file(out / path) for path in table.path]
    counts = {label: len(rows) for label, rows in chosen.items()}
    return TileSet.create(
        out,
        table,
        classes,
        made_by="pixcell",
        synthetic=True,
        generator=model.card["name"],
        parents=[model.fingerprint()],
        licence=model.card["licence"],
        citation=model.card["citation"],
        size=model.size,
        sampling={"guidance": config.guidance, "steps": config.steps, "solver": config.solver},
        conditioned_on=_conditioned_on(config, counts),
    )


def _check(config: PixCellConfig) -> None:
    check_settings(config, counts=("per_class", "pool"), shares=("share",))


def _chosen(table: pd.DataFrame, classes: tuple[str, ...], config: PixCellConfig) -> dict[str, pd.DataFrame]:
    """The reference tiles of each class in the order in which they are shown."""
    found: dict[str, pd.DataFrame] = {}
    for label in classes:
        rows = table[table.label == label]
        if config.condition == "nothing":
            rows = rows.iloc[:0]
        elif len(rows) == 0:
            say(f"There is no reference tile of {label}: its tiles are drawn from nothing and may show any tissue.")
        order = numpy_rng(config.seed, "references", label).permutation(len(rows))[: config.pool]
        found[label] = rows.iloc[order].reset_index(drop=True)
    return found


def _plan(chosen: dict[str, pd.DataFrame], config: PixCellConfig, model: PixCell) -> pd.DataFrame:
    name, size = model.card["name"], model.size
    rows = []
    for label, shown in chosen.items():
        ids, n = shown.id.tolist(), len(shown)
        condition = config.condition if n else "nothing"
        for k in range(config.per_class):
            first = ids[k % n] if condition in ("reference", "between") else ""
            second = ""
            if condition == "between":
                step = 1 + int(numpy_rng(config.seed, "second reference", label, k).integers(max(1, n - 1)))
                second = ids[(k + step) % n]
            rows.append({
                "id": f"{name}-{safe_name(label)}-{k:05d}", "path": f"images/{safe_name(label)}/gen_{k:04d}.png",
                "label": label, "source": name, "generator": name, "format": "PNG", "width": size, "height": size,
                "seed": derive(config.seed, "pixcell tile", label, k), "kept": True,
                "reference": first, "second_reference": second, "condition": condition,
            })  # fmt: skip
    return pd.DataFrame(rows).assign(
        checkpoint=model.fingerprint(), guidance=config.guidance, steps=config.steps, solver=config.solver
    )


def _making(
    config: PixCellConfig,
    model: PixCell,
    generator: PixCellGenerator,
    encoder: Encoder | None,
    chosen: dict[str, pd.DataFrame],
) -> dict[str, Any]:
    """What two calls must share for their tiles to be of one set."""
    from histosynth.encoders.store import weights_hash

    settings = asdict(config)
    kept = ("seed", "condition", "share", "guidance", "steps", "solver", "dtype", "vae_tiling", "attention_slicing")
    return {name: settings[name] for name in kept} | {
        "checkpoint": model.fingerprint(),
        "vae": model.vae_fingerprint(),
        "encoder": "" if encoder is None else f"{encoder.card.name} {weights_hash(encoder)}",
        "micro_batch": generator.micro_batch,
        "references": {label: rows.id.tolist() for label, rows in chosen.items()},
    }


class _Told:
    """The embeddings that the tiles still to be made are told."""

    def __init__(
        self,
        shown: References,
        chosen: dict[str, pd.DataFrame],
        config: PixCellConfig,
        model: PixCell,
        encoder: Encoder | None,
        todo: pd.DataFrame,
    ) -> None:
        self.share = config.share
        self.of_tile: dict[str, Tensor] = {}
        self.of_class: dict[str, Tensor] = {}
        if encoder is None or len(todo) == 0:
            return
        from histosynth.diffusion.pixcell.conditions import prototype

        needed = {*todo.reference, *todo.second_reference} - {""}
        classes = todo.label[todo.condition == "prototype"].unique()
        rows = pd.concat([*chosen.values()])
        rows = rows[rows.id.isin(needed) | rows.label.isin(classes)]
        self.of_tile = _embed(rows, shown, model, encoder)
        import torch

        for label in classes:
            ids = chosen[label].id
            self.of_class[label] = prototype(torch.stack([self.of_tile[i] for i in ids]))

    def __call__(self, row: Any) -> Tensor | None:
        """The embedding [T, dim] of a row, or None for nothing."""
        from histosynth.diffusion.pixcell.conditions import interpolate

        if row.condition == "nothing":
            return None
        if row.condition == "prototype":
            return self.of_class[row.label]
        if row.condition == "between":
            return interpolate(self.of_tile[row.reference], self.of_tile[row.second_reference], self.share)
        return self.of_tile[row.reference]


def _embed(rows: pd.DataFrame, shown: References, model: PixCell, encoder: Encoder) -> dict[str, Tensor]:
    """Embeddings [T, dim] by id. One of several tokens sees tiles of PixCell's size; else each keeps its own."""
    import torch

    from histosynth.diffusion.pixcell.conditions import embed

    found: dict[str, Tensor] = {}
    waiting: dict[int, list[tuple[str, np.ndarray]]] = {}

    def flush(edge: int) -> None:
        some = waiting.pop(edge)
        images = torch.from_numpy(np.stack([tile for _, tile in some]).transpose(0, 3, 1, 2).copy())
        found.update(zip([i for i, _ in some], embed(encoder, images, model.tokens), strict=True))

    with bar(f"Encode references ({encoder.card.name})", len(rows)) as tick:
        for row in rows.itertuples():
            pixels = shown.read(row.path)
            edge = min(pixels.shape[:2]) if model.tokens == 1 else model.size
            waiting.setdefault(edge, []).append((row.id, square(pixels, edge)))
            if len(waiting[edge]) == _CHUNK:
                flush(edge)
            tick()
        for edge in list(waiting):
            flush(edge)
    return found


def _tiles(
    generator: PixCellGenerator, rows: pd.DataFrame, told: _Told, config: PixCellConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """(path, uint8 [H, W, 3]) of the tiles of one class, which are all told something or all told nothing."""
    import torch

    if len(rows) == 0:
        return
    embeddings = [told(row) for row in rows.itertuples()]
    known = [e for e in embeddings if e is not None]
    images = generator.sample(
        torch.stack(known) if known else None,
        rows.seed.tolist(),
        batch_size=generator.micro_batch,
        guidance=config.guidance,
        steps=config.steps,
        solver=config.solver,
    )
    tiles = (tile for batch in images for tile in batch.permute(0, 2, 3, 1).numpy())
    yield from zip(rows.path, tiles, strict=True)


def _load_encoder(config: PixCellConfig) -> Encoder:
    from histosynth import encoders

    return encoders.load(config.encoder, device=config.device, weights=config.encoder_weights)


def _conditioned_on(config: PixCellConfig, counts: dict[str, int]) -> str:
    told = sum(counts.values())
    if config.condition == "prototype" and told:
        return f"the mean embedding of each class, over {told} training tiles"
    return ""  # the column `reference` says it tile by tile
