"""From the report of `evaluate` to its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.core.files import write_json, write_text
from histosynth.study import figures, view
from histosynth.study.evaluation import charts
from histosynth.study.evaluation.measures import PATIENTS_LIMIT
from histosynth.study.evaluation.scorecard import scorecard
from histosynth.study.evaluation.verdict import apart, name_of, suspicious
from histosynth.study.figures import Panel
from histosynth.study.report import page_template, pair_groups, sample_sheet
from histosynth.study.sheets import encode_sheets

_PER_CLASS = ("frechet", "precision", "coverage")
_SHEET_BUDGET = 600_000
_NUCLEI = {
    "count": ("Nuclei", "nuclei in 10,000 pixels"),
    "area": ("Size of a nucleus", "pixels"),
    "density": ("Darkness of nuclei", "haematoxylin, optical density"),
}
TITLES = view.FIDELITY_TITLES | {
    "frechet_infinity": ("Fréchet distance for endless tiles", "extrapolated, without the bias of few tiles"),
}
_ARROWS = {"lower": "↓ lower is better", "higher": "↑ higher is better", "near one": "best near 1"}
_STAIN_ROWS = {
    "patients_shift": ("Mean colour", "distance from the mean of the real test patients, in units of their spread"),
    "patients_outside": ("Tiles stained like no patient", "share farther out than 99 % of the tiles of a new patient"),
    "haematoxylin_angle": ("Haematoxylin", "degrees between the mean stain vectors"),
    "eosin_angle": ("Eosin", "degrees between the mean stain vectors"),
}


@dataclass
class Shown:
    """What the page shows beside the numbers of the report."""

    samples: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Source -> class -> uint8 [n, 3, S, S]."""
    pairs: list[tuple[np.ndarray, np.ndarray, float, str]] = field(default_factory=list)
    """Synthetic tile, its closest training tile, distance, class; the most suspect first."""
    alarms: list[bool] = field(default_factory=list)
    """Which of these pairs ring the pixel alarm."""
    map: dict[str, Any] = field(default_factory=dict)
    """`embedding` (source -> float [n, 2]) and `embedding_labels`."""
    tiles: dict[str, list[tuple[np.ndarray, float, str]]] = field(default_factory=dict)
    """worst, best -> synthetic tile, its distance to real tiles (1 is usual), class."""
    colour: dict[str, Any] = field(default_factory=dict)
    """`clouds` (side -> float [n, 3]) and `patients` (name -> float [n, 3])."""
    nuclei: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Side -> measure -> float [n]."""
    encoded: dict[str, np.ndarray] = field(default_factory=dict)
    """Features of each side by the first encoder."""
    hopeless: np.ndarray = field(default_factory=lambda: np.empty((0, 3, 1, 1), np.uint8))
    """The blurred tiles, uint8 [n, 3, S, S]."""


def write_evaluation(folder: Path, report: dict[str, Any], shown: Shown) -> Path:
    """Write report.json and report.html; returns the page's path.

    Raises:
        RunError: the folder cannot be written.
    """
    write_json(folder / "report.json", report)
    write_text(folder / "report.html", page_template("evaluation.html.j2").render(context(report, shown)))
    return folder / "report.html"


def context(report: Mapping[str, Any], shown: Shown) -> dict[str, Any]:
    """What the template needs."""
    source = report["source"]
    title = "Second real set" if report["synthetic_is_real"] else name_of(report)[:1].upper() + name_of(report)[1:]
    classes = view.class_entries(report)
    rung, n, many = suspicious(report)
    shades = {"test": figures.INK, "train": "#8a949d", "synthetic": figures.source_style(source, [source])[0]}
    names = {"test": "Real test", "train": "Real training", "synthetic": title}
    return {
        "r": report,
        "title": title,
        "kind": "real" if report["synthetic_is_real"] else "synthetic",
        "mark": view.mark(source, [source]),
        "classes": classes,
        "glance": _glance(report),
        "guards": _guards(report),
        "scale": _scale(report),
        "tables": [_table(name, judged) for name, judged in report["encoders"].items()],
        "class_panels": _class_panels(report, classes),
        "class_reasons": _class_reasons(report),
        "variety_rows": _variety_rows(report),
        "labels": _labels(report, title, shades["synthetic"]),
        "sheet": sample_sheet(shown.samples, classes, [source]),
        "titles": {"real": "Real test", source: title},
        "maps": _maps(shown, classes, {"real": "Real test", source: title}),
        "extremes": _extremes(shown),
        "pairs": _pairs(report, shown, title),
        "suspicious": {"rung": rung, "n": n, "many": many},
        "copy_rows": view.flat_rows(
            view.COPY_TITLES, [view.part(j, "copies") for j in report["encoders"].values()], shares=True
        ),
        "colour_rows": view.flat_rows(
            view.COLOUR_TITLES,
            [
                view.part(next(iter(report["encoders"].values()), {}), "colour", s)
                for s in ("synthetic", "floor", "ceiling")
            ],
        ),
        "stain_rows": _stain_rows(report),
        "cloud": charts.colour_cloud(shown.colour["clouds"], shown.colour["patients"], names, shades),
        "nuclei_panels": [
            charts.distributions({s: v[m] for s, v in shown.nuclei.items()}, *words, names, shades)
            for m, words in _NUCLEI.items()
        ],
        "nuclei_rows": _nuclei_rows(report),
        "card": scorecard(report),
    }


def _glance(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The answer in five boxes."""
    name, judged = next(iter(report["encoders"].items()))
    worse, told, _ = apart(judged)
    shift = view.part(report, "staining", "synthetic").get("patients_shift")
    rung, n, many = suspicious(report)
    made, real = (view.part(report, "labels", s).get("label_consistency") for s in ("synthetic", "real"))
    nuclei, floor = (view.part(report, "nuclei", s).get("nuclei_distance") for s in ("synthetic", "real"))
    boxes = [
        ("Apart from real", f"{worse} of {told}" if told else view.NA, f"scores with {name}"),
        ("Staining", view.number(shift, 2), f"of the patients’ spread; usual below {PATIENTS_LIMIT:.1f}"),
        ("Like a training tile", f"{rung} of {n}", "more than chance explains" if many else "chance explains these"),
        ("Label recognised", view.NA if made is None else f"{view.percent(made, 0)} %",
         "no classifier was given" if made is None else f"real test tiles {view.percent(real, 0)} %"),
        ("Nuclei", view.number(nuclei, 2), f"distance to real; real training tiles {view.number(floor, 2)}"),
    ]  # fmt: skip
    return [{"title": title, "value": value, "note": note} for title, value, note in boxes]


def _guards(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = {}
    for finding in report["guards"]:
        found.setdefault(finding["severity"], []).append(finding)
    words = {"strong": "Misleading unless you know it", "warning": "Weaker than it looks", "note": "For the record"}
    return [{"severity": s, "title": words[s], "findings": found[s]} for s in words if s in found]


def _scale(report: Mapping[str, Any]) -> Panel | None:
    rows: dict[str, dict[str, float]] = {}
    for name, judged in report["encoders"].items():
        for score, entry in view.part(judged, "all", "scores").items():
            if entry.get("position") is not None:
                rows.setdefault(score, {})[name] = entry["position"]
    known = [score for score in TITLES if score in rows]
    ordered = known + [score for score in rows if score not in TITLES]
    return charts.scale({_titled(score)[0]: rows[score] for score in ordered}) if rows else None


def _titled(score: str) -> tuple[str, str]:
    return TITLES.get(score, (view.pretty(score), ""))


def _table(name: str, judged: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for score, entry in view.part(judged, "all", "scores").items():
        title, meaning = _titled(score)
        better = entry.get("better", "")
        cell = view.fidelity_cell(entry, better)
        place = entry.get("position")
        rows.append({
            "title": title, "meaning": meaning, "arrow": _ARROWS.get(better, ""), **cell,
            "ceiling": view.number(entry.get("ceiling")),
            "position": "n/a" if place is None else f"{100 * place:.0f} %".replace("-", "−"),
        })  # fmt: skip
    worse, told, _ = apart(judged)
    every = view.part(judged, "all")
    return {
        "name": name, "rows": rows, "apart": worse, "told": told, "n": every.get("n"), "reason": every.get("reason"),
    }  # fmt: skip


def _class_panels(report: Mapping[str, Any], classes: list[dict[str, str]]) -> list[Panel]:
    judged = next(iter(report["encoders"].values()), {})
    panels = []
    for score in _PER_CLASS:
        entries = {c["label"]: view.part(judged, "per_class", c["label"], "scores", score) for c in classes}
        if any(e.get("value") is not None for e in entries.values()):
            bars = [
                charts.Bar(c["label"], c["colour"], *(
                    entries[c["label"]].get(k) for k in ("value", "low", "high", "floor", "ceiling")
                ))
                for c in classes
            ]  # fmt: skip
            better = next(e["better"] for e in entries.values() if e.get("better"))
            panels.append(charts.class_bars(bars, _titled(score)[0], better))
    return panels


def _variety_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, sides in view.part(report, "variety").items():
        made, real = (sides[s].get("diversity") for s in ("synthetic", "real"))
        cells = [
            {"text": view.number(one["diversity"]),
             "interval": f"{view.number(one['diversity_low'])} to {view.number(one['diversity_high'])}"}
            for one in (sides["synthetic"], sides["real"])
        ]  # fmt: skip
        share = view.percent(made / real, 0) + " %" if made is not None and real else view.NA
        classes = {c["label"]: [sides[s].get(f"diversity_{c['label']}") for s in ("synthetic", "real")]
                   for c in view.class_entries(report)}  # fmt: skip
        shares = {c: a / b for c, (a, b) in classes.items() if a is not None and b}
        poorest = min(shares, key=shares.__getitem__) if shares else ""
        least = f"{poorest} {view.percent(shares[poorest], 0)} %" if poorest else view.NA
        rows.append({"title": name.upper().replace("-ALEX", " (alex)").replace("-VGG", " (vgg)"), "cells": cells,
                     "share": share, "least": least})  # fmt: skip
    return rows


def _class_reasons(report: Mapping[str, Any]) -> list[str]:
    judged = next(iter(report["encoders"].values()), {})
    return [f"{label}: {one['reason']}" for label, one in view.part(judged, "per_class").items() if one.get("reason")]


def _labels(report: Mapping[str, Any], title: str, colour: str) -> dict[str, Any]:
    labels = report["labels"]
    if labels.get("reason"):
        return {"reason": labels["reason"]}
    panels = [figures.confusion(labels["confusion"], labels["classes"], f"{title}: asked for, and seen", colour)]
    if labels.get("confusion_real"):
        panels.append(figures.confusion(labels["confusion_real"], labels["classes"], "Real test", figures.INK))
    cells = [view.part(labels, side) for side in ("synthetic", "real", "hopeless")]
    rows = [{"title": "All classes", "total": True, "cells": [_share(c, "label_consistency") for c in cells]}]
    rows += [
        {"title": name, "total": False, "cells": [_share(c, f"label_consistency_{name}") for c in cells]}
        for name in labels["classes"]
        if f"label_consistency_{name}" in cells[0]
    ]
    return {"panels": panels, "rows": rows}


def _share(scores: Mapping[str, Any], name: str) -> dict[str, str]:
    value, low, high = (scores.get(n) for n in (name, f"{name}_low", f"{name}_high"))
    interval = "" if low is None or high is None else f"{view.percent(low, 0)} to {view.percent(high, 0)}"
    return {"text": view.NA if value is None else f"{view.percent(value, 0)} %", "interval": interval}


def _maps(shown: Shown, classes: list[dict[str, str]], titles: Mapping[str, str]) -> list[Panel]:
    if not shown.map.get("embedding"):
        return []
    return view.embedding_panels(shown.map["embedding"], shown.map["embedding_labels"], classes, titles)


def _extremes(shown: Shown) -> list[dict[str, Any]]:
    words = {"worst": "Farthest from any real tile", "best": "Closest to real tiles"}
    groups = [(tile[None], 1) for kind in words for tile, _, _ in shown.tiles.get(kind, [])]
    uris = iter(encode_sheets(groups, _SHEET_BUDGET).uris)
    return [
        {
            "title": title,
            "tiles": [{"uri": next(uris), "distance": d, "label": c} for _, d, c in shown.tiles.get(kind, [])],
        }
        for kind, title in words.items()
    ]


def _pairs(report: Mapping[str, Any], shown: Shown, title: str) -> list[dict[str, Any]]:
    groups = pair_groups({report["source"]: shown.pairs}, {report["source"]: title})
    found = groups[0]["pairs"] if groups else []
    return [pair | {"alarm": alarm} for pair, alarm in zip(found, shown.alarms, strict=False)]


def _stain_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    staining = report["staining"]
    if staining.get("reason"):
        return []
    made, real = staining["synthetic"], staining["real"]
    rows = []
    for name, (title, meaning) in _STAIN_ROWS.items():
        form = (lambda v: f"{view.percent(v)} %") if name == "patients_outside" else (lambda v: view.number(v, 3))
        typical = made.get(f"{name}_typical")
        one = "about 1 %" if name == "patients_outside" else view.number(typical)
        rows.append({"title": title, "meaning": meaning, "made": form(made[name]), "real": form(real[name]),
                     "typical": one})  # fmt: skip
    return rows


def _nuclei_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = report["nuclei"]
    rows = []
    for name, (title, unit) in _NUCLEI.items():
        cells = [view.part(found, side) for side in ("synthetic", "real", "hopeless")]
        rows.append({
            "title": title, "unit": unit,
            "means": [view.number(c.get(f"nuclei_{name}_mean")) for c in cells],
            "distances": [view.number(c.get(f"nuclei_{name}_w1")) for c in cells],
        })  # fmt: skip
    return rows
