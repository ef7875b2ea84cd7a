"""From the numbers of a calibration to its page and its diagrams."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from histosynth.core.files import write_json, write_text
from histosynth.study import figures
from histosynth.study.figures import HELPS, HURTS, INK, Panel, Point
from histosynth.study.report import page_template
from histosynth.study.view import pretty

TITLES = {
    "none": "As it is",
    "temperature": "Temperature scaling",
    "vector": "Vector scaling",
    "isotonic": "Isotonic regression",
}
RULES = {
    "lac": ("LAC", "one limit on the probability: the smallest sets on average"),
    "aps": ("APS", "adds classes from the most probable down: larger sets for harder tiles"),
    "raps": ("RAPS", "the same with a penalty for long sets"),
}
_SHADES = {"none": "#3a4652", "temperature": "#1f6391", "vector": "#6b4c9a", "isotonic": "#b4531a"}
_ROWS = (
    ("ece", "ECE", "confidence against accuracy, bins of equal width"),
    ("ece_debiased", "ECE, debiased", "less what few tiles alone would cause"),
    ("ece_mass", "ECE, equal mass", "bins with as many tiles each"),
    ("classwise_ece", "Class-wise ECE", "the same for every class's probability, mean"),
    ("mce", "MCE", "the worst bin; its interval is too narrow"),
    ("brier", "Brier score", "squared distance of the probabilities from the truth"),
    ("brier_reliability", "of it: reliability", "what calibration could remove"),
    ("nll", "Log-likelihood, negative", "nats a tile"),
)
_SHARES = (("accuracy", "Accuracy", "isotonic and vector scaling may change it"),)
_DECISIVE = "ece_debiased"


def write_calibration(folder: Path, report: dict[str, Any]) -> Path:
    """Write calibration.json, a PNG for every reliability diagram, and calibration.html; returns the page's path.

    Raises:
        RunError: the folder cannot be written.
    """
    report["sentence"] = sentence(report)
    write_json(folder / "calibration.json", report)
    write_text(folder / "calibration.html", page_template("calibration.html.j2").render(context(report, folder)))
    return folder / "calibration.html"


def sentence(report: Mapping[str, Any]) -> str:
    """What calibration did on the first split that was measured, in words that its interval allows."""
    name, split = next((n, s) for n, s in report["splits"].items() if not s["fitted"])
    chosen, fit = report["chosen"], report["fit"]["split"]
    if chosen == "none":
        return (
            f"No calibrator is clearly better than the plain softmax on patients of {fit} that it was not fitted on. "
            f"{_error(split, 'none', name)}"
        )
    difference = split["differences"][chosen][_DECISIVE]
    low, high = difference["low"], difference["high"]
    before = split["measures"]["none"][_DECISIVE]["value"]
    after = split["measures"][chosen][_DECISIVE]["value"]
    claim = "No evidence that it changes the calibration error on"
    if low is not None and high < 0:
        claim = "It lowers the calibration error on"
    elif low is not None and low > 0:
        claim = "It raises the calibration error on"
    span = "no interval can be had"
    if low is not None:
        interval = f"{100 * split['level']:g} % interval {_signed(low)} to {_signed(high)}"
        span = f"difference {_signed(difference['value'])}, {interval}"
    return (
        f"For patients of {fit} that it was not fitted on, {_title(chosen).lower()} is the simplest calibrator "
        "that is about as good as the best. "
        f"{claim} {name}: {before:.3f} before, {after:.3f} after ({span}; {split['tiles']} tiles"
        f"{_patients(split)}). {_temper(report)}"
    )


def context(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the template needs; draws the diagrams."""
    measured = {name: split for name, split in report["splits"].items() if not split["fitted"]}
    level = f"{100 * report['settings']['level']:g} %"
    return {
        "r": report,
        "level": level,
        "goal": f"{100 * (1 - report['settings']['alpha']):g} %",
        "splits": [_split(name, split, report, folder) for name, split in measured.items()],
        "glance": _glance(report, measured),
        "base": _title(report["conformal"]["probabilities"]).lower(),
        "worth": [
            {"title": _title(kind), "value": f"{value:.4f}", "chosen": kind == report["chosen"]}
            for kind, value in report["fit"]["cross_validated_nll"].items()
        ],
        "counts": [
            {"name": label, "cells": [s["counts"][label] for s in report["splits"].values()]}
            for label in report["classes"]
        ],
    }


def _split(name: str, split: Mapping[str, Any], report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    diagrams = []
    for kind, bins in split["reliability"].items():
        rows = [{"count" if k == "tiles" else k: v for k, v in row.items()} for row in bins]
        png = folder / f"reliability-{_file(name)}-{kind}.png"
        error = split["measures"][kind]["ece"]["value"]
        title = f"{_title(kind)}: ECE {error:.3f}"
        diagrams.append(figures.reliability(rows, title, _SHADES.get(kind, figures.MUTED), error, png))
    kinds = list(split["measures"])
    rows = []
    for key, title, meaning in (*_ROWS, *_SHARES):
        form = _percent if (key, title, meaning) in _SHARES else _three
        cells = [
            {
                "text": form(split["measures"][kind][key]["value"]),
                "interval": _interval(split["measures"][kind][key], form),
                "word": "" if kind == "none" else _word(split["differences"][kind][key], key),
            }
            for kind in kinds
        ]
        rows.append({"title": title, "meaning": meaning, "cells": cells})
    return {
        "name": name,
        "tiles": split["tiles"],
        "patients": split["patients"],
        "notes": split["notes"],
        "diagrams": diagrams,
        "kinds": [_title(kind) for kind in kinds],
        "rows": rows,
        "sets": [_sets(rule, split) for rule in RULES],
        "classes": [_class_row(k, label, split) for k, label in enumerate(report["classes"])],
        "coverage": _coverage_panel(name, split, report),
    }


def _sets(rule: str, split: Mapping[str, Any]) -> dict[str, Any]:
    both = [split["conformal"][rule], split["conformal"][f"{rule}-by-class"]]
    cells = []
    for found in both:
        sizes = found["sizes"]
        cells += [
            {"text": _percent(found["coverage"]["value"]), "interval": _interval(found["coverage"], _percent)},
            {
                "text": f"{found['size']['value']:.2f}",
                "interval": f"{100 * sizes[0]:.0f} % empty, {100 * sizes[1]:.0f} % one class",
            },
        ]
    return {"title": RULES[rule][0], "meaning": RULES[rule][1], "cells": cells}


def _class_row(k: int, label: str, split: Mapping[str, Any]) -> dict[str, Any]:
    cells = []
    for rule in ("aps", "aps-by-class"):
        own = split["conformal"][rule]["per_class"][k]
        size = "n/a" if own["size"] is None else f"{own['size']:.2f}"
        interval = _interval(own["coverage"], _percent)
        cells += [{"text": _percent(own["coverage"]["value"]), "interval": interval}, {"text": size, "interval": ""}]
    return {"label": label, "tiles": split["counts"][label], "cells": cells}


def _coverage_panel(name: str, split: Mapping[str, Any], report: Mapping[str, Any]) -> Panel:
    points = []
    for k, label in enumerate(report["classes"]):
        for rule, words in (("aps", "one limit"), ("aps-by-class", "a limit a class")):
            own = split["conformal"][rule]["per_class"][k]["coverage"]
            value, low, high = (None if own[key] is None else 100 * own[key] for key in ("value", "low", "high"))
            shade = INK if rule == "aps" else figures.source_style("diffusion")[0]
            points.append(Point(f"{label}, {words}", value, low, high, shade, hollow=rule == "aps"))
    goal = 100 * (1 - report["settings"]["alpha"])
    return figures.dot_plot(points, f"Coverage of APS sets by class, {name}", "sets that hold the true class, %", goal)


def _glance(report: Mapping[str, Any], measured: Mapping[str, Any]) -> list[dict[str, str]]:
    boxes = []
    for name, split in measured.items():
        for kind in dict.fromkeys(("none", report["chosen"])):
            found = split["measures"][kind]["ece"]
            boxes.append({"title": f"ECE on {name}, {_title(kind).lower()}", "value": _three(found["value"]),
                          "note": _interval(found, _three) or "no interval"})  # fmt: skip
        sets = split["conformal"]["aps"]
        boxes.append({"title": f"APS sets on {name}", "value": _percent(sets["coverage"]["value"]),
                      "note": f"hold the true class; {sets['size']['value']:.2f} classes a set"})  # fmt: skip
    temperature = report["calibrators"]["temperature"]["temperature"]
    boxes.append({"title": "Temperature", "value": f"{temperature:.2f}", "note": _sureness(temperature)})
    return boxes


def _word(difference: Mapping[str, Any], key: str) -> dict[str, str] | str:
    low, high = difference["low"], difference["high"]
    if low is None or low <= 0 <= high:
        return ""
    better = (high < 0) != (key == "accuracy")
    return {"text": "better" if better else "worse", "colour": HELPS if better else HURTS}


def _title(kind: str) -> str:
    return TITLES.get(kind, pretty(kind))


def _error(split: Mapping[str, Any], kind: str, name: str) -> str:
    found = split["measures"][kind][_DECISIVE]
    span = f" ({_interval(found, _three)})" if found["low"] is not None else ""
    return f"Its calibration error on {name} is {found['value']:.3f}{span}."


def _temper(report: Mapping[str, Any]) -> str:
    temperature = report["calibrators"]["temperature"]["temperature"]
    return f"The best temperature is {temperature:.2f}: {_sureness(temperature)}."


def _sureness(temperature: float) -> str:
    if 0.97 < temperature < 1.03:
        return "the confidences are about right"
    return "the network is too sure" if temperature > 1 else "the network is too modest"


def _patients(split: Mapping[str, Any]) -> str:
    return "" if split["patients"] is None else f", {split['patients']} patients"


def _interval(found: Mapping[str, Any], form: Any) -> str:
    return "" if found["low"] is None else f"{form(found['low'])} to {form(found['high'])}"


def _three(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _file(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name) or "split"
