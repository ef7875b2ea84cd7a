"""From what `assess` found to what the page shows: verdicts, panels and tables, and no HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from histosynth.study import figures, view
from histosynth.study.figures import Panel, Point
from histosynth.study.usefulness import charts, tables
from histosynth.study.usefulness.cautions import SEVERITIES
from histosynth.study.usefulness.charts import Line
from histosynth.study.usefulness.rows import (
    added,
    arm_of,
    here,
    in_percent,
    mark,
    pick,
    rare_first,
    style,
    tiles_named,
    where,
)

_SIGNS = {"helps": "▲", "hurts": "▼", "no relevant difference": "≈"}


def context(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the template needs."""
    plan = result["plan"]
    return {
        "r": result,
        "plan": plan,
        "level": f"{100 * result['settings']['level']:g} %",
        "margin": f"{100 * result['settings']['margin']:g}",
        "baseline": arm_of(result, result["primary"]["baseline"])["title"],
        "where": where(result),
        "cards": cards(result),
        "forest": forest(result),
        "glance": glance(result),
        "cautions": [
            {"severity": s, "title": title, "texts": [c["text"] for c in result["cautions"] if c["severity"] == s]}
            for s, title in SEVERITIES.items()
            if any(c["severity"] == s for c in result["cautions"])
        ],
        "curves": learning_panels(result),
        "worth": tables.worth_table(result),
        "shares": share_panel(result),
        "classes": class_panel(result),
        "recalls": tables.recall_table(result),
        "reliability": reliability_panels(result),
        "columns": tables.columns(result),
        "arms": tables.arms_table(result),
        "sets": tables.sets_table(result),
        "trts": tables.trts_table(result),
        "secondary": tables.secondary_table(result),
        "protocol": tables.protocol(result),
        "costs": tables.costs(result),
    }


def cards(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A verdict a generator."""
    found = []
    for spoken in result["verdicts"]:
        gains = result["gains"][spoken["generator"]]
        adjusted = f" (adjusted for {gains['looks']} comparisons)" if gains["looks"] > 1 else ""
        said = [
            f"Recall of {', '.join(gains[way])} {verb}{adjusted}."
            for way, verb in (("better", "rises"), ("worse", "falls"))
            if gains[way]
        ]
        found.append({
            **spoken, "mark": mark(result, arm_of(result, spoken["arm"])),
            "kind": spoken["word"] if spoken["word"] in ("helps", "hurts") else "none",
            "sign": _SIGNS.get(spoken["word"], "●"),
            "classes": " ".join(said) or f"For no single class is a change beyond chance{adjusted}.",
        })  # fmt: skip
    return found


def forest(result: Mapping[str, Any]) -> Panel | None:
    """Differences to the baseline where the verdict is taken, synthetic tiles alone left out: they are far off."""
    primary = result["primary"]
    rows = pick(result["differences"], against=primary["baseline"], set=primary["test"], metric=primary["metric"])
    points = []
    for row in here(result, rows):
        arm = arm_of(result, row["arm"])
        if arm["real"]:
            points.append(Point(added(result, arm), *in_percent(row), *style(result, arm)))
    points.sort(key=lambda point: point.hollow)  # what decides comes first
    level = f"{100 * result['settings']['level']:g} % intervals"
    return figures.forest(points, "difference in balanced accuracy, percentage points", level) if points else None


def glance(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The size of the experiment in a few boxes."""
    plan, primary = result["plan"], result["primary"]
    score = pick(result["scores"], arm=primary["baseline"], n=primary["n"], set=primary["test"])[0]
    value = score["scores"][primary["metric"]]["mean"]
    test = plan["sets"][0]
    trained = sum(plan["train_counts"].values())
    boxes = [
        ("Tested on", f"{test['tiles']:,} tiles", f"of {test['patients']:,} patients"),
        ("Real training tiles", f"{trained:,}", f"of {plan['train_patients']:,} patients"),
        ("Without synthetic tiles", f"{view.percent(value)} %", "balanced accuracy"),
        ("Seeds", str(len(result["seeds"])), "classifiers in each arm"),
        ("Classifiers", str(result["costs"]["cells"]), f"{plan['steps']:,} steps each"),
    ]
    return [{"title": title, "value": value, "note": note} for title, value, note in boxes]


def learning_panels(result: Mapping[str, Any]) -> list[Panel]:
    """Learning curves, a panel a generator with the baseline in each; none with one number of tiles."""
    primary, metric = result["primary"], result["primary"]["metric"]
    at = {point["n"]: point["tiles"] for point in result["worth"].get("baseline", [])}
    if len(at) < 2:
        return []

    def line(arm: Mapping[str, Any], label: str, **how: Any) -> Line | None:
        rows = [
            row
            for row in pick(result["scores"], arm=arm["name"], set=primary["test"])
            if row["n"] in at and row["share"] in (0, primary["share"])
        ]
        points = sorted((at[row["n"]], *in_percent(row["scores"][metric])) for row in rows)
        colour, marker, _ = style(result, arm)
        return Line(label, colour, marker, points, **how) if points else None

    base = line(arm_of(result, primary["baseline"]), "real only")
    groups = []
    for generator in result["plan"]["generators"]:
        lines = [base]
        for arm in result["plan"]["arms"]:
            if arm["real"] and arm["generators"] == [generator["name"]]:
                few = arm["selected"] or bool(arm.get("classes"))
                kind = "selected" if arm["selected"] else "for rare classes" if few else "with synthetic tiles"
                lines.append(line(arm, kind, quiet=few, band=not few))
        groups.append((generator["title"], [one for one in lines if one]))
    every = [v for _, lines in groups for one in lines for p in one.points for v in p[1:] if v is not None]
    edge = 0.05 * (max(every) - min(every)) + 0.5
    limits = (min(every) - edge, min(max(every) + edge, 100.5))
    ticks = sorted((x, tiles_named(n)) for n, x in at.items())
    return [charts.learning_curves(lines, title, ticks, limits, len(groups) < 3) for title, lines in groups]


def share_panel(result: Mapping[str, Any]) -> Panel | None:
    """The difference to the baseline against the share of synthetic tiles; None with one share."""
    primary = result["primary"]
    lines = []
    for spoken in result["verdicts"]:
        rows = pick(result["differences"], arm=spoken["arm"], n=primary["n"], set=primary["test"],
                    metric=primary["metric"], against=primary["baseline"])  # fmt: skip
        points = sorted((100 * row["share"], *in_percent(row)) for row in rows)
        if len(points) > 1:
            colour, marker, _ = style(result, arm_of(result, spoken["arm"]))
            lines.append(Line(spoken["title"], colour, marker, [(0.0, 0.0, 0.0, 0.0), *points]))
    tiles = "all real tiles" if primary["n"] == 0 else f"{primary['n']} real tiles a class"
    return charts.share_curves(lines, f"How many synthetic tiles? ({tiles})") if lines else None


def class_panel(result: Mapping[str, Any]) -> Panel | None:
    """Differences in recall of every class for each generator; filled where sure after adjustment."""
    plan, sure = result["plan"], 1 - result["settings"]["level"]
    series = []
    for spoken in result["verdicts"]:
        rows = {row["class"]: row for row in pick(result["differences"], family="classes", arm=spoken["arm"])}
        colour, marker, _ = style(result, arm_of(result, spoken["arm"]))
        points = []
        for label in rare_first(plan):
            row = rows.get(label)
            value, low, high = in_percent(row) if row else (None, None, None)
            hollow = not row or row["p_adjusted"] is None or row["p_adjusted"] >= sure
            points.append(Point(label, value, low, high, colour, marker, hollow))
        series.append((spoken["title"], points))
    names = [f"{label} (rare)" if label in plan["rare"] else label for label in rare_first(plan)]
    return charts.class_gains(names, series) if series else None


def reliability_panels(result: Mapping[str, Any]) -> list[Panel]:
    """Reliability diagrams of the baseline and of each generator's arm."""
    panels = []
    for one in result["reliability"]:
        arm = arm_of(result, one["arm"])
        row = here(result, pick(result["scores"], arm=one["arm"], set=result["primary"]["test"]))[0]
        title = added(result, arm)
        panels.append(figures.reliability(one["bins"], title, style(result, arm)[0], row["scores"]["ece"]["mean"]))
    return panels
