"""The charts of the report. Each function takes plain numbers and returns a `Panel`: one SVG with its words.

Small panels, not one wide figure, so that the page can lay them out for any width. Generators differ by
marker as well as by colour, and every panel's `alt` says in words what it shows.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from histosynth.core.files import atomic_path
from histosynth.study.sheets import data_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE, PALE = "#1f2933", "#56616b", "#d5dadf", "#eef1f3"
HELPS, HURTS = "#1a6e46", "#a82a22"
_FONTS = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_STYLES = {
    "real": ("#3a4652", "o"),
    "gan": ("#b4531a", "s"),
    "diffusion": ("#1f6391", "D"),
}
_MORE_STYLES = (("#6b4c9a", "^"), ("#2f7d5b", "v"), ("#8a6d00", "P"), ("#a03a6c", "X"))
_PIXELS_PER_INCH = 96  # of CSS
THIRD, HALF = 3.58, 5.49  # inches: so many panels side by side fill the page
_DASHED = (0, (4, 3))


@dataclass(frozen=True)
class Panel:
    """One chart: a data URI, the words for those who cannot see it, and its natural width in CSS pixels."""

    uri: str
    alt: str
    width: int


@dataclass(frozen=True)
class Point:
    """An estimate with its interval; `low` and `high` may be unknown."""

    label: str
    value: float | None
    low: float | None = None
    high: float | None = None
    colour: str = INK
    marker: str = "o"
    hollow: bool = False
    dots: tuple[float, ...] = ()


def source_style(source: str, generators: Sequence[str] = ()) -> tuple[str, str]:
    """Colour and marker of a source; the same one in all charts."""
    if source in _STYLES:
        return _STYLES[source]
    others = [name for name in generators if name not in _STYLES]
    return _MORE_STYLES[others.index(source) % len(_MORE_STYLES) if source in others else 0]


def forest(points: Sequence[Point], unit: str, levels: str) -> Panel:
    """Differences with intervals around the zero line, in `unit`; "hurts" to the left, "helps" to the right."""
    with _rows(points, 7.6, 0.42, top=0.34, numbers="+.1f") as (axes, panel):
        reach = max([1e-9, *(abs(v) for p in points for v in (p.value, p.low, p.high) if v is not None)]) * 1.18
        axes.set_xlim(-reach, reach)
        axes.axvspan(-reach, 0, color=HURTS, alpha=0.045, linewidth=0)
        axes.axvspan(0, reach, color=HELPS, alpha=0.055, linewidth=0)
        axes.axvline(0, color=INK, linewidth=1.1)
        _estimates(axes, points, unknown_at=0)
        for x, align, word, colour, weight in (
            (-reach, "left", "◂ hurts", HURTS, "bold"),
            (0, "center", "no difference", MUTED, "normal"),
            (reach, "right", "helps ▸", HELPS, "bold"),
        ):
            axes.annotate(word, (x, 1), xycoords=("data", "axes fraction"), xytext=(0, 5), color=colour,
                          textcoords="offset points", ha=align, va="bottom", fontweight=weight)  # fmt: skip
        axes.set_xlabel(f"{unit}, {levels}")
        words = "; ".join(f"{p.label}: {spell(p, '+.1f')}" for p in points)
        panel["alt"] = f"Forest plot, {unit}, {levels}. {words}."
    return Panel(**panel)


def dot_plot(points: Sequence[Point], title: str, xlabel: str, reference: float | None = None) -> Panel:
    """Estimates with intervals, a row each; `reference` draws a line, small strokes show single runs."""
    with _rows(points, 7.6, 0.42, top=0.12, numbers=".1f") as (axes, panel):
        known = [v for p in points for v in (p.value, p.low, p.high, *p.dots) if v is not None]
        if known:
            edge = max(0.04 * (max(known) - min(known)), 1e-3)
            axes.set_xlim(min(known) - edge, max(known) + edge)
        if reference is not None:
            axes.axvline(reference, color=MUTED, linewidth=0.9, linestyle=_DASHED)
        _estimates(axes, points, unknown_at=min(known, default=0))
        axes.set_xlabel(xlabel)
        panel["alt"] = f"{title}. " + "; ".join(f"{p.label}: {spell(p, '.1f')}" for p in points) + "."
    return Panel(**panel)


def metric_panel(points: Sequence[Point], title: str, better: str) -> Panel:
    """One fidelity score for the floor (the first points) and each generator, on its own scale."""
    with _rows(points, 2.62, 0.27, top=0.32) as (axes, panel):
        floor = points[0].value
        if floor is not None:
            axes.axvline(floor, color=MUTED, linewidth=0.9, linestyle=_DASHED)
        known = [v for p in points for v in (p.value, p.low, p.high) if v is not None]
        _estimates(axes, points, unknown_at=floor if floor is not None else min(known, default=0), size=5.5)
        axes.locator_params(axis="x", nbins=4)
        arrow = {"lower": "◂ lower is better", "higher": "higher is better ▸"}.get(better, "best near 1")
        panel_title(axes, title)
        axes.set_xlabel(arrow)
        panel["alt"] = f"{title} ({arrow.strip('◂▸ ')}). " + "; ".join(f"{p.label}: {spell(p)}" for p in points) + "."
    return Panel(**panel)


def reliability(
    bins: Sequence[Mapping[str, Any]], title: str, colour: str, ece: float | None, png: Path | None = None
) -> Panel:
    """Confidence against accuracy a bin, with its interval where known, and the histogram of confidences below."""
    bins = [b for b in bins if b.get("count")]
    with drawing(THIRD, 3.8, left=0.55, right=0.12, bottom=0.5, top=0.32, png=png) as (figure, panel):
        axes, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3.4, 1), "hspace": 0.09})
        axes.plot((0, 1), (0, 1), color=MUTED, linewidth=0.9, linestyle=_DASHED)
        x = [b["confidence"] for b in bins]
        y = [b["accuracy"] for b in bins]
        axes.vlines(x, x, y, color=colour, linewidth=2.2, alpha=0.28)
        for b in bins:
            if b.get("accuracy_low") is not None:
                ends = (b["accuracy_low"], b["accuracy_high"])
                axes.plot((b["confidence"],) * 2, ends, color=INK, linewidth=1, alpha=0.6)
        axes.plot(x, y, color=colour, marker="o", markersize=5, linewidth=1.6)
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="share correct")
        panel_title(axes, title)
        axes.text(0.04, 0.94, "too modest", color=MUTED, va="top", fontsize=8)
        axes.text(0.96, 0.06, "too sure", color=MUTED, ha="right", fontsize=8)
        middle = [(b["low"] + b["high"]) / 2 for b in bins]
        widths = [0.9 * (b["high"] - b["low"]) for b in bins]
        below.bar(middle, [b["count"] for b in bins], widths, color=colour, alpha=0.75)
        below.set(xlabel="confidence of the prediction", ylabel="tiles")
        below.locator_params(axis="y", nbins=2)
        for each in (axes, below):
            each.grid(color=PALE, linewidth=0.8)
            each.set_axisbelow(True)
        words = ", ".join(f"{b['confidence']:.2f} → {b['accuracy']:.2f} ({b['count']} tiles)" for b in bins)
        error = "" if ece is None else f" Expected calibration error {ece:.3f}."
        panel["alt"] = f"Reliability diagram, {title}.{error} Confidence → share correct: {words or 'no bins'}."
    return Panel(**panel)


def confusion(
    matrix: Sequence[Sequence[float]], labels: Sequence[str], title: str, colour: str, png: Path | None = None
) -> Panel:
    """A confusion matrix: shade is the share of the true class (row), the number is the count of tiles."""
    from matplotlib.colors import LinearSegmentedColormap

    counts = np.asarray(matrix, dtype=float)
    totals = counts.sum(1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    k = len(labels)
    names = [shorten(label, 12) for label in labels]
    room = max(map(text_inches, names), default=0) + 0.42
    width = THIRD if k <= 10 else HALF if k <= 24 else 7.6
    side = min(width - room - 0.12, 0.6 * k)
    width = max(side + room + 0.12, room + 1.15 * text_inches(title, 9.5))
    right = width - room - side
    margins = {"left": room, "right": right, "bottom": room, "top": 0.32}
    with drawing(width, side + room + 0.32, **margins, png=png) as (figure, panel):
        axes = figure.subplots()
        axes.imshow(shares, cmap=LinearSegmentedColormap.from_list("share", ("#ffffff", colour)), vmin=0, vmax=1)
        size = min(9.0, 72 * side / k * 0.38)
        for i, j in zip(*np.nonzero(counts), strict=True):
            text = f"{counts[i, j]:.0f}"
            axes.text(j, i, text, ha="center", va="center", fontsize=size * (0.8 if len(text) > 3 else 1),
                      color="white" if shares[i, j] > 0.55 else INK)  # fmt: skip
        axes.set_xticks(range(k), names, rotation=90)
        axes.set_yticks(range(k), names)
        axes.set(xlabel="predicted", ylabel="true")
        panel_title(axes, title)
        axes.set_xticks(np.arange(k + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
        axes.grid(which="minor", color=RULE, linewidth=0.6)
        axes.tick_params(which="both", length=0)
        panel["alt"] = f"Confusion matrix, {title}. {_confusions(counts, shares, labels)}"
    return Panel(**panel)


def embedding(
    points: np.ndarray, labels: Sequence[str], backdrop: np.ndarray, colours: Mapping[str, str], title: str,
    limits: tuple[np.ndarray, np.ndarray],
) -> Panel:  # fmt: skip
    """A 2-D map [n, 2] of one source in class colours over the real tiles in grey, classes named in place."""
    with drawing(THIRD, THIRD + 0.3, left=0.02, right=0.02, bottom=0.02, top=0.32) as (figure, panel):
        axes = figure.subplots()
        axes.scatter(backdrop[:, 0], backdrop[:, 1], s=9, color="#d3d8dc", linewidths=0, rasterized=True)
        names = np.asarray(labels)
        present = list(dict.fromkeys(names.tolist()))
        shades = [colours.get(label, MUTED) for label in names.tolist()]
        # one layer, in the order of the points: no class is painted over by the next
        axes.scatter(points[:, 0], points[:, 1], s=11, color=shades, linewidths=0, alpha=0.8, rasterized=True)
        middles = np.array([np.median(points[names == label], axis=0) for label in present])
        short = [shorten(label, 12) for label in present]
        low, high = limits
        for (x, y), text in zip(_apart((middles - low) / (high - low), short), short, strict=True):
            axes.text(x, y, text, ha="center", va="center", fontsize=8.5 if len(present) < 12 else 7,
                      fontweight="bold", color=INK, transform=axes.transAxes,
                      bbox={"facecolor": "white", "alpha": 0.72, "linewidth": 0, "pad": 0.8})  # fmt: skip
        axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_visible(True)
        panel_title(axes, title)
        panel["alt"] = (
            f"Two-dimensional map, {title}: {len(points)} tiles in {len(present)} classes "
            f"over {len(backdrop)} real tiles in grey."
        )
    return Panel(**panel)


def spell(point: Point, form: str = "") -> str:
    """An estimate in words: "0.71 (0.69 to 0.73)"; `form` is a format such as "+.1f"."""
    if point.value is None:
        return "not known"
    form = form or f".{_decimals(point)}f"
    texts = ["" if v is None else f"{v:{form}}".replace("-", "−") for v in (point.value, point.low, point.high)]
    return f"{texts[0]} ({texts[1]} to {texts[2]})" if texts[1] and texts[2] else texts[0]


def shorten(text: str, length: int) -> str:
    """A label that fits beside an axis."""
    return text if len(text) <= length else text[: length - 1] + "…"


@contextmanager
def _rows(
    points: Sequence[Point], width: float, pitch: float, top: float, numbers: str = ""
) -> Iterator[tuple[Axes, dict[str, Any]]]:
    """Axes with a row of `pitch` inches a point, named on the left; `numbers` is the format of those on the right."""
    labels = [shorten(p.label, 44) for p in points]
    left = min(max(map(text_inches, labels), default=0) + 0.12, 0.45 * width)
    right = max((text_inches(spell(p, numbers)) for p in points), default=0) + 0.2 if numbers else 0.12
    height = top + pitch * len(points) + 0.52
    with drawing(width, height, left=left, right=right, bottom=0.52, top=top) as (figure, panel):
        axes = figure.subplots()
        yield axes, panel
        axes.set_yticks(range(len(points)), labels)
        axes.set_ylim(len(points) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="x", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        if numbers:
            for row, point in enumerate(points):
                axes.annotate(spell(point, numbers), (1, row), xycoords=("axes fraction", "data"), xytext=(9, 0),
                              textcoords="offset points", va="center", color=INK)  # fmt: skip


def _estimates(axes: Axes, points: Sequence[Point], unknown_at: float, size: float = 6.5) -> None:
    for row, point in enumerate(points):
        if point.value is None:
            axes.text(unknown_at, row, " n/a", va="center", color=MUTED)
            continue
        if point.low is not None and point.high is not None:
            axes.plot((point.low, point.high), (row, row), color=point.colour, linewidth=2, solid_capstyle="butt")
        if point.dots:
            axes.plot(point.dots, [row + 0.27] * len(point.dots), linestyle="", marker="|", markersize=5,
                      color=point.colour, alpha=0.75)  # fmt: skip
        axes.plot(point.value, row, marker=point.marker, markersize=size, color=point.colour, linestyle="",
                  markerfacecolor="white" if point.hollow else point.colour, markeredgewidth=1.5)  # fmt: skip


def panel_title(axes: Axes, text: str) -> None:
    """A chart's title above its left edge."""
    # explicit height: finding it automatically measures every label again
    axes.set_title(text, loc="left", fontweight="bold", color=INK, fontsize=9.5, y=1.0, pad=7)


def _decimals(point: Point) -> int:
    """Decimals that show three significant digits of the largest number, but not more than four."""
    largest = max(abs(v) for v in (point.value, point.low, point.high) if v is not None)
    return 1 if largest >= 10 else 2 if largest >= 1 else 3 if largest >= 0.1 else 4


def text_inches(text: str, size: float = 8.5) -> float:
    """About how wide a text is; East Asian characters are twice as wide as Latin ones."""
    units = sum(2.0 if unicodedata.east_asian_width(c) in "WF" else 1.0 for c in text)
    return units * 0.55 * size / 72


def _apart(places: np.ndarray, texts: Sequence[str]) -> list[tuple[float, float]]:
    """Move labels (centres as fractions of the axes) upwards until none covers another."""
    height, per_character = 0.048, 0.0245
    widths = [max(len(t), 1) * per_character for t in texts]
    done: dict[int, tuple[float, float]] = {}
    for i in np.argsort(places[:, 1], kind="stable").tolist():
        half = min(widths[i] / 2, 0.5)
        x, y = min(max(float(places[i, 0]), half), 1 - half), float(places[i, 1])
        for j in sorted(done, key=lambda j: done[j][1]):
            if abs(done[j][0] - x) < (widths[i] + widths[j]) / 2 and abs(done[j][1] - y) < height:
                y = done[j][1] + height
        done[i] = (x, y)
    return [done[i] for i in range(len(texts))]


def _confusions(counts: np.ndarray, shares: np.ndarray, labels: Sequence[str]) -> str:
    if not counts.sum():
        return "No tiles."
    right = np.trace(counts) / counts.sum()
    off = shares - np.diag(np.diag(shares))
    worst = [np.unravel_index(i, off.shape) for i in np.argsort(-off, axis=None, kind="stable")[:3]]
    named = "; ".join(f"{labels[i]} taken for {labels[j]}: {off[i, j]:.0%}" for i, j in worst if off[i, j] > 0)
    return f"{right:.0%} of the tiles are on the diagonal. Most frequent confusions: {named or 'none'}."


@contextmanager
def drawing(
    width: float, height: float, *, left: float, right: float, bottom: float, top: float, png: Path | None = None
) -> Iterator[tuple[Figure, dict[str, Any]]]:
    """A figure with margins, all in inches; on leaving, the dict holds the fields of a `Panel` but for `alt`.

    `png` writes the figure to a file as well, on white.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",  # words stay words, in the fonts of whoever opens the page
        "svg.hashsalt": "histosynth",  # the same figure gives the same bytes
        "text.parse_math": False,  # a class may be called $x$
        "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK,
        "axes.edgecolor": RULE, "axes.labelcolor": MUTED, "axes.spines.top": False, "axes.spines.right": False,
        "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    }  # fmt: skip
    with rc_context(settings), warnings.catch_warnings():
        # a script that DejaVu lacks only makes a measured width a guess: the page's fonts draw it
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height))
        # margins are set by hand: the automatic layouts draw everything twice
        figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
        FigureCanvasSVG(figure)
        panel: dict[str, Any] = {"width": round(width * _PIXELS_PER_INCH)}
        yield figure, panel
        stream = io.StringIO()
        figure.savefig(stream, format="svg", dpi=160, transparent=True, metadata={"Date": None, "Creator": None})
        if png is not None:
            with atomic_path(png) as temporary:
                figure.savefig(temporary, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    # said once for all words, not once for each of them
    svg = re.sub(r" font-family: 'DejaVu Sans'[^;]*;", "", stream.getvalue())
    svg = re.sub(r"(?s)<metadata>.*?</metadata>", f"<style>text{{font-family:{_FONTS}}}</style>", svg, count=1)
    panel["uri"] = data_uri(svg.encode(), "image/svg+xml")
