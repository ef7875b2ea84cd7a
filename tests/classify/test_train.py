"""The classifier learns, repeats itself, survives the disk, and refuses what it cannot use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from histosynth.classify import augment
from histosynth.classify.scores import scores
from histosynth.classify.train import Classifier, ClassifierConfig, train_classifier
from histosynth.core.checkpoint import read_card, save_checkpoint
from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.tiles.batches import TileArray

_CLASSES = ("dots", "stripes", "plain")
_QUICK = ClassifierConfig(steps=40, batch=16, width=0.25, lr=1e-2)
_SHORT = ClassifierConfig(steps=3, batch=6, width=0.25, val_every=2)


def _tiles(n: int, *, seed: int, labels: tuple[int, ...] = (0, 1, 2), size: int = 32) -> TileArray:
    """Noisy pink tiles; the class is a texture, not a colour."""
    rng = np.random.default_rng(seed)
    images = rng.normal((200, 120, 180), 25, (n, size, size, 3))
    y = np.array([labels[i % len(labels)] for i in range(n)], dtype=np.int64)
    images[y == 0, ::6, ::6] -= 160
    images[y == 1, ::4] -= 90
    images += rng.normal(0, 20, (n, 1, 1, 3))
    pixels = images.clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2)
    return TileArray(np.ascontiguousarray(pixels), y, [f"t{i}" for i in range(n)], _CLASSES)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return train_classifier(_tiles(120, seed=0), _tiles(60, seed=1), _QUICK, seed=0, device="cpu")


def test_it_learns_and_is_calibrated(trained):
    test = _tiles(90, seed=2)
    result = scores(trained.probabilities(test.images), test.labels, _CLASSES)
    assert result["balanced_accuracy"] > 0.9
    assert result["ece"] < 0.15
    assert trained.initialisation == "scratch"
    assert trained.history[-1]["loss"] < trained.history[0]["loss"]


def test_the_same_seed_gives_the_same_logits_and_another_does_not():
    train, val, test = (_tiles(24, seed=s) for s in (0, 1, 2))
    before = torch.random.get_rng_state()
    a, b, c = (train_classifier(train, val, _SHORT, seed=s, device="cpu") for s in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(a.logits(test.images), b.logits(test.images))
    assert not torch.equal(a.logits(test.images), c.logits(test.images))
    assert [row["step"] for row in a.history] == [1, 2, 3]
    assert [("val_nll" in row) for row in a.history] == [False, True, False]


def test_looking_at_validation_changes_nothing():
    train, val = _tiles(24, seed=0), _tiles(24, seed=1)
    blind = ClassifierConfig(**{**_SHORT.__dict__, "val_every": 0})
    a = train_classifier(train, val, _SHORT, seed=0, device="cpu")
    b = train_classifier(train, val, blind, seed=0, device="cpu")
    assert torch.equal(a.logits(val.images), b.logits(val.images))


def test_saved_and_read_back(trained, tmp_path):
    test = _tiles(20, seed=3)
    path = trained.save(tmp_path / "classifier.safetensors")
    back = Classifier.load(path, device="cpu")
    assert torch.equal(back.logits(test.images), trained.logits(test.images))
    assert back.temperature == trained.temperature and back.classes == trained.classes
    card = read_card(path)
    assert card["kind"] == "classifier" and card["steps"] == _QUICK.steps
    assert card["trained_on"] == {"dots": 40, "stripes": 40, "plain": 40}
    assert card["config"]["lr"] == _QUICK.lr


def test_another_kind_of_checkpoint_is_refused(tmp_path):
    path = save_checkpoint(tmp_path / "gan.safetensors", {"w": torch.zeros(1)}, {"kind": "gan"})
    with pytest.raises(CheckpointError, match="gan"):
        Classifier.load(path)


def test_logits_do_not_depend_on_the_batch_size_and_tiles_are_resized(trained):
    test = _tiles(10, seed=4)
    few, all_at_once = (trained.logits(test.images, n) for n in (3, 10))
    torch.testing.assert_close(few, all_at_once, rtol=1e-4, atol=1e-4)
    assert trained.logits(_tiles(2, seed=4, size=48).images).shape == (2, 3)
    assert trained.logits(test.images[:0]).shape == (0, 3)
    with pytest.raises(DataError, match="uint8"):
        trained.logits(test.tensor().float())


def test_probabilities_divide_by_the_temperature(trained):
    test = _tiles(6, seed=5)
    expected = torch.softmax(trained.logits(test.images) / trained.temperature, dim=1)
    assert trained.probabilities(test.images).numpy() == pytest.approx(expected.numpy(), abs=1e-6)


def test_a_class_without_training_tiles_stays_and_is_named():
    result = train_classifier(_tiles(20, seed=0, labels=(0, 2)), _tiles(24, seed=1), _SHORT, seed=0, device="cpu")
    assert result.classes == _CLASSES and any("stripes" in note for note in result.notes)


@pytest.mark.parametrize("n", [0, 5])
def test_too_little_validation_means_temperature_one(n):
    val = _tiles(5, seed=1).subset(np.arange(n))
    result = train_classifier(_tiles(24, seed=0), val, _SHORT, seed=0, device="cpu")
    assert result.temperature == 1.0 and any("Not calibrated" in note for note in result.notes)


def test_one_class_is_refused():
    with pytest.raises(DataError, match="'stripes'"):
        train_classifier(_tiles(8, seed=0, labels=(1,)), _tiles(8, seed=1), _SHORT, seed=0)
    with pytest.raises(DataError, match="no tile"):
        train_classifier(_tiles(8, seed=0).subset([]), _tiles(8, seed=1), _SHORT, seed=0)


def test_all_options_run_and_tick():
    config = ClassifierConfig(
        steps=2, batch=6, width=0.25, augment="classical", mixup=0.2, sampling="natural", average=0.0
    )
    ticks = []
    train_classifier(_tiles(12, seed=0), _tiles(24, seed=1), config, seed=0, tick=lambda: ticks.append(1), device="cpu")
    assert len(ticks) == 2


def test_settings_name_what_is_wrong():
    with pytest.raises(SettingError, match="steps is 0"):
        ClassifierConfig(steps=0)
    with pytest.raises(SettingError, match="augment is 'heavy'"):
        ClassifierConfig(augment="heavy")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="weights is 'auto!'"):
        ClassifierConfig(weights="auto!")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="share is 0.5, but sampling"):
        ClassifierConfig(share=0.5, sampling="natural")
    with pytest.raises(SettingError, match="val-every"):
        ClassifierConfig(patience=2)
    with pytest.raises(SettingError, match="val-every"):
        ClassifierConfig(schedule="plateau")


def test_augmentation_is_seeded_bounded_and_differs_between_tiles():
    images = _tiles(8, seed=0).tensor().float()
    a, b = (augment.classical(images, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == images.shape
    assert a.min() >= 0 and a.max() <= 255
    same = images[:1].repeat(4, 1, 1, 1)
    jittered = augment.stain_jitter(same, torch.Generator().manual_seed(2))
    assert not torch.allclose(jittered[0], jittered[1], atol=0.5)


def test_no_jitter_and_no_blur_leave_the_tile_alone():
    images = _tiles(4, seed=0).tensor().float()
    generator = torch.Generator().manual_seed(0)
    jittered = augment.stain_jitter(images, generator, strength=0.0)
    torch.testing.assert_close(jittered, images, atol=0.05, rtol=0)
    torch.testing.assert_close(augment.blur(images, generator, sigma=0.0), images)
    assert torch.equal(augment.blur(images, generator, probability=0.0), images)


def test_blur_keeps_the_mean_of_a_plain_tile_and_smooths_noise():
    noise = _tiles(4, seed=0).tensor().float()
    smooth = augment.blur(noise, torch.Generator().manual_seed(0), probability=1.0, sigma=2.0)
    assert (smooth.var((1, 2, 3)) <= noise.var((1, 2, 3)) + 1e-3).all()
    plain = torch.full((2, 3, 16, 16), 90.0)
    torch.testing.assert_close(augment.blur(plain, torch.Generator().manual_seed(0), probability=1.0), plain)
