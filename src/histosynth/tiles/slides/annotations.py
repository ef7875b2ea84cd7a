"""Outlines that pathologists drew, as QuPath exports them (GeoJSON), and how much of a tile each class covers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.core.errors import DataError
from histosynth.tiles.slides.tissue import shares

_SAMPLES = 64  # samples of a tile's edge: shares are exact to about a hundredth
_BAND_CELLS = 4_000_000
_NOT_DRAWN = {"detection", "cell", "tile"}  # QuPath's objects that programs make
_LEAVE_COVERED = "region*"  # QuPath's class for regions of interest: no label, but takes nothing away


@dataclass(frozen=True)
class Outline:
    """One annotated area.

    Attributes:
        label: name of its class.
        parts: polygons, each a list of rings float64 [n, 2] (x, y in level-0 pixels): the outer one, then holes.
    """

    label: str
    parts: list[list[np.ndarray]]


@dataclass(frozen=True)
class Annotations:
    """All annotated areas of a slide.

    Attributes:
        outlines: the areas that count as a class.
        excluded: areas of QuPath's ignored classes (names that end with *, such as Ignore*): no class counts there.
        colours: #RRGGBB of a class, where the file gives one.
        skipped: what was left out, and how often.
    """

    outlines: list[Outline]
    excluded: list[Outline]
    colours: dict[str, str]
    skipped: dict[str, int]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, sorted."""
        return tuple(sorted({o.label for o in self.outlines}))


def read_annotations(path: Path | str) -> Annotations:
    """Read the GeoJSON of QuPath: a FeatureCollection, a bare list of features, or one feature.

    Areas without a class, points and lines, and cells that a program detected are left out and counted.

    Raises:
        DataError: the file is missing, is no GeoJSON, holds a broken polygon, or no area at all has a class.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(
            f"The annotations {path} cannot be read: {error.strerror or error}.", "Check the path."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not GeoJSON: {error}.", "Export it from QuPath again.") from error
    outlines, excluded, colours = [], [], {}
    skipped: Counter[str] = Counter()
    for number, feature in enumerate(_features(found, path)):
        properties = feature.get("properties") or {}
        if not isinstance(properties, dict):
            raise _broken(path, number, "its properties are no object")
        if str(properties.get("objectType", properties.get("object_type", "annotation"))).lower() in _NOT_DRAWN:
            skipped["detected objects"] += 1
            continue
        parts = _parts(feature.get("geometry"), path, number)
        if not parts:
            skipped["points and lines"] += 1
            continue
        label, colour = _class_of(properties)
        if not label:
            skipped["areas without a class"] += 1
        elif label.lower() == _LEAVE_COVERED:
            skipped["regions of interest"] += 1
        elif label.endswith("*"):
            excluded.append(Outline(label, parts))
        else:
            outlines.append(Outline(label, parts))
            if colour:
                colours.setdefault(label, colour)
    if not outlines and skipped["areas without a class"]:
        raise DataError(
            f"None of the {skipped['areas without a class']} areas in {path} has a class.",
            "Set the class of each annotation in QuPath, then export again.",
        )
    return Annotations(outlines, excluded, colours, dict(skipped))


def _features(found: Any, path: Path) -> list[dict[str, Any]]:
    if isinstance(found, dict):
        found = found.get("features") if found.get("type") == "FeatureCollection" else [found]
    features = found if isinstance(found, list) else None
    if features is None or not all(isinstance(f, dict) and f.get("type") == "Feature" for f in features):
        raise DataError(f"{path} is not GeoJSON with features.", "Export the annotations from QuPath as GeoJSON.")
    return features


def _parts(geometry: Any, path: Path, number: int) -> list[list[np.ndarray]]:
    if geometry is None:
        return []
    if not isinstance(geometry, dict):
        raise _broken(path, number, "its geometry is no object")
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        inner = geometry.get("geometries")
        if not isinstance(inner, list) or any(isinstance(g, dict) and g.get("type") == kind for g in inner):
            raise _broken(path, number, "its geometry collection cannot be used")
        return [part for g in inner for part in _parts(g, path, number)]
    coordinates = geometry.get("coordinates")
    if kind == "Polygon":
        coordinates = [coordinates]
    elif kind != "MultiPolygon":
        return []
    if not isinstance(coordinates, list):
        raise _broken(path, number, "it has no coordinates")
    parts = []
    for polygon in coordinates:
        if not isinstance(polygon, list) or not polygon:
            raise _broken(path, number, "it has no coordinates")
        parts.append([_ring(ring, path, number) for ring in polygon])
    return parts


def _ring(ring: Any, path: Path, number: int) -> np.ndarray:
    try:
        points = np.array([(float(p[0]), float(p[1])) for p in ring])
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise _broken(path, number, "its coordinates are no numbers") from error
    if len(points) < 3 or not np.isfinite(points).all() or np.abs(points).max() > 1e9:
        raise _broken(path, number, "a ring needs at least three points with finite coordinates")
    return points


def _broken(path: Path, number: int, why: str) -> DataError:
    return DataError(f"Feature {number} of {path} is broken: {why}.", "Export the annotations from QuPath again.")


def _class_of(properties: dict[str, Any]) -> tuple[str, str]:
    """Name and colour of a class: QuPath's `classification`, of any version."""
    given = properties.get("classification")
    if isinstance(given, str):
        return given.strip(), ""
    if not isinstance(given, dict):
        return "", ""
    names = given.get("names")
    name = given.get("name") or (": ".join(map(str, names)) if isinstance(names, list) else "")
    packed, colour = given.get("colorRGB"), given.get("color")
    if isinstance(colour, list) and len(colour) >= 3 and all(isinstance(c, int) and 0 <= c <= 255 for c in colour[:3]):
        text = "#{:02X}{:02X}{:02X}".format(*colour[:3])
    else:  # older versions: a signed 32-bit integer with the alpha in its highest byte
        text = f"#{packed & 0xFFFFFF:06X}" if isinstance(packed, int) else ""
    return str(name).strip(), text


def covered(
    annotations: Annotations, left: np.ndarray, top: np.ndarray, width: float, height: float
) -> tuple[tuple[str, ...], np.ndarray]:
    """Which share of each rectangle each class covers.

    The areas of a class are united on a raster of 64 samples a rectangle's edge (overlapping areas of one class
    count once), those of ignored classes are taken away, and the raster is averaged over each rectangle.

    Args:
        left, top: corners of N rectangles in level-0 pixels.
        width, height: their extent.

    Returns:
        (class names, float64 [N, classes]).
    """
    labels = annotations.labels
    out = np.zeros((len(left), len(labels)))
    if not len(left) or not labels:
        return labels, out
    cell_x, cell_y = max(width / _SAMPLES, 1.0), max(height / _SAMPLES, 1.0)
    right, bottom = left + width, top + height
    excluded = [ring for o in annotations.excluded for ring in [o.parts]]
    for k, label in enumerate(labels):
        areas = [o.parts for o in annotations.outlines if o.label == label]
        x0, y0, x1, y1 = _extent(areas)
        touched = np.flatnonzero((right > x0) & (left < x1) & (bottom > y0) & (top < y1))
        if not len(touched):
            continue
        # an area may reach far beyond the slide; only where there are tiles does it cost anything
        x0, x1 = max(x0, float(left[touched].min())), min(x1, float(right[touched].max()))
        columns = max(1, int(np.ceil((x1 - x0) / cell_x)))
        band = max(1, _BAND_CELLS // columns) * cell_y
        order = touched[np.argsort(top[touched], kind="stable")]
        while len(order):
            start = max(float(top[order[0]]), y0)
            stop = max(start + band, float(bottom[order[0]]))
            here = order[bottom[order] <= stop]
            here = here if len(here) else order[:1]
            end = min(float(bottom[here].max()), y1)
            rows = max(1, int(np.ceil((end - start) / cell_y)))
            grid = (x0, start, cell_x, cell_y, rows, columns)
            raster = _united(areas, grid)
            if excluded:
                raster &= ~_united(excluded, grid)
            a, c = (left[here] - x0) / cell_x, (right[here] - x0) / cell_x
            b, d = (top[here] - start) / cell_y, (bottom[here] - start) / cell_y
            out[here, k] = shares(raster, a, b, c, d)
            order = order[~np.isin(order, here)]
    return labels, out


def _extent(areas: list[list[list[np.ndarray]]]) -> tuple[float, float, float, float]:
    points = np.concatenate([ring for parts in areas for rings in parts for ring in rings])
    (x0, y0), (x1, y1) = points.min(0), points.max(0)
    return float(x0), float(y0), float(x1), float(y1)


def _united(areas: list[list[list[np.ndarray]]], grid: tuple[float, float, float, float, int, int]) -> np.ndarray:
    x0, y0, cell_x, cell_y, rows, columns = grid
    found = np.zeros((rows, columns), bool)
    for parts in areas:
        for rings in parts:
            scaled = [(ring - (x0, y0)) / (cell_x, cell_y) for ring in rings]
            low = np.floor(np.min([r.min(0) for r in scaled], axis=0)).astype(int)
            high = np.ceil(np.max([r.max(0) for r in scaled], axis=0)).astype(int)
            a, b = max(low[0], 0), max(low[1], 0)
            c, d = min(high[0], columns), min(high[1], rows)
            if c > a and d > b:
                found[b:d, a:c] |= fill([r - (a, b) for r in scaled], d - b, c - a)
    return found


def fill(rings: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Cells whose centre lies inside a polygon with holes, by the even-odd rule.

    Along each row of centres, every edge that crosses it flips the cells to its right; a running sum modulo two
    gives the inside.

    Args:
        rings: float [n, 2] (x, y) each, in cells; closed or not.

    Returns:
        bool [height, width].
    """
    flips = np.zeros((height, width + 1), np.int32)
    for ring in rings:
        following = np.roll(ring, -1, axis=0)
        upper = np.where((ring[:, 1] <= following[:, 1])[:, None], ring, following)
        lower = np.where((ring[:, 1] <= following[:, 1])[:, None], following, ring)
        # rows whose centre r + 0.5 lies in [upper, lower): half open, so that a shared corner counts once
        first = np.clip(np.ceil(upper[:, 1] - 0.5), 0, height).astype(int)
        last = np.clip(np.ceil(lower[:, 1] - 0.5), 0, height).astype(int)
        count = np.maximum(last - first, 0)
        edge = np.repeat(np.arange(len(ring)), count)
        row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
        rise = lower[edge, 1] - upper[edge, 1]
        x = upper[edge, 0] + (row + 0.5 - upper[edge, 1]) / rise * (lower[edge, 0] - upper[edge, 0])
        column = np.clip(np.ceil(x - 0.5), 0, width).astype(int)
        np.add.at(flips, (row, column), 1)
    return (np.cumsum(flips[:, :width], axis=1) & 1).astype(bool)
