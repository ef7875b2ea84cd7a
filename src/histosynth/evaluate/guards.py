"""What makes a fidelity score meaningless, looked for before any score is taken.

Every guard is a function of the two tables of tiles and of what is known of them. It names what it found; it never
mends anything silently. Findings are refused (no score may be taken), strong (the scores mislead unless the reader
knows this), warning (they are weaker than they look) or note (a fact that belongs beside every score).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

Severity = Literal["refused", "strong", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("refused", "strong", "warning", "note")
LOSSY = {"JPEG", "JPEG2000", "WEBP"}
_FEW_PATIENTS = 10
_TRACES_APART = 0.25  # difference between the shares of tiles with traces of JPEG that cannot be chance
_PRIOR_APART = 0.1


@dataclass(frozen=True)
class Finding:
    """What one guard found."""

    guard: str
    """Its name."""
    severity: Severity
    """How bad that is."""
    message: str
    """What was found, in a sentence."""
    remedy: str = ""
    """What to do about it."""

    def as_dict(self) -> dict[str, str]:
        """For the report."""
        return asdict(self)


@dataclass(frozen=True)
class Facts:
    """What is known of the two tile sets beside their tables."""

    size: int
    """Edge length in pixels at which tiles are compared."""
    classes: Sequence[str]
    """Classes of the real set."""
    n: int = 0
    """Tiles a side in every score, where they are picked already."""
    synthetic_is_real: bool = False
    """The "synthetic" side is a second set of real tiles."""
    patients_known: bool = True
    """The patients of the real set are patients and not groups of tiles that look alike."""
    trained_on: Mapping[str, Any] = field(default_factory=dict)
    """Of the generator: counts (class -> tiles) and digest of its training tiles, as far as known."""
    real_train: Mapping[str, Any] = field(default_factory=dict)
    """The same of the real training tiles."""
    real_test: str = ""
    """Digest of the real test tiles."""
    conditioning: str = ""
    """What else than the label the generator was given, in words."""
    chosen_on: str = ""
    """Split on which the generator's checkpoint or settings were chosen, if that is recorded."""
    encoders: Sequence[str] = ()
    """Encoders on whose features the scores are taken."""
    learned_through: Sequence[str] = ()
    """Encoders that took part in the generator's training."""
    traces: Mapping[str, float] = field(default_factory=dict)
    """Share of the "real" and of the "synthetic" tiles whose pixels show JPEG compression, where measured."""


def inspect(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """Everything that the guards find, the worst first.

    Args:
        real: kept rows of the real tile set, with their splits; the scores compare with its test.
        synthetic: kept rows of the synthetic tile set.
    """
    found = [finding for guard in GUARDS for finding in guard(real, synthetic, facts)]
    return sorted(found, key=lambda f: SEVERITIES.index(f.severity))


def few_tiles(n: int, dims: Mapping[str, int]) -> list[Finding]:
    """Encoders for which `n` tiles a side are fewer than twice their dimensions."""
    short = {name: dim for name, dim in dims.items() if n < 2 * dim}
    if not short:
        return []
    named = ", ".join(f"{name} has {dim}" for name, dim in short.items())
    text = (
        f"{n} tiles a side are fewer than twice the dimensions ({named}): the Fréchet distance is biased upwards and "
        "compares only with its own floor; it is not extrapolated to endless tiles."
    )
    return [Finding("few tiles", "warning", text, "Read KID, or use more tiles or an encoder with fewer dimensions.")]


def unequal_numbers(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """Distances depend on N, so both sides are cut to the same."""
    sides = {"real train": real[real.split == "train"], "real test": real[real.split == "test"], "other": synthetic}
    if len({len(rows) for rows in sides.values()}) == 1:
        return []
    said = ", ".join(f"{len(rows)} {_other(facts) if name == 'other' else name}" for name, rows in sides.items())
    used = facts.n or sum(min((rows.label == label).sum() for rows in sides.values()) for label in facts.classes)
    text = f"The sides have {said} tiles; every score compares {used} of each, the same number of each class."
    return [Finding("unequal numbers", "note", text)]


def prior(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """The mix of classes behind the pooled scores."""
    ours, theirs = (rows.label.value_counts(normalize=True) for rows in (real[real.split == "test"], synthetic))
    text = (
        "Pooled scores give every class the same share on both sides (the smallest of its counts), "
        "which is not how often the classes occur."
    )
    apart = ours.sub(theirs, fill_value=0).abs()
    if len(apart) and apart.max() > _PRIOR_APART:
        label = apart.idxmax()
        text += (
            f" The sets themselves differ most in {label}: {_percent(ours.get(label, 0))} of the real test tiles, "
            f"{_percent(theirs.get(label, 0))} of the {_other(facts)} tiles."
        )
    return [Finding("class prior", "note", text)]


def missing_classes(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """Classes that only one side has."""
    found = []
    test, train, made = (set(r.label) for r in (real[real.split == "test"], real[real.split == "train"], synthetic))
    for message, labels in (
        (f"There is no {_other(facts)} tile of", (test & train) - made),
        ("There is no real test tile of", made - test),
        ("There is no real training tile of", (made & test) - train),
    ):
        if labels:
            text = f"{message} {_some(sorted(labels))}: left out of every comparison."
            found.append(Finding("missing classes", "warning", text))
    return found


def formats(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """Lossy compression on one side only moves every score by itself."""
    tiles = real[real.split.isin(("train", "test"))]
    shares = [rows.format.isin(LOSSY).mean() if len(rows) else 0.0 for rows in (tiles, synthetic)]
    remedy = "Train and compare with tiles that were never compressed, or compress both sides alike."
    if abs(shares[0] - shares[1]) > 0.01:
        text = (
            f"{_percent(shares[0])} of the real and {_percent(shares[1])} of the {_other(facts)} tiles come from lossy "
            f"files ({_formats(tiles)} against {_formats(synthetic)}): compression alone can move every score."
        )
        return [Finding("file formats", "strong", text, remedy)]
    ours, theirs = facts.traces.get("real"), facts.traces.get("synthetic")
    if ours is not None and theirs is not None and abs(ours - theirs) > _TRACES_APART:
        text = (
            f"The pixels of {_percent(ours)} of the real and {_percent(theirs)} of the {_other(facts)} tiles show JPEG "
            "compression, whatever their files are called: compression alone can move every score."
        )
        return [Finding("file formats", "strong", text, remedy)]
    return []


def enlarged(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """Tiles that were smaller than they are compared at."""
    shares = {}
    for name, rows in (("real", real[real.split.isin(("train", "test"))]), (_other(facts), synthetic)):
        known = rows[(rows.width > 0) & (rows.height > 0)]
        shares[name] = float((known[["width", "height"]].min(axis=1) < facts.size).mean()) if len(known) else 0.0
    said = [f"{_percent(share)} of the {name} tiles" for name, share in shares.items() if share]
    if not said:
        return []
    ours, theirs = shares.values()
    text = f"{' and '.join(said)} are smaller than {facts.size} px and were enlarged, which blurs them."
    severity: Severity = "strong" if abs(ours - theirs) > 0.01 else "warning"
    return [Finding("enlarged tiles", severity, text, "Compare at the smaller size (--size).")]


def staining(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """Stain-normalised tiles against tiles as they came."""
    ours, theirs = (
        float((rows.stain == "normalised").mean()) if "stain" in rows and len(rows) else 0.0
        for rows in (real[real.split.isin(("train", "test"))], synthetic)
    )
    if ours <= 0.5 < theirs:
        text = f"The {_other(facts)} tiles are stain-normalised and the real ones are not."
        return [Finding("staining", "strong", text, "Compare with the tile set that was prepared in the same way.")]
    if theirs <= 0.5 < ours and not (_same_training(facts) or facts.synthetic_is_real):
        text = (
            f"The real tiles are stain-normalised; of the {_other(facts)} ones that is not recorded. It is right only "
            "if the generator was trained on normalised tiles."
        )
        return [Finding("staining", "warning", text, "Give the generator's --checkpoint.")]
    if theirs <= 0.5 < ours and facts.synthetic_is_real:
        text = "The first set is stain-normalised and the second is not."
        return [Finding("staining", "strong", text, "Prepare both in the same way.")]
    return []


def conditioning(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """Tiles that were conditioned on real tiles: on those of the test, there is no score to take."""
    found = []
    children = synthetic[synthetic.reference.fillna("") != ""] if "reference" in synthetic else synthetic.iloc[:0]
    split = real.set_index("id").split
    side = children.reference.map(split[~split.index.duplicated()])
    for name, severity, text in (
        ("test", "refused", "they show what they were given, and the distance to the test measures that"),
        ("val", "warning", "they look more like real tiles than what the generator makes of a label alone"),
        ("train", "warning", "they look more like real tiles than what the generator makes of a label alone"),
    ):
        count = int((side == name).sum())
        if count:
            message = f"{count} of {len(synthetic)} synthetic tiles were conditioned on real {name} tiles: {text}."
            remedy = "Make them again with references from train only." if name == "test" else ""
            found.append(Finding(f"conditioned on {name}", severity, message, remedy))  # type: ignore[arg-type]
    unknown = int(side.isna().sum())
    if unknown:
        text = (
            f"{unknown} of {len(synthetic)} synthetic tiles were conditioned on tiles that the real set does not have: "
            "whether these are copies of test tiles is not known."
        )
        found.append(Finding("conditioned on unknown tiles", "strong", text, "Give the set that they were made from."))
    if facts.conditioning:
        text = f"The generator was given more than the label: {facts.conditioning}."
        found.append(Finding("conditioned on train", "warning", text))
    return found


def same_tiles(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """The same file, or the same patient, on both sides."""
    found = []
    hashes = set(synthetic.sha256) - {""}
    for name, severity in (("test", "refused"), ("train", "strong")):
        rows = real[(real.split == name) & real.sha256.isin(hashes)]
        if len(rows):
            text = f"{len(rows)} real {name} tiles are also in the {_other(facts)} set, bit for bit ({_some(rows.id)})."
            remedy = "Compare two sets that have no tile in common."
            found.append(Finding("same tiles", severity, text, remedy))  # type: ignore[arg-type]
    if facts.synthetic_is_real:
        for name, severity in (("test", "strong"), ("train", "warning")):
            both = sorted((set(synthetic.patient) & set(real[real.split == name].patient)) - {""})
            if both:
                text = f"{len(both)} patients of the {name} tiles have tiles in the second set as well ({_some(both)})."
                found.append(Finding("same patients", severity, text, "Give disjoint patients."))  # type: ignore[arg-type]
    return found


def not_real(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """Synthetic tiles among those that stand for reality."""
    found = []
    for name, severity in (("test", "refused"), ("train", "strong")):
        count = int(((real.split == name) & (real.generator.fillna("") != "")).sum())
        if count:
            text = f"{count} {name} tiles of the real set were made by a generator."
            found.append(Finding("not real", severity, text, "Give a tile set of real tiles."))  # type: ignore[arg-type]
    return found


def training_set(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """Whether the real training tiles are those that the generator learned from: else floor and copies mislead."""
    if facts.synthetic_is_real:
        return []
    if not facts.trained_on:
        text = (
            "Which tiles the generator was trained on is not recorded: if they are others than the training tiles "
            "here, the copy check looks in the wrong place."
        )
        return [Finding("training set", "warning", text, "Give the generator's --checkpoint.")]
    if _same_training(facts):
        return []
    if facts.real_test and facts.real_test == facts.trained_on.get("digest"):
        text = "The generator was trained on the very test tiles that it would be compared with."
        return [Finding("training set", "refused", text, "Train it on the training tiles.")]
    text = (
        "The generator was trained on other tiles than the training tiles here: its copies cannot be found, "
        "and the floor is that of another training set."
    )
    return [Finding("training set", "strong", text, "Give the tile set that the generator was trained on.")]


def few_patients(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """A test of few patients says little of the next one."""
    rows = real[real.split == "test"]
    count = rows.patient[rows.patient != ""].nunique()
    if not facts.patients_known:
        text = "Patients are not known: tiles of one patient may be on both sides of the split, and floors too low."
        return [Finding("patients", "warning", text, "Import the tiles with a patient column.")]
    if count >= _FEW_PATIENTS:
        return []
    severity: Severity = "strong" if count < 3 else "warning"
    text = f"The real test tiles are of {count or 'no known'} patient(s): floors and intervals hold for these alone."
    return [Finding("patients", severity, text, "Use a test with more patients.")]


def chosen_on_test(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """A test that chose something is no test of it."""
    if facts.chosen_on != "test":
        return []
    text = "The generator's checkpoint was chosen on the test tiles, so its scores on them are too good."
    return [Finding("chosen on the test", "strong", text, "Choose on validation tiles.")]


def judge_took_part(real: pd.DataFrame, synthetic: pd.DataFrame, facts: Facts) -> list[Finding]:
    """A generator that learned to please an encoder pleases it more than it pleases others."""
    both = [name for name in facts.encoders if name in facts.learned_through]
    if not both:
        return []
    text = f"The generator was trained through {_some(both)}, so scores on these features are flattered."
    return [Finding("the judge took part", "warning", text, "Read those of another encoder (--encoder) too.")]


GUARDS: tuple[Callable[[pd.DataFrame, pd.DataFrame, Facts], list[Finding]], ...] = (
    not_real, same_tiles, conditioning, chosen_on_test, judge_took_part, training_set, formats, enlarged, staining,
    few_patients, missing_classes, unequal_numbers, prior,
)  # fmt: skip


def _same_training(facts: Facts) -> bool:
    """By digest where both are known, else by the number of tiles of each class."""
    ours, theirs = facts.real_train, facts.trained_on
    if ours.get("digest") and theirs.get("digest"):
        return bool(ours["digest"] == theirs["digest"])
    counts = [{c: n for c, n in (side.get("counts") or {}).items() if n} for side in (ours, theirs)]
    return bool(counts[1]) and counts[0] == counts[1]


def _other(facts: Facts) -> str:
    return "other real" if facts.synthetic_is_real else "synthetic"


def _formats(rows: pd.DataFrame) -> str:
    return "/".join(sorted({str(f) or "unknown" for f in np.unique(rows.format.astype(str))})) or "none"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _some(names: Iterable[object]) -> str:
    listed = [str(n) for n in names]
    return ", ".join(listed[:5]) + (" ..." if len(listed) > 5 else "")
