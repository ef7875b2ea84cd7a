"""Probes against scikit-learn and a plain loop; shares; the disk; the entry for every kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from histosynth import encoders
from histosynth.classify import probe as probes
from histosynth.classify.config import ClassifierConfig
from histosynth.classify.fit import check_kind, fit, load, ticks
from histosynth.classify.model import Classifier
from histosynth.classify.probe import NEIGHBOURS, VOTE_TEMPERATURE, logistic, tile_weights
from histosynth.core.checkpoint import load_checkpoint, save_checkpoint
from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.tiles.batches import TileArray, batch_at

_CLASSES = ("pink", "blue", "grey")


def _tiles(n: int, *, seed: int, labels: tuple[int, ...] = (0, 1, 2), noise: float = 25.0) -> TileArray:
    """Tiles of three colours, not always told apart."""
    rng = np.random.default_rng(seed)
    y = np.array([labels[i % len(labels)] for i in range(n)], dtype=np.int64)
    colour = np.array([(200, 120, 180), (120, 110, 200), (160, 160, 160)])[y] + rng.normal(0, noise, (n, 3))
    images = (colour[:, :, None, None] + rng.normal(0, 20, (n, 3, 32, 32))).clip(0, 255).astype(np.uint8)
    return TileArray(images, y, [f"t{i}" for i in range(n)], _CLASSES)


def test_the_regression_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    x, y, weight = rng.normal(size=(120, 7)), rng.integers(0, 4, 120), rng.random(120)
    weight /= weight.sum()
    for penalty in (3.0, 0.01):
        ours = logistic(x, y, weight, 4, penalty)
        # its objective is C sum_i w_i nll_i + |W|^2 / 2
        theirs = LogisticRegression(C=7 / penalty, tol=1e-8, max_iter=5000).fit(x, y, sample_weight=weight)
        mine = x @ ours[:, :-1].T + ours[:, -1]
        np.testing.assert_allclose(mine - mine.mean(1, keepdims=True), _centred(theirs.decision_function(x)), atol=5e-3)
        again = logistic(x, y, weight, 4, penalty, start=rng.normal(size=(4, 8)))
        np.testing.assert_allclose(again[:, :-1], ours[:, :-1], atol=5e-3)  # convex: one minimum


def _centred(z: np.ndarray) -> np.ndarray:
    return z - z.mean(1, keepdims=True)


@pytest.mark.parametrize("kind", ["linear:colour", "knn:colour", "linear:tissue-tiny"])
def test_it_learns_is_calibrated_and_survives_the_disk(kind, tmp_path):
    ticked = []
    train, val, test = (_tiles(n, seed=s) for n, s in ((90, 0), (60, 1), (150, 2)))
    model = fit(kind, train, val, seed=0, tick=lambda: ticked.append(1), device="cpu")
    probs = model.probabilities(test.images).numpy()
    assert probs.sum(1) == pytest.approx(1) and (probs.argmax(1) == test.labels).mean() > 0.6
    assert model.initialisation == f"frozen {kind.partition(':')[2]}" and model.history == []
    assert len(ticked) == ticks(kind, ClassifierConfig()) == 1
    back = load(model.save(tmp_path / "probe.safetensors"), device="cpu")
    assert torch.equal(back.logits(test.images), model.logits(test.images))
    assert (back.temperature, back.classes, back.notes) == (model.temperature, model.classes, model.notes)
    assert back.card["kind"] == "probe" and back.card["trained_on"] == train.counts()
    assert model.logits(test.images[:0]).shape == (0, 3)
    torch.testing.assert_close(model.logits(test.images, batch_size=7), model.logits(test.images))
    with pytest.raises(DataError, match="uint8"):
        model.logits(test.tensor().float())


def test_the_neighbours_vote_as_in_a_plain_loop():
    train, test = _tiles(40, seed=0, labels=(0, 0, 0, 1, 2)), _tiles(9, seed=1)
    model = fit("knn:colour", train, _tiles(30, seed=3), seed=0, device="cpu")
    encoder = encoders.load("colour", "cpu")
    weight = tile_weights(train, None)
    bank = encoder.encode(train.tensor()).double().numpy()
    mean = weight @ bank
    scale = np.sqrt(weight @ (bank - mean) ** 2)
    scale = np.maximum(scale, scale.max() / 100)
    bank = (bank - mean) / scale
    for image, logits in zip(test.images, model.logits(test.images).numpy(), strict=True):
        one = (encoder.encode(torch.from_numpy(image[None])).double().numpy()[0] - mean) / scale
        cosine = [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for other in bank]
        votes = np.zeros(3)
        for i in np.argsort(cosine)[-NEIGHBOURS:]:
            votes[train.labels[i]] += weight[i] * np.exp(cosine[i] / VOTE_TEMPERATURE)
        np.testing.assert_allclose(np.exp(logits), 0.99 * votes / votes.sum() + 0.01 / 3, rtol=1e-4)


def test_many_tiles_of_a_class_do_not_crowd_out_few():
    train = _tiles(60, seed=0, labels=(0,) * 18 + (1, 2))
    model = fit("linear:colour", train, _tiles(60, seed=1), seed=0, device="cpu")
    test = _tiles(150, seed=2)
    right = model.logits(test.images).argmax(1).numpy() == test.labels
    assert min(right[test.labels == k].mean() for k in range(3)) > 0.5


@pytest.mark.parametrize("share", [None, 0.0, 0.25, 0.75, 1.0])
def test_weights_are_the_shares_of_the_batches(share):
    real, made = _tiles(20, seed=0, labels=(0, 1, 1, 2)), _tiles(30, seed=1, labels=(0, 1))
    both = real.joined(made)
    drawn = np.zeros(len(both))
    place = {name: i for i, name in enumerate(f"{s}{t}" for s, t in zip(both.sources, both.ids, strict=True))}
    both = TileArray(both.images, both.labels, list(place), _CLASSES, sources=both.sources)
    for step in range(300):
        for name in batch_at(both, step, batch_size=60, share=share).ids:
            drawn[place[name]] += 1
    np.testing.assert_allclose(drawn / drawn.sum(), tile_weights(both, share), atol=5e-4)


def test_synthetic_tiles_count_as_their_share_says():
    real, val = _tiles(30, seed=0), _tiles(60, seed=1)
    wrong = _tiles(300, seed=2)
    wrong = TileArray(wrong.images, (wrong.labels + 1) % 3, wrong.ids, _CLASSES)
    both = real.joined(wrong)

    def of(train, share):
        return fit("linear:colour", train, val, ClassifierConfig(share=share), seed=0, device="cpu").logits(val.images)

    torch.testing.assert_close(of(both, 0.0), of(real, None), rtol=1e-3, atol=1e-3)
    few, many = ((of(both, share).argmax(1).numpy() == val.labels).mean() for share in (0.1, 0.9))
    assert few > 0.6 > 0.3 > many


def test_augmentation_makes_copies_from_the_seed():
    train, val = _tiles(30, seed=0), _tiles(30, seed=1)
    config = ClassifierConfig(augment="classical", copies=3)
    a, b, c = (fit("knn:colour", train, val, config, seed=s, device="cpu") for s in (0, 0, 1))
    assert len(a.tensors["bank"]) == 90 and torch.equal(a.tensors["bank"], b.tensors["bank"])
    assert not torch.equal(a.tensors["bank"], c.tensors["bank"])
    assert torch.equal(a.tensors["labels"], torch.from_numpy(np.tile(train.labels, 3)))


def test_too_little_validation_is_said():
    model = fit("linear:colour", _tiles(30, seed=0), _tiles(5, seed=1), seed=0, device="cpu")
    assert model.temperature == 1.0 and any("0.1" in n for n in model.notes)
    assert any("Not calibrated" in n for n in model.notes)
    absent = fit("knn:colour", _tiles(30, seed=0, labels=(0, 2)), _tiles(30, seed=1), seed=0, device="cpu")
    assert absent.classes == _CLASSES and any("blue" in n for n in absent.notes)


def test_what_cannot_be_used_is_refused(tmp_path, monkeypatch):
    for kind, said in (("linear", "linear:tissue-tiny"), ("lineal:colour", "linear"), ("linear:color", "colour")):
        with pytest.raises(SettingError, match=said):
            check_kind(kind)
    with pytest.raises(DataError, match="'blue'"):
        fit("knn:colour", _tiles(9, seed=0, labels=(1,)), _tiles(9, seed=1), seed=0)
    model = fit("linear:colour", _tiles(30, seed=0), _tiles(30, seed=1), seed=0, device="cpu")
    path = model.save(tmp_path / "probe.safetensors")
    tensors, card = load_checkpoint(path)
    save_checkpoint(tmp_path / "other.safetensors", tensors, card | {"encoder_weights": "other"})
    with pytest.raises(CheckpointError, match="other weights"):
        load(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="kind 'probe'"):
        Classifier.load(path)
    with pytest.raises(SettingError, match="linear or knn"):
        probes.fit_probe("tree", "colour", _tiles(9, seed=0), _tiles(9, seed=1), seed=0)


def test_the_entry_trains_networks_too(tmp_path):
    config = ClassifierConfig(steps=2, batch=6, width=0.25, weights="none")
    ticked = []
    model = fit("resnet-18", _tiles(12, seed=0), _tiles(24, seed=1), config, seed=0, tick=lambda: ticked.append(1))
    assert len(ticked) == ticks("resnet-18", config) == 2 and model.card["name"] == "resnet-18"
    back = load(model.save(tmp_path / "net.safetensors"), device="cpu")
    images = _tiles(4, seed=2).images
    torch.testing.assert_close(back.logits(images), model.logits(images))
