"""The tables of the usefulness page: rows of words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from histosynth.study import view
from histosynth.study.usefulness.rows import added, arm_of, here, mark, pick, rare_first, tiles_named, where

SCORES = (
    ("balanced_accuracy", "Balanced accuracy", "% ↑"),
    ("rare_recall", "Rare classes", "recall, % ↑"),
    ("macro_f1", "Macro F1", "% ↑"),
    ("auroc", "AUROC", "% ↑"),
    ("ece", "Calibration error", "% ↓"),
    ("brier", "Brier score", "↓"),
    ("nll", "Log loss", "nats ↓"),
)
_PLAIN = ("brier", "nll")  # not shares
_TITLES = {name: f"{title} ↓" if "↓" in note else title for name, title, note in SCORES} | {
    "rare_recall": "Recall of the rare classes",
}


def worth_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """What synthetic tiles are worth in real ones, a row a number of real tiles and a column a generator."""
    found = result["worth"]
    deciding = {v["arm"]: v["title"] for v in result["verdicts"]}
    rows = []
    for n in dict.fromkeys(row["n"] for row in found.get("rows", [])):
        cells = []
        for arm in deciding:
            row = next(iter(pick(found["rows"], n=n, arm=arm)), None)
            cells.append(_worth_cell(result, row) if row else {"text": view.NA, "interval": ""})
        rows.append({"title": tiles_named(n), "cells": cells})
    more = any("†" in cell["text"] for row in rows for cell in row["cells"])
    return {"columns": list(deciding.values()), "rows": rows, "more": more, "reason": found.get("reason", "")}


def recall_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """Recall of every class where the verdict is taken, a column an arm."""
    plan, primary = result["plan"], result["primary"]
    shown = [row for row in here(result, pick(result["scores"], set=primary["test"])) if _shown(result, row["arm"])]
    rows = []
    for label in rare_first(plan):
        cells = [_cell("recall", row["recall"][label]) for row in shown]
        rows.append({"label": label, "rare": label in plan["rare"], "train": plan["train_counts"][label],
                     "cells": cells})  # fmt: skip
    columns = [{"title": added(result, arm_of(result, row["arm"])), **mark(result, arm_of(result, row["arm"]))}
               for row in shown]  # fmt: skip
    return {"columns": columns, "rows": rows}


def columns(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name, title and unit of the scores that there are; without rare classes there is no recall of them."""
    return [row for row in SCORES if row[0] in result["scores"][0]["scores"]]


def arms_table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All scores of every arm where the verdict is taken."""
    rows = []
    for row in here(result, pick(result["scores"], set=result["primary"]["test"])):
        arm = arm_of(result, row["arm"])
        real, made = (sum(pair[i] for pair in row["train_tiles"].values()) for i in (0, 1))
        kept = row["kept"]
        rows.append({
            "title": arm["title"], "mark": mark(result, arm), "real": f"{real:,.0f}", "made": f"{made:,.0f}",
            "kept": "" if kept is None else f"{100 * sum(kept.values()) / max(len(kept), 1):.0f} % kept",
            "cells": [_cell(name, row["scores"][name]) for name, _, _ in columns(result)],
        })  # fmt: skip
    return rows


def sets_table(result: Mapping[str, Any]) -> dict[str, Any]:
    """Balanced accuracy and the difference to the baseline on every test set; nothing with one set."""
    plan, primary = result["plan"], result["primary"]
    if len(plan["sets"]) < 2:
        return {}
    rows = []
    for arm in plan["arms"]:
        cells = []
        for one in plan["sets"]:
            score = here(result, pick(result["scores"], arm=arm["name"], set=one["name"]))
            change = here(result, pick(result["differences"], arm=arm["name"], set=one["name"],
                                       metric=primary["metric"], against=primary["baseline"]))  # fmt: skip
            cell = _cell("recall", score[0]["scores"][primary["metric"]]) if score else _cell("recall", None)
            cells.append(cell | {"change": _change(change[0]) if change else ""})
        rows.append({"title": arm["title"], "mark": mark(result, arm), "cells": cells})
    return {"sets": plan["sets"], "rows": rows}


def trts_table(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the classifier of real tiles sees in synthetic ones."""
    found, pairs = result["extra"].get("trts") or {}, result["extra"].get("pairs") or {}
    titles = {g["name"]: g["title"] for g in result["plan"]["generators"]} | {"real": "Real test tiles"}
    rows = []
    for name, one in found.items():
        per_class = {c: v for c, v in (one.get("per_class") or {}).items() if v is not None}
        poorest = min(per_class, key=per_class.__getitem__, default="")
        pair = pairs.get(name) or {}
        rows.append({
            "title": titles.get(name, name), "tiles": f"{one['tiles']:,}",
            "seen": _share(one.get("label_consistency")),
            "interval": _range(one.get("label_consistency_low"), one.get("label_consistency_high")),
            "poorest": f"{poorest} {_share(per_class[poorest])}" if poorest else view.NA,
            "pairs": _share(pair.get("pair_consistency")),
            "chance": f"by chance {_share(pair['pair_consistency_chance'])}"
                      if pair.get("pair_consistency_chance") is not None else "",
        })  # fmt: skip
    return rows


def secondary_table(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every secondary comparison, a group a family."""
    sure = 1 - result["settings"]["level"]
    saw_more = {(row["arm"], row["n"], row["share"]) for row in result["scores"] if row["generator_saw_more"]}
    titles = {one["name"]: one["title"] for one in result["plan"]["sets"]}
    groups = []
    for family, words in result["families"].items():
        rows = []
        for row in pick(result["differences"], family=family):
            arm, p = arm_of(result, row["arm"]), row["p_adjusted"]
            score = f"recall of {row['class']}" if row["class"] else _TITLES[row["metric"]]
            rows.append({
                "title": arm["title"], "mark": mark(result, arm), "tiles": tiles_named(row["n"]),
                "share": f"{100 * row['share']:g} %", "score": f"{score}, {titles[row['set']]}"
                if family == "sets" else score, "mean": view.signed(row["mean"]),
                "interval": _range_signed(row), "p": view.NA if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
                "sure": p is not None and p < sure, "more": (row["arm"], row["n"], row["share"]) in saw_more,
            })  # fmt: skip
        if rows:
            groups.append({"title": words[:1].upper() + words[1:], "rows": rows})
    return groups


def protocol(result: Mapping[str, Any]) -> dict[str, Any]:
    """How it was measured."""
    plan, settings, primary = result["plan"], result["settings"], result["primary"]
    return {
        "classifier": plan["classifier"],
        "initialisation": result["initialisation"],
        "steps": f"{plan['steps']:,}, the same in every cell",
        "real tiles a class": [tiles_named(n) for n in plan["per_class"]],
        "shares of synthetic tiles": [f"{100 * s:g} %" for s in plan["shares"]],
        "seeds": result["seeds"],
        "primary comparison": f"balanced accuracy against “{arm_of(result, primary['baseline'])['title']}”, "
        f"{where(result)}",
        "intervals": f"{100 * settings['level']:g} %, paired bootstrap over patients and seeds, "
        f"{settings['replicates']:,} replicates",
        "secondary comparisons": "p-values adjusted by Holm within each family of questions; never used for a verdict",
        "margin": f"{100 * settings['margin']:g} points: smaller differences do not matter",
        "calibration": "temperature from the validation tiles; AUROC, calibration error, Brier score and log loss "
        "are of the scaled probabilities",
        "rare classes": plan["rare"] or "none",
        "tile size": f"{plan['size']} px" if plan.get("size") else "",
        "split": plan.get("split_protocol", ""),
    }


def costs(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Time of the classifiers, an arm a row."""
    found = result["costs"]["arms"]
    most = max((one["seconds"] for one in found.values()), default=0) or 1
    return [
        {"title": arm_of(result, name)["title"], "seconds": one["seconds"], "cells": one["cells"],
         "width": round(100 * one["seconds"] / most, 1)}
        for name, one in found.items()
    ]  # fmt: skip


def _shown(result: Mapping[str, Any], arm: str) -> bool:
    return arm == result["primary"]["baseline"] or any(v["arm"] == arm for v in result["verdicts"])


def _cell(name: str, score: Mapping[str, Any] | None) -> dict[str, str]:
    form = (lambda v: f"{v:.3f}") if name in _PLAIN else view.percent
    if not score or score["mean"] is None:
        return {"text": view.NA, "interval": ""}
    known = score["low"] is not None and score["high"] is not None
    return {"text": form(score["mean"]), "interval": f"{form(score['low'])} to {form(score['high'])}" if known else ""}


def _worth_cell(result: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
    def said(value: float | None, off: str) -> str:
        if value is None:
            return view.NA
        sign = {"above": "≥ ", "below": "≤ "}.get(off, "")
        return sign + f"{value:+.0f}".replace("-", "−").replace("+0", "0").replace("−0", "0")

    more = pick(result["scores"], arm=row["arm"], n=row["n"], share=row["share"])[0]["generator_saw_more"]
    interval = f"{said(row['low'], row['low_off'])} to {said(row['high'], row['high_off'])}"
    return {
        "text": said(row["tiles"], row["off"]) + (" †" if more else ""),
        "interval": interval if row["low"] is not None else "",
    }


def _change(row: Mapping[str, Any]) -> str:
    interval = _range_signed(row)
    return view.signed(row["mean"]) + (f" ({interval})" if interval != view.NA else "")


def _range_signed(row: Mapping[str, Any]) -> str:
    return view.NA if row["low"] is None else f"{view.signed(row['low'])} to {view.signed(row['high'])}"


def _share(value: float | None) -> str:
    return view.NA if value is None else f"{view.percent(value, 0)} %"


def _range(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{view.percent(low, 0)} to {view.percent(high, 0)}"
