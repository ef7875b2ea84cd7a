"""Leakage probes: planted leaks are found, and what only looks like a leak is not."""

import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score

from histosynth.core.errors import DataError
from histosynth.tiles.probes import features as pf
from histosynth.tiles.probes import leakage as pr

EDGE = 80


def tissue(count: int, seed: int, roughness: float = 1.4) -> np.ndarray:
    """Noise with the falling spectrum of natural textures in pinks, uint8 [count, 3, EDGE, EDGE]."""
    rng = np.random.default_rng(seed)
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(EDGE), np.fft.fftfreq(EDGE)))
    f[0, 0] = 1
    layers = np.fft.ifft2(np.fft.fft2(rng.normal(size=(count, 2, EDGE, EDGE))) / f**roughness).real
    layers /= layers.std((2, 3), keepdims=True)
    grain = rng.normal(0, 3, (count, 3, EDGE, EDGE))
    tint = np.array([[20, 30, 14], [14, 30, 22]]).T
    mixed = np.einsum("ck,nkhw->nchw", tint, layers) + np.array([185, 140, 175])[:, None, None] + grain
    return mixed.clip(0, 255).astype(np.uint8)


def jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    done = []
    for image in images:
        stream = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(stream, "JPEG", quality=quality)
        done.append(np.asarray(Image.open(stream)).transpose(2, 0, 1))
    return np.stack(done)


@pytest.fixture(scope="module")
def tiles() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """240 tiles of 40 patients in three classes of different roughness; a patient has tiles of all three."""
    labels = np.tile(np.arange(3), 80)
    images = np.empty((240, 3, EDGE, EDGE), np.uint8)
    for k, roughness in enumerate((1.2, 1.5, 1.9)):
        images[labels == k] = tissue(80, k, roughness)
    return images, labels, [f"p{i // 6}" for i in range(240)]


def traces_probe(images: np.ndarray, labels: np.ndarray, groups: list[str]) -> pr.Probe:
    traces = pf.compression(images)
    quality = pf.alike_quality(images[:24], traces[:24])
    return pr.probe_compression(traces, pf.compression(pf.compressed_alike(images, quality)), labels, groups, 3)


@pytest.mark.parametrize("quality", [90, 50])
def test_a_class_that_was_compressed_is_found(tiles: tuple[np.ndarray, np.ndarray, list[str]], quality: int) -> None:
    images, labels, groups = tiles
    leaky = images.copy()
    leaky[labels == 1] = jpeg(images[labels == 1], quality)
    found = traces_probe(leaky, labels, groups)
    assert found.level == "warning" and found.area[1] > 0.95 and found.score > found.null_high


@pytest.mark.parametrize("quality", [None, 60])
def test_classes_of_different_texture_that_were_treated_alike_are_not(
    tiles: tuple[np.ndarray, np.ndarray, list[str]], quality: int | None
) -> None:
    images, labels, groups = tiles
    assert traces_probe(images if quality is None else jpeg(images, quality), labels, groups).level == "none"


def test_a_grid_that_does_not_begin_at_the_corner_is_found(tiles: tuple[np.ndarray, np.ndarray, list[str]]) -> None:
    images, labels, groups = tiles
    leaky = images.copy()
    leaky[labels == 2] = jpeg(images[labels == 2], 60)
    assert traces_probe(leaky[:, :, 3:, 5:], labels, groups).level == "warning"


def test_traces_are_near_zero_for_any_texture_that_was_never_compressed() -> None:
    for image in (tissue(8, 1, 1.0), tissue(8, 2, 2.2), np.full((2, 3, EDGE, EDGE), 250, np.uint8)):
        assert np.abs(pf.compression(image).mean(0)).max() < 0.12
    assert np.abs(pf.compression(jpeg(tissue(8, 1, 1.4), 60)).mean(0)).max() > 0.4


def test_an_enlarged_class_is_not_taken_for_a_compressed_one(tiles: tuple[np.ndarray, np.ndarray, list[str]]) -> None:
    images, labels, groups = tiles
    small = images[labels == 1][:, :, :60, :60]  # linear interpolation by 4/3 leaves a lattice that repeats
    turned = [Image.fromarray(i.transpose(1, 2, 0)).resize((EDGE, EDGE), Image.Resampling.BILINEAR) for i in small]
    enlarged = images.copy()
    enlarged[labels == 1] = np.stack([np.asarray(i).transpose(2, 0, 1) for i in turned])
    assert traces_probe(enlarged, labels, groups).level == "none"


def test_a_tint_is_found_by_colour_and_not_by_compression(tiles: tuple[np.ndarray, np.ndarray, list[str]]) -> None:
    _, labels, groups = tiles
    images = tissue(240, 9)
    plain = pr.probe_class("mean colour", pf.mean_colour(images), labels, groups, 3)
    assert plain.level == "none"
    images[labels == 0] = (images[labels == 0] * np.array([1.0, 0.94, 1.0])[:, None, None]).astype(np.uint8)
    for name, features in (("mean colour", pf.mean_colour), ("colour histogram", pf.colour_histogram)):
        found = pr.probe_class(name, features(images), labels, groups, 3)
        assert found.level == "warning" and found.recall[0] > 0.9 and found.low > found.chance
    assert traces_probe(images, labels, groups).level == "none"


def test_labels_without_meaning_are_rarely_reported() -> None:
    # tiles of a patient look alike and have mostly one label: what fools a probe that ignores patients
    flagged, small = 0, 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        patient = np.repeat(np.arange(24), rng.integers(2, 16, 24))
        x = rng.normal(size=(24, 6))[patient] + 0.3 * rng.normal(size=(len(patient), 6))
        main = rng.integers(0, 3, 24)[patient]
        y = np.where(rng.random(len(patient)) < 0.8, main, rng.integers(0, 3, len(patient)))
        found = pr.probe_class("mean colour", x, y, [str(p) for p in patient], 3)
        flagged += found.level != "none"
        small += found.p <= 0.1
    assert flagged <= 1 and small <= 4


def test_a_patient_whose_tiles_all_have_one_class_does_not_fool_the_probe() -> None:
    # every patient is recognisable and has one class: known patients would be named perfectly
    rng = np.random.default_rng(3)
    patient = np.repeat(np.arange(24), 15)
    x = rng.normal(size=(24, 8))[patient] * 5 + 0.1 * rng.normal(size=(360, 8))
    y = (np.arange(24) % 2)[patient]
    own = LinearDiscriminantAnalysis().fit(x[::2], y[::2]).score(x[1::2], y[1::2])
    found = pr.probe_class("mean colour", x, y, [f"p{p}" for p in patient], 2)
    assert own > 0.65 and found.level == "none"
    assert found.low < 0.5 < found.high or found.score < 0.5


def test_a_shift_between_train_and_test_is_found_and_a_mix_of_classes_is_none() -> None:
    rng = np.random.default_rng(0)
    patient = np.repeat(np.arange(40), 8)
    test = patient % 4 == 0
    # the test side has other classes, and the classes differ: no shift
    y = np.where(rng.random(320) < np.where(test, 0.8, 0.3), 1, 0)
    x = rng.normal(size=(320, 3)) + 4 * y[:, None]
    groups = [str(p) for p in patient]
    assert pr.probe_split("mean colour", x, y, test, groups).level == "none"
    shifted = pr.probe_split("mean colour", x + 1.5 * test[:, None], y, test, groups)
    assert shifted.level == "warning" and shifted.score > 0.85 and shifted.low > 0.7


def test_too_little_to_judge_is_said() -> None:
    x, y = np.random.default_rng(0).normal(size=(30, 2)), np.repeat([0, 1, 2], 10)
    everyone = [f"p{i}" for i in range(30)]
    few = ["a"] * 10 + everyone[10:]
    found = pr.probe_class("mean colour", x, y, few, 3)
    assert found.recall[0] is None and found.chance == 0.5 and found.tiles == 20
    assert "fewer than two classes" in pr.probe_class("mean colour", x, y, ["a"] * 20 + everyone[20:], 3).reason
    same = pr.probe_class("file facts", np.ones((30, 2)), y, everyone, 3)
    assert same.reason == "the same for all tiles" and same.score is None and same.skill == 0
    assert "fewer than" in pr.probe_split("mean colour", x, y, np.arange(30) < 2, everyone).reason


def test_tiles_without_a_patient_stand_for_themselves() -> None:
    x, y = np.random.default_rng(0).normal(size=(60, 2)), np.tile([0, 1], 30)
    assert pr.probe_class("mean colour", x, y, [""] * 60, 2).groups == 60


def test_the_same_seed_gives_the_same_probe_and_the_order_of_names_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(90, 3)), np.tile([0, 1, 2], 30)
    groups = [f"p{i // 3}" for i in range(90)]
    assert pr.probe_class("mean colour", x, y, groups, 3) == pr.probe_class("mean colour", x, y, groups, 3)
    assert pr.probe_class("mean colour", x, y, groups, 3, 1) != pr.probe_class("mean colour", x, y, groups, 3, 2)
    scaled = pr.probe_class("mean colour", x * [1e3, 1, 1e-3] + 7, y, groups, 3)
    assert scaled.score == pytest.approx(pr.probe_class("mean colour", x, y, groups, 3).score)


def test_the_discriminant_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    y = np.repeat([0, 1, 2], 400)
    x = rng.normal(size=(1200, 4)) + rng.normal(size=(3, 4))[y]
    new = rng.normal(size=(500, 4))
    ours = pr._discriminant(x, x.T @ x, y, new, 3)
    theirs = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(3, 1 / 3)).fit(x, y)
    assert (ours.argmax(1) == theirs.predict(new)).mean() > 0.99


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_the_area_agrees_with_scikit_learn_with_ties_and_weights(seed: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=40)
    scores = np.round(scores) if ties else scores
    positive = np.arange(40) % 3 == 0
    weights = rng.integers(0, 3, (2, 40)).astype(float)
    found = pr._areas(scores, positive, weights)
    for value, weight in zip(found, weights, strict=True):
        assert value == pytest.approx(roc_auc_score(positive, scores, sample_weight=weight))
    assert np.isnan(pr._areas(scores, np.zeros(40, bool))[0])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_no_patient_is_in_two_folds(sizes: list[int]) -> None:
    group = np.repeat(np.arange(len(sizes)), sizes)
    folds = pr._folds(group, 0)
    assert all(len(set(folds[group == g])) == 1 for g in range(len(sizes)))
    assert len(np.unique(folds)) == min(pr.FOLDS, len(sizes))


def test_file_facts_tell_a_class_of_its_own_format() -> None:
    y = np.tile([0, 1, 2, 3], 40)
    table = pd.DataFrame({"format": np.where(y == 2, "JPEG", "PNG"), "width": 224, "height": 224})
    groups = [f"p{i // 4}" for i in range(160)]
    found = pr.probe_class("file facts", pf.file_facts(table), y, groups, 4)
    assert found.level == "warning" and found.area[2] == 1 and found.recall[2] == 1
    alike = pr.probe_class("file facts", pf.file_facts(table.assign(format="PNG")), y, groups, 4)
    assert alike.reason == "the same for all tiles"


def test_histograms_are_unit_vectors_and_do_not_see_where_pixels_are() -> None:
    images = tissue(3, 0)
    mixed = images.reshape(3, 3, -1)[:, :, np.random.default_rng(0).permutation(EDGE**2)].reshape(images.shape)
    found = pf.colour_histogram(images)
    assert np.allclose((found**2).sum(1), 1) and np.array_equal(found, pf.colour_histogram(mixed))
    assert np.allclose(pf.mean_colour(images), pf.mean_colour(mixed))


def test_wrong_input_is_named() -> None:
    with pytest.raises(DataError, match="float64"):
        pf.mean_colour(np.zeros((1, 3, 8, 8)))
    with pytest.raises(DataError, match="20 x 20"):
        pf.compression(np.zeros((1, 3, 20, 20), np.uint8))
    with pytest.raises(DataError, match="2 groups"):
        pr.probe_class("mean colour", np.zeros((3, 2)), np.zeros(3, int), ["a", "b"], 2)
    with pytest.raises(DataError, match="not finite"):
        pr.probe_class("mean colour", np.full((2, 2), np.nan), np.zeros(2, int), ["a", "b"], 2)


def test_real_biopsies_compressed_alike_are_not_reported(real_data) -> None:
    table = pd.read_csv(real_data / "ebhi-seg-128" / "tiles.csv").sample(120, random_state=0)
    images = np.stack([np.asarray(Image.open(real_data / "ebhi-seg-128" / p).convert("RGB")) for p in table.path])
    images = images.transpose(0, 3, 1, 2)
    labels = np.unique(table.label, return_inverse=True)[1] % 3
    groups = table.patient.astype(str).tolist()
    assert traces_probe(jpeg(images, 75), labels, groups).level == "none"
    leaky = images.copy()
    leaky[labels == 1] = jpeg(images[labels == 1], 75)
    assert traces_probe(leaky, labels, groups).level == "warning"
