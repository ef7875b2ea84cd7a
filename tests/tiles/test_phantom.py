"""The simulator keeps its promises: one seed one tile, Beer-Lambert, a consistent truth, classes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from histosynth.core.errors import SettingError
from histosynth.tiles import phantom
from histosynth.tiles.phantom import CLASSES, PhantomTile, make_hospital, make_patient, render, render_batch


@lru_cache(maxsize=64)
def tile(label: str, seed: int = 5, size: int = 96) -> PhantomTile:
    return render(label, patient=make_patient(seed, make_hospital(seed % 3)), seed=seed, size=size)


def test_tables_name_the_nine_classes() -> None:
    assert CLASSES == ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
    assert tuple(phantom.CLASS_NAMES) == tuple(phantom.CLASS_COLOURS) == CLASSES


@pytest.mark.parametrize("label", CLASSES)
def test_same_seed_gives_the_same_tile_and_another_seed_another(label: str) -> None:
    patient = make_patient(1, make_hospital(1))
    first, again = (render(label, patient=patient, seed=9, size=64) for _ in range(2))
    other = render(label, patient=patient, seed=10, size=64)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.nuclei, again.nuclei)
    assert np.array_equal(first.density, again.density)
    assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("label", CLASSES)
def test_image_obeys_beer_lambert_up_to_noise(label: str) -> None:
    t = tile(label)
    optical = np.einsum("chw,ck->hwk", t.density.astype(np.float64), t.stain_matrix)
    residual = t.image - t.white * np.exp(-optical)
    noise = make_patient(5, make_hospital(2)).noise
    assert abs(residual.mean()) < 0.1
    assert residual.std() < np.hypot(noise, 0.3) + 0.05
    assert np.abs(residual).max() < 6 * noise + 1
    assert np.allclose(np.linalg.norm(t.stain_matrix, axis=1), 1)
    assert (t.density >= 0).all()


@pytest.mark.parametrize("label", ["DEB", "LYM", "MUS", "NORM", "STR", "TUM"])
def test_nuclei_hold_more_haematoxylin_than_the_rest(label: str) -> None:
    t = tile(label)
    inside = t.nuclei > 0
    assert 0.005 < inside.mean() < 0.95
    assert t.density[0][inside].mean() > 1.5 * t.density[0][~inside].mean()


def test_glands_are_marked_in_mucosa_and_tumour_only() -> None:
    for label in CLASSES:
        assert tile(label).glands.any() == (label in ("NORM", "TUM")), label


def test_empty_glass_shows_the_white_point_and_hardly_any_stain() -> None:
    t = tile("BACK")
    assert np.median(t.density.sum(axis=0)) < 0.1
    assert np.abs(np.median(t.image, axis=(0, 1)) - t.white).max() < 12


def test_types_and_shapes() -> None:
    t = tile("TUM")
    assert t.image.shape == (96, 96, 3) and t.image.dtype == np.uint8
    assert t.nuclei.shape == (96, 96) and t.nuclei.dtype == np.int32
    assert t.glands.shape == (96, 96) and t.glands.dtype == np.bool_
    assert t.density.shape == (2, 96, 96) and t.density.dtype == np.float32
    assert t.stain_matrix.shape == (2, 3) and t.stain_matrix.dtype == np.float64
    assert t.white.shape == (3,) and t.white.dtype == np.float64


@pytest.mark.parametrize("label", CLASSES)
@pytest.mark.parametrize(("size", "field_um"), [(32, 60), (64, 112), (64, 300), (128, 112), (224, 112), (224, 60)])
def test_every_class_renders_at_every_scale(label: str, size: int, field_um: float) -> None:
    patient = make_patient(2, make_hospital(2, shift=1.0))
    t = render(label, patient=patient, seed=3, size=size, field_um=field_um)
    assert t.image.shape == (size, size, 3)
    assert np.isfinite(t.density).all()


def test_tile_finer_than_the_lens_resolves_is_enlarged() -> None:
    patient = make_patient(2, make_hospital(2))
    t = render("TUM", patient=patient, seed=3, size=400, field_um=60)
    assert t.image.shape == (400, 400, 3) and t.nuclei.shape == t.glands.shape == (400, 400)
    assert t.density.shape == (2, 400, 400)


def test_one_seed_shows_the_same_tissue_at_every_size() -> None:
    patient = make_patient(4, make_hospital(4))
    small = render("NORM", patient=patient, seed=8, size=64).density.sum(axis=0)
    large = render("NORM", patient=patient, seed=8, size=128).density.sum(axis=0)
    reduced = large.reshape(64, 2, 64, 2).mean(axis=(1, 3))
    assert np.corrcoef(small.ravel(), reduced.ravel())[0, 1] > 0.9


def test_patients_differ_more_between_hospitals_than_within() -> None:
    def staining(hospital: int) -> np.ndarray:
        home = make_hospital(hospital, shift=0.7)
        patients = [make_patient(s, home) for s in range(12)]
        return np.array([np.r_[p.stain_matrix.ravel(), np.log(p.concentrations)] for p in patients])

    groups = np.stack([staining(h) for h in range(8)])
    within = groups.var(axis=1).sum(axis=-1).mean()
    between = groups.mean(axis=1).var(axis=0).sum()
    assert between > 2 * within


def test_shift_scales_the_distance_between_hospitals() -> None:
    assert np.allclose(make_hospital(1, shift=0.0).log_stain, make_hospital(2, shift=0.0).log_stain)
    near = np.abs(make_hospital(1, shift=0.2).log_stain - make_hospital(2, shift=0.2).log_stain).sum()
    far = np.abs(make_hospital(1, shift=1.0).log_stain - make_hospital(2, shift=1.0).log_stain).sum()
    assert far > 2 * near > 0


def test_batch_equals_single_tiles() -> None:
    patients = [make_patient(s, make_hospital(s)) for s in range(3)]
    images, labels = render_batch(["TUM", "ADI", "LYM"], patients=patients, seeds=[1, 2, 3], size=48)
    assert images.shape == (3, 3, 48, 48) and images.dtype == np.uint8
    assert labels.tolist() == [8, 0, 3] and labels.dtype == np.int64
    assert np.array_equal(images[1], render("ADI", patient=patients[1], seed=2, size=48).image.transpose(2, 0, 1))
    with pytest.raises(SettingError, match="2, 3 and 3"):
        render_batch(["TUM", "ADI"], patients=patients, seeds=[1, 2, 3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "TUMOR"}, "TUM"),
        ({"label": "xyz"}, "ADI"),
        ({"size": 15}, "size is 15"),
        ({"size": 4097}, "size is 4097"),
        ({"field_um": 20.0}, "field_um is 20"),
    ],
)
def test_wrong_settings_are_named(change: dict, message: str) -> None:
    patient = make_patient(1, make_hospital(1))
    settings = {"label": "TUM", "size": 64, "field_um": 112.0} | change
    with pytest.raises(SettingError, match=message):
        render(settings.pop("label"), patient=patient, seed=1, **settings)


def test_shift_outside_its_range_is_refused() -> None:
    with pytest.raises(SettingError, match=r"shift is 1\.5"):
        make_hospital(1, shift=1.5)


def test_texture_tells_the_classes_apart_and_mean_colour_alone_does_not() -> None:
    labels, colour, texture = [], [], []
    for s in range(30):
        patient = make_patient(s, make_hospital(s, shift=0.8))
        for i, label in enumerate(CLASSES):
            image = render(label, patient=patient, seed=100 * s + i, size=32).image.astype(np.float64)
            grey = image.mean(axis=2)
            slopes = [np.abs(np.diff(grey, axis=a)).mean() for a in (0, 1)]
            coarse = grey.reshape(8, 4, 8, 4).mean(axis=(1, 3)).std()
            labels.append(i)
            colour.append(image.mean(axis=(0, 1)))
            texture.append(np.r_[image.mean(axis=(0, 1)), image.std(axis=(0, 1)), slopes, coarse])

    def accuracy(features: list[np.ndarray]) -> float:
        x, y = np.array(features), np.array(labels)
        x = (x - x.mean(axis=0)) / x.std(axis=0)
        train = np.arange(len(y)) < len(y) // 2
        distance = ((x[~train, None] - x[None, train]) ** 2).sum(axis=-1)
        votes = y[train][np.argsort(distance, axis=1)[:, :5]]
        guess = np.array([np.bincount(v, minlength=len(CLASSES)).argmax() for v in votes])
        return float((guess == y[~train]).mean())

    only_colour, both = accuracy(colour), accuracy(texture)
    assert both > 0.4
    assert both > only_colour
    assert only_colour < 0.8
