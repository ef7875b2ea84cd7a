"""Every guard finds what it is for, and is silent on a sound pair of sets."""

import pandas as pd
import pytest

from histosynth.evaluate.guards import GUARDS, SEVERITIES, Facts, few_tiles, inspect
from histosynth.tiles.tileset import complete

COUNTS = {"ADI": 4, "TUM": 4}


def real(**changes):
    """Real tiles: two classes, twelve patients a side, PNG, 64 px."""
    rows = [
        {
            "id": f"{split}-{label}-{k}", "label": label, "split": split, "patient": f"{split}-{label}-{k}",
            "sha256": f"hash {split} {label} {k}", "format": "PNG", "width": 64, "height": 64,
        }
        for split, n in (("train", 4), ("test", 10))
        for label in ("ADI", "TUM")
        for k in range(n)
    ]  # fmt: skip
    return complete(pd.DataFrame(rows).assign(**changes))


def synthetic(labels=("ADI", "TUM"), n=4, **changes):
    rows = [
        {"id": f"made-{label}-{k}", "label": label, "sha256": f"made {label} {k}", "format": "PNG", "width": 64,
         "height": 64, "generator": "gan"}
        for label in labels
        for k in range(n)
    ]  # fmt: skip
    return complete(pd.DataFrame(rows).assign(**changes))


def facts(**changes):
    known = {"counts": COUNTS, "digest": "abc"}
    return Facts(**({"size": 64, "classes": ("ADI", "TUM"), "trained_on": known, "real_train": known} | changes))


def found(ours=None, theirs=None, **changes):
    """Severity of every finding but the notes, by guard."""
    findings = inspect(real() if ours is None else ours, synthetic() if theirs is None else theirs, facts(**changes))
    return {f.guard: f.severity for f in findings if f.severity != "note"}


def test_a_sound_pair_has_notes_alone():
    findings = inspect(real(), synthetic(), facts())
    assert {f.guard for f in findings} == {"unequal numbers", "class prior"}
    assert all(f.severity == "note" and f.as_dict()["message"] == f.message for f in findings)


def test_unequal_numbers_are_named_with_what_is_compared():
    message = next(f.message for f in inspect(real(), synthetic(n=3), facts()) if f.guard == "unequal numbers")
    assert "8 real train, 20 real test, 6 synthetic" in message and "compares 6 of each" in message
    message = next(f.message for f in inspect(real(), synthetic(n=3), facts(n=4)) if f.guard == "unequal numbers")
    assert "compares 4 of each" in message, "no more than were picked"


def test_the_prior_is_stated_and_where_it_differs_most():
    theirs = synthetic(("TUM",), n=9)
    message = next(f.message for f in inspect(real(), theirs, facts()) if f.guard == "class prior")
    assert "same share" in message and "50 % of the real test tiles" in message


def test_few_tiles_for_the_dimensions():
    assert few_tiles(512, {"tiny": 256}) == []
    (finding,) = few_tiles(511, {"tiny": 256, "colour": 66})
    assert finding.severity == "warning" and "tiny has 256" in finding.message and "colour" not in finding.message


@pytest.mark.parametrize(
    ("ours", "theirs", "severity"),
    [("PNG", "JPEG", "strong"), ("JPEG", "PNG", "strong"), ("JPEG", "JPEG", None), ("TIFF", "PNG", None)],
)
def test_lossy_files_on_one_side(ours, theirs, severity):
    assert found(real(format=ours), synthetic(format=theirs)).get("file formats") == severity


def test_compression_is_found_in_pixels_whatever_the_files_are_called():
    assert found(traces={"real": 0.9, "synthetic": 0.0}) == {"file formats": "strong"}
    assert found(traces={"real": 0.1, "synthetic": 0.0}) == {}


def test_enlarged_tiles():
    assert found(theirs=synthetic(width=32, height=32)) == {"enlarged tiles": "strong"}
    assert found(real(width=32), synthetic(height=32)) == {"enlarged tiles": "warning"}
    assert found(size=32) == {}


def test_normalised_against_raw():
    assert found(theirs=synthetic(stain="normalised")) == {"staining": "strong"}
    assert found(real(stain="normalised")) == {}, "the generator was trained on these very tiles"
    others = {"counts": COUNTS, "digest": "other"}
    assert found(real(stain="normalised"), trained_on=others)["staining"] == "warning"
    assert found(real(stain="normalised"), synthetic_is_real=True) == {"staining": "strong"}


@pytest.mark.parametrize(
    ("parent", "guard", "severity"),
    [
        ("test-ADI-0", "conditioned on test", "refused"),
        ("train-ADI-0", "conditioned on train", "warning"),
        ("from elsewhere", "conditioned on unknown tiles", "strong"),
    ],
)
def test_conditioned_tiles(parent, guard, severity):
    theirs = synthetic()
    theirs.loc[0, "reference"] = parent
    assert found(theirs=theirs) == {guard: severity}


def test_a_generator_that_was_given_training_features():
    assert found(conditioning="features of 20 of its training tiles") == {"conditioned on train": "warning"}


@pytest.mark.parametrize(("split", "severity"), [("test", "refused"), ("train", "strong")])
def test_the_same_file_on_both_sides(split, severity):
    theirs = synthetic()
    theirs.loc[0, "sha256"] = f"hash {split} TUM 1"
    assert found(theirs=theirs) == {"same tiles": severity}


def test_the_same_patient_in_two_real_sets():
    theirs = synthetic(generator="", patient="test-ADI-0")
    assert found(theirs=theirs, synthetic_is_real=True) == {"same patients": "strong"}


def test_synthetic_tiles_among_the_real_ones():
    ours = real()
    ours.loc[ours.split == "test", "generator"] = "gan"
    assert found(ours) == {"not real": "refused"}


def test_the_training_set_of_the_generator():
    assert found(trained_on={}) == {"training set": "warning"}
    assert found(trained_on={"counts": {"ADI": 5, "TUM": 4}}) == {"training set": "strong"}
    assert found(trained_on={"counts": COUNTS}) == {}, "without a digest, the counts must do"
    assert found(trained_on={"counts": COUNTS, "digest": "other"}) == {"training set": "strong"}
    leaked = {"trained_on": {"counts": COUNTS, "digest": "other"}, "real_test": "other"}
    assert found(**leaked) == {"training set": "refused"}
    assert found(trained_on={}, synthetic_is_real=True) == {}


def test_few_or_unknown_patients():
    assert found(real(patient="one")) == {"patients": "strong"}
    ours = real()
    nine = ours[(ours.split == "train") | (ours.label == "ADI") & (ours.id != "test-ADI-0")]
    assert found(nine)["patients"] == "warning"
    assert found(patients_known=False) == {"patients": "warning"}


def test_missing_classes():
    assert found(theirs=synthetic(("ADI",))) == {"missing classes": "warning"}
    assert found(theirs=synthetic(("ADI", "TUM", "LYM"))) == {"missing classes": "warning"}


def test_a_test_that_chose_the_checkpoint():
    assert found(chosen_on="test") == {"chosen on the test": "strong"}
    assert found(chosen_on="val") == {}


def test_an_encoder_that_trained_the_generator_is_no_neutral_judge():
    through = {"learned_through": ("tissue-tiny",)}
    assert found(encoders=("tissue-tiny", "colour"), **through) == {"the judge took part": "warning"}
    assert found(encoders=("colour",), **through) == {} and found(encoders=("tissue-tiny",)) == {}


def test_the_worst_comes_first():
    theirs = synthetic(("ADI",), format="JPEG")
    theirs.loc[0, "reference"] = "test-ADI-0"
    severities = [SEVERITIES.index(f.severity) for f in inspect(real(), theirs, facts())]
    assert severities == sorted(severities) and severities[0] == 0 and len(set(severities)) == 4


def test_empty_sides_break_no_guard():
    for guard in GUARDS:
        for finding in guard(real().iloc[:0], synthetic().iloc[:0], facts()):
            assert finding.message
