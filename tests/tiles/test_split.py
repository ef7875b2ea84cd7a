"""Splits: no patient, slide, near-duplicate or synthetic child on two sides; shares, published protocols, order."""

import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from histosynth.core.errors import DataError, SettingError
from histosynth.tiles.sources.source import ImportConfig, import_tiles
from histosynth.tiles.split.assign import (
    SplitConfig,
    carve,
    check_no_straddling,
    check_synthetic,
    divide,
    official_split,
    split_by_group,
    tie_groups,
)
from histosynth.tiles.split.protocols import PROTOCOLS
from histosynth.tiles.tileset import complete


def rows(**columns):
    """A tile set's table with ids t0, t1 ..."""
    count = len(next(iter(columns.values())))
    return complete(pd.DataFrame({"id": [f"t{i}" for i in range(count)], **columns}))


@st.composite
def patients_and_labels(draw):
    count = draw(st.integers(4, 30))
    sizes = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    patients = np.repeat([f"p{i}" for i in range(count)], sizes).tolist()
    labels = draw(st.lists(st.sampled_from("ABCD"), min_size=len(patients), max_size=len(patients)))
    return patients, labels


@settings(max_examples=30, deadline=None)
@given(patients_and_labels(), st.integers(0, 10))
def test_no_patient_straddles_and_no_side_is_empty(drawn, seed):
    patients, labels = drawn
    sides = split_by_group(patients, labels, SplitConfig(seed=seed))
    assert set(sides) == {"train", "val", "test"}
    assert pd.Series(sides).groupby(patients).nunique().max() == 1
    order = np.random.default_rng(seed).permutation(len(patients))
    again = split_by_group([patients[i] for i in order], [labels[i] for i in order], SplitConfig(seed=seed))
    assert again == [sides[i] for i in order], "the order of the rows does not matter"


@pytest.mark.parametrize("seed", range(4))
def test_class_shares_are_close_to_the_wanted_ones(seed):
    rng = np.random.default_rng(seed)
    patients = rng.integers(0, 120, 2400).astype(str).tolist()
    labels = rng.choice(list("ABCD"), 2400, p=[0.5, 0.3, 0.15, 0.05]).tolist()
    sides = split_by_group(patients, labels, SplitConfig(seed=seed))
    shares = pd.crosstab(pd.Series(labels), pd.Series(sides), normalize="index")
    wanted = {"train": 0.6, "test": 0.25, "val": 0.15}
    for side, share in wanted.items():
        assert (shares[side] - share).abs().max() < 0.05


def test_validation_is_carved_out_by_group():
    patients = [f"p{i // 4}" for i in range(80)]
    sides = carve(patients, ["A", "B"] * 40, 0.2, seed=1)
    assert set(sides) == {"train", "val"} and 0.15 <= np.mean([s == "val" for s in sides]) <= 0.25
    assert pd.Series(sides).groupby(patients).nunique().max() == 1
    with pytest.raises(SettingError, match="val is 1.5"):
        carve(patients, ["A"] * 80, 1.5, seed=1)
    with pytest.raises(DataError, match="1 patient"):
        carve(["p"] * 3, ["A"] * 3, 0.2, seed=1)


def test_patients_who_share_a_tile_go_to_one_side():
    patients = [f"p{i // 2}" for i in range(40)]
    duplicates = [f"tile {i}" for i in range(40)]
    duplicates[0] = duplicates[7] = "pair"  # of p0 and p3
    duplicates[6] = duplicates[11] = "other"  # of p3 and p5: ties all three
    groups, aside = tie_groups(patients, duplicates, limit=0.2)
    assert not aside.any()
    assert {groups[i] for i in (0, 1, 6, 7, 10, 11)} == {"p0"}
    assert groups[2:6] == ["p1", "p1", "p2", "p2"] and len(set(groups)) == 18


def test_a_tie_that_would_rule_the_split_sets_look_alikes_aside():
    patients = ["a"] * 10 + ["b"] * 10 + ["c"] * 10
    duplicates = [f"tile {i}" for i in range(30)]
    for i in (3, 12, 13, 25):
        duplicates[i] = "blank"
    groups, aside = tie_groups(patients, duplicates)
    assert groups == patients
    assert np.flatnonzero(aside).tolist() == [3, 25], "the patient with most look-alikes keeps them"


def test_tiles_without_a_patient_belong_to_their_near_duplicates():
    groups, aside = tie_groups(["", "", "", "p"], ["x", "x", "y", "z"])
    assert groups == ["x", "x", "y", "p"] and not aside.any()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 25)), min_size=12, max_size=60), st.randoms())
def test_ties_leave_no_near_duplicate_between_groups(drawn, random):
    patients, duplicates = [f"p{p}" for p, _ in drawn], [f"d{d}" for _, d in drawn]
    groups, aside = tie_groups(patients, duplicates, limit=0.4)
    left = pd.DataFrame({"g": groups, "d": duplicates, "p": patients})[~aside]
    assert left.groupby("d").g.nunique().max() == 1
    assert pd.DataFrame({"g": groups, "p": patients}).groupby("p").g.nunique().max() == 1
    sizes = pd.Series(groups).value_counts()
    largest = pd.Series(patients).value_counts().max()
    assert sizes.max() <= max(0.4 * len(drawn), largest)
    order = list(range(len(drawn)))
    random.shuffle(order)
    again, aside_again = tie_groups([patients[i] for i in order], [duplicates[i] for i in order], limit=0.4)
    assert again == [groups[i] for i in order] and aside_again.tolist() == aside[order].tolist()


def many(count=60, **columns):
    labels = [("A", "B", "C")[i % 3] for i in range(count)]
    return rows(label=labels, patient=[f"p{i // 4}" for i in range(count)], **columns)


def test_near_duplicates_stay_on_one_side_though_patients_are_given():
    table = many(120)
    duplicates = [f"g{i}" for i in range(120)]
    for first, second in ((0, 50), (9, 77), (20, 90)):
        duplicates[second] = duplicates[first]
    for seed in range(6):
        split, words = divide(table, SplitConfig(seed=seed), duplicates)
        kept = split[split.kept]
        assert len(kept) == 120 and words == "by patient"
        for first, second in ((0, 50), (9, 77), (20, 90)):
            assert kept.split[first] == kept.split[second] and kept.duplicate_group[first] == f"g{first}"
        assert kept.groupby("patient").split.nunique().max() == 1
        assert (split.duplicate_group != "").sum() == 6


def test_divide_does_not_depend_on_the_order_of_rows():
    table = many(80).assign(patient="")
    duplicates = np.array([f"g{i % 70}" for i in range(80)])
    order = np.random.default_rng(0).permutation(80)
    one, words = divide(table, SplitConfig(), duplicates)
    two, _ = divide(table.iloc[order].reset_index(drop=True), SplitConfig(), duplicates[order])
    assert one.set_index("id").split.to_dict() == two.set_index("id").split.to_dict()
    assert "no patients were given" in words
    assert one.groupby(duplicates).split.nunique().max() == 1


def test_rows_set_aside_before_get_no_side():
    table = many(60)
    table.loc[[3, 8], ["kept", "reason"]] = [False, "unreadable"]
    split, _ = divide(table, SplitConfig())
    assert (split.split[[3, 8]] == "").all() and (split.split[split.kept] != "").all()
    with pytest.raises(DataError, match="60 near-duplicate groups came with 58"):
        divide(table, SplitConfig(), [f"g{i}" for i in range(60)])


def test_a_given_split_keeps_its_test_and_loses_training_copies_of_it():
    table = many(96, split=["train"] * 48 + ["val"] * 24 + ["test"] * 24)
    duplicates = [f"g{i}" for i in range(96)]
    duplicates[5] = duplicates[80] = "x"  # train and test
    duplicates[50] = duplicates[81] = "y"  # val and test
    duplicates[7] = duplicates[60] = "z"  # train and val
    split, words = divide(table, SplitConfig(), duplicates)
    assert words == "as given, checked by patient"
    assert split.index[~split.kept].tolist() == [5, 7, 50]
    assert split.reason[5] == "near-duplicate: looks like a tile of the test split"
    assert split.reason[7] == "near-duplicate: looks like a tile of the val split"
    left = split.kept
    assert split.split[left].tolist() == table.split[left].tolist()


def test_a_given_split_of_the_same_tiles_is_refused():
    table = many(60, split=["train"] * 28 + ["test"] * 32)
    with pytest.raises(DataError, match="20 of the 28 train tiles look like"):
        divide(table, SplitConfig(), [f"g{i % 40}" for i in range(60)])


def test_validation_is_taken_from_train_where_none_is_given():
    table = many(80, split=["train"] * 60 + ["test"] * 20)
    split, words = divide(table, SplitConfig(), [f"g{i}" for i in range(80)])
    assert words.endswith("validation taken from train")
    assert (split.split[60:] == "test").all() and set(split.split[:60]) == {"train", "val"}
    with pytest.raises(DataError, match=r"only \['train'\]"):
        divide(many(80, split=["train"] * 60 + [""] * 20), SplitConfig())
    with pytest.raises(DataError, match="12 of 12 tiles have no patient"):
        divide(many(12).assign(patient=""), SplitConfig())


@pytest.mark.parametrize("column", ["patient", "slide", "duplicate_group"])
def test_straddling_is_refused_by_name(column):
    table = rows(label=["A"] * 4, split=["train", "test", "val", "train"])
    table[column] = ["x", "x", "y", ""]
    with pytest.raises(DataError, match="1 .* more than one split: x"):
        check_no_straddling(table)
    table.loc[1, "kept"] = False
    check_no_straddling(table)


def family(parent, child, kept=True):
    table = rows(label=["A"] * 3, split=[parent, "train", child], reference=["", "", "t0"])
    table.loc[0, "kept"] = kept
    return table


@pytest.mark.parametrize(("parent", "child"), itertools.product(["train", "val", "test"], repeat=2))
def test_a_synthetic_tile_stays_with_its_reference(parent, child):
    if parent == child != "test":
        check_no_straddling(family(parent, child))
        return
    wanted = "in the test split: t2" if child == "test" else f"t2 .{child}. from t0 .{parent}."
    with pytest.raises(DataError, match=wanted):
        check_no_straddling(family(parent, child))


def test_a_reference_that_was_set_aside_may_be_a_copy_of_a_test_tile():
    with pytest.raises(DataError, match="t0 .set aside"):
        check_no_straddling(family("", "train", kept=False))
    with pytest.raises(DataError, match="t2 .no split. from t0 .test."):
        check_no_straddling(family("test", ""))
    check_no_straddling(family("train", ""))


def test_a_generated_tile_is_no_test_tile_of_a_real_set():
    table = rows(label=["A"] * 3, split=["train", "test", "test"], generator=["", "", "gan"])
    with pytest.raises(DataError, match=r"1 synthetic tile\(s\) are in the test split: t2"):
        check_no_straddling(table)
    check_no_straddling(table.assign(generator="gan"))  # a set of generated tiles alone can be divided
    check_no_straddling(table.assign(split=["train", "test", "train"]))


def test_synthetic_sets_are_checked_against_the_real_one():
    real = rows(label=["A"] * 5, split=["train", "val", "test", "train", ""])
    real.loc[3, ["kept", "split"]] = [False, ""]

    def made(*references):
        return rows(label=["A"] * len(references), reference=list(references))

    check_synthetic(real, made("t0", "", "t0"))
    check_synthetic(real, made("t1"), use="val")
    check_synthetic(real, made("", "").drop(columns="reference"))
    for bad, where in (("t1", "val"), ("t2", "test"), ("t3", "set aside"), ("t4", "without a split")):
        with pytest.raises(DataError, match=f"1 synthetic .*outside train: t1 from {bad} .{where}"):
            check_synthetic(real, made("t0", bad))
    with pytest.raises(DataError, match="does not have: elsewhere"):
        check_synthetic(real, made("elsewhere"))
    with pytest.raises(DataError, match="cannot join the test"):
        check_synthetic(real, made("t0"), use="test")
    thrown_away = made("t2", "t0")
    thrown_away.loc[0, "kept"] = False
    check_synthetic(real, thrown_away)


def nct(train=60, test=20, twins=False):
    """A small table of the NCT-CRC collections, no patients; near-duplicates are to be given."""
    names = [f"T{i:03d}" for i in range(train)]
    origins, files = ["NCT-CRC-HE-100K.zip"] * train, list(names)
    if twins:
        origins, files = origins + ["NCT-CRC-HE-100K-NONORM"] * train, files + names
    origins, files = origins + ["crc-val-he-7k"] * test, files + [f"V{i}" for i in range(test)]
    labels = [("ADI", "TUM")[i % 2] for i in range(len(files))]
    return rows(label=labels, source=[f"{x}/{f}.tif" for f, x in zip(files, labels, strict=True)], origin=origins)


def unique(table):
    return [f"g{i}" for i in range(len(table))]


def test_the_published_split_of_nct_crc():
    table = nct()
    split = official_split(table, "nct-crc", SplitConfig(val=0.2), unique(table))
    assert (split.split[60:] == "test").all() and set(split.split[:60]) == {"train", "val"}
    assert 9 <= (split.split == "val").sum() <= 15
    again, words = divide(table, SplitConfig(val=0.2, protocol="nct-crc"), unique(table))
    assert again.equals(split) and "CRC-VAL-HE-7K" in words and "nct-crc" in words
    assert set(split.label[split.split == "val"]) == {"ADI", "TUM"}


def test_two_stainings_of_a_tile_are_never_on_two_sides():
    table = nct(twins=True)
    split = official_split(table, "nct-crc", SplitConfig(), unique(table))
    stem = split.source.str.split("/").str[-1]
    assert split.kept.all() and (split.groupby(stem).split.nunique() == 1).all()
    assert (split.split[120:] == "test").all()


def test_training_copies_of_test_tiles_leave_the_published_split():
    table = nct()
    duplicates = unique(table)
    duplicates[3] = duplicates[65]
    split = official_split(table, "nct-crc", SplitConfig(), duplicates)
    assert split.index[~split.kept].tolist() == [3] and split.split[65] == "test"


def test_mistakes_with_protocols_are_named():
    table = nct()
    with pytest.raises(SettingError, match="protocol is 'nct'.*'nct-crc'"):
        official_split(table, "nct", duplicates=unique(table))
    with pytest.raises(DataError, match="column origin"):
        official_split(table.drop(columns="origin"), "nct-crc", duplicates=unique(table))
    with pytest.raises(DataError, match="no tiles to test on.*CRC-VAL-HE-7K"):
        official_split(table[:60], "nct-crc", duplicates=unique(table[:60]))
    with pytest.raises(DataError, match="no place for tiles from 'EBHI'"):
        official_split(table.replace("crc-val-he-7k", "EBHI"), "nct-crc", duplicates=unique(table))
    with pytest.raises(DataError, match="80 of 80 tiles have no patient"):
        official_split(table, "nct-crc")
    assert all(p.title and p.train and p.test for p in PROTOCOLS.values())


@pytest.mark.parametrize("patients", [True, False])
def test_imported_near_duplicates_stay_together(folders, tmp_path, patients):
    files = sorted(folders.rglob("*.png"))
    turned = np.rot90(np.asarray(Image.open(files[0])), 3) * 0.9 + 10
    Image.fromarray(turned.astype(np.uint8)).save(files[5])
    listing = pd.DataFrame({"path": [str(f.relative_to(folders)) for f in files]})
    listing["label"] = [f.parent.name for f in files]
    listing["patient"] = [f"p{i}" for i in range(len(files))] if patients else ""
    listing.to_csv(folders / "tiles.csv", index=False)
    for seed in range(3):
        config = ImportConfig(split=SplitConfig(seed=seed))
        table = import_tiles(folders, tmp_path / str(seed), config).kept.set_index("source")
        first, second = (table.loc[listing.path[i]] for i in (0, 5))
        assert first.split == second.split and first.duplicate_group == second.duplicate_group != ""
        assert (table.duplicate_group != "").sum() == 2
