"""Faults of an earlier evaluation of synthetic histology tiles, each as a test that ours has not got it.

The faults: pixels rescaled twice before a pathology encoder; eigenvalues of a product that is not symmetric; the best
step of a training chosen by a score of washed-out features while the tiles turned white; LPIPS fed with [0, 1] and
taken between unrelated real and synthetic tiles; Fréchet distances of few tiles without a word; the mean of class
distances reported as the distance of the whole; a set against itself as the check of real against real; conditioning
tiles in the reference.
"""

import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from histosynth import encoders
from histosynth.core.errors import DataError
from histosynth.evaluate import Protocol, judge
from histosynth.evaluate.coverage import prdc
from histosynth.evaluate.frechet import frechet, frechet_distance, trace_sqrt_product
from histosynth.evaluate.guards import Facts, inspect
from histosynth.evaluate.kernel import mmd2
from histosynth.evaluate.perceptual import lpips_diversity, pair_distance
from histosynth.tiles.phantom import make_hospital, make_patient, render
from histosynth.tiles.tileset import complete

CLASSES = ("LYM", "STR", "TUM")
QUICK = Protocol(replicates=6, kid_subsets=20, min_per_class=15)


def tissue(patients: range, each: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 3, 64, 64] and labels, of these patients of one hospital."""
    hospital = make_hospital(4, shift=0.3)
    people = [make_patient(100 + i, hospital) for i in patients]
    images = [
        render(name, patient=people[k % len(people)], seed=1000 * patients.start + k, size=64, field_um=112.0).image
        for name in CLASSES
        for k in range(each)
    ]
    return np.stack(images).transpose(0, 3, 1, 2).copy(), np.repeat(np.arange(len(CLASSES)), each)


@pytest.fixture(scope="module")
def real():
    return tissue(range(4), 30), tissue(range(4, 8), 30)


@pytest.fixture(scope="module")
def encode():
    encoder = encoders.load("tissue-tiny", "cpu")
    return lambda images: encoder.encode(torch.from_numpy(np.ascontiguousarray(images))).numpy().astype(float)


def paled(images: np.ndarray, white: float) -> np.ndarray:
    """Tiles on their way to a white collapse: 0 untouched, 1 all white."""
    return np.rint(images * (1 - white) + 255 * white).astype(np.uint8)


# rescaled twice, and an eigenvalue routine for another kind of matrix


def test_pixels_reach_an_encoder_in_one_known_range(real):
    """Encoders take uint8 and nothing else: a tile that is already in [0, 1] cannot be rescaled once more."""
    images = torch.from_numpy(real[0][0][:4])
    for name in ("tissue-tiny", "colour"):
        encoder = encoders.load(name, "cpu")
        with pytest.raises(DataError, match="uint8"):
            encoder.encode(images.float() / 255)
        direct = encoder.differentiable(images.float() / 127.5 - 1)
        torch.testing.assert_close(encoder.encode(images), direct.detach().cpu(), rtol=1e-4, atol=1e-4)
        washed = encoder.differentiable((images.float() / 127.5 - 1 + 1) / 2)
        assert (washed - direct).abs().max() > 0.05, "a second rescaling does change the features"


def test_washed_out_pixels_hide_a_difference_that_ours_keeps(real, encode):
    """The fault made the distance too small: features of tiles squeezed into [0.5, 1] lie closer together."""
    (first, _), (second, _) = real
    dark = (second * 0.6).astype(np.uint8)
    ours = frechet_distance(encode(first), encode(dark))
    washed = frechet_distance(encode(paled(first, 0.5)), encode(paled(dark, 0.5)))
    assert ours > washed


def test_the_root_of_a_product_is_not_taken_from_one_triangle():
    rng = np.random.default_rng(0)
    a, b = (x.T @ x / 50 for x in (rng.normal(size=(50, 12)), rng.normal(size=(50, 12)) * np.arange(1, 13)))
    truth = np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    wrong = np.sqrt(np.linalg.eigvalsh(a @ b).clip(0)).sum()
    assert trace_sqrt_product(a, b) == pytest.approx(truth, rel=1e-9)
    assert abs(wrong - truth) > 1e-3 * truth, "the fault would show here"
    assert trace_sqrt_product(a, b) == pytest.approx(trace_sqrt_product(b, a), rel=1e-9)


# the best step chosen while the tiles turned white


def test_a_white_collapse_is_worse_at_every_step(real, encode):
    (first, labels), (second, _) = real
    reference = encode(first)
    steps = [encode(paled(second, white)) for white in (0, 0.3, 0.6, 0.9)]
    distances = [frechet_distance(reference, step) for step in steps]
    kernels = [mmd2(reference, step) for step in steps]
    shares = [prdc(reference, step, 5) for step in steps]
    assert (np.diff(distances) > 0).all() and (np.diff(kernels) > 0).all()
    assert (np.diff([s["precision"] for s in shares]) <= 0).all() and shares[-1]["precision"] < 0.1
    assert shares[0]["recall"] > shares[-1]["recall"] and shares[-1]["coverage"] < 0.1
    distance = pair_distance("ms-ssim")
    looks = [lpips_diversity(paled(second, w), labels, CLASSES, distance)["diversity_ms_ssim"] for w in (0, 0.9)]
    assert looks[1] < 0.5 * looks[0]


# LPIPS


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_gets_the_range_that_it_was_made_for():
    """uint8 goes in; what the network sees is [-1, 1]. [0, 1] would give a smaller number."""
    peer = pytest.importorskip("lpips")
    from histosynth.encoders.lpips import Lpips, build, read_heads

    torch.manual_seed(0)
    layers = build("alex")
    theirs = peer.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    features = [m for part in range(1, 6) for m in getattr(theirs.net, f"slice{part}")]
    for own, other in zip(layers["features"], features, strict=True):
        if hasattr(own, "weight"):
            other.load_state_dict(own.state_dict())
    ours = Lpips("alex", layers["features"], read_heads("alex")).eval()
    rng = np.random.default_rng(0)
    one, two = (torch.from_numpy(rng.integers(0, 256, (3, 3, 64, 64), dtype=np.uint8)) for _ in range(2))
    with torch.no_grad():
        expected = theirs(one.float() / 127.5 - 1, two.float() / 127.5 - 1).flatten()
        squeezed = theirs(one.float() / 255, two.float() / 255).flatten()
    torch.testing.assert_close(ours(one, two), expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours(one, two), squeezed, rtol=0.02)


def test_perceptual_distance_is_never_between_real_and_synthetic(real):
    """A function of one set: two sets cannot be given to it, and its pairs are of one class."""
    (images, labels), _ = real
    marked = images.copy()
    marked[:, 0, 0, 0] = labels
    seen = []

    def spy(one, two):
        seen.append((one[:, 0, 0, 0] == two[:, 0, 0, 0]).all())
        return np.ones(len(one))

    lpips_diversity(marked, labels, CLASSES, spy)
    assert seen and all(seen)


# few tiles, means of classes, a set against itself


def test_few_tiles_for_the_dimensions_are_said_to_be_few(real, encode):
    (first, one), (second, two) = real
    x, y = encode(first), encode(second)
    assert len(x) < 2 * x.shape[1]
    assert frechet(x, y, Protocol(replicates=0))["frechet_enough"] == 0
    report, _ = judge(x, y, x, one, two, one, classes=CLASSES, encoder="tissue-tiny", protocol=QUICK)
    assert any("biased upwards" in warning for warning in report["warnings"])


def test_the_whole_is_pooled_and_not_a_mean_of_classes(real, encode):
    (first, one), (second, two) = real
    x, y = encode(first), encode(second)
    protocol = replace(QUICK, metrics=("frechet",))
    report, _ = judge(x, y, x[::-1], one, two, one[::-1], classes=CLASSES, encoder="none", protocol=protocol)
    pooled = report["all"]["scores"]["frechet"]["value"]
    classes = [report["per_class"][c]["scores"]["frechet"]["value"] for c in CLASSES]
    assert pooled == pytest.approx(frechet_distance(y, x), rel=1e-6)
    assert abs(pooled - np.mean(classes)) > 0.05 * pooled
    assert report["all"]["n"] == sum(report["per_class"][c]["n"] for c in CLASSES)


def test_the_floor_is_other_patients_and_not_the_same_files(real, encode):
    (first, one), (second, two) = real
    x, y = encode(first), encode(second)
    report, _ = judge(x, y, y, one, two, two, classes=CLASSES, encoder="none", protocol=QUICK)
    score = report["all"]["scores"]["frechet"]
    assert score["value"] == pytest.approx(0, abs=1e-6), "the same files prove only that the code repeats itself"
    assert score["floor"] == pytest.approx(frechet_distance(y, x), rel=1e-6) and score["floor"] > 1
    assert not any(np.array_equal(a, b) for a in first[:10] for b in second)


def test_sides_of_unequal_number_are_made_equal(real, encode):
    (first, one), (second, two) = real
    x, y = encode(first), encode(second)
    many = np.concatenate([x, x, x])
    report, _ = judge(x, y[::2], many, one, two[::2], np.tile(one, 3), classes=CLASSES, encoder="n", protocol=QUICK)
    assert report["all"]["n"] == 45
    assert {report["all"]["scores"][name]["n"] for name in ("frechet", "kid", "precision")} == {45}


def test_precision_and_recall_need_no_pairs_and_are_numbers(real, encode):
    (first, one), (second, two) = real
    x, y = encode(first), encode(second)
    report, _ = judge(x, y, x[:70], one, two, one[:70], classes=CLASSES, encoder="none", protocol=QUICK)
    assert all(0 <= report["all"]["scores"][name]["value"] <= 1 for name in ("precision", "recall", "coverage"))


# conditioning tiles in the reference; formats


def table(prefix: str, splits: dict[str, int], **columns) -> pd.DataFrame:
    rows = [
        {"id": f"{prefix}-{split}-{k}", "label": "TUM", "split": split, "patient": f"{prefix}-{split}-{k}",
         "sha256": f"{prefix} {split} {k}", "format": "PNG", "width": 64, "height": 64}
        for split, count in splits.items()
        for k in range(count)
    ]  # fmt: skip
    return complete(pd.DataFrame(rows).assign(**columns))


def test_tiles_made_from_the_reference_are_not_let_pass():
    ours = table("real", {"train": 12, "test": 12})
    facts = Facts(size=64, classes=("TUM",))
    sound = table("made", {"": 4}, reference=[f"real-train-{k}" for k in range(4)])
    leaking = table("made", {"": 4}, reference=[f"real-test-{k}" for k in range(4)])
    severe = [
        {f.guard for f in inspect(ours, theirs, facts) if f.severity in ("refused", "strong")}
        for theirs in (sound, leaking)
    ]
    assert severe[1] - severe[0], "references among the test tiles must be found"


def test_jpeg_beside_png_is_named():
    ours = table("real", {"train": 12, "test": 12})
    theirs = table("made", {"": 12}).assign(format="JPEG")
    facts = Facts(size=64, classes=("TUM",))
    plain = {f.guard for f in inspect(ours, table("made", {"": 12}), facts) if f.severity != "note"}
    assert {f.guard for f in inspect(ours, theirs, facts) if f.severity != "note"} - plain


def test_jpeg_moves_the_distance_by_itself(real, encode):
    """Why that is named: the same tiles, saved as JPEG, are farther from the reference than as PNG."""

    def saved(tile):
        stream = io.BytesIO()
        Image.fromarray(tile.transpose(1, 2, 0)).save(stream, "JPEG", quality=40)
        return np.asarray(Image.open(stream)).transpose(2, 0, 1)

    (first, _), (second, _) = real
    x = encode(first)
    assert frechet_distance(x, encode(np.stack([saved(t) for t in second]))) > frechet_distance(x, encode(second))
