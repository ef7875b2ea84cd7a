"""The charts of the overview of a tile set: plain numbers in, a `Panel` out.

No chart tells classes apart by colour alone: each class has its own row or panel with its name. Dots of the colour
clouds have the colour of the tiles themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from histosynth.study.figures import (
    HALF,
    HURTS,
    INK,
    MUTED,
    PALE,
    RULE,
    THIRD,
    Panel,
    drawing,
    panel_title,
    shorten,
    text_inches,
)
from histosynth.study.view import number, pretty

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# dark to light, so that the splits differ without colour
SPLIT_SHADES = {"train": "#1f4e79", "val": "#6fa3cf", "test": "#d0a14a", "": "#8c979f"}
HAEMATOXYLIN, EOSIN = "#3b3f9e", "#c2487e"
_LOGARITHMIC = ("lap_var", "tenengrad", "focus_tissue", "noise", "block_spatial")
_PITCH = 0.27  # inches a row


def counts(classes: Sequence[Mapping[str, Any]], unit: str, splits: Sequence[str]) -> Panel:
    """Tiles or patients of each class, a bar a class, a shade a split.

    Args:
        classes: {"label", unit: {split: count}} for each class.
        unit: "tiles" or "patients".
        splits: the order of the shades.
    """
    labels = [shorten(c["label"], 16) for c in classes]
    numbers = np.array([[c[unit].get(s, 0) for s in splits] for c in classes], dtype=float)
    totals = numbers.sum(1)
    texts = [f"{t:,.0f}" for t in totals]
    left = max(map(text_inches, labels), default=0) + 0.24
    right = max(map(text_inches, texts), default=0) + 0.2
    height = 0.4 + _PITCH * len(labels) + 0.42
    with drawing(HALF, height, left=left, right=right, bottom=0.42, top=0.4) as (figure, panel):
        axes = figure.subplots()
        start = np.zeros(len(labels))
        for split, column in zip(splits, numbers.T, strict=True):
            axes.barh(range(len(labels)), column, 0.68, left=start, color=SPLIT_SHADES.get(split, MUTED),
                      label=split or unit, edgecolor="white", linewidth=0.6)  # fmt: skip
            start += column
        for row, (total, text) in enumerate(zip(totals, texts, strict=True)):
            axes.annotate(text, (total, row), xytext=(5, 0), textcoords="offset points", va="center")
        _class_axis(axes, labels)
        axes.locator_params(axis="x", nbins=5)
        panel_title(axes, f"{pretty(unit)} of each class")
        if len(splits) > 1:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=len(splits), frameon=False, fontsize=8.5,
                        handlelength=0.9, handletextpad=0.4, columnspacing=1.1, borderaxespad=0.25)  # fmt: skip
        words = "; ".join(
            f"{c['label']}: " + ", ".join(f"{c[unit].get(s, 0):,} {s}".strip() for s in splits) for c in classes
        )
        panel["alt"] = f"{pretty(unit)} of each class. {words}."
    return Panel(**panel)


def distribution(metric: str, title: str, rows: Sequence[Mapping[str, Any]]) -> Panel:
    """One quality metric: a row a class with its spread, and its limits.

    Args:
        metric: its key; some have a logarithmic scale.
        title: its name.
        rows: {"label", "quantiles": values at 1, 25, 50, 75 and 99 %, "low": limit or None, "high": limit or None}.
    """
    labels = [shorten(r["label"], 12) for r in rows]
    left = max(map(text_inches, labels), default=0) + 0.24
    height = 0.34 + 0.24 * len(rows) + 0.34
    with drawing(THIRD, height, left=left, right=0.2, bottom=0.34, top=0.34) as (figure, panel):
        axes = figure.subplots()
        spread = np.array([r["quantiles"] for r in rows], dtype=float)
        low, high = float(spread.min()), float(spread.max())
        limits = [v for r in rows for v in (r["low"], r["high"]) if v is not None]
        logarithmic = metric in _LOGARITHMIC and low > 0 and high / low > 20
        # a limit far away from all tiles would squeeze them to a line: only limits that are near are in view
        reach = (high / low) ** 0.35 if logarithmic else max(0.35 * (high - low), 1e-3 * max(abs(high), 1e-9))
        ends = (low / reach, high * reach) if logarithmic else (low - reach, high + reach)
        inside = [v for v in limits if ends[0] <= v <= ends[1]]
        shown = min([low, *inside]), max([high, *inside])
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(_tick)
            axes.xaxis.set_minor_formatter("")
            step = (shown[1] / shown[0]) ** 0.05
            axes.set_xlim(shown[0] / step, shown[1] * step)
        else:
            step = max(0.05 * (shown[1] - shown[0]), 0.02 * abs(shown[1]), 1e-3)
            axes.set_xlim(shown[0] - step, shown[1] + step)
            axes.locator_params(axis="x", nbins=4)
            axes.xaxis.set_major_formatter(
                lambda value, _: f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"
            )
        for row, (r, q) in enumerate(zip(rows, spread, strict=True)):
            axes.plot((q[0], q[4]), (row, row), color=MUTED, linewidth=1)
            axes.plot((q[1], q[3]), (row, row), color=SPLIT_SHADES["train"], linewidth=5, solid_capstyle="butt")
            axes.plot(q[2], row, marker="o", markersize=4.2, color="white", markeredgecolor=INK, linestyle="")
            for limit, side in ((r["low"], 0), (r["high"], 1)):
                if limit is not None:
                    _limit(axes, limit, side, row)
        _class_axis(axes, labels)
        panel_title(axes, title)
        words = "; ".join(
            f"{r['label']}: median {number(float(r['quantiles'][2]))}"
            + (f", at least {number(r['low'])}" if r["low"] is not None else "")
            + (f", at most {number(r['high'])}" if r["high"] is not None else "")
            for r in rows
        )
        panel["alt"] = f"{title}, spread of each class with its limits. {words}."
    return Panel(**panel)


def _tick(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _limit(axes: Axes, limit: float, side: int, row: int) -> None:
    low, high = axes.get_xlim()
    if not low <= limit <= high:
        return
    ends = (low, limit) if side == 0 else (limit, high)
    axes.fill_between(ends, row - 0.42, row + 0.42, color=HURTS, alpha=0.10, linewidth=0)
    axes.plot((limit, limit), (row - 0.42, row + 0.42), color=HURTS, linewidth=1.5)


def cloud(label: str, points: np.ndarray, backdrop: np.ndarray, limits: Sequence[tuple[float, float]]) -> Panel:
    """Mean colours of one class over those of all classes, a dot a patient.

    Args:
        label: the class.
        points: mean RGB of each patient's tiles of that class, float [n, 3], 0 to 255.
        backdrop: the same of all classes.
        limits: of both axes, see `colour_plane`.
    """
    with drawing(2.62, 2.62, left=0.64, right=0.08, bottom=0.45, top=0.32) as (figure, panel):
        axes = figure.subplots()
        axes.scatter(*colour_plane(backdrop).T, s=7, color="#dfe3e6", linewidths=0, rasterized=True)
        shades = np.clip(points / 255, 0, 1)
        axes.scatter(*colour_plane(points).T, s=26, c=shades, edgecolors=INK, linewidths=0.45, rasterized=True)
        middle = points.mean(0)
        x, y = colour_plane(middle[None])[0]
        axes.plot(x, y, marker="+", markersize=13, markeredgewidth=3.4, color="white")
        axes.plot(x, y, marker="+", markersize=12, markeredgewidth=1.6, color=INK)
        axes.set(xlim=limits[0], ylim=limits[1], xlabel="brightness", ylabel="red less blue")
        axes.locator_params(nbins=4)
        axes.grid(color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        panel_title(axes, shorten(label, 26))
        red, green, blue = (f"{v:.0f}" for v in middle)
        panel["alt"] = f"Mean colours of class {label}: {len(points)} patients, on average {red} {green} {blue}."
    return Panel(**panel)


def colour_plane(rgb: np.ndarray) -> np.ndarray:
    """Brightness (the mean of the channels) and red less blue of RGB [n, 3]: float [n, 2].

    The channels themselves go up and down together, so that one against the other is little more than a line.
    """
    return np.stack([rgb.mean(1), rgb[:, 0] - rgb[:, 2]], axis=1)


def stains(haematoxylin: np.ndarray, eosin: np.ndarray) -> Panel:
    """Stain vectors of each patient as two angles, [n, 2] in degrees each."""
    with drawing(HALF, 4.0, left=0.6, right=0.12, bottom=0.5, top=0.32) as (figure, panel):
        axes = figure.subplots()
        for points, colour, marker, name in (
            (haematoxylin, HAEMATOXYLIN, "o", "haematoxylin"),
            (eosin, EOSIN, "s", "eosin"),
        ):
            axes.scatter(points[:, 0], points[:, 1], s=17, color=colour, marker=marker, alpha=0.6, linewidths=0,
                         label=name, rasterized=True)  # fmt: skip
        axes.set(xlabel="green against red, degrees", ylabel="blue, degrees")
        axes.grid(color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="best", frameon=True, framealpha=0.85, edgecolor=RULE, fontsize=9)
        panel_title(axes, "Stain vectors, a pair a patient")
        words = ", ".join(
            f"{name} spreads by {v[:, 0].std():.1f} and {v[:, 1].std():.1f} degrees"
            for name, v in (("haematoxylin", haematoxylin), ("eosin", eosin))
        )
        panel["alt"] = f"Directions of the stains of {len(haematoxylin)} patients: {words}."
    return Panel(**panel)


def matrix(values: Sequence[Sequence[float | None]], labels: Sequence[str], title: str, top: float) -> Panel:
    """Distances between classes as a heat map; `top` is the distance of the darkest shade."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("distance", ("#ffffff", "#9cc3e0", "#1f4e79"))
    array = np.array([[np.nan if v is None else v for v in row] for row in values], dtype=float)
    k = len(labels)
    names = [shorten(label, 10) for label in labels]
    room = max(map(text_inches, names), default=0) + 0.22
    width = THIRD if k <= 10 else HALF if k <= 24 else 7.6
    side = min(width - room - 0.1, 0.55 * k + 0.3)
    with drawing(side + room + 0.1, side + room + 0.32, left=room, right=0.1, bottom=room, top=0.32) as (figure, panel):
        axes = figure.subplots()
        blank = np.eye(k, dtype=bool) | ~np.isfinite(array)
        drawn = shades(np.where(blank, 0, array) / max(top, 1e-12))
        drawn[blank] = (0.94, 0.945, 0.95, 1)
        axes.imshow(drawn)
        size = min(8.5, 72 * side / k * 0.30)
        if k <= 16:
            for i in range(k):
                for j in range(k):
                    if i != j:
                        known = np.isfinite(array[i, j])
                        dark = known and array[i, j] > 0.72 * top
                        axes.text(j, i, _short(array[i, j]) if known else "n/a", ha="center", va="center",
                                  fontsize=size, color="white" if dark else INK if known else MUTED)  # fmt: skip
        axes.set_xticks(range(k), names, rotation=90)
        axes.set_yticks(range(k), names)
        axes.set_xticks(np.arange(k + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1)
        axes.tick_params(which="both", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        panel_title(axes, title)
        panel["alt"] = f"{title}. {_extremes(array, labels)}"
    return Panel(**panel)


def probe_scores(probes: Sequence[Mapping[str, Any]], title: str, unit: str) -> Panel:
    """Scores of the probes with intervals, over what chance reaches.

    Args:
        probes: {"name", "score", "low", "high", "chance", "null_high", "level"} for each.
        title: what they predict.
        unit: of the score.
    """
    labels = [pretty(p["name"]) if p["name"][0].islower() else p["name"] for p in probes]
    left = max(map(text_inches, labels)) + 0.2
    with drawing(HALF, 0.4 + 0.46 * len(probes) + 0.52, left=left, right=0.62, bottom=0.52, top=0.4) as (figure, panel):
        axes = figure.subplots()
        for row, p in enumerate(probes):
            if p["score"] is None:
                axes.annotate("not judged", (p["chance"], row), xytext=(6, 0), textcoords="offset points", va="center",
                              color=MUTED)  # fmt: skip
                continue
            colour = HURTS if p["level"] == "warning" else "#9a6a00" if p["level"] == "note" else SPLIT_SHADES["train"]
            sign = {"warning": "D", "note": "s"}.get(p["level"], "o")
            axes.barh(row, p["null_high"] - p["chance"], 0.56, left=p["chance"], color="#d9dee2", linewidth=0)
            axes.plot((p["low"], p["high"]), (row, row), color=colour, linewidth=2, solid_capstyle="butt")
            axes.plot(p["score"], row, marker=sign, markersize=7, color=colour)
            axes.annotate(f"{p['score']:.2f}", (1, row), xycoords=("axes fraction", "data"), xytext=(8, 0),
                          textcoords="offset points", va="center", fontweight="bold", color=colour)  # fmt: skip
        chance = probes[0]["chance"]
        axes.axvline(chance, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        lowest = min([chance, *(p["low"] for p in probes if p["score"] is not None)])
        axes.set_xlim(max(0, lowest - 0.05), 1)
        _class_axis(axes, labels)
        axes.set_xlabel(unit)
        panel_title(axes, title)
        words = "; ".join(
            f"{p['name']}: " + (f"{p['score']:.2f} ({p['low']:.2f} to {p['high']:.2f})" if p["score"] is not None
                                else "not judged")
            for p in probes
        )  # fmt: skip
        panel["alt"] = f"{title}, {unit}, chance {chance:.2f}. {words}."
    return Panel(**panel)


def _class_axis(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}".lstrip("0")


def _extremes(array: np.ndarray, labels: Sequence[str]) -> str:
    pairs = [
        (array[i, j], labels[i], labels[j])
        for i in range(len(labels))
        for j in range(i)
        if np.isfinite(array[i, j])
    ]  # fmt: skip
    if not pairs:
        return "No distance is known."
    near, far = min(pairs), max(pairs)
    return f"Closest: {near[1]} and {near[2]}, {near[0]:.3g}. Farthest: {far[1]} and {far[2]}, {far[0]:.3g}."
