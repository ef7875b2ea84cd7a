"""FIXTURE: an experiment on disk, with made-up logits whose effects are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from histosynth.core.files import write_json

CLASSES = ("ADENOCA", "HGIN", "LGIN", "NORMAL", "POLYP", "SERRATED")
TRAIN = {"ADENOCA": 160, "HGIN": 80, "LGIN": 150, "NORMAL": 30, "POLYP": 120, "SERRATED": 24}
RARE = ("NORMAL", "SERRATED")


def made_up(
    out: Path,
    gains: dict[str, float],
    *,
    numbers: tuple[int, ...] = (5, 10, 20, 0),
    shares: tuple[float, ...] = (0.5,),
    seeds: tuple[int, ...] = (3, 8, 11),
    patients: int = 40,
    per_patient: int = 8,
    external: bool = False,
    rare_gain: float = 0.0,
    saw_more: bool = True,
    noise: float = 0.1,
    seed: int = 0,
) -> dict[str, Any]:
    """Write the files of an experiment; returns its plan.

    Args:
        gains: what the tiles of each generator add to the margin of the right class, in standard deviations of the
            logits, at a share of a half; less at other shares, and half as much after selection.
        rare_gain: what they add for rare classes beyond that.
    """
    rng = np.random.default_rng(seed)
    arms = [_arm("real", "Real", [], classical=False), _arm("real_classical", "Real + classical augmentation", [])]
    arms += [_arm(f"real_{g}", f"Real + classical + {g.upper()}", [g]) for g in gains]
    if len(gains) > 1:
        arms.append(_arm("real_all", f"Real + classical + {' + '.join(g.upper() for g in gains)}", list(gains)))
    arms += [_arm(f"real_{g}_selected", f"Real + classical + selected {g.upper()}", [g], selected=True) for g in gains]
    arms += [_arm(f"{g}_only", f"{g.upper()} only", [g], real=False) for g in gains]
    sets = ["test", *(["external-1"] if external else [])]
    truth = {}
    for name in sets:
        y = rng.choice(len(CLASSES), patients * per_patient, p=np.array([*TRAIN.values()]) / sum(TRAIN.values()))
        groups = np.repeat([f"{name}-{i:02d}" for i in range(patients)], per_patient)
        truth[name] = y, groups, rng.normal(0, 0.4, patients).repeat(per_patient)
        (out / "sets").mkdir(parents=True, exist_ok=True)
        ids = np.array([f"{name}-{i}" for i in range(len(y))])
        np.savez(out / "sets" / f"{name}.npz", y=y, groups=groups, ids=ids)
    (out / "cells").mkdir(parents=True, exist_ok=True)
    for run in seeds:
        shared = {name: np.random.default_rng(run).normal(0, 1, (len(truth[name][0]), len(CLASSES))) for name in sets}
        for n in numbers:
            for arm in arms:
                if not arm["real"] and n != numbers[-1]:
                    continue
                for share in shares if arm["generators"] and arm["real"] else (0.0 if arm["real"] else 1.0,):
                    key = f"{arm['name']}-n{0 if not arm['real'] else n}-s{round(100 * share)}-r{run}"
                    own = np.random.default_rng([seed, run, n, *key.encode()])
                    margin = 0.6 + 0.35 * np.log((n or 94) / 5) + (0.2 if arm["classical"] else 0)
                    gain = sum(gains[g] for g in arm["generators"]) / max(len(arm["generators"]), 1)
                    gain *= (0.5 if arm["selected"] else 1) * (4 * share * (1 - share) if arm["real"] else 1)
                    margin += own.normal(0, noise) + gain - (0 if arm["real"] else 1.2)
                    extra = rare_gain if arm["generators"] and arm["real"] else 0.0
                    logits = {}
                    for name in sets:
                        y, _, hard = truth[name]
                        values = 0.9 * shared[name] + 0.45 * own.normal(0, 1, shared[name].shape)
                        rare = np.isin(y, [CLASSES.index(c) for c in RARE])
                        values[np.arange(len(y)), y] += margin - hard + extra * rare - (0.4 if name != "test" else 0)
                        logits[name] = (1.5 * values).astype(np.float32)
                    np.savez(out / "cells" / f"{key}.npz", **logits)
                    real = {c: (min(k, n) if n else k) if arm["real"] else 0 for c, k in TRAIN.items()}
                    made = 120 if arm["generators"] else 0
                    write_json(out / "cells" / f"{key}.json", {
                        "key": key, "arm": arm["name"], "n": 0 if not arm["real"] else n, "share": share, "seed": run,
                        "temperature": 1.3, "initialisation": "random", "notes": [],
                        "train_tiles": {c: [k, made] for c, k in real.items()},
                        "kept": dict.fromkeys(CLASSES, 0.6) if arm["selected"] else None,
                        "generator_saw_more": bool(saw_more and arm["generators"] and n), "seconds": 12.5,
                    })  # fmt: skip
    plan = {
        "arms": arms, "baseline": "real_classical", "per_class": list(numbers), "shares": list(shares),
        "seeds": list(seeds), "classes": list(CLASSES), "rare": list(RARE), "classifier": "mobilenet-v2", "steps": 300,
        "sets": [{"name": name, "title": {"test": "Test patients"}.get(name, "Hospital B"),
                  "tiles": len(truth[name][0]), "patients": patients} for name in sets],
        "generators": [{"name": g, "title": g.upper(), "tiles": dict.fromkeys(CLASSES, 120), "licence": "Apache-2.0",
                        "origin": {"kind": "nested", "words": "trained on the training tiles of real"}} for g in gains],
        "train_counts": TRAIN, "train_patients": 61, "notes": [], "source": "made-up numbers", "size": 64,
    }  # fmt: skip
    write_json(out / "plan.json", plan)
    seen = {"tiles": 720, "seeds": len(seeds), "label_consistency": 0.71, "label_consistency_low": 0.66,
            "label_consistency_high": 0.76, "per_class": dict.fromkeys(CLASSES, 0.7) | {"SERRATED": 0.31}}  # fmt: skip
    pairs = {"pairs": 700, "pair_consistency": 0.62, "pair_consistency_chance": 0.21}
    write_json(out / "extra.json", {"trts": dict.fromkeys([*gains, "real"], seen),
                                    "pairs": dict.fromkeys(list(gains)[-1:], pairs)})  # fmt: skip
    return plan


def _arm(
    name: str, title: str, generators: list[str], *, real: bool = True, classical: bool = True, selected: bool = False
) -> dict[str, Any]:
    return {
        "name": name, "title": title, "real": real, "generators": generators, "classical": classical,
        "selected": selected,
    }  # fmt: skip
