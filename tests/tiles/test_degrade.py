"""Controlled degradations: determinism, grades, and that the quality metrics notice every one of them."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from histosynth.core.errors import DataError, SettingError
from histosynth.core.seeds import derive
from histosynth.tiles.phantom import make_hospital, make_patient, render
from histosynth.tiles.quality.degrade import DEGRADATIONS, degrade
from histosynth.tiles.quality.metrics import METRICS, measure
from histosynth.tiles.quality.thresholds import QualityConfig, learn

MEANT = {
    "defocus": ("focus_tissue", -1), "jpeg": ("jpeg_quality", -1), "noise": ("noise", 1), "fold": ("fold_ratio", 1),
    "ink": ("ink_ratio", 1), "bubble": ("bubble_ratio", 1),
}  # fmt: skip
TISSUE = ("DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


@pytest.fixture(scope="module")
def tiles():
    """uint8 [42, 3, 224, 224] of seven tissues, three hospitals, and the labels."""
    images, labels = [], []
    for k in range(6):
        patient = make_patient(derive(1, "patient", k), make_hospital(k % 3, shift=0.6))
        for label in TISSUE:
            tile = render(label, patient=patient, seed=derive(1, label, k), size=224)
            images.append(tile.image.transpose(2, 0, 1))
            labels.append(label)
    return np.stack(images), labels


@pytest.fixture(scope="module")
def clean(tiles):
    return pd.DataFrame(measure(tiles[0]))


@pytest.mark.parametrize("name", MEANT)
def test_the_metrics_notice_moderate_damage(tiles, clean, name):
    images, labels = tiles
    damaged = pd.DataFrame(measure(degrade(name, images, 0.5, range(len(images)))))
    truth = np.repeat([0, 1], len(images))
    metric, side = MEANT[name]
    assert roc_auc_score(truth, side * np.concatenate([clean[metric], damaged[metric]])) >= 0.95
    limits = learn(clean, labels, QualityConfig(min_tiles=100))
    score = np.concatenate([limits.score(clean, labels), limits.score(damaged, labels)])
    assert roc_auc_score(truth, score) >= 0.95
    assert (limits.score(clean, labels) > 0).mean() <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", MEANT)
def test_the_metrics_notice_damage_on_real_tiles(real_data, name):
    files = sorted((real_data / "ebhi-seg-224-sample").glob("*/*.png"))
    images = np.stack([np.asarray(Image.open(f).convert("RGB")).transpose(2, 0, 1) for f in files])
    labels = [f.parent.name for f in files]
    sound, damaged = (pd.DataFrame(measure(x)) for x in (images, degrade(name, images, 0.5, range(len(images)))))
    metric, side = MEANT[name]
    truth = np.repeat([0, 1], len(images))
    assert roc_auc_score(truth, side * np.concatenate([sound[metric], damaged[metric]])) >= 0.95
    limits = learn(sound, labels)
    score = np.concatenate([limits.score(sound, labels), limits.score(damaged, labels)])
    assert roc_auc_score(truth, score) >= 0.95


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_damage_follows_from_the_tiles_seed_alone(tiles, name):
    images = tiles[0][:3, :, :96, :80]
    first = degrade(name, images, 0.6, [5, 6, 7])
    assert first.dtype == np.uint8 and first.shape == images.shape
    assert np.array_equal(first, degrade(name, images, 0.6, [5, 6, 7]))
    assert np.array_equal(first[1:2], degrade(name, images[1:2], 0.6, [6]))
    same = images[[0, 0]]
    if name not in ("jpeg", "brightness"):  # nothing, or a single choice of two, is random in them
        pair = degrade(name, same, 0.6, [1, 2])
        assert not np.array_equal(pair[0], pair[1])


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_damage_grows_with_strength_from_nothing(tiles, name):
    images = tiles[0][:8, :, ::2, ::2]
    before = images.copy()
    assert np.array_equal(degrade(name, images, 0, range(8)), images)
    change = [np.abs(degrade(name, images, s, range(8)).astype(int) - images).mean() for s in (0.25, 0.5, 1)]
    assert 0 < change[0] < change[1] < change[2]
    assert np.array_equal(images, before)  # the caller's tiles are left alone


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 3, 17, 40)])
def test_damage_works_at_any_size(name, shape, rng):
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    for strength in (0.05, 1):
        assert degrade(name, images, strength, [0]).shape == shape


def test_wrong_input_is_refused(tiles):
    images = tiles[0][:2, :, :32, :32]
    with pytest.raises(SettingError, match="did you mean|Did you mean 'bubble'"):
        degrade("buble", images, 0.5, [0, 1])
    with pytest.raises(SettingError, match="strength is 1.5"):
        degrade("ink", images, 1.5, [0, 1])
    with pytest.raises(DataError, match="2 tiles came with 1 seeds"):
        degrade("ink", images, 0.5, [0])
    with pytest.raises(DataError, match="must be uint8"):
        degrade("ink", images.astype(float), 0.5, [0, 1])


def test_a_fold_darkens_and_ink_colours():
    image = np.full((1, 3, 128, 128), 200, np.uint8)
    image[:, 1] = 120
    folded = degrade("fold", image, 0.5, [3])[0].astype(int)
    dark = folded.sum(0) < image[0].sum(0) - 40
    assert 0.03 < dark.mean() < 0.5 and (folded <= image[0]).all()
    assert set(METRICS) >= {"fold_ratio", "ink_ratio"}
    inked = degrade("ink", image, 0.5, range(1))[0]
    changed = (inked != image[0]).any(0)
    assert 0.05 < changed.mean() < 0.6 and (inked <= image[0]).all()
