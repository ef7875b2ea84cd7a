"""What to know before training: findings in plain sentences, the worst first.

Every finding is {"level": "warning", "note" or "fine", "text", "section"}; the section is the part of the page that
shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

IMBALANCE = 5.0
"""Largest class over smallest, in training tiles, from which imbalance is named."""
FEW_PATIENTS = 5
"""Classes of fewer patients say little about other patients."""
MANY_REJECTED = 0.02
"""Share of tiles that the quality filter would reject, from which it is a note; of a class, `MANY_OF_CLASS`."""
MANY_OF_CLASS = 0.10
STAINING = (1.0, 5.0)
"""Staining is named when patients of a class spread this many times as far in mean colour as classes do, and this
many grey levels."""
DRAWN = (0.10, 0.5)
"""Relative change of the mean Mahalanobis distance from which normalisation is said to move the classes, and the
distance that they must have before or after."""

_ORDER = ("warning", "note", "fine")
_MEANINGS = {
    ("mean colour", "warning"): "a classifier may be learning the staining instead of the tissue",
    ("mean colour", "note"): "colour is part of what tells the classes apart",
    ("colour histogram", "warning"): "colour gives the class away, and a classifier may be learning the staining",
    ("colour histogram", "note"): "colour is part of what tells the classes apart",
    ("JPEG traces", "warning"): "classes were compressed differently, and a classifier may be learning that",
    ("JPEG traces", "note"): "classes may have been compressed differently",
    ("file facts", "warning"): "classes come from different kinds of files, which may show in the pixels",
    ("file facts", "note"): "classes come partly from different kinds of files, which may show in the pixels",
}
_NAMES = {
    "mean colour": "The mean colour alone (3 numbers)", "colour histogram": "A colour histogram alone",
    "JPEG traces": "Traces of JPEG compression alone", "file facts": "Format and size of the files alone",
}  # fmt: skip


def findings(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """All findings of a report, those of the highest level first, in the order of the page within a level."""
    parts = (_leaks, _sides, _balance, _set_aside, _quality, _staining, _normalisation, _files)
    found = [{"level": level, "section": section, "text": text} for part in parts for level, section, text in
             part(report)]  # fmt: skip
    return sorted(found, key=lambda f: _ORDER.index(f["level"]))


def _leaks(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    labels = [c["label"] for c in report["classes"]]
    judged = quiet = 0
    for p in report["probes"]["class"]:
        judged += p["score"] is not None
        quiet += p["score"] is not None and p["level"] == "none"
        if p["level"] == "none":
            continue
        text = (
            f"{_NAMES[p['name']]} reach{'' if p['name'] in ('JPEG traces', 'file facts') else 'es'} "
            f"{p['score']:.2f} balanced accuracy on unseen patients (chance {p['chance']:.2f})"
        )
        area = [-1 if a is None else a for a in p["area"]]
        best = area.index(max(area))
        if p["name"] in ("JPEG traces", "file facts"):
            text += f"; {labels[best]} stands out most (area under the curve {area[best]:.2f})"
        yield p["level"], "leaks", f"{text}: {_MEANINGS[p['name'], p['level']]}."
    for p in report["probes"]["split"]:
        if p["level"] != "none":
            yield (
                p["level"],
                "leaks",
                f"{_NAMES[p['name']]} tell{'' if p['name'] in ('JPEG traces', 'file facts') else 's'} test tiles "
                f"from training tiles (area under the curve {p['score']:.2f}, chance 0.50): the test tiles are not "
                "like the training tiles in this respect.",
            )
    if judged and judged == quiet:
        yield "fine", "leaks", "Neither colour, nor traces of JPEG, nor the files give the class away."


def _sides(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    patients = report["straddling"]
    if patients:
        yield (
            "warning",
            "counts",
            f"{len(patients)} patient(s) have tiles in more than one split ({_few(patients)}): scores on them are not "
            "scores on unseen patients.",
        )
    elif len(report["splits"]) > 1 and report["has_patients"]:
        yield "fine", "counts", "No patient has tiles in two splits."
    near = report["duplicates"]
    if near["across_splits"]:
        yield (
            "warning",
            "duplicates",
            f"{near['across_splits']:,} pair(s) of near-duplicate tiles lie on two sides of the split: the test has "
            "seen them.",
        )
    if near["across_classes"]:
        yield (
            "warning",
            "duplicates",
            f"{near['across_classes']:,} pair(s) of near-duplicate tiles have two different labels.",
        )
    if near["across_patients"]:
        yield (
            "note",
            "duplicates",
            f"{near['across_patients']:,} pair(s) of near-duplicate tiles come from two patients: one patient may have "
            "two names.",
        )
    if not near["across_splits"] + near["across_patients"]:
        yield "fine", "duplicates", "No near-duplicate tiles lie on two sides of the split or in two patients."
    if not report["has_patients"]:
        yield (
            "warning",
            "counts",
            "The patients are not known: tiles of one patient may lie on both sides, so scores will look too good.",
        )
    if report["splits"] == [""]:
        yield "note", "counts", "The tiles are not split into train, val and test."


def _balance(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    classes = [c for c in report["classes"] if c["training"]]
    empty = [c["label"] for c in report["classes"] if not c["training"]]
    split = "training " if "train" in report["splits"] else ""
    if empty:
        yield "warning", "counts", f"No {split}tile: {_few(empty)}."
    if len(classes) > 1:
        most, least = (f(classes, key=lambda c: c["training"]) for f in (max, min))
        ratio = most["training"] / least["training"]
        if ratio >= IMBALANCE:
            yield (
                "note",
                "counts",
                f"{most['label']} has {ratio:.0f} times as many {split}tiles as {least['label']} "
                f"({most['training']:,} against {least['training']:,}): use balanced batches and balanced accuracy.",
            )
    rare = [f"{c['label']} ({c['training']:,})" for c in classes if c["rare"]]
    if rare:
        yield "note", "counts", f"Rare, with less than half of an equal share of the {split}tiles: {_few(rare)}."
    if report["has_patients"]:
        few = [f"{c['label']} ({c['all_patients']})" for c in report["classes"] if c["all_patients"] < FEW_PATIENTS]
        if few:
            yield "warning", "counts", f"Fewer than {FEW_PATIENTS} patients: {_few(few)}. Their scores mean little."
    for side in ("val", "test"):
        missing = [c["label"] for c in classes if side in report["splits"] and not c["tiles"].get(side)]
        if missing:
            yield "warning", "counts", f"Classes without {side} tiles: {_few(missing)}."


def _set_aside(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    lost = report["set_aside"]
    if lost:
        total = sum(row["tiles"] for row in lost)
        kinds = _few([f"{row['tiles']:,} {row['kind']}" for row in lost])
        yield "note", "duplicates", f"{total:,} tile(s) are set aside and never used: {kinds}."
    if report["unreadable"]:
        yield (
            "warning",
            "duplicates",
            f"{report['unreadable']['tiles']:,} tile(s) of the set can no longer be read, such as: "
            f"{report['unreadable']['first']}",
        )


def _quality(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    part = report["quality"]
    share = part["rejected"] / max(part["tiles"], 1)
    if share >= MANY_REJECTED:
        worst = max(part["by_class"], key=lambda c: c["rejected"] / max(c["tiles"], 1))
        yield (
            "note",
            "quality",
            f"The quality filter would reject {part['rejected']:,} of {part['tiles']:,} tiles ({share:.1%}), most of "
            f"{worst['label']} ({worst['rejected'] / max(worst['tiles'], 1):.0%}).",
        )
    elif part["rules"] != "none":
        yield "fine", "quality", f"The quality filter would reject {part['rejected']:,} of {part['tiles']:,} tiles."
    heavy = [f"{c['label']} ({c['rejected'] / c['tiles']:.0%})" for c in part["by_class"]
             if c["tiles"] and c["rejected"] / c["tiles"] >= MANY_OF_CLASS]  # fmt: skip
    if heavy and part["rejected"]:
        yield "warning", "quality", f"The quality filter would take much of a class: {_few(heavy)}. Look at the tiles."


def _staining(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    spread = report["colour"]["spread"]
    ratio, levels = STAINING
    if report["has_patients"] and spread["patients"] >= max(ratio * spread["classes"], levels):
        yield (
            "note",
            "colour",
            f"Mean colour differs by {spread['patients']:.0f} grey levels between patients of a class, and by "
            f"{spread['classes']:.0f} between classes: normalise or augment the staining.",
        )


def _normalisation(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    before, *after = report["normalisation"].get("states") or [{}]
    for state in after:
        old, new = before.get("mean_mahalanobis"), state.get("mean_mahalanobis")
        if old and new is not None:
            change = new / old - 1
            moved = "draws the classes together" if change < 0 else "drives the classes apart"
            level = "note" if abs(change) >= DRAWN[0] and max(old, new) >= DRAWN[1] else "fine"
            text = f"{state['name'].capitalize()} normalisation "
            text += f"{moved} in mean colour" if level == "note" else "hardly moves the classes in mean colour"
            yield level, "normalisation", f"{text} (Mahalanobis distance {old:.2f} before, {new:.2f} after)."


def _files(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    sizes, formats = report["files"]["sizes"], report["files"]["formats"]
    if len(sizes) > 1:
        yield "note", "counts", f"The tiles have more than one size ({_few(list(sizes))}): they will be resized."
    lossy = [name for name in formats if name in ("JPEG", "WEBP")]
    if lossy:
        yield "note", "counts", f"{sum(formats[n] for n in lossy):,} tile(s) were read from {_few(lossy)} files."


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
