"""What a cell is trained on: subsets, shares, arms."""

from dataclasses import replace

import numpy as np
import pytest

from histosynth.core.errors import SettingError
from histosynth.study.usefulness.cells import Places, open_material, real_subset, training_set
from histosynth.study.usefulness.plan import (
    ALL,
    BASELINE,
    Cell,
    SelectionConfig,
    UtilityConfig,
    all_arms,
    cells_of,
    choose_arms,
    rare_classes,
    short_name,
    steps_of,
)
from histosynth.tiles.batches import TileArray, batch_at
from tests.study.usefulness.conftest import SIZE

TITLES = {"gan": "GAN", "diffusion": "Diffusion"}
ARMS = {arm.name: arm for arm in all_arms(TITLES)}


@pytest.fixture(scope="module")
def material(world, tmp_path_factory):
    cache = tmp_path_factory.mktemp("material")
    synthetic = {name: world[name].folder for name in TITLES}
    places = Places(world["real"].folder, synthetic, {"external-1": world["external"].folder}, SIZE, cache)
    rng = np.random.default_rng(0)
    for name, count in (("train", 63), ("val", 36), ("gan", 36)):
        np.save(cache / f"{name}.npy", rng.normal(size=(count, 4)).astype(np.float32))
    return open_material(places)


def test_small_subsets_lie_within_larger_ones_and_spread_over_patients(material):
    train = material.train
    groups = np.array(train.groups)
    last: set[int] = set()
    for n in (1, 2, 5, 9, 12, 27, 100):
        picked = real_subset(train, n, seed=4)
        assert last <= set(picked), "nested"
        last = set(picked)
        for label in range(3):
            own = picked[train.labels[picked] == label]
            per_patient = np.unique(groups[own], return_counts=True)[1]
            most = 27 if label < 2 else 9
            assert len(own) == min(n, most)
            assert len(per_patient) == min(n, 9), "no patient gives two before all have given one"
            assert per_patient.max() - per_patient.min() <= (1 if n >= 9 else 0)
    assert last == set(range(len(train))) == set(real_subset(train, ALL, seed=4))
    assert set(real_subset(train, 2, seed=5)) != set(real_subset(train, 2, seed=4))


def test_a_subset_does_not_depend_on_the_order_of_the_tiles(material):
    train, rng = material.train, np.random.default_rng(1)
    shuffled = train.subset(rng.permutation(len(train)))
    for n in (1, 5, 12):
        names = [{array.ids[i] for i in real_subset(array, n, seed=2)} for array in (train, shuffled)]
        assert names[0] == names[1]


def test_arms_of_a_seed_see_the_same_real_tiles_in_the_same_order(material):
    def order(arm, share, n=5):
        tiles, _ = training_set(Cell(ARMS[arm], n, share, 7), material)
        known = set(material.train.ids)
        ids = [i for k in range(60) for i in batch_at(tiles, k, batch_size=6, share=share or None).ids]
        return [i for i in ids if i in known and i in material.train.ids[:63] and material.train.labels[
            material.train.ids.index(i)] == 0]  # fmt: skip

    plain = order("real_classical", 0.0)
    assert order("real", 0.0) == plain
    for arm, share in (("real_gan", 0.5), ("real_diffusion", 0.25), ("real_all", 0.75)):
        mixed = order(arm, share)
        assert 0 < len(mixed) < len(plain) and mixed == plain[: len(mixed)]


def test_training_sets_of_the_arms(material):
    def of(name, n=ALL):
        return training_set(Cell(ARMS[name], n, 0.5, 3), material)[0]

    assert of("real") is material.train and of("real_classical") is material.train
    assert of("real_gan").sources.tolist() == [0] * 63 + [1] * 36
    assert of("real_all").sources.tolist() == [0] * 63 + [1] * 36 + [2] * 24
    assert of("gan_only").ids == material.synthetic["gan"].ids and of("gan_only").sources is None
    assert of("real_gan", 5).counts() == {"A": 17, "B": 17, "C": 17}
    tiles, kept = training_set(Cell(ARMS["real_gan_selected"], 5, 0.5, 3), material)
    assert len(tiles) == 15 + int(kept.mask.sum()) and set(kept.shares) == {"A", "B", "C"}
    assert tiles.ids[15:] == [i for i, k in zip(material.synthetic["gan"].ids, kept.mask, strict=True) if k]


def test_arms_for_rare_classes_get_synthetic_tiles_of_these_alone(material):
    arms = {arm.name: arm for arm in all_arms(TITLES, rare=["C"])}
    assert set(arms) - set(ARMS) == {"real_gan_rare", "real_diffusion_rare"}
    tiles, _ = training_set(Cell(arms["real_gan_rare"], ALL, 0.5, 3), material)
    assert tiles.sources.tolist() == [0] * 63 + [1] * 12 and set(tiles.labels[63:]) == {2}
    plain = training_set(Cell(ARMS["real_classical"], ALL, 0.0, 3), material)[0]
    for step in range(12):  # the other classes see what they see without synthetic tiles
        one, other = (batch_at(array, step, batch_size=6, share=0.5) for array in (tiles, plain))
        common = one.labels != 2
        assert [i for i, k in zip(one.ids, common, strict=True) if k] == [
            i for i, k in zip(other.ids, common, strict=True) if k
        ]


def test_the_grid_has_every_cell_once_and_synthetic_only_arms_at_one_number():
    arms = list(ARMS.values())
    assert [a.name for a in arms] == [
        "real", "real_classical", "real_gan", "real_diffusion", "real_all", "real_gan_selected",
        "real_diffusion_selected", "gan_only", "diffusion_only",
    ]  # fmt: skip
    cells = cells_of(arms, (5, 10, ALL), (0.25, 0.5), (1, 2))
    assert len({c.key for c in cells}) == len(cells) == 2 * (3 * (2 + 5 * 2) + 2)
    assert {c.key for c in cells if not c.arm.real} == {f"{g}_only-n0-s100-r{s}" for g in TITLES for s in (1, 2)}
    assert "real_gan-n5-s25-r1" in {c.key for c in cells} and "real_classical-n0-s0-r2" in {c.key for c in cells}
    assert [a.name for a in choose_arms(arms, ["gan_only"])] == [BASELINE, "gan_only"]
    with pytest.raises(SettingError, match="'gan_onyl'.*'gan_only'"):
        choose_arms(arms, ["gan_onyl"])
    assert "real_all" not in {a.name for a in all_arms({"gan": "GAN"})}


def test_settings_that_make_no_sense_are_named():
    for wrong, message in (
        ({"per_class": ()}, "per_class is empty"),
        ({"per_class": (-3,)}, "per_class has -3"),
        ({"shares": (1.0,)}, "shares has 1.0"),
        ({"shares": (0.501, 0.502)}, "whole percents"),
        ({"seeds": 0}, "seeds is 0"),
        ({"minutes": 5, "steps": 5}, "minutes is 5 and steps is 5"),
    ):
        with pytest.raises(SettingError, match=message):
            UtilityConfig(**wrong)
    with pytest.raises(SettingError, match="selection.realism is 0"):
        SelectionConfig(realism=0)
    config = UtilityConfig(per_class=("all", 20, 5, 0))
    assert config.numbers == (5, 20, ALL)
    assert steps_of(config, 10) == 300 and steps_of(replace(config, minutes=10), 20) == 690
    assert len(set(config.cell_seeds())) == 5


def test_rare_classes_are_those_well_below_the_middle():
    counts = {"Normal": 44, "Polyp": 280, "LGIN": 380, "HGIN": 110, "Serrated": 35, "Adeno": 470}
    assert rare_classes(counts) == ["Normal", "HGIN", "Serrated"]
    assert rare_classes(dict.fromkeys("abc", 50)) == []
    assert rare_classes(counts, ("Polyp",)) == ["Polyp"]
    with pytest.raises(SettingError, match="'polyp'"):
        rare_classes(counts, ("polyp",))


def test_names_of_generators_are_fit_for_files_and_never_those_of_other_arms():
    taken: dict[str, str] = {}
    for text, name in (("GAN", "gan"), ("gan", "gan-2"), ("all", "all-2"), ("classical", "classical-2"), ("µ", "set")):
        assert short_name(text, taken) == name
        taken[name] = text


def test_material_keeps_patients_of_every_set(material, world):
    assert isinstance(material.sets["external-1"], TileArray)
    assert set(material.sets["external-1"].groups) == set(world["external"].kept.patient)
    assert set(material.sets["test"].groups) == set(world["real"].rows("test").patient)
