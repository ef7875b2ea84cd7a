"""The card of a synthetic tile set in the shape of the "7 Cs" scorecard.

Zamzmi, Subbaswamy, Sizikova, Margerrison, Delfino & Badano: Scorecards for synthetic medical data evaluation and
reporting (Communications Engineering 2025, arXiv 2406.11143). Every entry is a number that was measured, or a fact
of the tile set; what is neither is said not to be known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from histosynth.core.files import write_json, write_text
from histosynth.study.view import number, part, pretty

CITATION = "Zamzmi et al., Communications Engineering 2025 (arXiv 2406.11143)"
UNKNOWN = "not known"
CRITERIA = {
    "congruence": "How closely do the synthetic tiles follow the distribution of real ones?",
    "coverage": "How much of the variety of real tiles do they hold?",
    "constraint": "Do they keep to what tissue and staining can look like?",
    "completeness": "Is everything there that their use needs: classes, labels, records?",
    "compliance": "Privacy and licences: copies of patients' tiles, and under which terms they can be used.",
    "comprehension": "Is it known and told how they were made, and what they cannot be used for?",
    "consistency": "Do they show what they were asked for, alike in every class, and can they be made again?",
}


def write_card(folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Write card.json and card.md.

    Raises:
        RunError: the folder cannot be written.
    """
    card = scorecard(report)
    write_json(folder / "card.json", card)
    write_text(folder / "card.md", as_markdown(card))
    return card


def scorecard(report: Mapping[str, Any]) -> dict[str, Any]:
    """The card: for each of the seven criteria its question and entries {what, value, beside, source}."""
    entries = {
        "congruence": _congruence(report),
        "coverage": _coverage(report),
        "constraint": _constraint(report),
        "completeness": _completeness(report),
        "compliance": _compliance(report),
        "comprehension": _comprehension(report),
        "consistency": _consistency(report),
    }
    data = part(report, "data")
    return {
        "scorecard": "7 Cs of synthetic medical data",
        "citation": CITATION,
        "tiles": part(data, "synthetic").get("source") or UNKNOWN,
        "digest": part(data, "synthetic").get("digest") or UNKNOWN,
        "generator": part(report, "generator").get("name") or UNKNOWN,
        "judged_against": data.get("source") or UNKNOWN,
        "reference_digest": data.get("digest") or UNKNOWN,
        "created": report.get("created") or UNKNOWN,
        "version": report.get("version") or UNKNOWN,
        "command": report.get("command") or UNKNOWN,
        "criteria": {name: {"question": CRITERIA[name], "entries": found} for name, found in entries.items()},
    }


def as_markdown(card: Mapping[str, Any]) -> str:
    """The card for people."""
    lines = [
        f"# Card of synthetic tiles: {card['tiles']}",
        "",
        f"The 7 Cs of synthetic medical data, after {card['citation']}. Every value was measured or is a fact of the "
        f'tile set; otherwise the entry says "{UNKNOWN}".',
        "",
        *(f"- {pretty(k)}: {card[k]}" for k in ("generator", "digest", "judged_against", "reference_digest")),
        f"- Made by histosynth {card['version']}, {card['created']}",
        f"- Command: `{card['command']}`",
    ]
    for name, criterion in card["criteria"].items():
        lines += ["", f"## {pretty(name)}", "", criterion["question"], "", "| what | value | beside | from |"]
        lines += ["| --- | --- | --- | --- |"]
        lines += [
            "| " + " | ".join(_cell(entry[k]) for k in ("what", "value", "beside", "source")) + " |"
            for entry in criterion["entries"]
        ]
    return "\n".join(lines) + "\n"


def _entry(what: str, value: Any, beside: str = "", source: str = "measured") -> dict[str, str]:
    known = value not in (None, "", "n/a")
    text = str(value) if known else UNKNOWN
    return {"what": what, "value": text, "beside": beside if known else "", "source": source if known else ""}


def _scores(report: Mapping[str, Any], names: Mapping[str, str]) -> list[dict[str, str]]:
    found = []
    for encoder, judged in part(report, "encoders").items():
        scores = part(judged, "all", "scores")
        for name, title in names.items():
            score = scores.get(name) or {}
            value, floor, ceiling = (number(score.get(k)) for k in ("value", "floor", "ceiling"))
            low, high = score.get("low"), score.get("high")
            interval = "" if low is None or high is None else f" ({number(low)} to {number(high)})"
            beside = f"real {floor}, hopeless {ceiling}, {part(judged, 'all').get('n')} tiles a side"
            found.append(_entry(f"{title}, {encoder}", value if value == "n/a" else f"{value}{interval}", beside))
    return found


def _congruence(report: Mapping[str, Any]) -> list[dict[str, str]]:
    names = {"frechet": "Fréchet distance", "kid": "Kernel distance (KID)", "precision": "Precision"}
    return _scores(report, names)


def _coverage(report: Mapping[str, Any]) -> list[dict[str, str]]:
    names = {"recall": "Recall", "coverage": "Coverage", "vendi_ratio": "Variety (Vendi ratio)"}
    found = _scores(report, names)
    for name, sides in part(report, "variety").items():
        made, real = (part(sides, s).get("diversity") for s in ("synthetic", "real"))
        found.append(_entry(f"Distance between two tiles of a class, {name}", number(made), f"real {number(real)}"))
    return found


def _constraint(report: Mapping[str, Any]) -> list[dict[str, str]]:
    stain, nuclei = part(report, "staining"), part(report, "nuclei")
    shift, real = (part(stain, side).get("patients_shift") for side in ("synthetic", "real"))
    outside = part(stain, "synthetic").get("patients_outside")
    limit = stain.get("limit")
    wide = part(report, "single_tiles").get("median")
    return [
        _entry("Staining, in units of the spread between patients", number(shift),
               f"real {number(real)}; 95 % of patients lie within {number(limit)}"),
        _entry("Tiles stained like no real patient", _percent(outside), "about 1 % expected"),
        *(
            _entry(f"Nuclei, {what}: distance in standard deviations",
                   number(part(nuclei, "synthetic").get(f"nuclei_{name}_w1")),
                   f"real {number(part(nuclei, 'real').get(f'nuclei_{name}_w1'))}")
            for name, what in (("count", "number"), ("area", "size"), ("density", "darkness"))
        ),
        _entry("Median distance of a tile to real test tiles", number(wide), "real 1"),
        _entry("Review by a pathologist", None),
    ]  # fmt: skip


def _completeness(report: Mapping[str, Any]) -> list[dict[str, str]]:
    data = part(report, "data")
    made, test = part(data, "synthetic", "counts"), part(data, "counts", "test")
    needed = [c for c, n in test.items() if n]
    missing = [c for c in needed if not made.get(c)]
    covered = f"{len(needed) - len(missing)} of {len(needed)}"
    columns = ", ".join(c for c in ("label", "seed", "checkpoint", "reference", "patient")
                        if c in (part(data, "synthetic").get("columns") or [])) or "none"  # fmt: skip
    return [
        _entry("Classes of the real test that have tiles", covered,
               f"without: {', '.join(missing)}" if missing else "", "tile set"),
        _entry("Tiles", number(sum(made.values())), ", ".join(f"{c} {n}" for c, n in made.items()), "tile set"),
        _entry("Recorded for every tile", columns, "", "tile set"),
        _entry("Edge length", f"{part(data, 'synthetic').get('edge')} px", f"compared at {data.get('size')} px",
               "tile set"),
    ]  # fmt: skip


def _compliance(report: Mapping[str, Any]) -> list[dict[str, str]]:
    judged = next(iter(part(report, "encoders").values()), {})
    copies, planted, generator = part(judged, "copies"), part(report, "planted"), part(report, "generator")
    trust = f"the check finds {_percent(planted.get('found'))} of {planted.get('n')} planted copies"
    return [
        _entry("Exact copies of training tiles", _percent(copies.get("pixel_equal")), "0 % expected"),
        _entry("Tiles that resemble a training tile pixel by pixel", _percent(copies.get("pixel_alarms")),
               f"about 1 % expected; {trust}"),
        _entry("Distance to the closest training tile", number(copies.get("nn_ratio")),
               "1 for real tiles that were never trained on"),
        _entry("Licence of the tiles", generator.get("licence"), "", "tile set"),
        _entry("Licence of the real tiles", part(report, "data").get("licence"), "", "tile set"),
        _entry("Formal privacy guarantee (such as differential privacy)", None),
        _entry("Consent or ethics approval of the source", None),
    ]  # fmt: skip


def _comprehension(report: Mapping[str, Any]) -> list[dict[str, str]]:
    generator, data = part(report, "generator"), part(report, "data")
    trained = generator.get("trained_on") or {}
    strong = [g["guard"] for g in report.get("guards") or [] if g["severity"] == "strong"]
    return [
        _entry("Generator", generator.get("name"), "", "tile set"),
        _entry("Checkpoint (SHA-256)", generator.get("checkpoint"), "", "tile set"),
        _entry("Trained from", ", ".join(generator.get("parents") or []), "", "checkpoint"),
        _entry("Training tiles", trained.get("tiles"), "", "checkpoint"),
        _entry("Command", generator.get("command"), "", "checkpoint"),
        _entry("Reference tiles", data.get("source"), str(data.get("split_protocol") or ""), "tile set"),
        _entry("Findings that make the scores misleading", ", ".join(strong) or "none", "", "guards"),
        _entry("Use", "research; not for diagnosis", "", "histosynth"),
    ]


def _consistency(report: Mapping[str, Any]) -> list[dict[str, str]]:
    labels, generator = part(report, "labels"), part(report, "generator")
    made, real, chance = (part(labels, s).get("label_consistency") for s in ("synthetic", "real", "hopeless"))
    judged = next(iter(part(report, "encoders").items()), ("", {}))
    ranks = {c: part(one, "scores", "coverage").get("value") for c, one in part(judged[1], "per_class").items()}
    known = {c: v for c, v in ranks.items() if v is not None}
    spread = f"{number(min(known.values()))} ({min(known, key=known.__getitem__)}) to {number(max(known.values()))} " \
             f"({max(known, key=known.__getitem__)})" if known else None  # fmt: skip
    cosine = part(report, "references", "cosine")
    seeds = generator.get("seeds")
    return [
        _entry("Labels that a classifier trained on real tiles recognises", _percent(made),
               f"real test tiles {_percent(real)}, shuffled labels {_percent(chance)}"),
        _entry(f"Coverage from class to class, {judged[0]}", spread),
        _entry("Likeness to the tile a tile was conditioned on (cosine)", number(cosine.get("reference_cosine")),
               f"to another of the class {number(cosine.get('reference_cosine_other'))}"),
        _entry("Can be made again", f"{seeds:,} seeds are recorded" if seeds else None, "", "tile set"),
    ]  # fmt: skip


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
