"""Colour in units of the spread between real patients."""

import numpy as np
import pytest

from histosynth.core.errors import DataError
from histosynth.evaluate.patients import patient_colour, tile_density
from histosynth.tiles.simulate import PhantomConfig, simulate


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospital") / "tiles"
    tiles = simulate(folder, PhantomConfig(patients=12, per_class=18, size=48, seed=3)).array(size=48)
    keep = np.isin(tiles.labels, [i for i, c in enumerate(tiles.classes) if c in ("STR", "TUM", "NORM", "LYM")])
    return np.asarray(tiles.images)[keep], np.array(tiles.groups)[keep]


def test_other_patients_of_the_hospital_lie_among_its_patients(hospital):
    images, patients = hospital
    names = np.unique(patients)
    known = np.isin(patients, names[::2])
    got = patient_colour(images[known], patients[known], images[~known])
    assert got["patients_shift"] < got["patients_shift_typical"]
    assert got["patients_outside"] < 0.1
    assert got["haematoxylin_angle"] < 2 * got["haematoxylin_angle_typical"] + 1


def test_a_tint_shows(hospital):
    images, patients = hospital
    tinted = (images * np.array([1.0, 0.75, 0.9])[:, None, None]).astype(np.uint8)
    got = patient_colour(images, patients, tinted)
    usual = patient_colour(images, patients, images)
    assert usual["patients_shift"] < 0.5 < 2 < got["patients_shift"]
    assert usual["patients_outside"] <= 0.02 and got["patients_outside"] > 0.1


def test_density_of_flat_tiles():
    tiles = np.full((2, 3, 8, 8), 255, np.uint8)
    tiles[1, 0] = 127
    np.testing.assert_allclose(tile_density(tiles), [[0, 0, 0], [np.log(2), 0, 0]], atol=1e-12)


def test_white_tiles_and_few_patients():
    white = np.full((8, 3, 16, 16), 255, np.uint8)
    got = patient_colour(white, [f"P{i % 4}" for i in range(8)], white)
    assert got["patients_shift"] == got["patients_outside"] == 0 and np.isnan(got["eosin_angle"])
    with pytest.raises(DataError, match="2 patient"):
        patient_colour(white, ["A", "B"] * 4, white)
    with pytest.raises(DataError, match="one patient a tile"):
        patient_colour(white, ["A"], white)
