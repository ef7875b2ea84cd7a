"""Cut whole-slide images into a tile set, in several processes, resumable at any moment.

While it runs, OUT/cutting/ holds what is done: a plan a slide and a small file a chunk of tiles, each written at
once or not at all. A repeated call does only what is missing.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError, RunError
from histosynth.core.files import atomic_path, read_json, sha256_file, write_json
from histosynth.core.pool import default_workers, run_tasks
from histosynth.core.progress import bar, say
from histosynth.tiles.images import read_rgb, write_png
from histosynth.tiles.slides.listing import Slide, list_slides
from histosynth.tiles.slides.plan import CutConfig, Plan, check_config, plan_slide
from histosynth.tiles.slides.reader import SlideReader, open_slide, read_field
from histosynth.tiles.sources.source import set_copies_aside
from histosynth.tiles.split.assign import check_no_straddling, split_by_group
from histosynth.tiles.tileset import SPLITS, TileSet, claim, class_entry, safe_name

__all__ = ["CutConfig", "Slide", "cut", "list_slides"]

_CHUNK = 64  # tiles that are lost at most when a worker is killed
_JOURNAL = "cutting"


def cut(
    slides: Sequence[Path | str], out: Path | str, config: CutConfig = CutConfig(), workers: int | None = None
) -> TileSet:
    """Cut slides into a new tile set; goes on where an interrupted call stopped.

    A slide that cannot be read is set aside with its reason (a row of the table without a tile, and slides.csv) and
    never stops the others. The result is the same for any number of workers.

    Args:
        slides: slides, folders of slides, or CSV files with the columns slide, patient, label, annotations, mpp (only
            `slide` is needed; paths are relative to the CSV). Annotations are also found as SLIDE.geojson beside
            the slide.
        out: folder of the tile set. slides/ gets a picture of each slide with its tiles, slides.csv what became of it.
        workers: number of processes; all processors by default.

    Raises:
        SettingError: a setting that cannot be used.
        DataError: no slides, a CSV without the needed columns, or no slide that gives a tile.
        RunError: `out` cannot be written, holds other files, or was begun with other slides or settings.
    """
    check_config(config)
    found = list_slides(slides)
    out = claim(out)
    _same_cut(out, found, config)
    _clear_leftovers(out)
    workers = default_workers() if workers is None else workers
    setup = partial(_worker, out, config)
    with bar("Find tissue", len(found)) as tick:
        todo = [("plan", slide, 0) for slide in found if not (_journal(out, slide) / "plan.json").is_file()]
        tick(len(found) - len(todo))
        run_tasks(setup, todo, workers, lambda _: tick())
    planned = [slide for slide in found if not _failure(out, slide)]
    counts = {slide.name: int(read_json(_journal(out, slide) / "plan.json")["facts"]["tiles"]) for slide in planned}
    chunks = [("cut", slide, k) for slide in planned for k in range(-(-counts[slide.name] // _CHUNK))]
    todo = [task for task in chunks if not _chunk_path(out, task[1], task[2]).is_file()]
    total = sum(counts.values())
    left = sum(min(_CHUNK, counts[slide.name] - k * _CHUNK) for _, slide, k in todo)
    with bar("Cut tiles", total, total - left) as tick:
        run_tasks(setup, todo, workers, lambda number: tick(number))
    return _finish(out, found, config, partial(run_tasks, setup, workers=workers))


def _same_cut(out: Path, slides: list[Slide], config: CutConfig) -> None:
    """Refuse to go on in a folder that was begun with other slides or settings."""
    described = []
    for slide in slides:
        state = slide.path.stat() if slide.path.is_file() else None
        notes = slide.annotations
        described.append([
            slide.name, str(slide.path.resolve()), state.st_size if state else -1, state.st_mtime_ns if state else -1,
            slide.patient, slide.label, sha256_file(notes) if notes and notes.is_file() else "", slide.mpp,
        ])  # fmt: skip
    settings = {"config": {**asdict(config), "any_tissue": list(config.any_tissue)}, "slides": described}
    path = out / _JOURNAL / "settings.json"
    if not path.is_file():
        write_json(path, settings)
    elif read_json(path) != settings:
        raise RunError(
            f"The folder {out} holds an unfinished cut of other slides or with other settings.",
            "Repeat it with the same slides and settings, or choose a new folder.",
        )


def _clear_leftovers(out: Path) -> None:
    """Remove half-written files of a killed process, and try slides again that failed."""
    for path in [*out.rglob(".*.tmp*"), *(out / _JOURNAL).glob("*/failed.json")]:
        path.unlink(missing_ok=True)


def _journal(out: Path, slide: Slide) -> Path:
    return out / _JOURNAL / slide.name


def _chunk_path(out: Path, slide: Slide, number: int) -> Path:
    return _journal(out, slide) / f"chunk-{number:06d}.json"


def _failure(out: Path, slide: Slide) -> str:
    path = _journal(out, slide) / "failed.json"
    return str(read_json(path)["reason"]) if path.is_file() else ""


def _worker(out: Path, config: CutConfig) -> Callable[[tuple[str, Slide, Any]], int]:
    """What a process does with a task; it keeps the slide of its last task open."""
    kept: dict[str, tuple[SlideReader, Plan]] = {}

    def opened(slide: Slide) -> tuple[SlideReader, Plan]:
        if slide.name not in kept:
            while kept:
                kept.popitem()[1][0].close()
            plan = _load_plan(_journal(out, slide))
            kept[slide.name] = open_slide(slide.path), plan
        return kept[slide.name]

    def work(task: tuple[str, Slide, Any]) -> int:
        kind, slide, argument = task
        if kind == "draw":
            return _draw(out, slide, argument)
        if _failure(out, slide):
            return 0
        try:
            if kind == "plan":
                _save_plan(plan_slide(slide, config), _journal(out, slide))
                return 1
            return _cut_chunk(out, slide, argument, config, *opened(slide))
        except DataError as error:
            write_json(_journal(out, slide) / "failed.json", {"reason": str(error)})
            return 0

    return work


def _cut_chunk(out: Path, slide: Slide, number: int, config: CutConfig, reader: SlideReader, plan: Plan) -> int:
    rows = plan.tiles.iloc[number * _CHUNK : (number + 1) * _CHUNK]
    digests = []
    for row in rows.itertuples():
        tile = read_field(reader, row.x, row.y, plan.width, plan.height, config.size)
        write_png(out / _tile_path(slide, row.label, row.x, row.y), tile)
        digests.append(hashlib.sha256(f"{config.size}x{config.size}".encode() + tile.tobytes()).hexdigest())
    write_json(_chunk_path(out, slide, number), {"sha256": digests})
    return len(rows)


def _draw(out: Path, slide: Slide, colours: dict[str, str]) -> int:
    from histosynth.tiles.slides.thumbnail import draw_thumbnail

    write_png(
        out / "slides" / f"{slide.name}.png", draw_thumbnail(_load_plan(_journal(out, slide)), slide.name, colours)
    )
    return 1


def _tile_id(slide: Slide, x: int, y: int) -> str:
    return f"{slide.name}-x{x:06d}-y{y:06d}"


def _tile_path(slide: Slide, label: str, x: int, y: int) -> str:
    return f"images/{safe_name(label)}/{_tile_id(slide, x, y)}.png"


def _save_plan(plan: Plan, folder: Path) -> None:
    with atomic_path(folder / "tiles.parquet") as temporary:
        plan.tiles.to_parquet(temporary, index=False)
    write_png(folder / "picture.png", plan.picture)
    write_png(folder / "mask.png", np.repeat(plan.mask[..., None].astype(np.uint8) * 255, 3, axis=2))
    described = {
        "facts": plan.facts, "colours": plan.colours, "width": plan.width, "height": plan.height,
        "picture_pixel": plan.picture_pixel, "mask_pixel": plan.mask_pixel,
    }  # fmt: skip
    write_json(folder / "plan.json", described)  # last: a plan with it is whole


def _load_plan(folder: Path) -> Plan:
    described = read_json(folder / "plan.json")
    for name in ("picture_pixel", "mask_pixel"):
        described[name] = tuple(described[name])
    mask = read_rgb(folder / "mask.png")[0][..., 0] > 127
    picture = read_rgb(folder / "picture.png")[0]
    return Plan(pd.read_parquet(folder / "tiles.parquet"), mask=mask, picture=picture, **described)


def _finish(out: Path, slides: list[Slide], config: CutConfig, run: Callable[..., None]) -> TileSet:
    """Gather the journals into the table, draw the slides, and describe the set."""
    tables, report, colours = [], [], {}
    for slide in slides:
        facts, tiles, reason = _gather(out, slide, config)
        tables.append(tiles)
        report.append(facts)
        if not reason:
            for label, colour in read_json(_journal(out, slide) / "plan.json")["colours"].items():
                colours.setdefault(label, colour)
    table = pd.concat(tables, ignore_index=True)
    if not table.kept.any():
        shutil.rmtree(out / _JOURNAL, ignore_errors=True)  # so that other settings can be tried in the same folder
        first = next((f"{f['slide']}: {f['reason']}" for f in report if f["reason"]), "")
        raise DataError(
            f"None of the {len(slides)} slide(s) gave a tile. {first}".strip(),
            "Check the slides, or lower --min-tissue or --min-cover.",
        )
    set_copies_aside(table)  # one slide under two names would be on both sides of the split
    classes = sorted(set(table.label[table.kept]))
    entries = [class_entry(label, i, len(classes)) for i, label in enumerate(classes)]
    chosen = {entry["label"]: colours.get(entry["label"], entry["colour"]) for entry in entries}
    protocol = _assign_splits(table, config)
    summary = pd.DataFrame(report)
    with atomic_path(out / "slides.csv") as temporary:
        summary.to_csv(temporary, index=False)
    drawable = [slide for slide, facts in zip(slides, report, strict=True) if facts["status"] != "set aside"]
    with bar("Draw slides", len(drawable)) as tick:
        run([("draw", slide, chosen) for slide in drawable], finished=lambda _: tick())
    tileset = TileSet.create(
        out,
        table,
        classes,
        classes_info={label: {"colour": colour} for label, colour in chosen.items()},
        made_by="cut",
        source=", ".join(s.path.name for s in slides[:5]) + (f" and {len(slides) - 5} more" if len(slides) > 5 else ""),
        split_protocol=protocol,
        licence=config.licence,
        microns_per_pixel=config.mpp,
        slides=summary.status.value_counts().to_dict(),
        split={"val": config.split.val, "test": config.split.test, "seed": config.split.seed},
        cut={k: v for k, v in asdict(config).items() if k not in ("split", "licence")},
    )
    shutil.rmtree(out / _JOURNAL, ignore_errors=True)
    _tell(summary)
    return tileset


def _gather(out: Path, slide: Slide, config: CutConfig) -> tuple[dict[str, Any], pd.DataFrame, str]:
    """What slides.csv says of a slide, its rows of the table, and why it is set aside."""
    facts: dict[str, Any] = {"slide": slide.name, "path": str(slide.path), "patient": slide.patient}
    facts |= {"annotations": str(slide.annotations or "")}
    reason = _failure(out, slide)
    planned = (_journal(out, slide) / "plan.json").is_file()
    plan = _load_plan(_journal(out, slide)) if planned else None
    if reason or plan is None:
        for row in plan.tiles.itertuples() if plan else ():
            (out / _tile_path(slide, row.label, row.x, row.y)).unlink(missing_ok=True)
        row = {"id": slide.name, "source": slide.path.name, "slide": slide.name, "kept": False}
        row |= {"patient": slide.patient, "reason": f"unreadable slide: {reason}", "x": -1, "y": -1, "mpp": config.mpp}
        return facts | {"status": "set aside", "reason": reason}, pd.DataFrame([row]), reason
    tiles = plan.tiles
    digests = [d for k in range(-(-len(tiles) // _CHUNK)) for d in read_json(_chunk_path(out, slide, k))["sha256"]]
    rows = pd.DataFrame({
        "id": [_tile_id(slide, x, y) for x, y in zip(tiles.x, tiles.y, strict=True)],
        "path": [_tile_path(slide, *p) for p in zip(tiles.label, tiles.x, tiles.y, strict=True)],
        "label": tiles.label, "patient": slide.patient, "source": slide.path.name, "sha256": digests,
        "format": plan.facts["reader"], "width": config.size, "height": config.size, "kept": True, "reason": "",
        "slide": slide.name, "x": tiles.x, "y": tiles.y, "mpp": config.mpp,
        "tissue": tiles.tissue, "cover": tiles.cover,
    })  # fmt: skip
    status = "cut" if len(rows) else "no tiles"
    return facts | {"status": status, "reason": ""} | plan.facts, rows, ""


def _assign_splits(table: pd.DataFrame, config: CutConfig) -> str:
    kept = table[table.kept]
    table["split"] = ""
    if kept.patient.nunique() < len(SPLITS):
        say(f"The tiles come from {kept.patient.nunique()} patient(s), so they are not split (three are needed).")
        return "none: fewer than three patients"
    table.loc[kept.index, "split"] = split_by_group(kept.patient, kept.label, config.split)
    check_no_straddling(table)
    return "by patient" if (table.patient != table.slide).any() else "by slide, because no patients were given"


def _tell(summary: pd.DataFrame) -> None:
    for row in summary[summary.status == "set aside"].itertuples():
        say(f"Slide {row.slide} is set aside: {row.reason}")
    for row in summary[summary.status == "no tiles"].itertuples():
        say(f"Slide {row.slide} gave no tile.")
    if "annotations_skipped" in summary:
        for row in summary[summary.annotations_skipped.fillna("") != ""].itertuples():
            say(f"Slide {row.slide}, annotations left out: {row.annotations_skipped}.")
    for column, what in (("two_classes", "covered enough by two classes"), ("unlabelled", "of no class")):
        if column in summary and (number := int(summary[column].fillna(0).sum())):
            say(f"Left out: {number} places {what}.")
