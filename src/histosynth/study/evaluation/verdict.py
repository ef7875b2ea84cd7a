"""The verdict of `evaluate` in plain sentences, made of its numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from histosynth.study.evaluation.measures import PATIENTS_LIMIT
from histosynth.study.view import fidelity_cell, part

_EXPECTED_ALARMS = 0.01
_FEW_TILES = 20  # the deviation of fewer tiles says nothing
_AS_MANY = 0.2  # deviations of a real tile


def verdict(report: Mapping[str, Any]) -> str:
    """The paragraph at the top of the page."""
    sentences = [_apart(report), _stained(report), _copied(report), _labelled(report), _nuclei(report), _read(report)]
    return " ".join(s for s in sentences if s)


def apart(judged: Mapping[str, Any]) -> tuple[int, int, float | None]:
    """Of one encoder's pooled scores: how many are apart from real, of how many that can be told, and the median
    position between real and hopeless tiles."""
    scores = part(judged, "all", "scores")
    words = [fidelity_cell(score, score.get("better", ""))["against"] for score in scores.values()]
    told = [w for w in words if w]
    places = [s["position"] for s in scores.values() if s.get("position") is not None]
    return sum(w == "apart from real" for w in told), len(told), float(np.median(places)) if places else None


def what(report: Mapping[str, Any]) -> str:
    """What the judged tiles are called."""
    return "other real tiles" if report.get("synthetic_is_real") else f"{name_of(report)} tiles"


def name_of(report: Mapping[str, Any]) -> str:
    """The generator's name as people write it."""
    return {"gan": "GAN"}.get(report["source"], str(report["source"]))


def suspicious(report: Mapping[str, Any]) -> tuple[int, int, bool]:
    """Tiles that ring the pixel alarm, tiles in all, and whether these are more than false alarms explain."""
    copies = part(next(iter(report["encoders"].values()), {}), "copies")
    n = int(copies.get("n_synthetic") or 0)
    rung = round((copies.get("pixel_alarms") or 0) * n)
    return rung, n, rung > stats.binom.ppf(0.99, n, _EXPECTED_ALARMS)


def _apart(report: Mapping[str, Any]) -> str:
    found = []
    for name, judged in report["encoders"].items():
        worse, told, place = apart(judged)
        if told:
            way = "" if place is None else f" ({_percent(max(place, 0))} of the way from real to hopeless tiles)"
            found.append(f"{worse} of {told} scores with {name}{way}")
    if not found:
        return f"There are too few {what(report)} for scores ({report['n']} of each side)."
    tiles = part(report, "data", "counts", "test")
    patients = part(report, "data", "patients").get("test")
    of = f" of {patients} {_people(report)}" if patients else ""
    every = sum(tiles.values())
    count = f"{report['n']} of {every}" if report["n"] < every else every
    text = f"Against {count} real test tiles{of}, the {what(report)} are apart from real in "
    return f"{text}{' and '.join(found)}."


def _stained(report: Mapping[str, Any]) -> str:
    shift = part(report, "staining", "synthetic").get("patients_shift")
    if shift is None:
        return ""
    inside = shift <= PATIENTS_LIMIT
    people = _people(report)
    place = f"lies within the spread between real {people}" if inside else f"is unlike that of the real {people}"
    return f"Their staining {place} ({shift:.1f} units of it; 95 % of {people} lie within {PATIENTS_LIMIT:.1f})."


def _people(report: Mapping[str, Any]) -> str:
    how = str(part(report, "data").get("split_protocol", ""))
    if "no patients were given" not in how:
        return "patients"
    return "slides" if how.startswith("by slide") else "groups of alike tiles"


def _copied(report: Mapping[str, Any]) -> str:
    copies = part(next(iter(report["encoders"].values()), {}), "copies")
    n = int(copies.get("n_synthetic") or 0)
    equal = round((copies.get("pixel_equal") or 0) * n)
    rung, n, many = suspicious(report)
    planted = part(report, "planted")
    trust = f"the check finds {_percent(planted['found'])} of {planted['n']} planted copies" if planted.get("n") else ""
    if equal:
        more = f", and {rung - equal} more resemble one too closely" if many and rung > equal else ""
        return f"{equal} of {n} tiles are exact copies of training tiles{more} ({trust})."
    if many:
        expected = f"{_EXPECTED_ALARMS * n:.0f} expected by chance"
        return f"{rung} of {n} tiles resemble a training tile too closely ({expected}; {trust}): look at them below."
    return f"No copies of training tiles were found ({trust})." if trust else "No copies of training tiles were found."


def _labelled(report: Mapping[str, Any]) -> str:
    labels = part(report, "labels")
    made, real = (part(labels, side).get("label_consistency") for side in ("synthetic", "real"))
    if made is None:
        return ""
    best = "" if real is None else f", and of real test tiles {_percent(real)}"
    return f"A classifier trained on real tiles recognises the label of {_percent(made)} of them{best}."


def _nuclei(report: Mapping[str, Any]) -> str:
    count, other = (part(report, "nuclei", side).get("nuclei_count_shift") for side in ("synthetic", "real"))
    if count is None or (part(report, "nuclei").get("n") or 0) < _FEW_TILES:
        return ""
    if abs(count) < _AS_MANY:
        return "They hold as many nuclei as real tiles."
    # other real patients differ as well: what these do, in the same direction, is no fault of the tiles
    if other is not None and count * other > 0 and abs(count) < abs(other) + _AS_MANY:
        return "Their number of nuclei differs from that of the real test tiles no more than other real patients' does."
    more = "more" if count > 0 else "fewer"
    return f"They hold {more} nuclei than real tiles (by {abs(count):.1f} standard deviations of a real tile)."


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _read(report: Mapping[str, Any]) -> str:
    strong = [g for g in report.get("guards") or [] if g["severity"] == "strong"]
    if not strong:
        return ""
    kinds = ", ".join(dict.fromkeys(g["guard"] for g in strong))
    return f"Read these scores with care: {len(strong)} finding(s) make them misleading ({kinds})."
