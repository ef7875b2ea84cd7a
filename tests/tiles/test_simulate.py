"""Simulated tile sets: patients, rare classes, purity."""

import numpy as np
import pytest

from histosynth.core.errors import SettingError
from histosynth.tiles.images import read_rgb
from histosynth.tiles.simulate import BaseTissueConfig, PhantomConfig, base_tissue, simulate


def test_simulated_hospital_has_patients_rare_classes_and_a_digest(tmp_path):
    config = PhantomConfig(per_class=6, rare={"TUM": 1}, patients=5, size=32, val=0.2, test=0.4)
    tileset = simulate(tmp_path / "a", config)
    counts = tileset.kept.groupby(["label", "split"]).size()
    assert counts["TUM", "train"] == 1 and counts["STR", "train"] == 2 and counts["TUM", "test"] == 2
    assert tileset.kept.groupby("patient").split.nunique().max() == 1
    assert simulate(tmp_path / "b", config).digest == tileset.digest
    elsewhere = simulate(tmp_path / "elsewhere", PhantomConfig(per_class=1, patients=3, size=32, seed=1))
    assert not set(elsewhere.kept.patient) & set(tileset.kept.patient)
    assert read_rgb(tileset.folder / tileset.kept.path[0])[0].shape == (32, 32, 3)
    with pytest.raises(SettingError, match="'TUMM'.*'TUM'"):
        simulate(tmp_path / "c", PhantomConfig(rare={"TUMM": 1}))
    with pytest.raises(SettingError, match="patients is 2"):
        simulate(tmp_path / "c", PhantomConfig(patients=2))


def test_base_tissue_does_not_depend_on_workers(tmp_path):
    config = BaseTissueConfig(tiles=20, size=32, hospitals=3, patients_per_hospital=2)
    one = base_tissue(config, tmp_path / "one", workers=1)
    two = base_tissue(config, tmp_path / "two", workers=2)
    assert np.array_equal(one.images, two.images) and np.array_equal(one.labels, two.labels)
    assert len(np.unique(np.asarray(one.images).reshape(20, -1), axis=0)) == 20
    assert base_tissue(config, tmp_path / "one").images.filename == one.images.filename
