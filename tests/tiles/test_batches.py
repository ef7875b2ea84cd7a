"""Batches: balance, coverage, purity in (seed, step)."""

import hashlib

import numpy as np
import pytest
import torch

from histosynth.core.errors import DataError, SettingError
from histosynth.tiles.batches import TileArray, batch_at, symmetry, turned


def tiles(counts, size=8, prefix="t"):
    labels = np.repeat(np.arange(len(counts)), counts)
    rng = np.random.default_rng(sum(counts))
    images = rng.integers(0, 255, (len(labels), 3, size, size), dtype=np.uint8)
    return TileArray(images, labels, [f"{prefix}{i}" for i in range(len(labels))], tuple("abcdefghi"[: len(counts)]))


def test_batches_are_pure_in_seed_and_step():
    array = tiles([5, 50, 3])
    far = batch_at(array, 1000, batch_size=8, seed=4)
    for step in range(5):
        batch_at(array, step, batch_size=8, seed=4)
    again = batch_at(array, 1000, batch_size=8, seed=4)
    assert torch.equal(far.images, again.images) and far.ids == again.ids
    assert batch_at(array, 1000, batch_size=8, seed=5).ids != far.ids


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_balanced_sampling_gives_every_present_class_its_share(batch_size):
    array = tiles([2, 100, 0, 13])
    labels = torch.cat([batch_at(array, k, batch_size=batch_size).labels for k in range(300)])
    shares = torch.bincount(labels, minlength=4) / len(labels)
    assert shares[2] == 0
    assert torch.allclose(shares[[0, 1, 3]], torch.full((3,), 1 / 3), atol=0.01)


def test_every_tile_is_seen_equally_often():
    array = tiles([10, 20])
    ids = [i for k in range(30) for i in batch_at(array, k, batch_size=10, sampling="natural").ids]
    assert {ids.count(i) for i in array.ids} == {10}
    balanced = [i for k in range(40) for i in batch_at(array, k, batch_size=10).ids]
    assert {balanced.count(i) for i in array.ids[:10]} == {20} and {balanced.count(i) for i in array.ids[10:]} == {10}


def test_synthetic_tiles_cannot_crowd_out_real_ones():
    joined = tiles([4, 30]).joined(tiles([200, 200], prefix="s"))
    batches = [batch_at(joined, k, batch_size=20) for k in range(50)]
    ids = np.array([i for b in batches for i in b.ids])
    labels = np.concatenate([b.labels.numpy() for b in batches])
    for label in (0, 1):
        made = np.char.startswith(ids[labels == label], "s")
        assert made.mean() == pytest.approx(0.5, abs=0.02)


def test_the_eight_symmetries_are_distinct_and_are_all_used():
    image = torch.arange(9).reshape(1, 3, 3)
    assert len({tuple(symmetry(image, k).flatten().tolist()) for k in range(8)}) == 8
    array = TileArray(np.arange(3 * 9, dtype=np.uint8).reshape(1, 3, 3, 3), np.zeros(1, np.int64), ["x"], ("a",))
    seen = {tuple(t.flatten().tolist()) for k in range(20) for t in batch_at(array, k, batch_size=8).images}
    assert len(seen) == 8
    plain = batch_at(array, 3, batch_size=4, augment=False).images
    assert torch.equal(plain, torch.from_numpy(array.images).repeat(4, 1, 1, 1))


def test_bad_arrays_and_settings_are_named():
    with pytest.raises(DataError, match="float64"):
        TileArray(np.zeros((2, 3, 4, 4)), np.zeros(2, np.int64), ["a", "b"], ("x",))
    with pytest.raises(DataError, match="1 labels"):
        TileArray(np.zeros((2, 3, 4, 4), np.uint8), np.zeros(1, np.int64), ["a", "b"], ("x",))
    with pytest.raises(DataError, match="no tile"):
        batch_at(tiles([0]), 0, batch_size=2)
    with pytest.raises(SettingError, match="sampling is 'fair'"):
        batch_at(tiles([3]), 0, batch_size=2, sampling="fair")
    with pytest.raises(DataError, match="cannot be joined"):
        tiles([2]).joined(tiles([2, 2]))


@pytest.mark.parametrize(("sampling", "digest"), [("balanced", "f76e701dcf4cbca0"), ("natural", "e5ab5083449b1595")])
def test_the_same_seeds_give_the_same_batches_as_ever(sampling, digest):
    images = np.arange(14 * 3 * 4 * 4, dtype=np.uint16).astype(np.uint8).reshape(14, 3, 4, 4)
    labels = np.repeat(np.arange(3), [5, 0, 9])
    array = TileArray(images, labels, [str(i) for i in range(14)], tuple("abc"), sources=np.arange(14) % 2)
    found = hashlib.sha256()
    for step in range(20):
        batch = batch_at(array, step, batch_size=6, sampling=sampling, seed=7)
        found.update(batch.images.numpy().tobytes() + " ".join(batch.ids).encode())
    assert found.hexdigest()[:16] == digest


def test_many_symmetries_at_once_are_those_of_each_tile():
    images, which = torch.from_numpy(tiles([20]).images), np.arange(20) % 8
    each = torch.stack([symmetry(tile, int(k)) for tile, k in zip(images, which, strict=True)])
    assert torch.equal(turned(images, which), each)


def test_members_are_the_positions_of_each_class_and_source():
    joined = tiles([2, 0, 3]).joined(tiles([1, 1, 0]))
    assert {k: {s: m.tolist() for s, m in v.items()} for k, v in joined.members.items()} == {
        0: {0: [0, 1], 1: [5]},
        1: {1: [6]},
        2: {0: [2, 3, 4]},
    }
    assert tiles([0]).members == {}
