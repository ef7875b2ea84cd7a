"""The overview of a tile set: one page that opens offline, and the same numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import histosynth
from histosynth.core.errors import DataError, SettingError
from histosynth.core.files import ensure_folder, write_json, write_text
from histosynth.core.progress import say
from histosynth.study.figures import Panel
from histosynth.study.overview import charts, parts
from histosynth.study.overview.findings import findings
from histosynth.study.overview.sample import measure, small_tiles, spread
from histosynth.study.report import page_template
from histosynth.study.sheets import encode_sheets
from histosynth.study.view import class_entries, pretty
from histosynth.tiles.quality.thresholds import QualityConfig
from histosynth.tiles.split.duplicates import DuplicateConfig
from histosynth.tiles.tileset import TileSet

# bytes of tiles before base64; with the charts the page stays below 6 MB
_SHEETS_BUDGET, _WORST_BUDGET, _PAIRS_BUDGET = 2_000_000, 450_000, 350_000
_WORST, _PAIRS = 24, 12
_STAIN_EDGE = 160
_BESIDE = 6  # tiles side by side in a contact sheet
_METRICS = {
    "lap_var": "Sharpness (Laplacian)", "entropy": "Entropy, bits", "tenengrad": "Sharpness (Tenengrad)",
    "white_ratio": "White share", "sat_ratio": "Saturated share", "tissue_fraction": "Tissue share",
    "block_spatial": "Block edges, grey levels", "block_dct": "Low-frequency share of blocks",
    "focus_tissue": "Focus on tissue", "noise": "Noise, grey levels", "jpeg_quality": "JPEG quality (100: none seen)",
    "ink_ratio": "Pen ink", "fold_ratio": "Tissue fold", "bubble_ratio": "Air bubble",
}  # fmt: skip
_MADE = ("made_by", "source", "licence", "microns_per_pixel", "split_protocol")
_DISTANCES = {"euclidean": "Euclidean", "mahalanobis": "Mahalanobis", "bhattacharyya": "Bhattacharyya"}


@dataclass(frozen=True)
class OverviewConfig:
    """What the overview looks at."""

    sample: int = 2000
    """At most so many tiles are measured for colour and leakage, in equal shares of classes and patients."""
    stain_sample: int = 600
    """At most so many tiles are measured for stains and normalised."""
    sheet: int = 12
    """Tiles of each class on the contact sheets."""
    normalise: tuple[str, ...] = ("vahadane",)
    """Stain normalisations whose effect on the classes is shown: vahadane, macenko, reinhard."""
    quality: QualityConfig = QualityConfig()
    """Limits that are drawn; what they reject is counted in all splits."""
    duplicates: DuplicateConfig = DuplicateConfig()
    """When two tiles count as near-duplicates."""
    workers: int | None = None
    """Threads that read tiles; all processors by default. The figures do not depend on it."""
    seed: int = 0
    """Seed of the subsets, probes and sheets."""

    def __post_init__(self) -> None:
        for name in ("sample", "stain_sample", "sheet"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}.", "Give at least 1.")


@dataclass(frozen=True)
class Shown:
    """What the page shows beside its numbers."""

    sheets: dict[str, np.ndarray]
    """Class -> uint8 [n, 3, S, S]."""
    worst: list[tuple[np.ndarray, str, str]]
    """Tile uint8 [3, S, S], class, reason."""
    worst_rejected: bool
    """Whether those tiles would be rejected, or are only the nearest to it."""
    pairs: list[tuple[np.ndarray, np.ndarray, str, str]]
    """Two tiles uint8 [3, S, S], and what is known of each."""
    units: pd.DataFrame
    """A row a patient and class: label, r, g, b."""
    angles: np.ndarray
    """Stain vectors of patients in degrees, [n, 2, 2]."""


def overview(
    tiles: Path | str, out: Path | str | None = None, config: OverviewConfig = OverviewConfig()
) -> tuple[Path, dict[str, Any]]:
    """Write overview.html and overview.json about a tile set; existing ones are replaced.

    Args:
        tiles: a tile set; a folder that is none has to be imported first.
        out: a folder, or the name of the page (ending in .html); the tile set's own folder by default.

    Returns:
        (path of the page, the report).

    Raises:
        DataError: `tiles` is no tile set, or has no usable tile.
        RunError: `out` cannot be written.
    """
    tileset = TileSet.open(tiles)
    page = Path(out) if out is not None else tileset.folder
    page = page if page.suffix.lower() == ".html" else page / "overview.html"
    ensure_folder(page.parent)
    report, shown = describe(tileset, config)
    write_text(page, render(report, shown))
    write_json(page.with_suffix(".json"), report)
    return page, report


def describe(tileset: TileSet, config: OverviewConfig = OverviewConfig()) -> tuple[dict[str, Any], Shown]:
    """The numbers and pictures of the overview.

    Raises:
        DataError: no usable tile.
    """
    kept, classes = tileset.kept, tileset.classes
    if kept.empty:
        raise DataError(f"The tile set {tileset.folder} has no usable tile.", "Import tiles that can be read.")
    quality, judged, _ = parts.quality(tileset, config.quality, config.workers)
    near, pairs = parts.duplicates(tileset, config.duplicates, config.workers)
    measured = measure(tileset, kept.iloc[spread(kept, config.sample, config.seed, "measured")], config.workers)
    colour, units = parts.colour(measured, classes)
    rows = kept.iloc[spread(kept, config.stain_sample, config.seed, "stain")].reset_index(drop=True)
    edge = min(_STAIN_EDGE, int(kept[["width", "height"]].min(axis=1).median()))
    images = small_tiles(tileset, rows, edge, config.workers)
    say("Separate the stains ...")
    stain, angles = parts.stain(rows, images, "vahadane")
    normalised = parts.normalisation(rows, images, classes, config.normalise, config.seed)
    say("Probe for leaks ...")
    report: dict[str, Any] = {
        "kind": "overview",
        "title": tileset.folder.resolve().name,
        "version": histosynth.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "digest": tileset.digest,
        "made": {k: tileset.meta.get(k) for k in _MADE},
        "seed": config.seed,
        "tiles": len(kept),
        "patients": int(kept[kept.patient != ""].patient.nunique()) if parts.has_patients(tileset) else None,
        "has_patients": parts.has_patients(tileset),
        "splits": parts.splits_of(tileset),
        "classes": parts.counts(tileset),
        "files": parts.files(tileset),
        "set_aside": parts.set_aside(tileset),
        "straddling": parts.straddling(tileset),
        "unreadable": {"tiles": len(measured.unreadable), "first": measured.unreadable[0]}
        if measured.unreadable else None,
        "quality": quality,
        "duplicates": near,
        "colour": colour,
        "stain": stain,
        "normalisation": normalised,
        "probes": parts.leaks(measured, len(classes), config.seed),
    }  # fmt: skip
    report = parts.plain(report)
    report["findings"] = findings(report)
    return report, _pictures(tileset, config, judged, pairs, units, angles)


def render(report: dict[str, Any], shown: Shown) -> str:
    """The page: HTML without any reference to another file."""
    return page_template("overview.html.j2").render(_context(report, shown))


def _pictures(
    tileset: TileSet, config: OverviewConfig, judged: pd.DataFrame, pairs: Sequence[tuple[int, int]],
    units: pd.DataFrame, angles: np.ndarray,
) -> Shown:  # fmt: skip
    kept = tileset.kept
    chosen = {
        label: own[spread(kept.iloc[own].reset_index(drop=True), config.sheet, config.seed, f"sheet {label}")]
        for label in tileset.classes
        if len(own := np.flatnonzero(kept.label == label))
    }
    rejected = np.flatnonzero(judged.reason != "")
    pool = rejected if len(rejected) else np.arange(len(judged))
    worst = pool[np.argsort(-judged.score.to_numpy(float)[pool], kind="stable")][: _WORST if len(rejected) else 12]
    if not np.isfinite(judged.score.to_numpy(float)[worst]).any() or (judged.score.to_numpy(float)[worst] <= -1).all():
        worst = worst[: len(rejected)]  # no limits, so no tile is worse than another
    crossing = list(pairs)[:_PAIRS]
    wanted = np.unique(np.concatenate([*chosen.values(), worst, np.array(crossing, int).ravel()]).astype(int))
    edge = int(min(160, max(32, kept[["width", "height"]].min(axis=1).median())))
    pixels = dict(zip(wanted, small_tiles(tileset, kept.iloc[wanted], edge, config.workers), strict=True))

    def known(position: int) -> str:
        row = kept.iloc[position]
        return " · ".join(str(v) for v in (row.label, row.patient, row.split) if v)

    return Shown(
        {label: np.stack([pixels[i] for i in rows]) for label, rows in chosen.items()},
        [(pixels[i], str(kept.label[i]), judged.reason[i]) for i in worst],
        bool(len(rejected)),
        [(pixels[a], pixels[b], known(a), known(b)) for a, b in crossing],
        units,
        angles,
    )


def _context(report: dict[str, Any], shown: Shown) -> dict[str, Any]:
    classes = class_entries({"data": {"classes": report["classes"]}})
    labels = [c["label"] for c in classes]
    merged = [entry | own for own, entry in zip(report["classes"], classes, strict=True)]
    sheets = encode_sheets([(tiles, _BESIDE) for tiles in shown.sheets.values()], _SHEETS_BUDGET)
    worst = encode_sheets([(tile[None], 1) for tile, _, _ in shown.worst], _WORST_BUDGET).uris
    pairs = encode_sheets([(np.stack([a, b]), 2) for a, b, _, _ in shown.pairs], _PAIRS_BUDGET).uris
    limited = sorted(
        report["quality"]["metrics"],
        key=lambda m: not any(c["low"] is not None or c["high"] is not None for c in m["classes"]),
    )
    return {
        "r": report,
        "classes": merged,
        "count_panels": [
            charts.counts(report["classes"], unit, report["splits"])
            for unit in (("tiles", "patients") if report["has_patients"] else ("tiles",))
        ],
        "sheets": dict(zip(shown.sheets, sheets.uris, strict=True)),
        "sheet_counts": {label: len(tiles) for label, tiles in shown.sheets.items()},
        "how": sheets.how,
        "metric_panels": [
            charts.distribution(m["metric"], _metric(m["metric"]), m["classes"])
            for m in limited if m["classes"]
        ],
        "worst": [
            {"uri": uri, "label": own[1], "reason": _reason(own[2])}
            for uri, own in zip(worst, shown.worst, strict=True)
        ],
        "metric": _metric,
        "worst_rejected": shown.worst_rejected,
        "pairs": [{"uri": u, "first": p[2], "second": p[3]} for u, p in zip(pairs, shown.pairs, strict=True)],
        "clouds": _clouds(shown.units, labels),
        "stain_panel": charts.stains(shown.angles[:, 0], shown.angles[:, 1]) if len(shown.angles) else None,
        "distance_rows": _distance_panels(report["normalisation"], labels),
        "distances": _DISTANCES,
        "probe_panels": [
            charts.probe_scores(probes, title, unit)
            for probes, title, unit in (
                (report["probes"]["class"], "Which class?", "balanced accuracy on unseen patients"),
                (report["probes"]["split"], "Train or test?", "area under the ROC curve, unseen patients"),
            )
            if probes
        ],
    }  # fmt: skip


def _metric(name: str) -> str:
    return _METRICS.get(name, pretty(name))


def _reason(text: str) -> str:
    """ "quality: lap_var 12.1 below 50 (BACK)" in the words of the page, without the class, which stands beside it."""
    metric, _, rest = text.removeprefix("quality: ").rpartition(" (")[0].partition(" ")
    return f"{_metric(metric)} {rest}" if rest else text


def _clouds(units: pd.DataFrame, labels: Sequence[str]) -> list[Panel]:
    points = units[list("rgb")].to_numpy(float)
    plane = charts.colour_plane(points)
    low, high = plane.min(0), plane.max(0)
    margin = np.maximum(0.06 * (high - low), 2)
    limits = list(zip(low - margin, high + margin, strict=True))
    own = {label: points[(units.label == label).to_numpy()] for label in labels}
    return [charts.cloud(label, rows, points, limits) for label, rows in own.items() if len(rows)]


def _distance_panels(part: dict[str, Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """For each distance, a panel a state, all to one scale."""
    found, known_states = [], [s for s in part["states"] if "error" not in s]
    for name, title in _DISTANCES.items():
        matrices = [np.array(s[name], dtype=float) for s in known_states]
        known = np.concatenate([m[np.isfinite(m)] for m in matrices])
        top = float(np.percentile(known[known > 0], 90)) if (known > 0).any() else 1.0
        # a class of one colour lies so far away that all others would look alike
        states = zip(known_states, matrices, strict=True)
        found.append(
            {"title": title, "panels": [charts.matrix(m, labels, f"{title}, {_state(s)}", top) for s, m in states]}
        )
    return found


def _state(state: dict[str, Any]) -> str:
    return "as they are" if state["name"] == "before" else f"after {state['name'].capitalize()}"
