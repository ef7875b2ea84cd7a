"""From the report's dict to what the page shows: rows of words and panels, and no HTML.

Everything here puts up with missing parts: an experiment that lost a generator still gets its page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from histosynth.study import figures
from histosynth.study.figures import Panel, Point, source_style

NA = "n/a"
_SIGNS = {"o": "●○", "s": "■□", "D": "◆◇", "^": "▲△", "v": "▼▽", "P": "✚✚", "X": "✖✖"}
_SHARES = {"balanced_accuracy", "macro_f1", "accuracy"}
SCORE_TITLES = {
    "balanced_accuracy": ("Balanced accuracy", "% ↑"),
    "macro_f1": ("Macro F1", "% ↑"),
    "accuracy": ("Accuracy", "% ↑"),
    "auroc": ("AUROC", "↑"),
    "ece": ("ECE", "raw ↓"),
    "ece_calibrated": ("ECE", "scaled ↓"),
    "brier": ("Brier score", "raw ↓"),
    "brier_calibrated": ("Brier score", "scaled ↓"),
}
FIDELITY_TITLES = {
    "frechet": ("Fréchet distance", "how far the synthetic set lies from real tiles as a whole"),
    "kid": ("Kernel distance (KID)", "the same, without bias when tiles are few"),
    "cmmd": ("Kernel distance (CMMD)", "the same with a Gaussian kernel"),
    "precision": ("Precision", "share of synthetic tiles that lie among real ones: do they look right?"),
    "recall": ("Recall", "share of real tiles that lie among synthetic ones: is anything missing?"),
    "density": ("Density", "how deep among the real tiles the synthetic ones lie"),
    "coverage": ("Coverage", "share of real neighbourhoods that hold a synthetic tile"),
    "vendi_ratio": ("Variety (Vendi ratio)", "effective number of different tiles, relative to real"),
    "spread_ratio": ("Spread", "mean distance between two tiles, relative to real"),
}
COPY_TITLES = {
    "nn_ratio": ("Distance to the closest training tile", "relative to real tiles never trained on", "about 1"),
    "nn_below_5pct": ("Suspiciously close", "share closer than the closest 5 % of such real tiles", "about 5 %"),
    "authenticity": ("Authenticity", "share farther from their closest training tile than that tile is from its "
                     "own closest", "about 50 % or more"),
    "pixel_alarms": ("Pixel alarms", "share that resembles a training tile pixel by pixel, turned or mirrored",
                     "about 1 %"),
    "pixel_equal": ("Exact copies", "share equal to a training tile in every pixel", "0 %"),
}  # fmt: skip
COLOUR_TITLES = {
    "colour_distance": ("All channels", "mean distance over the channels, in standard deviations of the real tiles"),
    "haematoxylin_w1": ("Haematoxylin", "optical density"),
    "eosin_w1": ("Eosin", "optical density"),
    "lightness_w1": ("Lightness", "CIE L*"),
}
_PER_CLASS = ("frechet", "precision", "coverage")


def mark(source: str, generators: Sequence[str] = ()) -> dict[str, str]:
    """The colour and the character that stand for a source."""
    colour, marker = source_style(source, generators)
    return {"colour": colour, "sign": _SIGNS[marker][0]}


def sign(marker: str, hollow: bool = False) -> str:
    """The character that stands for a marker in text."""
    return _SIGNS[marker][hollow]


def arm_style(arm: str, generators: Sequence[str]) -> tuple[str, str, bool]:
    """Colour, marker, hollow: hollow for what has no real tiles, or real tiles without augmentation."""
    for name in generators:
        if arm == f"real_{name}":
            return (*source_style(name, generators), False)
        if arm == f"{name}_only":
            return (*source_style(name, generators), True)
    return (*source_style("real"), arm == "real")


def arm_mark(arm: str, generators: Sequence[str]) -> dict[str, str]:
    """The colour and the character that stand for an arm."""
    colour, marker, hollow = arm_style(arm, generators)
    return {"colour": colour, "sign": _SIGNS[marker][hollow]}


def generator_names(report: Mapping[str, Any], samples: Mapping[str, Any] | None = None) -> list[str]:
    """Every generator that any part of the report speaks of, in the report's order."""
    named: list[str] = [
        *(part(report, "generators")),
        *(part(report, "fidelity", "generators")),
        *(v["generator"] for v in report.get("verdicts") or [] if v.get("generator")),
        *(part(report, "costs", "generators")),
        *(s for s in samples or {} if s != "real"),
    ]
    return list(dict.fromkeys(named))


def part(report: Mapping[str, Any], *keys: str) -> Any:
    """A nested section, or an empty dict when any level of it is missing."""
    here: Any = report
    for key in keys:
        here = here.get(key) if isinstance(here, Mapping) else None
    return here if here is not None else {}


def class_entries(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Label, name and colour of every class; what is no colour becomes grey, since styles are made of it."""
    found = []
    for entry in part(report, "data").get("classes") or []:
        colour = str(entry.get("colour"))
        safe = colour if re.fullmatch(r"#[0-9a-fA-F]{6}", colour) else figures.MUTED
        found.append({"label": entry["label"], "name": entry.get("name") or entry["label"], "colour": safe})
    return found


def percent(value: float | None, digits: int = 1) -> str:
    """0.713 -> "71.3"."""
    return NA if value is None else f"{100 * value:.{digits}f}"


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, thousands separated."""
    if value is None:
        return NA
    whole = isinstance(value, int) or abs(value) >= 10**digits
    return (f"{value:,.0f}" if whole else f"{value:#.{digits}g}".rstrip(".")).replace("-", "−")


def signed(value: float | None) -> str:
    """0.021 -> "+2.1", with a true minus sign."""
    return NA if value is None else f"{100 * value:+.1f}".replace("-", "−")


def duration(seconds: float | None) -> str:
    """90.0 -> "1 min 30 s"."""
    if seconds is None:
        return NA
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def score_cell(name: str, score: Mapping[str, Any] | None) -> dict[str, str]:
    """Text and interval of a score; shares in percent, all others with three decimals."""
    form = percent if name in _SHARES else (lambda v: NA if v is None else f"{v:.3f}")
    score = score or {}
    low, high = score.get("low"), score.get("high")
    interval = f"{form(low)} to {form(high)}" if low is not None and high is not None else ""
    reason = score.get("reason") or score.get("mean_reason") or ""
    return {"text": form(score.get("mean")), "interval": interval, "reason": reason}


def level(interval: str | None) -> str:
    """The confidence level of an interval's description, such as "95 % intervals"."""
    found = re.match(r"\s*(\d+(?:\.\d+)?)\s*%", interval or "")
    return f"{found[1]} % intervals" if found else "intervals"


def rare_classes(train: Mapping[str, int]) -> set[str]:
    """Classes with less than half of an equal share of the training tiles."""
    return {label for label, n in train.items() if n < 0.5 * sum(train.values()) / max(len(train), 1)}


def verdict_forest(report: Mapping[str, Any], generators: Sequence[str]) -> Panel | None:
    """The forest plot of what decides the verdict: each generator added, and real tiles not augmented."""
    utility = part(report, "utility")
    titles = {arm["name"]: arm["title"] for arm in utility.get("arms") or []}
    wanted = [f"real_{g}" for g in generators] + ["real"]
    points = []
    for name in wanted:
        for row in utility.get("differences") or []:
            if row["arm"] == name and is_primary(row["metric"]):
                colour, marker, hollow = arm_style(name, generators)
                value, low, high = _hundredfold(row)
                points.append(Point(titles.get(name, name), value, low, high, colour, marker, hollow))
    if not points:
        return None
    interval = level(part(utility, "protocol").get("interval"))
    return figures.forest(points, "difference in balanced accuracy, percentage points", interval)


def is_primary(metric: str) -> bool:
    """Whether a metric's name means balanced accuracy, however it is spelt."""
    return metric.replace(" ", "_").lower() == "balanced_accuracy"


def arms_panel(report: Mapping[str, Any], generators: Sequence[str], baseline: str) -> Panel | None:
    """Balanced accuracy of every arm."""
    points, reference = [], None
    for arm in part(report, "utility").get("arms") or []:
        score = part(arm, "scores", "balanced_accuracy")
        value, low, high = _hundredfold(score)
        seeds = [s["balanced_accuracy"] for s in arm.get("per_seed") or [] if s.get("balanced_accuracy") is not None]
        colour, marker, hollow = arm_style(arm["name"], generators)
        dots = tuple(100 * s for s in seeds) if len(seeds) > 1 else ()
        points.append(Point(arm["title"], value, low, high, colour, marker, hollow, dots))
        reference = value if arm["name"] == baseline else reference
    if not points:
        return None
    return figures.dot_plot(points, "Balanced accuracy of each training set", "balanced accuracy, %", reference)


def _hundredfold(score: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    value, low, high = (None if score.get(k) is None else 100 * score[k] for k in ("mean", "low", "high"))
    return value, low, high


def chosen_arms(report: Mapping[str, Any], generators: Sequence[str], baseline: str) -> list[dict[str, Any]]:
    """The arms worth a picture of their own: the baseline, and real tiles with each generator."""
    arms = part(report, "utility").get("arms") or []
    wanted = {baseline, *(f"real_{g}" for g in generators)}
    return [arm for arm in arms if arm["name"] in wanted] or arms[:1]


def baseline_of(report: Mapping[str, Any]) -> str:
    """The arm that the verdict compares with."""
    rows = part(report, "utility").get("differences") or []
    named = part(report, "utility", "protocol").get("baseline")
    return named or next((row["baseline"] for row in rows if is_primary(row["metric"])), "real")


def fidelity_panels(judged: Mapping[str, Any], generators: Mapping[str, str]) -> list[Panel]:
    """One panel a score: real training tiles (the floor) and each generator, against real test tiles."""
    panels = []
    names = dict.fromkeys(n for one in judged.values() for n in part(one, "all", "scores"))
    for name in names:
        scores = {g: part(judged[g], "all", "scores", name) for g in judged}
        floors: dict[tuple[float | None, ...], Point] = {}
        made = []
        for g, s in scores.items():
            colour, marker = source_style("real")
            own = (s.get("floor"), s.get("floor_low"), s.get("floor_high"))
            # with other numbers of tiles a side, each generator has its own floor
            floors.setdefault(own, Point(f"real, N of {generators.get(g, g)}", *own, colour, marker))
            colour, marker = source_style(g, list(judged))
            made.append(Point(generators.get(g, g), s.get("value"), s.get("low"), s.get("high"), colour, marker))
        if len(floors) == 1:
            floors = {own: replace(point, label="real (floor)") for own, point in floors.items()}
        points = [*floors.values(), *made]
        better = next((s["better"] for s in scores.values() if s.get("better")), "")
        panels.append(figures.metric_panel(points, FIDELITY_TITLES.get(name, (pretty(name), ""))[0], better))
    return panels


def fidelity_rows(judged: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a score; for each generator its value, its floor, and whether the two can be told apart."""
    rows = []
    for name in dict.fromkeys(n for one in judged.values() for n in part(one, "all", "scores")):
        scores = [part(judged[g], "all", "scores", name) for g in judged]
        title, meaning = FIDELITY_TITLES.get(name, (pretty(name), ""))
        better = next((s["better"] for s in scores if s.get("better")), "")
        arrow = {"lower": "↓ lower is better", "higher": "↑ higher is better", "near one": "best near 1"}.get(
            better, ""
        )
        cells = [fidelity_cell(score, better) for score in scores]
        rows.append({"title": title, "meaning": meaning, "arrow": arrow, "cells": cells})
    return rows


def fidelity_cell(score: Mapping[str, Any], better: str) -> dict[str, str]:
    """Value and floor of one score with their intervals, and how they compare."""

    def interval(low: float | None, high: float | None) -> str:
        return "" if low is None or high is None else f"{number(low)} to {number(high)}"

    low, high = score.get("low"), score.get("high")
    floor_low, floor_high = score.get("floor_low"), score.get("floor_high")
    against = ""
    if low is not None and high is not None and floor_low is not None and floor_high is not None:
        worse = {"lower": low > floor_high, "higher": high < floor_low}.get(
            better, low > floor_high or high < floor_low
        )
        against = "apart from real" if worse else "as real"
    return {
        "value": number(score.get("value")), "interval": interval(low, high),
        "floor": number(score.get("floor")), "floor_interval": interval(floor_low, floor_high),
        "against": against, "reason": score.get("reason") or "",
    }  # fmt: skip


def class_rows(judged: Mapping[str, Any], labels: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the scores shown for single classes, and a row a class with a cell for each generator and score."""
    known = dict.fromkeys(
        name for one in judged.values() for c in part(one, "per_class").values() for name in part(c, "scores")
    )
    names = [n for n in _PER_CLASS if n in known] or list(known)[:3]
    rows = []
    for label in labels:
        cells = []
        for one in judged.values():
            found = part(one, "per_class", label)
            scores = part(found, "scores")
            group = [fidelity_cell(scores[n], scores[n].get("better", "")) if n in scores else None for n in names]
            cells.append({"n": found.get("n"), "reason": found.get("reason") or "", "scores": group})
        rows.append({"label": label, "cells": cells})
    return [FIDELITY_TITLES.get(n, (pretty(n), ""))[0] for n in names], rows


def flat_rows(
    titles: Mapping[str, tuple[str, ...]], columns: Sequence[Mapping[str, Any]], shares: bool = False
) -> list[dict[str, Any]]:
    """Rows of plain numbers, for those titles that any column has."""
    rows = []
    for name, words in titles.items():
        if any(name in column for column in columns):
            cells = [
                f"{percent(c.get(name))}\u00a0%" if shares and name != "nn_ratio" and c.get(name) is not None
                else number(c.get(name))
                for c in columns
            ]  # fmt: skip
            rows.append({"title": words[0], "meaning": words[1], "expected": words[-1], "cells": cells})
    return rows


def embedding_panels(
    points: Mapping[str, np.ndarray], labels: Mapping[str, Any], classes: Sequence[Mapping[str, Any]],
    titles: Mapping[str, str],
) -> list[Panel]:  # fmt: skip
    """A map for each source, all to the same scale, the real tiles in grey behind."""
    colours = {c["label"]: c["colour"] for c in classes}
    maps = {s: np.asarray(p, float).reshape(-1, 2) for s, p in points.items()}
    together = np.concatenate(list(maps.values()))
    if not len(together):
        return []
    low, high = together.min(0), together.max(0)
    margin = 0.06 * np.maximum(high - low, 1e-9)
    backdrop = maps.get("real", together[:0])
    return [
        figures.embedding(own, label_names(labels.get(s, ()), len(own), classes), backdrop, colours,
                          titles.get(s, s), (low - margin, high + margin))
        for s, own in maps.items() if len(own)
    ]  # fmt: skip


def label_names(labels: Any, count: int, classes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Class labels of a map's points, whether given as names or as indices."""
    values = np.asarray(labels)
    if values.shape != (count,):
        return [""] * count
    if values.dtype.kind in "iu":
        return [classes[i]["label"] if 0 <= i < len(classes) else str(i) for i in values.tolist()]
    return [str(v) for v in values.tolist()]


def score_title(name: str) -> str:
    """What a classifier's score is called."""
    return SCORE_TITLES.get(name.replace(" ", "_"), (pretty(name),))[0]


def pretty(name: str) -> str:
    """A key as words."""
    text = name.replace("_", " ").strip()
    return text[:1].upper() + text[1:]
