"""The 7 Cs card: seven criteria, numbers from the report, and "not known" for everything else."""

import json

from histosynth.study.evaluation.scorecard import CRITERIA, UNKNOWN, as_markdown, scorecard, write_card

SCORE = {"value": 0.25, "low": 0.2, "high": 0.3, "floor": 0.05, "ceiling": 0.9, "better": "lower"}
REPORT = {
    "source": "gan", "created": "2026-01-01T00:00:00", "version": "0.1.0", "command": "histosynth evaluate A B",
    "encoders": {
        "colour": {
            "all": {"n": 60, "scores": {"kid": SCORE, "recall": SCORE | {"value": None}}},
            "per_class": {c: {"scores": {"coverage": {"value": v}}} for c, v in (("ADI", 0.5), ("TUM", 0.9))},
            "copies": {"pixel_equal": 0.0, "pixel_alarms": 0.02, "nn_ratio": 1.1, "n_synthetic": 50},
        }
    },
    "planted": {"n": 40, "found": 0.975},
    "staining": {"limit": 2.795, "synthetic": {"patients_shift": 1.5, "patients_outside": 0.03},
                 "real": {"patients_shift": 0.4}},
    "labels": {"reason": "no classifier"},
    "generator": {"name": "gan", "checkpoint": "f" * 64, "licence": "Apache-2.0", "seeds": 50},
    "data": {
        "source": "hospital | 7", "digest": "a" * 64, "counts": {"test": {"ADI": 3, "LYM": 2, "TUM": 0}}, "size": 32,
        "synthetic": {"counts": {"ADI": 25, "LYM": 0, "TUM": 25}, "columns": ["label", "seed"], "edge": 32,
                      "source": "made"},
    },
    "guards": [{"guard": "file formats", "severity": "strong"}],
}  # fmt: skip


def values(card, criterion):
    return {entry["what"]: entry["value"] for entry in card["criteria"][criterion]["entries"]}


def test_entries_are_what_was_measured():
    card = scorecard(REPORT)
    assert tuple(card["criteria"]) == tuple(CRITERIA) and "2406.11143" in card["citation"]
    assert values(card, "congruence")["Kernel distance (KID), colour"] == "0.250 (0.200 to 0.300)"
    assert values(card, "constraint")["Staining, in units of the spread between patients"] == "1.50"
    assert values(card, "completeness")["Classes of the real test that have tiles"] == "1 of 2"
    assert values(card, "compliance")["Tiles that resemble a training tile pixel by pixel"] == "2.0 %"
    assert values(card, "comprehension")["Findings that make the scores misleading"] == "file formats"
    assert values(card, "consistency")["Coverage from class to class, colour"] == "0.500 (ADI) to 0.900 (TUM)"


def test_what_is_not_known_is_said_so_and_has_no_source():
    card = scorecard(REPORT)
    unknown = [e for c in card["criteria"].values() for e in c["entries"] if e["value"] == UNKNOWN]
    assert {"Recall, colour", "Review by a pathologist", "Formal privacy guarantee (such as differential privacy)"} <= {
        e["what"] for e in unknown
    }
    assert all(e["source"] == "" and e["beside"] == "" for e in unknown)
    empty = scorecard({"encoders": {}})
    for name in ("constraint", "compliance", "consistency"):
        assert set(values(empty, name).values()) == {UNKNOWN}


def test_files(tmp_path):
    card = write_card(tmp_path, REPORT)
    assert json.loads((tmp_path / "card.json").read_text()) == card
    text = (tmp_path / "card.md").read_text()
    assert text == as_markdown(card)
    for name in CRITERIA:
        assert f"## {name.capitalize()}" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)
