"""Rows of what `assess` found: how to pick them, and how arms look and are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from histosynth.study.figures import source_style
from histosynth.study.view import sign

Rows = Sequence[Mapping[str, Any]]
_BOTH = ("#00707a", "P")  # of all generators together


def arm_of(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An arm of the plan."""
    return next(arm for arm in result["plan"]["arms"] if arm["name"] == name)


def style(result: Mapping[str, Any], arm: Mapping[str, Any]) -> tuple[str, str, bool]:
    """Colour, marker, and hollow for all arms that neither decide a verdict nor are its baseline."""
    names = [g["name"] for g in result["plan"]["generators"]]
    plain = arm["real"] and arm["classical"] and not arm["selected"] and not arm.get("classes")
    if not arm["generators"]:
        return (*source_style("real"), not plain)
    if len(arm["generators"]) > 1:
        return (*_BOTH, True)
    return (*source_style(arm["generators"][0], names), not plain)


def mark(result: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, str]:
    """The colour and the character that stand for an arm in tables."""
    colour, marker, hollow = style(result, arm)
    return {"colour": colour, "sign": sign(marker, hollow)}


def pick(rows: Rows, **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def here(result: Mapping[str, Any], rows: Rows) -> list[Mapping[str, Any]]:
    """The rows of the condition in which the verdict is taken; arms that mix nothing have no share to agree on."""
    primary = result["primary"]
    found = []
    for row in rows:
        arm = arm_of(result, row["arm"])
        mixes = arm["real"] and arm["generators"]
        if row["n"] == primary["n"] and (row["share"] == primary["share"] or not mixes):
            found.append(row)
    return found


def tiles_named(n: int) -> str:
    """A number of real tiles a class as people say it."""
    return "all" if n == 0 else str(n)


def where(result: Mapping[str, Any]) -> str:
    """Where the verdict is taken, in words."""
    primary = result["primary"]
    tiles = "all real training tiles" if primary["n"] == 0 else f"{primary['n']} real tiles a class"
    return f"{tiles}, and {100 * primary['share']:g} % of what the classifier sees of a class is synthetic"


def added(result: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    """What an arm adds to the baseline, as short as it can be said."""
    if not arm["generators"]:
        return "Real + classical" if arm["classical"] else "Real, no augmentation"
    titles = {g["name"]: g["title"] for g in result["plan"]["generators"]}
    named = " + ".join(titles[g] for g in arm["generators"])
    if arm.get("classes"):
        return f"{named} for rare classes"
    return f"selected {named}" if arm["selected"] else named if arm["real"] else f"{named} only"


def rare_first(plan: Mapping[str, Any]) -> list[str]:
    return [*plan["rare"], *(c for c in plan["classes"] if c not in plan["rare"])]


def in_percent(row: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    mean, low, high = (None if row[k] is None else 100 * row[k] for k in ("mean", "low", "high"))
    return mean, low, high
