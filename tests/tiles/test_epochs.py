"""Epochs: the four cases, purity in (seed, epoch), synthetic shares, pixel ranges, worker processes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from histosynth.core.errors import DataError, SettingError
from histosynth.tiles.batches import symmetry
from histosynth.tiles.epochs import EpochConfig, EpochDataset, EpochSampler, loader, scaled
from tests.tiles.test_batches import tiles

LABELS = np.repeat([0, 1, 3], [40, 12, 25])


def counts(sampler, epoch):
    return np.bincount(LABELS[sampler.indices(epoch)], minlength=4).tolist()


def test_case_a_balanced_and_as_many_as_wanted():
    sampler = EpochSampler(LABELS, EpochConfig(samples_per_class=20))
    for epoch in range(5):
        assert counts(sampler, epoch) == [20, 20, 0, 20]
    assert len(sampler) == 60
    seen = np.bincount(np.concatenate([sampler.indices(e) for e in range(6)]), minlength=len(LABELS))
    assert set(seen[:40]) == {3} and set(seen[40:52]) == {10}, "a tile comes again when all have come"


def test_case_b_balanced_to_the_smallest_class():
    sampler = EpochSampler(LABELS)
    chosen = [set(sampler.indices(e).tolist()) for e in range(12)]
    assert all(len(c) == 36 for c in chosen) and counts(sampler, 3) == [12, 12, 0, 12]
    assert set.union(*chosen) == set(range(len(LABELS))), "other tiles in other epochs"


def test_case_c_up_to_so_many():
    sampler = EpochSampler(LABELS, EpochConfig(balance=False, samples_per_class=20))
    assert counts(sampler, 0) == [20, 12, 0, 20] and len(sampler) == 52
    assert len(set(sampler.indices(0).tolist())) == 52
    assert set(sampler.indices(0).tolist()) != set(sampler.indices(1).tolist())


def test_case_d_everything_in_another_order_every_epoch():
    sampler = EpochSampler(LABELS, EpochConfig(balance=False))
    first, second = sampler.indices(0), sampler.indices(1)
    assert sorted(first) == sorted(second) == list(range(len(LABELS))) and (first != second).any()


@pytest.mark.parametrize("config", [EpochConfig(), EpochConfig(samples_per_class=10)])
def test_balanced_batches_have_every_class(config):
    labels = LABELS[EpochSampler(LABELS, config).indices(2)]
    assert (np.sort(labels.reshape(-1, 3), axis=1) == [0, 1, 3]).all()


def test_evaluation_never_shows_a_tile_again_and_says_when_there_are_no_more():
    sampler = EpochSampler(
        LABELS, EpochConfig(samples_per_class=5, evaluation=True), classes=("ADI", "MUC", "DEB", "TUM")
    )
    assert sampler.epochs == 2
    both = np.concatenate([sampler.indices(0), sampler.indices(1)])
    assert len(set(both.tolist())) == 30 and counts(sampler, 1) == [5, 5, 0, 5]
    with pytest.raises(DataError, match="epoch 2 .*class 'MUC' has 12, 2 epoch.s. of 5"):
        sampler.set_epoch(2)
    free = EpochSampler(LABELS, EpochConfig(samples_per_class=5, evaluation=True, no_repeat_eval=False))
    assert free.epochs is None and counts(free, 50) == [5, 5, 0, 5]
    assert len(set(free.indices(50).tolist())) == 15
    assert set(free.indices(0).tolist()) != set(free.indices(1).tolist())
    with pytest.raises(DataError, match="Class 1 has 12 tiles for evaluation, and samples_per_class is 13"):
        EpochSampler(LABELS, EpochConfig(samples_per_class=13, evaluation=True, no_repeat_eval=False))


@pytest.mark.parametrize("config", [EpochConfig(evaluation=True), EpochConfig(False, 7, evaluation=True)])
def test_other_evaluation_epochs_have_the_same_tiles(config):
    sampler = EpochSampler(LABELS, config)
    assert sorted(sampler.indices(0)) == sorted(sampler.indices(9))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 30)),
    st.floats(0, 0.95),
    st.integers(0, 50),
    st.integers(0, 9),
)
def test_an_epoch_is_pure_balanced_and_mixed(sizes, balance, wanted, ratio, epoch, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    made = np.repeat(np.arange(len(sizes)), 5)
    config = EpochConfig(balance=balance, samples_per_class=wanted, gan_ratio=ratio, seed=seed)
    sampler = EpochSampler(labels, config, synthetic=made)
    found = sampler.indices(epoch)
    sampler.indices(epoch + 1)
    sampler.set_epoch(3)
    assert np.array_equal(found, EpochSampler(labels, config, synthetic=made).indices(epoch))
    assert len(found) == len(sampler) and found.min() >= 0 and found.max() < len(labels) + len(made)
    every = np.concatenate([labels, made])[found]
    real = np.bincount(every[found < len(labels)], minlength=len(sizes))
    synthetic = np.bincount(every[found >= len(labels)], minlength=len(sizes))
    total = real + synthetic
    if balance:
        assert set(total) == {wanted or min(sizes)}
    elif wanted:
        assert total.tolist() == [min(wanted, s) for s in sizes]
    else:
        assert real.tolist() == sizes
    assert (np.abs(synthetic - ratio * total) <= 1).all()


def test_the_synthetic_share_is_exact_in_the_long_run_and_synthetic_tiles_take_turns():
    made = np.repeat([0, 1, 3], [7, 3, 40])
    sampler = EpochSampler(LABELS, EpochConfig(samples_per_class=5, gan_ratio=0.3), synthetic=made)
    found = np.concatenate([sampler.indices(e) for e in range(40)])
    every = np.concatenate([LABELS, made])[found]
    for label in (0, 1, 3):
        inside = found[every == label]
        assert (inside >= len(LABELS)).sum() == 60 and (inside < len(LABELS)).sum() == 140
    seen = np.bincount(found[found >= len(LABELS)] - len(LABELS), minlength=50)
    assert set(seen[7:10]) == {20} and seen[:7].max() - seen[:7].min() <= 1 and seen[10:].min() >= 1
    real = np.bincount(found[found < len(LABELS)])
    assert real[:40].max() - real[:40].min() <= 1, "real tiles too come equally often"


def test_all_may_be_synthetic():
    sampler = EpochSampler(LABELS, EpochConfig(samples_per_class=6, gan_ratio=1), synthetic=[0, 1, 3, 3])
    assert sampler.indices(4).min() >= len(LABELS)


def test_the_loader_mixes_synthetic_tiles_in():
    real, made = tiles([6, 9]), tiles([4, 4], prefix="s")
    config = EpochConfig(samples_per_class=8, gan_ratio=0.25, augment=False, batch=5)
    epoch = list(loader(real, made, config))
    ids = [i for _, _, names in epoch for i in names]
    assert len(ids) == 16 and sum(i.startswith("s") for i in ids) == 4
    assert [len(b[2]) for b in epoch] == [5, 5, 5, 1] and len(loader(real, made, config)) == 4
    pixels = dict(zip(real.ids, real.images, strict=True)) | dict(zip(made.ids, made.images, strict=True))
    classes = dict(zip(real.ids, real.labels, strict=True)) | dict(zip(made.ids, made.labels, strict=True))
    for images, labels, names in epoch:
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        for image, label, name in zip(images, labels, names, strict=True):
            assert label == classes[name]
            assert torch.allclose(image, torch.from_numpy(pixels[name]) / 255, atol=1e-6)


def test_training_tiles_are_flipped_and_turned_and_evaluation_tiles_are_not():
    array = tiles([3, 3])
    made = [symmetry(torch.from_numpy(t.copy()), k) / 255 for t in array.images for k in range(8)]
    seen = set()
    batches = loader(array, config=EpochConfig(samples_per_class=30))
    for images, _, names in batches:
        for image, name in zip(images, names, strict=True):
            here = array.ids.index(name) * 8
            match = [k for k in range(8) if torch.allclose(image, made[here + k], atol=1e-6)]
            assert len(match) == 1
            seen.add(match[0])
    assert seen == set(range(8))
    for images, _, names in loader(array, config=EpochConfig(evaluation=True)):
        for image, name in zip(images, names, strict=True):
            assert torch.allclose(image, made[array.ids.index(name) * 8], atol=1e-6)


def test_epochs_differ_and_come_again():
    batches = loader(tiles([8, 8]), config=EpochConfig(samples_per_class=20))

    def epoch(number):
        batches.set_epoch(number)
        return torch.cat([images for images, _, _ in batches])

    first, second = epoch(0), epoch(1)
    assert not torch.equal(first, second) and torch.equal(first, epoch(0))
    with pytest.raises(SettingError, match="epoch is -1"):
        batches.set_epoch(-1)


@pytest.mark.parametrize("pixel_range", ["0_1", "-1_1", "imagenet"])
def test_pixel_ranges(pixel_range):
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(2, 3, 1, 1)
    found = scaled(pixels, pixel_range)
    unit = pixels.double() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = {
        "0_1": unit,
        "-1_1": unit * 2 - 1,
        "imagenet": (unit - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1),
    }[pixel_range]
    assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-5)
    images, _, _ = next(iter(loader(tiles([2]), config=EpochConfig(pixel_range=pixel_range))))
    assert (images.min() < 0) == (pixel_range != "0_1")


def test_worker_processes_give_the_same_epochs():
    real, made = tiles([6, 9]), tiles([4, 4], prefix="s")
    config = EpochConfig(samples_per_class=8, gan_ratio=0.5, batch=6)
    here, there = loader(real, made, config), loader(real, made, config, workers=2)
    for epoch in (0, 3):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        for ours, theirs in zip(here, there, strict=True):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1]) and ours[2] == theirs[2]


def test_torchs_own_loader_can_be_used():
    array = tiles([6, 9])
    dataset = EpochDataset(array, config=EpochConfig(pixel_range="-1_1"))
    plain = torch.utils.data.DataLoader(dataset, batch_size=4, sampler=EpochSampler(array.labels))
    rows = [r for images, labels, ids in plain for r in zip(images, labels, ids, strict=True)]
    assert len(rows) == 12
    for image, label, name in rows:
        position = array.ids.index(name)
        assert label == array.labels[position]
        assert torch.allclose(image, torch.from_numpy(array.images[position]) / 127.5 - 1, atol=1e-5)
    image, label, name = dataset[14]
    assert name == array.ids[14] and label == 1 and image.shape == (3, 8, 8) and len(dataset) == 15


def test_mistakes_are_named():
    for settings_, message in (
        ({"samples_per_class": 0}, "samples_per_class is 0"),
        ({"gan_ratio": 1.2}, "gan_ratio is 1.2"),
        ({"gan_ratio": float("nan")}, "gan_ratio is nan"),
        ({"gan_ratio": 0.2, "evaluation": True}, "gan_ratio is 0.2 for evaluation"),
        ({"gan_ratio": 1, "balance": False}, "gan_ratio is 1 in epochs that hold all"),
        ({"pixel_range": "0_255"}, "pixel_range is '0_255'"),
        ({"batch": 0}, "batch is 0"),
    ):
        with pytest.raises(SettingError, match=message):
            EpochConfig(**settings_)
    with pytest.raises(SettingError, match="gan_ratio is 0.5, but no synthetic"):
        loader(tiles([3]), config=EpochConfig(gan_ratio=0.5))
    with pytest.raises(DataError, match="class 'b' has no synthetic tile"):
        loader(tiles([3, 3]), tiles([3, 0]), EpochConfig(gan_ratio=0.5))
    with pytest.raises(DataError, match="cannot be mixed"):
        loader(tiles([3]), tiles([3, 3]), EpochConfig(gan_ratio=0.5))
    with pytest.raises(DataError, match="has no tile"):
        EpochSampler([])
    with pytest.raises(SettingError, match="workers is -1"):
        loader(tiles([3]), workers=-1)
    with pytest.raises(SettingError, match="pixel_range is 'x'"):
        scaled(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), "x")
