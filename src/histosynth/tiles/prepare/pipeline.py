"""Prepare tiles for training: read, filter by quality, split, normalise the stain, resize, write a tile set.

Two passes over the pixels in several processes, a chunk of tiles at a time. The first reads every tile, sets damage
aside and measures the rest; the second writes the tiles that are kept. While it runs, OUT/preparing/ holds a file a
chunk, written at once or not at all, so that a repeat after any interruption does only what is missing. Between the
passes everything is decided on the table, the same way every time.

Tiles that are set aside stay in the table with their reason.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import histosynth
from histosynth.core.errors import RunError, SettingError
from histosynth.core.files import read_json, write_json, write_text
from histosynth.core.pool import default_workers, run_tasks
from histosynth.core.progress import bar, say
from histosynth.tiles.classes import class_entry, load_class_table
from histosynth.tiles.prepare.plan import (
    check_listing,
    check_quality,
    decide,
    finish_table,
    open_sources,
    warn_of_losses,
)
from histosynth.tiles.prepare.stain import check_reference, fit_reference
from histosynth.tiles.prepare.work import MIN_EDGE, ReadTask, WriteTask, reader, writer
from histosynth.tiles.quality.metrics import METRICS
from histosynth.tiles.quality.metrics import VERSION as METRICS_VERSION
from histosynth.tiles.quality.thresholds import QualityConfig, Thresholds
from histosynth.tiles.sources.source import Source
from histosynth.tiles.split.assign import SplitConfig, check_shares
from histosynth.tiles.split.duplicates import EDGE
from histosynth.tiles.split.protocols import protocol_named
from histosynth.tiles.tileset import TileSet, claim, set_aside

JOURNAL = "preparing"
_CHUNK = 256


@dataclass(frozen=True)
class PrepareConfig:
    """How tiles are prepared."""

    quality: QualityConfig = QualityConfig()
    """What the quality filter rejects. Only training tiles are filtered unless `splits` says otherwise: limits that
    depend on the class would use the labels of the test tiles."""
    split: SplitConfig = SplitConfig()
    """How tiles are divided; ignored when the sources bring a complete split."""
    stain: str = "none"
    """Stain normalisation: none, vahadane, macenko, reinhard or anchored. It can help or hurt a classifier."""
    stain_reference: str = "train"
    """What it is fitted on: train (training tiles only), or the path of a tile, a tile set or a saved profile."""
    stain_tiles: int = 64
    """Most tiles that the reference is fitted on."""
    size: int = 0
    """Edge length in pixels of the tiles that are written (the central square, resized); 0 keeps each as it is."""
    class_table: str = ""
    """Names and colours of the classes: a known table or a YAML file; by default the known tables are searched."""
    licence: str = ""
    """Licence of the tiles, kept in tileset.json."""
    microns_per_pixel: float | None = None
    """Resolution of the sources; that of the written tiles follows."""
    seed: int = 0
    """Seed of the sample that the stain reference is fitted on."""


def prepare(
    sources: Sequence[Path | str] | Path | str,
    out: Path | str,
    config: PrepareConfig = PrepareConfig(),
    workers: int | None = None,
    *,
    chunk: int = _CHUNK,
) -> TileSet:
    """Prepare the tiles of one or several sources as a new tile set; goes on where an interrupted call stopped.

    The result is the same, byte for byte, for any number of workers and interruptions. When settings change between
    two calls, what was read and measured is kept and the tiles are written again if their pixels would differ; when
    the sources change, the call is refused.

    Args:
        sources: what `open_source` takes. Ids stay unique over all; the column origin names the source.
        out: folder of the new tile set. thresholds.yaml gets the quality limits, stain.json the stain reference.
        config: how.
        workers: number of processes; all processors by default.
        chunk: tiles that a worker handles at a time, and that are lost at most when it is killed.

    Returns:
        The tile set. Columns beyond the usual ones: origin, duplicate_group (of tiles that have near-duplicates),
        stain ("normalised", "unchanged" where there was too little stained tissue, "" without normalisation),
        source_sha256 (of the pixels that were read), mpp where it is known, and q_<metric>, measured on the tile as
        it was read.

    Raises:
        SettingError: a setting that cannot be used.
        DataError: no usable tiles, a patient in two splits, too few patients, a class without training tiles.
        RunError: `out` cannot be written, holds something else, or was begun with other sources; a worker died.
    """
    _check(config, workers, chunk)
    sources, out = [sources] if isinstance(sources, Path | str) else list(sources), Path(out)
    if (done := _finished(sources, out, config)) is not None:
        return done
    journal = _claim(out)
    opened, listing, about = open_sources(sources, journal)
    check_listing(listing, config.split)
    _begin(out, listing, chunk)
    workers = default_workers() if workers is None else workers

    table, thumbnails = _read(opened, listing, journal, workers, chunk)
    table, protocol, limits = decide(table, thumbnails, config.split, config.quality)
    del thumbnails
    limits.save(journal / "thresholds.yaml")
    profile, fitted_on = _fit(opened, table, journal, config)
    written = _write(opened, table, out, profile, config.size, workers, chunk)
    microns = config.microns_per_pixel or about["microns_per_pixel"]
    table = finish_table(table, written, microns)

    kept = table[table.kept]
    empty = sorted({*about["empty_classes"], *table.label} - set(kept.label))
    for label in empty:
        say(f"Class {label!r} has no usable tile and is left out.")
    warn_of_losses(table)
    write_text(out / "thresholds.yaml", (journal / "thresholds.yaml").read_text(encoding="utf-8"))
    if profile:
        write_text(out / "stain.json", profile.read_text(encoding="utf-8"))
    else:
        (out / "stain.json").unlink(missing_ok=True)  # of an interrupted call with other settings
    classes = sorted(set(kept.label))
    known = load_class_table(config.class_table) if config.class_table else None
    spacing = kept.mpp.round(6).unique().tolist() if "mpp" in kept else []
    TileSet.create(
        out,
        table,
        classes,
        classes_info={c: class_entry(c, i, len(classes), known) for i, c in enumerate(classes)},
        made_by="prepare",
        **({"simulated": True} if about["simulated"] else {}),
        source=" + ".join(table.origin.unique()),
        split_protocol=protocol,
        quality_protocol=_quality_sentence(table, config.quality, limits.name),
        stain_protocol=_stain_sentence(kept, config, fitted_on),
        empty_classes=empty,
        licence=config.licence or about["licence"] or "",
        microns_per_pixel=spacing[0] if len(spacing) == 1 else None,
        split={"val": config.split.val, "test": config.split.test, "seed": config.split.seed},
        counts={
            "read": len(table),
            "set_aside": set_aside(table),
            "kept": len(kept),
            "with_near_duplicates": int((kept.duplicate_group != "").sum()),
            "stain": {k: int(v) for k, v in kept.stain[kept.stain != ""].value_counts().sort_index().items()},
        },
        metrics_version=METRICS_VERSION,
        stain_fitted_on=fitted_on,
        prepare=_told(sources, config),
    )
    shutil.rmtree(journal)
    return TileSet.open(out)


def _check(config: PrepareConfig, workers: int | None, chunk: int) -> None:
    if config.size and config.size < MIN_EDGE:
        raise SettingError(f"size is {config.size}.", f"Give 0 to keep the tiles as they are, or at least {MIN_EDGE}.")
    for name, value in (("stain_tiles", config.stain_tiles), ("workers", workers), ("chunk", chunk)):
        if value is not None and value < 1:
            raise SettingError(f"{name} is {value}.", "Give 1 or more.")
    if config.microns_per_pixel is not None and not 0 < config.microns_per_pixel < 1000:
        raise SettingError(f"microns_per_pixel is {config.microns_per_pixel}.", "Give microns, such as 0.5.")
    check_shares(config.split)
    if config.split.protocol:
        protocol_named(config.split.protocol)
    check_quality(config.quality)
    check_reference(config.stain, config.stain_reference)
    if config.class_table:
        load_class_table(config.class_table)


def _told(sources: Sequence[Path | str], config: PrepareConfig) -> dict[str, Any]:
    """The call as JSON has it."""
    return json.loads(json.dumps({"sources": [Path(s).resolve().name for s in sources], "settings": asdict(config)}))


def _finished(sources: Sequence[Path | str], out: Path, config: PrepareConfig) -> TileSet | None:
    """The tile set of this very call, if it was killed after the last file and before the journal was removed."""
    if not (TileSet.is_tileset(out) and (out / JOURNAL).is_dir()):
        return None
    done = TileSet.open(out)
    if done.meta.get("prepare") != _told(sources, config):
        raise RunError(
            f"The folder {out} already holds a tile set that was prepared otherwise.", "Choose a new or empty folder."
        )
    shutil.rmtree(out / JOURNAL)
    return done


def _claim(out: Path) -> Path:
    """The journal's folder; what another program made is never taken for it, because it is removed at the end."""
    journal, images = out / JOURNAL, out / "images"
    mark = journal / "journal.json"
    ours = mark.is_file()
    for half in (*out.glob(".*.tmp*"), *journal.rglob(".*.tmp*"), *images.rglob(".*.tmp*")) if ours else ():
        half.unlink()  # a killed call was writing these
    claim(out)
    for folder in (journal, images):
        if not ours and folder.is_dir() and any(not p.match(".*.tmp*") for p in folder.iterdir()):
            raise RunError(f"The folder {folder} holds files of something else.", "Choose a new or empty folder.")
    if not ours:
        write_json(mark, {"format": 1, "made_by": "prepare"})
    return journal


def _begin(out: Path, listing: pd.DataFrame, chunk: int) -> None:
    """Start the journal, or check that it was started with the same tiles."""
    rows = listing[["number", "source", "label", "patient", "split"]].astype(str)
    state = {
        "format": 1,
        "tiles": len(listing),
        "chunk": chunk,
        "metrics": METRICS_VERSION,
        "listing": _digest(rows.itertuples(index=False)),
    }
    path = out / JOURNAL / "read.json"
    if path.is_file() and (before := read_json(path)) != state:
        changed = [k for k in state if before.get(k) != state[k]]
        what = "sources that have other tiles" if {"tiles", "listing"} & set(changed) else f"another {changed[0]}"
        raise RunError(
            f"The folder {out} was begun with {what}.",
            f"Repeat the first command as it was, choose a new folder, or remove {out / JOURNAL} to begin again.",
        )
    write_json(path, state)


def _digest(rows: Any) -> str:
    return hashlib.sha256("\n".join("\x1f".join(row) for row in rows).encode()).hexdigest()


def _starts(count: int, chunk: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + chunk, count)) for start in range(0, count, chunk))


def _read(
    opened: Sequence[Source], listing: pd.DataFrame, journal: Path, workers: int, chunk: int
) -> tuple[pd.DataFrame, np.ndarray]:
    """The first pass: the listing with what was read and measured, and thumbnails uint8 [N, 32, 32]."""
    files, todo, left = [], [], 0
    for start, end in _starts(len(listing), chunk):
        files.append(journal / "read" / f"{start:08d}.parquet")
        if not _whole(files[-1], end - start):
            part = listing.iloc[start:end]
            todo.append(ReadTask(files[-1], tuple(zip(part.number.tolist(), part.source.tolist(), strict=True))))
            left += end - start
    with bar("Read and measure tiles", len(listing), len(listing) - left) as tick:
        run_tasks(partial(reader, opened), todo, min(workers, max(1, len(todo))), tick)
    columns = ["sha256", "format", "width", "height", "kept", "reason", *(f"q_{m}" for m in METRICS)]
    measured = pd.concat([pd.read_parquet(f, columns=columns) for f in files], ignore_index=True)
    thumbnails = np.empty((len(listing), EDGE, EDGE), np.uint8)
    for (start, end), file in zip(_starts(len(listing), chunk), files, strict=True):
        column = pd.read_parquet(file, columns=["thumbnail"]).thumbnail
        thumbnails[start:end] = np.frombuffer(b"".join(column), np.uint8).reshape(-1, EDGE, EDGE)
    return pd.concat([listing, measured], axis=1), thumbnails


def _whole(path: Path, rows: int) -> bool:
    """Whether a chunk is done; one that a full disk or a power cut damaged is not."""
    import pyarrow.parquet as pq

    try:
        return path.is_file() and pq.read_metadata(path).num_rows == rows
    except (OSError, ValueError):
        return False


def _fit(
    opened: Sequence[Source], table: pd.DataFrame, journal: Path, config: PrepareConfig
) -> tuple[Path | None, list[str]]:
    """The saved stain profile (None without normalisation), and what it was fitted on."""
    if config.stain == "none":
        return None, []
    train = table[table.kept & (table.split == "train")]
    normaliser, fitted_on = fit_reference(
        config.stain,
        config.stain_reference,
        train[["id", "number", "source", "width", "height"]],
        lambda number, path: opened[number].rgb(path)[0],
        config.stain_tiles,
        config.seed,
    )
    normaliser.save(journal / "stain.json")
    return journal / "stain.json", fitted_on


def _write(
    opened: Sequence[Source],
    table: pd.DataFrame,
    out: Path,
    profile: Path | None,
    size: int,
    workers: int,
    chunk: int,
) -> pd.DataFrame:
    """The second pass: sha256, width, height and stain of the kept tiles, in order."""
    kept = table[table.kept]
    state = {
        "version": histosynth.__version__,
        "size": size,
        "stain": profile.read_text(encoding="utf-8") if profile else "",
        "tiles": _digest(kept[["path", "sha256"]].itertuples(index=False)),
    }
    path, folder = out / JOURNAL / "write.json", out / JOURNAL / "write"
    if path.is_file() and (before := read_json(path)) != state:
        changed = ", ".join(k for k in state if before.get(k) != state[k])
        say(f"Changed since the interruption: {changed}. The tiles are written again; what was measured is kept.")
        path.unlink()
    if not path.is_file():
        for old in (folder, out / "images"):
            shutil.rmtree(old, ignore_errors=True)
        write_json(path, state)
    files, todo, left = [], [], 0
    for start, end in _starts(len(kept), chunk):
        files.append(folder / f"{start:08d}.parquet")
        if not _whole(files[-1], end - start):
            part = kept.iloc[start:end]
            rows = zip(part.number.tolist(), part.source, part.sha256, (out / p for p in part.path), strict=True)
            todo.append(WriteTask(files[-1], tuple(rows)))
            left += end - start
    with bar("Write tiles", len(kept), len(kept) - left) as tick:
        run_tasks(partial(writer, opened, profile, size), todo, min(workers, max(1, len(todo))), tick)
    return pd.concat([pd.read_parquet(f) for f in files], ignore_index=True)


def _quality_sentence(table: pd.DataFrame, config: QualityConfig, name: str) -> str:
    if config.rules == "none":
        return "not filtered"
    train = (table.split == "train").sum()
    rejected = table.reason.str.startswith("quality").sum()
    learned = f" learned from the {train} training tiles" if Thresholds.load(config.rules).recipe else ""
    return f"limits{learned} ({name}); filtered: {', '.join(config.splits) or 'nothing'}; {rejected} tiles rejected"


def _stain_sentence(kept: pd.DataFrame, config: PrepareConfig, fitted_on: Sequence[str]) -> str:
    if config.stain == "none":
        return "not normalised"
    own = config.stain_reference == "train"
    source = f"fitted on {len(fitted_on)} training tiles" if own else f"reference {Path(config.stain_reference).name}"
    same = (kept.stain == "unchanged").sum()
    return f"{config.stain}, {source}; {same} of {len(kept)} tiles have too little stained tissue and are unchanged"
