"""Codes of the tiles in files: what the verb `project` does."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from histosynth.core.checkpoint import load_checkpoint, save_checkpoint
from histosynth.core.errors import DataError, RunError, SettingError
from histosynth.core.files import ensure_folder, read_json, sha256_file, write_json, write_text
from histosynth.core.progress import bar, say
from histosynth.gan.likeness import load_likeness
from histosynth.gan.projector import MEASURES, Projection, ProjectSettings, project
from histosynth.gan.sample import GanGenerator
from histosynth.tiles.film import evenly
from histosynth.tiles.images import EXTENSIONS, read_rgb, square
from histosynth.tiles.pictures import Row, heat, save, sheet, zoom_for
from histosynth.tiles.tileset import TileSet

_CHUNK = 16
_SHOWN = 16
_DIFFERENCE = 96  # grey levels at the end of the colour scale


@dataclass(frozen=True)
class ProjectFiles:
    """Which tiles are projected."""

    split: str = ""
    """Of a tile set, only this split."""
    limit: int | None = None
    """At most this many tiles."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise SettingError(f"limit is {self.limit}.", "Use 1 or more.")


@dataclass(frozen=True)
class _File:
    path: Path
    name: str
    label: str = ""


def project_tiles(
    checkpoint: Path | str,
    sources: Sequence[Path | str],
    out: Path | str,
    settings: ProjectSettings = ProjectSettings(),
    files: ProjectFiles = ProjectFiles(),
) -> dict[str, float]:
    """Project tiles and write latents.safetensors, projection.csv and sheet.png into `out`; goes on where an
    interrupted call stopped. Tiles of another size are cut to their central square and resized, with a note.

    Args:
        sources: tile sets, folders of images, or image files.

    Returns:
        the median of every distance.

    Raises:
        DataError: no tile, or one that cannot be read.
        CheckpointError: the checkpoint or the encoder's weights cannot be used.
        RunError: `out` holds something else.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    generator = GanGenerator.from_checkpoint(checkpoint, files.device)
    found = [file for source in sources for file in _files(Path(source), files.split)][: files.limit]
    if not found:
        raise DataError("There is no tile to project.", "Give a tile set, a folder of images, or image files.")
    making = {
        "checkpoint": sha256_file(checkpoint),
        "settings": asdict(settings),
        "tiles": hashlib.sha256(json.dumps([[f.name, sha256_file(f.path)] for f in found]).encode()).hexdigest(),
    }
    parts = _claim(out, making)
    likeness = load_likeness(settings.encoder, files.device) if settings.perceptual else None
    sizes: list[tuple[int, int]] = []
    with bar("Project tiles", len(found) * settings.steps) as tick:
        for number, start in enumerate(range(0, len(found), _CHUNK)):
            chunk = found[start : start + _CHUNK]
            images, measured = _read(chunk, generator.size)
            sizes += measured
            path = parts / f"part-{number:05d}.safetensors"
            if not path.exists():
                labels = _labels(chunk, generator.classes)
                _keep(path, project(generator, images, settings, labels, likeness, tick), images)
            else:
                tick(len(chunk) * settings.steps)
    changed = [size for size in sizes if size != (generator.size, generator.size)]
    if changed:
        width, height = changed[0]
        say(
            f"{len(changed)} of {len(found)} tiles, such as one of {width} x {height} px, were cut to a square and "
            f"resized to {generator.size} px."
        )
    return _finish(out, parts, found, sizes, making, settings, generator)


def _files(source: Path, split: str) -> list[_File]:
    if TileSet.is_tileset(source):
        tiles = TileSet.open(source)
        rows = tiles.rows(split or None)
        return [_File(source / p, i, label) for p, i, label in zip(rows.path, rows.id, rows.label, strict=True)]
    if split:
        raise SettingError(f"split is {split!r}, but {source} is no tile set.", "Leave it out.")
    if source.is_dir():
        inside = sorted(p for p in source.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        return [_File(p, str(p.relative_to(source))) for p in inside]
    if not source.is_file():
        raise DataError(f"{source} does not exist.", "Give a tile set, a folder of images, or image files.")
    return [_File(source, source.name)]


def _read(chunk: Sequence[_File], size: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """uint8 [n, 3, size, size], and width and height before."""
    tiles, sizes = [], []
    for file in chunk:
        pixels = read_rgb(file.path)[0]
        sizes.append((pixels.shape[1], pixels.shape[0]))
        tiles.append(square(pixels, size).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(tiles)), sizes


def _labels(chunk: Sequence[_File], classes: Sequence[str]) -> list[int] | None:
    """Labels, if the generator knows the classes of all these tiles."""
    known = [classes.index(f.label) for f in chunk if f.label in classes]
    return known if len(known) == len(chunk) else None


def _claim(out: Path, making: dict[str, Any]) -> Path:
    path = ensure_folder(out) / "projection.json"
    if not path.exists():
        if any(p.name != "parts" for p in out.iterdir()):
            raise RunError(f"The folder {out} holds other files.", "Choose a new or empty folder.")
        write_json(path, making)
    elif read_json(path) != making:
        raise RunError(
            f"The folder {out} holds projections of other tiles or settings.", "Choose a new folder, or delete it."
        )
    return ensure_folder(out / "parts")


def _keep(path: Path, one: Projection, images: Tensor) -> None:
    tensors = {"latents": one.latents, "noise": one.noise, "images": one.images, "trace": one.trace, "target": images}
    save_checkpoint(path, tensors | {f"distance.{k}": v for k, v in one.distances.items()}, {"kind": "projection part"})


def _finish(
    out: Path,
    parts: Path,
    found: Sequence[_File],
    sizes: Sequence[tuple[int, int]],
    making: dict[str, Any],
    settings: ProjectSettings,
    generator: GanGenerator,
) -> dict[str, float]:
    pieces = [load_checkpoint(p)[0] for p in sorted(parts.glob("part-*.safetensors"))]
    whole = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    card = {
        "kind": "latents",
        "space": settings.space,
        "checkpoint": making["checkpoint"],
        "settings": making["settings"],
        "names": [f.name for f in found],
        "licence": generator.card.get("licence", ""),
    }
    save_checkpoint(out / "latents.safetensors", {k: whole[k] for k in ("latents", "noise")}, card)
    measures = [f"distance.{name}" for name in MEASURES if f"distance.{name}" in whole]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["name", "label", "width", "height", *(m.removeprefix("distance.") for m in measures)])
    for k, (file, (width, height)) in enumerate(zip(found, sizes, strict=True)):
        table.writerow([file.name, file.label, width, height, *(f"{float(whole[m][k]):.6g}" for m in measures)])
    write_text(out / "projection.csv", text.getvalue())
    rows = []
    for k in evenly(len(found), _SHOWN):
        one, two = whole["target"][k], whole["images"][k]
        error = (one.float() - two.float()).abs().mean(dim=0)
        note = f"{float(whole['distance.psnr'][k]):.1f} dB"
        rows.append(Row(found[k].label or found[k].name, torch.stack([one, two, heat(error, _DIFFERENCE)]), note))
    heads = ["tile", "reconstruction", f"difference 0–{_DIFFERENCE}"]
    save(out / "sheet.png", sheet(rows, heads, zoom=zoom_for(generator.size)))
    shutil.rmtree(parts)
    return {m.removeprefix("distance."): float(whole[m].median()) for m in measures}
