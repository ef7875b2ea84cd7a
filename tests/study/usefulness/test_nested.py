"""Nothing that a classifier learns from may have seen what it is tested on."""

import numpy as np
import pytest

from histosynth.core.errors import DataError
from histosynth.study.usefulness.nested import (
    Origin,
    check_alike,
    check_patients,
    check_real,
    lookalikes,
    origin,
    refuse_shared,
    strangers,
)
from histosynth.tiles.tileset import TileSet
from tests.study.usefulness.conftest import SIZE, draw, hospital, made, write_set


@pytest.fixture
def digest(world):
    return lambda split, size: world["real"].array(None if split == "whole" else split, size=size).digest()


def splits(tileset):
    return {s: tileset.array(s, size=SIZE) for s in ("train", "val", "test")}


def test_a_generator_of_the_training_tiles_is_nested(world, digest):
    found = origin(world["real"], world["gan"], "GAN", digest)
    assert found.kind == "nested" and found.saw_real_training and "training tiles of real" in found.words


@pytest.mark.parametrize(("split", "what"), [("test", "the test tiles"), ("val", "the val tiles"), (None, "all tiles")])
def test_a_generator_that_saw_held_out_tiles_is_refused_even_if_unknown_ones_are_not(
    world, digest, tmp_path, split, what
):
    wrong = made(tmp_path / "leaky", world["real"], count=2, split=split)
    for allow in (False, True):
        with pytest.raises(DataError, match=f"The generator of Leaky .*was trained on {what} of"):
            origin(world["real"], wrong, "Leaky", digest, allow_unknown=allow)


def test_an_unknown_origin_is_refused_unless_it_is_allowed(world, digest, tmp_path):
    silent = made(tmp_path / "silent", None, count=2)
    other = made(tmp_path / "other", hospital(tmp_path / "elsewhere", seed=9, patients=(3, 1, 1)), count=2)
    for one, words in ((silent, "not recorded which tiles"), (other, "trained on other tiles than")):
        with pytest.raises(DataError, match=f"{words}.*--allow-unknown-origin"):
            origin(world["real"], one, "X", digest)
        found = origin(world["real"], one, "X", digest, allow_unknown=True)
        assert found.kind == "unknown" and words in found.words and found.saw_real_training


def test_tiles_that_were_made_from_test_tiles_are_refused(world, digest, tmp_path):
    real = world["real"]
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        rows = [{"label": "A", "generator": "gan", "reference": real.rows(split).id[0]}]
        one = write_set(tmp_path / split, rows, [draw("A", rng)], synthetic=True, generator="gan")
        with pytest.raises(DataError, match="not recorded" if split == "train" else "outside train"):
            origin(real, one, "X", digest)


def test_tiles_of_patients_must_not_be_of_test_patients(world, digest, tmp_path):
    fresh = hospital(tmp_path / "fresh", seed=3, patients=(4, 0, 0), prefix="new")
    found = origin(world["real"], fresh, "Fresh", digest)
    assert found.kind == "other tiles" and not found.saw_real_training
    planted = hospital(tmp_path / "planted", seed=3, patients=(0, 0, 19))  # p00 to p18, as in the real set
    with pytest.raises(DataError, match=r"10 of its patients have names of val or test patients of real \(p09, p10"):
        origin(world["real"], planted, "Planted", digest)
    anonymous = hospital(tmp_path / "anonymous", seed=4, patients=(2, 0, 0))
    anonymous.table["patient"] = ""
    with pytest.raises(DataError, match="without patients"):
        origin(world["real"], TileSet(anonymous.folder, anonymous.table, anonymous.meta), "Anonymous", digest)


def test_a_patient_on_two_sides_is_refused(world):
    real = world["real"]
    check_real(real, splits(real))
    table = real.table.copy()
    table.loc[table.index[table.split == "train"][0], "split"] = "test"
    with pytest.raises(DataError, match=r"1 patient\(s\) have tiles in more than one split: p00"):
        check_real(TileSet(real.folder, table, real.meta), splits(real))


def test_a_picture_on_two_sides_is_found_turned_or_mirrored_under_another_name(world):
    found = splits(world["real"])
    train, test = found["train"], found["test"]
    copied = np.array(test.images)
    copied[3] = np.rot90(train.images[7], 1, (1, 2))[:, :, ::-1]
    planted = type(test)(copied, test.labels, test.ids, test.classes, test.groups)
    with pytest.raises(
        DataError, match=f"1 of the train tiles are among the test tiles: {train.ids[7]} = {test.ids[3]}"
    ):
        refuse_shared(train, planted, "train tiles", "test tiles", "")
    assert lookalikes(train, planted) >= 1
    blank = np.full_like(copied, 240)
    white = [type(t)(blank[:5], t.labels[:5], t.ids[:5], t.classes) for t in (train, test)]
    refuse_shared(*white, "train tiles", "test tiles", "")


def test_tiles_of_patients_that_training_knows_are_left_out_of_an_external_set(world, tmp_path):
    fresh, note = strangers(world["real"], world["external"])
    assert fresh.all() and not note
    same = hospital(tmp_path / "restained", seed=8, patients=(0, 0, 19))
    fresh, note = strangers(world["real"], same)
    assert set(same.kept.patient[fresh]) == set(world["real"].rows("test").patient) and "are left out" in note
    with pytest.raises(DataError, match="All patients"):
        strangers(world["real"], hospital(tmp_path / "x", patients=(0, 0, 2)))


def test_a_generator_that_began_from_weights_of_test_tiles_is_refused(world, digest, tmp_path):
    real = world["real"]
    whole = {"data": real.array(None, size=SIZE).digest(), "size": SIZE}
    train = {"data": real.array("train", size=SIZE).digest(), "size": SIZE}
    leaky = made(tmp_path / "leaky", real, count=2, learned_before=[train, whole])
    for allow in (False, True):
        with pytest.raises(DataError, match="began from weights that were trained on all tiles of"):
            origin(real, leaky, "Leaky", digest, allow_unknown=allow)
    strange = made(tmp_path / "strange", real, count=2, learned_before=[{"data": "elsewhere", "size": SIZE}])
    with pytest.raises(DataError, match="began from weights that were trained on other tiles.*--allow-unknown-origin"):
        origin(real, strange, "Strange", digest)
    fine = made(tmp_path / "fine", real, count=2, learned_before=[train, {"data": "", "size": 0}])
    assert origin(real, fine, "Fine", digest).kind == "nested"


def test_many_noisy_copies_of_test_tiles_are_refused_and_a_few_are_noted(world, tmp_path):
    real, rng = world["real"], np.random.default_rng(0)
    test = real.array("test", size=SIZE)
    noisy = [np.clip(t.transpose(1, 2, 0)[::-1] + rng.normal(0, 3, (SIZE, SIZE, 3)), 0, 255) for t in test.images]
    labels = [test.classes[label] for label in test.labels]
    rows = [{"label": label, "generator": "gan"} for label in labels]
    copies = write_set(tmp_path / "copies", rows, [t.astype(np.uint8) for t in noisy], synthetic=True).array(size=SIZE)
    nested = Origin("nested", "")
    with pytest.raises(DataError, match="look almost like a tile of test: they may be copies.*--allow-unknown"):
        check_alike(nested, copies, test, "GAN", "test")
    found, note = check_alike(nested, copies, test, "GAN", "test", allow_unknown=True)
    assert found.kind == "unknown" and " of 54 tiles of GAN look" in note and note[:-1] == found.words
    many = world["gan"].array(size=SIZE).joined(copies.subset([0]))
    assert check_alike(nested, many, test, "GAN", "test") == (
        nested,
        "1 of 37 tiles of GAN look almost like a tile of test.",
    )


def test_tiles_of_training_patients_carry_what_all_real_tiles_teach(world, digest, tmp_path):
    known = hospital(tmp_path / "known", seed=3, patients=(9, 0, 0))  # p00 to p08 are the training patients
    found = origin(world["real"], known, "Known", digest)
    assert found.kind == "other tiles" and found.saw_real_training and "9 of them in train" in found.words


def test_a_patient_of_an_external_set_is_known_by_his_name_however_it_is_written(world, tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"label": "A", "patient": name, "split": "test"} for name in ("P00", " p01 ", "elsewhere")]
    other = write_set(tmp_path / "other", rows, [draw("A", rng) for _ in rows])
    assert strangers(world["real"], other)[0].tolist() == [False, False, True]
    same = write_set(tmp_path / "same", [{"label": "A", "patient": "Elsewhere"}], [draw("A", rng)])
    with pytest.raises(DataError, match="1 patients of Same .* have names of patients of .*elsewhere"):
        check_patients(same, other, "Same")
    check_patients(world["gan"], other, "GAN")  # tiles of generators have no patient
