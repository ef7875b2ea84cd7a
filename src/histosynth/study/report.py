"""The report: one page that opens offline and prints, and the same numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histosynth.core.files import write_json, write_text
from histosynth.study import figures, view
from histosynth.study.sheets import columns_for, encode_sheets, write_sheet_png

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["Pictures", "page_template", "pair_groups", "render", "sample_sheet", "write_report", "write_sheet_png"]

# bytes of tiles before base64; with the charts the page stays below 6 MB
_SAMPLES_BUDGET = 2_700_000
_PAIRS_BUDGET = 700_000
_ROWS_UP_TO = 12  # with more classes, one row of tiles each keeps the sheet within a glance
_PAIRS_SHOWN = 12


@dataclass(frozen=True)
class Pictures:
    """What the report shows beside its numbers."""

    samples: dict[str, dict[str, np.ndarray]]
    """Source ("real", or a generator) -> class label -> uint8 [n, 3, S, S], up to 8 a class."""
    neighbours: dict[str, list[tuple[np.ndarray, np.ndarray, float, str]]]
    """Generator -> closest pairs: synthetic tile uint8 [3, S, S], nearest training tile, distance, class."""
    embedding: dict[str, np.ndarray] | None
    """Source -> 2-D map, float [n, 2]."""
    embedding_labels: dict[str, np.ndarray] | None
    """Source -> class label, or index of the class, for each point of the map [n]."""


def write_report(folder: Path | str, report: dict[str, Any], pictures: Pictures) -> Path:
    """Write report.json and report.html; returns the page's path.

    Raises:
        RunError: the folder cannot be written.
    """
    folder = Path(folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.html", render(report, pictures))
    return folder / "report.html"


def render(report: Mapping[str, Any], pictures: Pictures) -> str:
    """The page: HTML without any reference to another file."""
    return page_template("report.html.j2").render(_context(report, pictures))


@cache
def page_template(name: str) -> Template:
    """A page of the folder templates, with the filters that put numbers into words."""
    from jinja2 import ChainableUndefined, Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("histosynth.study"),
        autoescape=True,
        undefined=ChainableUndefined,  # a section that is missing is said to be missing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in ("duration", "number", "percent", "pretty", "score_title", "signed"):
        function = getattr(view, filter_)
        environment.filters[filter_] = lambda value, *rest, f=function: f(_known(value), *rest)
    return environment.get_template(name)


def _known(value: Any) -> Any:
    from jinja2 import Undefined

    return None if isinstance(value, Undefined) else value


def _context(report: Mapping[str, Any], pictures: Pictures) -> dict[str, Any]:
    part = view.part
    generators = view.generator_names(report, pictures.samples)
    described = part(report, "generators")
    long = {g: part(described, g).get("title") or view.pretty(g) for g in generators}
    titles = {g: title.split(" (")[0] for g, title in long.items()}
    baseline = view.baseline_of(report)
    arms = part(report, "utility").get("arms") or []
    train = part(report, "data", "counts", "train")
    shown = [_arm(arm, generators, train) for arm in arms]
    judged = {g: one for g, one in part(report, "fidelity", "generators").items() if one}
    classes = view.class_entries(report)
    return {
        "r": report,
        "generators": generators,
        "long": long,
        "titles": {"real": "Real"} | titles,
        "marks": {s: view.mark(s, generators) for s in ("real", *generators)},
        "classes": classes,
        "rare": view.rare_classes(train),
        "baseline": next((arm for arm in shown if arm["name"] == baseline), None),
        "level": view.level(part(report, "utility", "protocol").get("interval")),
        "forest": view.verdict_forest(report, generators),
        "sheet": sample_sheet(pictures.samples, classes, generators),
        "pairs": pair_groups(pictures.neighbours, titles),
        "maps": _maps(pictures, classes, {"real": "Real"} | titles),
        "arms": shown,
        "arms_panel": view.arms_panel(report, generators, baseline),
        "scores": _score_columns(arms),
        "reliability": _reliability(report, generators, baseline),
        "confusion": _confusion(report, generators, baseline),
        "judged": judged,
        "fidelity_panels": view.fidelity_panels(judged, titles),
        "fidelity_rows": view.fidelity_rows(judged),
        "class_scores": view.class_rows(judged, [c["label"] for c in classes]),
        "copy_rows": view.flat_rows(view.COPY_TITLES, [part(j, "copies") for j in judged.values()], shares=True),
        "colour_rows": _colour_rows(judged),
        "stages": _stages(report),
    }


def sample_sheet(
    samples: Mapping[str, Mapping[str, np.ndarray]], classes: Sequence[Mapping[str, Any]], generators: Sequence[str]
) -> dict[str, Any] | None:
    """Montages of every source and class for the page; None without tiles."""
    sources = [s for s in ("real", *generators) if any(len(t) for t in samples.get(s, {}).values())]
    shown = [c for c in classes if any(len(samples[s].get(c["label"], ())) for s in sources)]
    if not shown:
        return None
    columns = columns_for(len(sources))
    most = columns * (2 if len(shown) <= _ROWS_UP_TO else 1)
    places, groups = [], []
    for entry in shown:
        for source in sources:
            tiles = samples[source].get(entry["label"])
            if tiles is not None and len(tiles):
                places.append((entry["label"], source, min(len(tiles), most)))
                groups.append((np.asarray(tiles)[:most], columns))
    encoded = encode_sheets(groups, _SAMPLES_BUDGET)
    cells: dict[str, dict[str, Any]] = {entry["label"]: {} for entry in shown}
    for (label, source, count), uri in zip(places, encoded.uris, strict=True):
        cells[label][source] = {"uri": uri, "count": count}
    return {"sources": sources, "classes": shown, "cells": cells, "how": encoded.how}


def pair_groups(
    neighbours: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray, float, str]]] | None, titles: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Pictures of pairs of tiles for the page, a group a source."""
    chosen = {g: list(pairs)[:_PAIRS_SHOWN] for g, pairs in (neighbours or {}).items() if pairs}
    groups = [(np.stack(pair[:2]), 2) for pairs in chosen.values() for pair in pairs]
    uris = iter(encode_sheets(groups, _PAIRS_BUDGET).uris)
    return [
        {
            "title": titles.get(g, g),
            "generator": g,
            "pairs": [{"uri": next(uris), "ratio": float(pair[2]), "label": pair[3]} for pair in pairs],
        }
        for g, pairs in chosen.items()
    ]


def _maps(pictures: Pictures, classes: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[figures.Panel]:
    if not pictures.embedding:
        return []
    return view.embedding_panels(pictures.embedding, pictures.embedding_labels or {}, classes, titles)


def _arm(arm: Mapping[str, Any], generators: Sequence[str], real: Mapping[str, int]) -> dict[str, Any]:
    tiles = sum((arm.get("train_tiles") or {}).values())
    synthetic_only = arm["name"].endswith("_only")
    genuine = 0 if synthetic_only else min(tiles, sum(real.values()))
    return {
        "name": arm["name"],
        "title": arm["title"],
        **view.arm_mark(arm["name"], generators),
        "real_tiles": genuine,
        "synthetic_tiles": tiles - genuine,
        "scores": {name: view.score_cell(name, score) for name, score in (arm.get("scores") or {}).items()},
        "recall": arm.get("recall") or {},
    }


def _score_columns(arms: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    found = dict.fromkeys(name for arm in arms for name in arm.get("scores") or {})
    known = [name for name in view.SCORE_TITLES if name in found]
    titles = {name: view.SCORE_TITLES.get(name, (view.pretty(name), "")) for name in found}
    ordered = known + [name for name in found if name not in known]
    return [{"name": name, "title": titles[name][0], "note": titles[name][1]} for name in ordered]


def _reliability(report: Mapping[str, Any], generators: Sequence[str], baseline: str) -> list[figures.Panel]:
    panels = []
    for arm in view.chosen_arms(report, generators, baseline):
        if arm.get("reliability"):
            scores = view.part(arm, "scores")
            ece = view.part(scores, "ece_calibrated") or view.part(scores, "ece")
            colour, _, _ = view.arm_style(arm["name"], generators)
            panels.append(figures.reliability(arm["reliability"], arm["title"], colour, ece.get("mean")))
    return panels


def _confusion(report: Mapping[str, Any], generators: Sequence[str], baseline: str) -> list[figures.Panel]:
    labels = [entry["label"] for entry in view.class_entries(report)]
    panels = []
    for arm in view.chosen_arms(report, generators, baseline):
        if arm.get("confusion") and len(arm["confusion"]) == len(labels):
            colour, _, _ = view.arm_style(arm["name"], generators)
            panels.append(figures.confusion(arm["confusion"], labels, arm["title"], colour))
    return panels


def _colour_rows(judged: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = [view.part(one, "colour", side) for one in judged.values() for side in ("synthetic", "floor")]
    return view.flat_rows(view.COLOUR_TITLES, columns)


def _stages(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    stages = [s for s in view.part(report, "costs").get("stages") or [] if s.get("seconds") is not None]
    longest = max((s["seconds"] for s in stages), default=0) or 1
    return [s | {"share": round(100 * s["seconds"] / longest, 1)} for s in stages]
