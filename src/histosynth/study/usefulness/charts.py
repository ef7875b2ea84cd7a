"""The charts of the usefulness page, each as a `Panel`. All scores are in percent, all differences in points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from histosynth.study.figures import (
    HALF,
    HELPS,
    HURTS,
    INK,
    PALE,
    THIRD,
    Panel,
    Point,
    drawing,
    panel_title,
    shorten,
    spell,
    text_inches,
)

_DODGE = 0.22


@dataclass(frozen=True)
class Line:
    """One arm over a grid.

    Attributes:
        points: x, score, low, high; the last two may be unknown.
        band: draw the intervals.
        quiet: dashed and thin.
    """

    label: str
    colour: str
    marker: str
    points: Sequence[tuple[float, float, float | None, float | None]]
    band: bool = True
    quiet: bool = False


def learning_curves(
    lines: Sequence[Line], title: str, ticks: Sequence[tuple[float, str]], limits: tuple[float, float], wide: bool
) -> Panel:
    """Balanced accuracy against real tiles a class (logarithmic), a line an arm; `limits` of the score, in percent."""
    with drawing(HALF if wide else THIRD, 3.3, left=0.55, right=0.15, bottom=0.5, top=0.32) as (figure, panel):
        axes = figure.subplots()
        axes.set_xscale("log")
        for line in lines:
            _line(axes, line)
        places, names = _spaced(ticks)
        axes.set_xticks(places, names)
        axes.set_xticks([], minor=True)
        axes.set(ylim=limits, xlabel="real training tiles a class", ylabel="balanced accuracy, %")
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="lower right", frameon=False, fontsize=8.5, handlelength=1.8, borderaxespad=0.2)
        panel_title(axes, title)
        panel["alt"] = f"Learning curves, {title}. {_words(lines)}"
    return Panel(**panel)


def share_curves(lines: Sequence[Line], title: str) -> Panel:
    """The difference to the baseline against the share of synthetic tiles, both in percent."""
    with drawing(HALF, 2.9, left=0.55, right=0.15, bottom=0.5, top=0.32) as (figure, panel):
        axes = figure.subplots()
        axes.axhline(0, color=INK, linewidth=1)
        for line in lines:
            _line(axes, line)
        shares = sorted({x for line in lines for x, *_ in line.points})
        axes.set_xticks(shares, [f"{x:g}" for x in shares])
        axes.set(xlabel="synthetic tiles in what is seen of a class, %", ylabel="difference, points")
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="best", frameon=False, fontsize=8.5, handlelength=1.8, borderaxespad=0.2)
        panel_title(axes, title)
        panel["alt"] = f"{title}. {_words(lines)}"
    return Panel(**panel)


def class_gains(classes: Sequence[str], series: Sequence[tuple[str, Sequence[Point]]]) -> Panel:
    """Differences in recall, a row a class and a mark a generator; filled where sure after adjustment."""
    names = [shorten(c, 26) for c in classes]
    left = max(map(text_inches, names), default=0) + 0.16
    pitch = 0.24 + 0.2 * len(series)
    with drawing(7.6, 0.62 + pitch * len(names) + 0.5, left=left, right=0.2, bottom=0.5, top=0.62) as (figure, panel):
        axes = figure.subplots()
        every = [v for _, points in series for p in points for v in (p.value, p.low, p.high) if v is not None]
        reach = max([1e-9, *map(abs, every)]) * 1.08
        axes.set_xlim(-reach, reach)
        axes.axvspan(-reach, 0, color=HURTS, alpha=0.045, linewidth=0)
        axes.axvspan(0, reach, color=HELPS, alpha=0.055, linewidth=0)
        axes.axvline(0, color=INK, linewidth=1.1)
        for k, (_, points) in enumerate(series):
            shift = (k - (len(series) - 1) / 2) * _DODGE * 2 / max(len(series) - 1, 1)
            for row, point in enumerate(points):
                if point.value is None:
                    continue
                if point.low is not None and point.high is not None:
                    axes.plot((point.low, point.high), (row + shift,) * 2, color=point.colour, linewidth=1.8)
                axes.plot(point.value, row + shift, marker=point.marker, color=point.colour, markersize=6.5,
                          markerfacecolor="white" if point.hollow else point.colour, markeredgewidth=1.5)  # fmt: skip
        for title, points in series:
            first = points[0]
            axes.plot([], [], marker=first.marker, color=first.colour, linewidth=1.8, label=title)
        axes.legend(loc="lower left", bbox_to_anchor=(-left / (7.6 - left - 0.2), 1.0), ncols=4, frameon=False,
                    handletextpad=0.4, columnspacing=1.4, borderaxespad=0.3)  # fmt: skip
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
        axes.tick_params(axis="y", which="minor", length=0)
        axes.grid(axis="y", which="minor", color=PALE, linewidth=0.8)
        axes.grid(axis="x", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel("difference in recall to the baseline, percentage points")
        words = ". ".join(
            f"{title}: " + "; ".join(f"{c} {spell(p, '+.1f')}" for c, p in zip(classes, points, strict=True))
            for title, points in series
        )
        panel["alt"] = f"Differences in the recall of each class. {words}."
    return Panel(**panel)


def _line(axes, line: Line) -> None:  # type: ignore[no-untyped-def]
    x, y = [p[0] for p in line.points], [p[1] for p in line.points]
    known = [p for p in line.points if p[2] is not None and p[3] is not None]
    if line.band and len(known) > 1:
        axes.fill_between([p[0] for p in known], [p[2] for p in known], [p[3] for p in known], color=line.colour,
                          alpha=0.13, linewidth=0)  # fmt: skip
    style = (0, (4, 2.5)) if line.quiet else "-"
    axes.plot(x, y, color=line.colour, marker=line.marker, markersize=4.5 if line.quiet else 6, label=line.label,
              linewidth=1.3 if line.quiet else 2, linestyle=style,
              markerfacecolor="white" if line.quiet else line.colour)  # fmt: skip


def _spaced(ticks: Sequence[tuple[float, str]]) -> tuple[list[float], list[str]]:
    """Ticks of a logarithmic axis, without the names of those that would run into the next."""
    places, names = [x for x, _ in ticks], [name for _, name in ticks]
    for i in range(len(ticks) - 2, -1, -1):
        after = next(j for j in range(i + 1, len(ticks)) if names[j])
        if np.log(places[after] / places[i]) < 0.09 * np.log(places[-1] / places[0]):
            names[i] = ""
    return places, names


def _words(lines: Sequence[Line]) -> str:
    return " ".join(
        f"{line.label}: " + ", ".join(f"{y:.1f} at {x:g}" for x, y, *_ in line.points).replace("-", "−") + "."
        for line in lines
    )
