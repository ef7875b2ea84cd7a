"""The classifier learns, repeats itself, survives the disk, and refuses what it cannot use."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from histosynth.classify import augment
from histosynth.classify import train as training
from histosynth.classify.kept import KeptWeights, Watch
from histosynth.classify.scores import scores
from histosynth.classify.train import Classifier, ClassifierConfig, train_classifier
from histosynth.core.checkpoint import read_card, save_checkpoint
from histosynth.core.errors import CheckpointError, DataError, RunError, SettingError
from histosynth.tiles.batches import TileArray

_CLASSES = ("dots", "stripes", "plain")
_QUICK = ClassifierConfig(steps=80, batch=16, width=0.25, lr=1e-2)
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


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    train, val = _tiles(24, seed=0), _tiles(24, seed=1)
    config = ClassifierConfig(
        steps=8, batch=6, width=0.25, val_every=2, patience=9, schedule="plateau", freeze=1, swa_from=5, clip=1.0
    )
    whole = train_classifier(train, val, config, seed=0, device="cpu")
    monkeypatch.setattr("histosynth.classify.train._SAVE_EVERY_S", 0.0)
    state, ticks = tmp_path / "state.safetensors", []

    def tick():
        ticks.append(1)
        if len(ticks) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_classifier(train, val, config, seed=0, device="cpu", state=state, tick=tick)
    ticks.clear()
    seen = []
    again = train_classifier(train, val, config, seed=0, device="cpu", state=state, tick=lambda: seen.append(1))
    assert len(seen) == 8 and again.history == whole.history
    for a, b in zip(whole.model.state_dict().values(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RunError, match="another|other settings"):
        train_classifier(train, val, config, seed=1, device="cpu", state=state)
    state.write_bytes(state.read_bytes()[:100])  # a damaged state only costs time
    assert train_classifier(train, val, config, seed=0, device="cpu", state=state).history == whole.history


def test_frozen_features_stay_as_they_were():
    train, val = _tiles(24, seed=0), _tiles(24, seed=1)

    def of(steps, **more):
        config = ClassifierConfig(steps=steps, batch=6, width=0.25, average=0.0, weights="none", lr=0.1, **more)
        return train_classifier(train, val, config, seed=0, device="cpu").model

    short, long = of(1, freeze=4), of(4, freeze=4)
    learning = of(4)
    for name, tensor in short.named_parameters():
        same = torch.equal(tensor, dict(long.named_parameters())[name])
        assert same != name.startswith("classifier."), name
    assert not torch.equal(short.features[0][0].weight, learning.features[0][0].weight)
    assert all(p.requires_grad for p in long.parameters())


def test_swa_keeps_the_plain_mean_of_the_weights(monkeypatch):
    seen = []
    usual = KeptWeights.update

    def update(self, step):
        seen.append([p.detach().clone() for p in self._parameters])
        usual(self, step)

    monkeypatch.setattr(KeptWeights, "update", update)
    config = ClassifierConfig(steps=6, batch=6, width=0.25, swa_from=2, swa_lr=0.5, average=0.0)
    model = train_classifier(_tiles(24, seed=0), _tiles(24, seed=1), config, seed=0, device="cpu")
    assert [row["lr"] for row in model.history][2:] == [0.005] * 4
    for i, parameter in enumerate(model.model.parameters()):
        torch.testing.assert_close(parameter, torch.stack([s[i] for s in seen[2:]]).mean(0), rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(monkeypatch):
    norms = []
    usual = torch.optim.AdamW.step

    def step(self):
        gradients = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack(gradients).norm()))
        return usual(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for clip in (0.0, 0.01):
        config = ClassifierConfig(steps=1, batch=6, width=0.25, clip=clip)
        train_classifier(_tiles(24, seed=0), _tiles(24, seed=1), config, seed=0, device="cpu")
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)


def test_early_stopping_keeps_the_best_look(monkeypatch):
    losses = iter([1.0, 0.5, 0.6, 0.7, 0.8, 0.9])
    monkeypatch.setattr("histosynth.classify.train._look", lambda *_: {"val_loss": next(losses)})
    config = ClassifierConfig(steps=12, batch=6, width=0.25, val_every=2, patience=2, patience_from=0, average=0.0)
    seen = []
    usual = KeptWeights.update

    def update(self, step):
        seen.append([p.detach().clone() for p in self._parameters])
        usual(self, step)

    monkeypatch.setattr(KeptWeights, "update", update)
    model = train_classifier(_tiles(24, seed=0), _tiles(24, seed=1), config, seed=0, device="cpu")
    # smoothed: 1, .85, .775, .752, .767, .807: the fourth look (step 8) is the best, and two later ones are not
    assert model.card["steps"] == 12 and any("Stopped at step 12" in note for note in model.notes)
    for parameter, best in zip(model.model.parameters(), seen[7], strict=True):
        assert torch.equal(parameter, best)


def test_watch_lowers_the_rate_on_a_plateau_and_ends_overfitting():
    watch = Watch(ClassifierConfig(schedule="plateau", val_every=1, plateau_patience=2, patience=99, overfit=3))
    factors = []
    for loss in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5):
        watch.look(loss, 2.0)
        factors.append(watch.factor)
    # three bad looks halve it, one look cools down, three more halve it again
    assert factors == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25] and not watch.reason
    for _ in range(3):
        watch.look(1.0, 0.1)
    assert "above the training loss" in watch.reason


def test_mixup_stops_where_it_is_told():
    train = _tiles(24, seed=0)

    def targets(step, until):
        config = ClassifierConfig(batch=12, mixup=0.5, mixup_until=until)
        return training._batch(train, config, 0, step, torch.device("cpu"))[1]

    assert ((targets(3, 0) > 0.01) & (targets(3, 0) < 0.99)).any()
    assert set(targets(3, 3).unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(targets(3, 0).sum(1), torch.ones(12))


def test_epochs_set_the_length():
    assert ClassifierConfig(epochs=3, batch=8).length(tiles=20, classes=2) == 9
    assert ClassifierConfig(epochs=15, batch=4, samples_per_class=300).length(tiles=20, classes=9) == 15 * 675
    config = ClassifierConfig(epochs=2, batch=8, width=0.25)
    assert train_classifier(_tiles(24, seed=0), _tiles(24, seed=1), config, seed=0, device="cpu").card["steps"] == 6


@pytest.mark.parametrize("quality", [40, 75, 92])
def test_jpeg_is_what_pillow_writes(quality):
    coarse = torch.rand(3, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 255
    tiles = torch.nn.functional.interpolate(coarse, (44, 44), mode="bicubic").clamp(0, 255).byte()  # no multiple of 8
    found = augment.jpeg(tiles.float(), torch.Generator(), probability=1.0, low=quality, high=quality)
    for image, ours in zip(tiles, found, strict=True):
        stream = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=quality, subsampling=0)
        theirs = torch.from_numpy(np.array(Image.open(stream))).permute(2, 0, 1).float()
        assert float((ours - theirs).abs().mean()) < 1.0 < float((theirs - image.float()).abs().mean())


def test_jpeg_spares_some_tiles_and_any_size():
    tiles = _tiles(40, seed=0, size=20).tensor().float()
    found = augment.jpeg(tiles, torch.Generator().manual_seed(0), probability=0.5)
    same = [torch.equal(a, b) for a, b in zip(tiles, found, strict=True)]
    assert found.shape == tiles.shape and 5 < sum(same) < 35
    assert augment.jpeg(tiles, torch.Generator(), probability=0.0) is tiles


def test_strong_views_keep_size_and_range():
    images = _tiles(6, seed=0).tensor()
    config = ClassifierConfig(augment="strong")
    found = augment.augmented(images, config, torch.Generator().manual_seed(0))
    assert found.shape == images.shape and found.min() >= -0.01 and found.max() <= 255.01
    assert torch.equal(found, augment.augmented(images, config, torch.Generator().manual_seed(0)))
    assert torch.equal(augment.augmented(images, ClassifierConfig(), torch.Generator()), images.float())
    with pytest.raises(SettingError, match="30 px"):
        augment.augmented(images[..., :30, :30], config, torch.Generator())
