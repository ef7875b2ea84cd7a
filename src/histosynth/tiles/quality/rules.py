"""Rules files of the quality filter: what they may hold, how they are read and written. See `thresholds`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from histosynth.core.errors import SettingError, did_you_mean
from histosynth.tiles.quality.metrics import METRICS

COMBINED = "jpeg_blockiness"
RULES: tuple[str, ...] = tuple(f"{m}_{side}" for m in (*METRICS, COMBINED) for side in ("min", "max"))
CALIBRATED = {"block_spatial": 0.02, "block_dct": 0.001}  # with the least spread
_CLASS_KEYS = ("accept", "typical", "calibration", *RULES)


@dataclass(frozen=True)
class Limits:
    """The limits of one class."""

    rules: dict[str, float] = field(default_factory=dict)
    """`<metric>_min` or `<metric>_max` to the limit itself, which is still accepted."""
    accept: str = ""
    """"always", "finite", or "" when the limits decide."""
    typical: dict[str, float] = field(default_factory=dict)
    """Median of a metric, for `Thresholds.score`."""
    calibration: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Mean and spread of block_spatial and block_dct."""


def find_rules(path: Path | str) -> tuple[str, str]:
    """Where the rules are and their text, of a file or of the preset of that name."""
    if Path(path).is_file():
        try:
            return str(path), Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise SettingError(f"The rules {path} cannot be read: {error}.", "Check the file.") from error
    folder = files("histosynth") / "presets" / "quality"
    presets = {p.name.removesuffix(".yaml"): p for p in folder.iterdir() if p.name.endswith(".yaml")}
    if str(path) not in presets:
        raise SettingError(f"The rules {str(path)!r} are no file and no preset.", did_you_mean(str(path), presets))
    return str(path), presets[str(path)].read_text(encoding="utf-8")


def parse_rules(content: Any, where: str) -> dict[str, Any]:
    """The fields of `Thresholds` from what a rules file holds."""
    known = ("format", "name", "pooled", "default", "classes", "learn")
    if not isinstance(content, dict):
        raise SettingError(f"The rules {where} hold no table.", f"Give the keys {', '.join(known[3:])}.")
    _check(content, known, where, "Classes belong under `classes:`. ")
    recipe = content.get("learn") or {}
    _check(recipe, RULES, f"{where}, learn")
    for rule, bounds in recipe.items():
        _check(bounds or {}, ("tolerated", "intolerable"), f"{where}, learn, {rule}")
    classes = content.get("classes") or {}
    if not isinstance(classes, dict):
        raise SettingError(f"The rules {where} hold {classes!r} under classes.", "Give a table by class.")
    return {
        "default": _limits(content.get("default"), f"{where}, default"),
        "classes": {str(c): _limits(v, f"{where}, class {c}") for c, v in classes.items()},
        "recipe": {
            r: {k: _number(v, f"{where}, learn, {r}, {k}") for k, v in (b or {}).items()} for r, b in recipe.items()
        },
        "pooled": tuple(str(c) for c in content.get("pooled") or ()),
        "name": str(content.get("name") or Path(where).stem),
    }


def _limits(content: Any, where: str) -> Limits:
    content = content or {}
    _check(content, _CLASS_KEYS, where)
    accept = content.get("accept", "")
    if accept not in ("", "always", "finite"):
        raise SettingError(f"accept is {accept!r} ({where}).", "Use always or finite, or leave it out.")
    typical, calibration = content.get("typical") or {}, content.get("calibration") or {}
    _check(typical, (*METRICS, COMBINED), f"{where}, typical")
    _check(calibration, tuple(CALIBRATED), f"{where}, calibration")
    for metric, pair in calibration.items():
        if not isinstance(pair, list) or len(pair) != 2:
            raise SettingError(f"The calibration of {metric} is {pair!r} ({where}).", "Give [mean, spread].")
    return Limits(
        {k: _number(v, f"{where}, {k}") for k, v in content.items() if k in RULES},
        accept,
        {k: _number(v, f"{where}, typical, {k}") for k, v in typical.items()},
        {k: (_number(v[0], f"{where}, {k}"), _number(v[1], f"{where}, {k}")) for k, v in calibration.items()},
    )


def _check(content: Any, known: Sequence[str], where: str, hint: str = "") -> None:
    if not isinstance(content, dict):
        raise SettingError(f"The rules {where} hold {content!r} where a table belongs.", "Give `key: value` lines.")
    for key in content:
        if key not in known:
            near = did_you_mean(str(key), known)
            raise SettingError(f"The rules {where} have the key {str(key)!r}, which is unknown.", f"{hint}{near}")


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise SettingError(f"The rules have {value!r} ({where}) where a number belongs.", "Give a number.")
    return float(value)


def plain(limits: Limits) -> dict[str, Any]:
    """Limits as a rules file holds them."""
    content: dict[str, Any] = {"accept": limits.accept} if limits.accept else {}
    content |= {rule: float(v) for rule, v in limits.rules.items()}
    if limits.typical:
        content["typical"] = {m: float(v) for m, v in limits.typical.items()}
    if limits.calibration:
        content["calibration"] = {m: [float(a), float(b)] for m, (a, b) in limits.calibration.items()}
    return content
