"""The charts of the page that `evaluate` writes, each as a `Panel`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from histosynth.study.figures import (
    HALF,
    HELPS,
    HURTS,
    INK,
    MUTED,
    PALE,
    THIRD,
    Panel,
    drawing,
    panel_title,
    shorten,
    text_inches,
)

_ENDS = (-0.3, 1.3)  # of the scale from real to hopeless; what lies beyond stands at its end
_DODGE = 0.2
_MARKS = ("o", "D", "s", "^", "v", "P", "X")
_SHADES = ("#1f6391", "#b4531a", "#6b4c9a", "#2f7d5b", "#8a6d00", "#a03a6c", "#3a4652")
_BINS = 24


@dataclass(frozen=True)
class Bar:
    """One class in a panel of classes."""

    label: str
    colour: str
    value: float | None
    low: float | None
    high: float | None
    floor: float | None
    ceiling: float | None


def scale(rows: Mapping[str, Mapping[str, float]]) -> Panel:
    """Where scores lie between real tiles (0) and hopeless ones (1): title -> encoder -> position."""
    encoders = list(dict.fromkeys(name for row in rows.values() for name in row))
    left = max(map(text_inches, rows), default=0) + 0.2
    height = 0.62 + 0.27 * len(rows) + 0.55
    with drawing(7.6, height, left=left, right=0.15, bottom=0.55, top=0.62) as (figure, panel):
        axes = figure.subplots()
        axes.set_xlim(*_ENDS)
        axes.axvspan(_ENDS[0], 0, color=HELPS, alpha=0.055, linewidth=0)
        axes.axvspan(1, _ENDS[1], color=HURTS, alpha=0.05, linewidth=0)
        for x in (0, 1):
            axes.axvline(x, color=INK, linewidth=1)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.set_xticks((0, 0.25, 0.5, 0.75, 1), ("0 %", "25 %", "50 %", "75 %", "100 %"))
        for k, name in enumerate(encoders):
            shade, mark = _SHADES[k % len(_SHADES)], _MARKS[k % len(_MARKS)]
            shift = (k - (len(encoders) - 1) / 2) * min(_DODGE, 0.7 / len(encoders))
            for place, row in enumerate(rows.values()):
                if name in row:
                    inside = float(np.clip(row[name], _ENDS[0] + 0.02, _ENDS[1] - 0.02))
                    beyond = inside != row[name]
                    axes.plot(inside, place + shift, marker=("<" if row[name] < 0 else ">") if beyond else mark,
                              color=shade, markersize=6.5, linestyle="",
                              markerfacecolor="white" if beyond else shade)  # fmt: skip
            axes.plot([], [], marker=mark, color=shade, linestyle="", label=name)
        for x, word, align, colour in ((0, "as real", "right", HELPS), (1, "hopeless", "left", HURTS)):
            axes.annotate(word, (x, 1), xycoords=("data", "axes fraction"), xytext=(-5 if align == "right" else 5, 4),
                          textcoords="offset points", ha=align, va="bottom", color=colour,
                          fontweight="bold")  # fmt: skip
        figure.legend(loc="upper left", bbox_to_anchor=(left / 7.6 - 0.008, 1.0), ncols=4, frameon=False,
                      handletextpad=0.2, columnspacing=1.2, borderaxespad=0.1)  # fmt: skip
        axes.set_xlabel("share of the way from real training tiles to blurred ones")
        words = "; ".join(
            f"{title}: {', '.join(f'{n} {p:.0%}' for n, p in row.items())}" for title, row in rows.items()
        )
        panel["alt"] = f"Scores between real (0 %) and hopeless tiles (100 %). {words}."
    return Panel(**panel)


def class_bars(bars: Sequence[Bar], title: str, better: str) -> Panel:
    """One score for each class: a bar for the synthetic tiles, a stroke for real ones, a dotted one for hopeless."""
    names = [shorten(b.label, 16) for b in bars]
    left = min(max(map(text_inches, names), default=0) + 0.14, 1.4)
    with drawing(THIRD, 0.34 + 0.25 * len(bars) + 0.52, left=left, right=0.16, bottom=0.52, top=0.34) as (fig, panel):
        axes = fig.subplots()
        for row, bar in enumerate(bars):
            if bar.value is None:
                axes.annotate("n/a", (0, row), xycoords=("axes fraction", "data"), xytext=(4, 0), color=MUTED,
                              textcoords="offset points", va="center", fontsize=8)  # fmt: skip
                continue
            axes.barh(row, bar.value, 0.62, color=bar.colour, alpha=0.75, linewidth=0)
            if bar.low is not None and bar.high is not None:
                axes.plot((bar.low, bar.high), (row, row), color=INK, linewidth=1.1)
            for value, style in ((bar.floor, "-"), (bar.ceiling, (0, (1, 1.2)))):
                if value is not None:
                    axes.plot((value, value), (row - 0.42, row + 0.42), color=INK, linewidth=2, linestyle=style)
        axes.set_yticks(range(len(bars)), names)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        panel_title(axes, title)
        axes.set_xlabel({"lower": "◂ lower is better", "higher": "higher is better ▸"}.get(better, "best near 1"))
        words = "; ".join(
            f"{b.label}: {_said(b.value)}, real {_said(b.floor)}, hopeless {_said(b.ceiling)}" for b in bars
        )
        panel["alt"] = f"{title} by class. {words}."
    return Panel(**panel)


def colour_cloud(
    clouds: Mapping[str, np.ndarray], patients: Mapping[str, np.ndarray], titles: Mapping[str, str],
    shades: Mapping[str, str],
) -> Panel:  # fmt: skip
    """Mean optical density of tiles, float [n, 3] a source; real patients as ellipses of one standard deviation."""
    from matplotlib.patches import Ellipse

    with drawing(HALF, 4.3, left=0.6, right=0.12, bottom=0.55, top=0.4) as (figure, panel):
        axes = figure.subplots()
        drawn = 0
        for own in patients.values():
            if len(own) < 3:
                continue
            points = own[:, :2]
            values, vectors = np.linalg.eigh(np.cov(points, rowvar=False) + 1e-8 * np.eye(2))
            angle = float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))
            width, height = 2 * np.sqrt(values[::-1])
            axes.add_patch(Ellipse(tuple(points.mean(0)), width, height, angle=angle, facecolor=INK, alpha=0.07))
            axes.add_patch(
                Ellipse(tuple(points.mean(0)), width, height, angle=angle, fill=False, edgecolor=MUTED, linewidth=0.6)
            )
            drawn += 1
        for name, own in clouds.items():
            axes.scatter(own[:, 0], own[:, 1], s=9, color=shades[name], alpha=0.55, linewidths=0, rasterized=True,
                         label=titles[name])  # fmt: skip
        axes.set(xlabel="optical density, red (haematoxylin)", ylabel="optical density, green (both stains)")
        axes.grid(color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        figure.legend(loc="upper left", bbox_to_anchor=(0.1, 1.0), ncols=3, frameon=False, markerscale=2,
                      handletextpad=0.1, columnspacing=1.2, borderaxespad=0.2)  # fmt: skip
        middles = "; ".join(
            f"{titles[name]}: red {own[:, 0].mean():.2f}, green {own[:, 1].mean():.2f}" for name, own in clouds.items()
        )
        panel["alt"] = f"Mean optical density of tiles over the ellipses of {drawn} real patients. Means: {middles}."
    return Panel(**panel)


def distributions(
    values: Mapping[str, np.ndarray], title: str, unit: str, titles: Mapping[str, str], shades: Mapping[str, str]
) -> Panel:
    """How a measure is spread over the tiles of each source."""
    known = {name: v[np.isfinite(v)] for name, v in values.items()}
    known = {name: v for name, v in known.items() if len(v)}
    with drawing(THIRD, 2.35, left=0.2, right=0.15, bottom=0.5, top=0.62) as (figure, panel):
        axes = figure.subplots()
        together: Any = np.concatenate(list(known.values())) if known else np.array([0.0, 1.0])
        low, high = np.quantile(together, (0.002, 0.998))
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
        for name, v in known.items():
            shares = np.histogram(v.clip(edges[0], edges[-1]), edges)[0] / len(v)
            axes.stairs(shares, edges, color=shades[name], fill=name == "test", linewidth=1.7,
                        alpha=0.28 if name == "test" else 1, label=titles[name])  # fmt: skip
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(unit)
        panel_title(axes, "")
        figure.text(0.2 / THIRD, 1 - 0.12 / 2.35, title, fontweight="bold", color=INK, fontsize=9.5, va="center")
        figure.legend(loc="upper left", bbox_to_anchor=(0.13 / THIRD, 1 - 0.2 / 2.35), ncols=3, frameon=False,
                      handlelength=1, handletextpad=0.4, columnspacing=1, borderaxespad=0.1)  # fmt: skip
        middles = "; ".join(f"{titles[name]}: {np.median(v):.3g}" for name, v in known.items())
        panel["alt"] = f"{title} ({unit}). Medians: {middles or 'not known'}."
    return Panel(**panel)


def _said(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"
