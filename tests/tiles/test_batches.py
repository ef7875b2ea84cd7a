"""Batches: balance, coverage, purity in (seed, step)."""

import hashlib

import numpy as np
import pytest
import torch

from histosynth.core.errors import DataError, SettingError
from histosynth.tiles.batches import TileArray, batch_at, indices_at, symmetry, turned


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


@pytest.mark.parametrize("batch_size", [4, 6, 10])
def test_tiles_of_a_class_can_come_in_runs(batch_size):
    array = tiles([5, 9, 7])
    rows = np.concatenate([indices_at(array, k, batch_size, "balanced", 3, run=4) for k in range(3780 // batch_size)])
    runs = rows.reshape(-1, 4)
    labels = array.labels[runs]
    assert (labels == labels[:, :1]).all() and np.bincount(labels[:, 0]).tolist() == [315, 315, 315]
    different = [len(set(run)) for run in runs.tolist()]
    assert min(different) >= 2 and np.mean(different) > 3.5  # a pass may end within a run
    for own in (rows[array.labels[rows] == k] for k in range(3)):
        counts = np.bincount(own)
        counts = counts[counts > 0]
        assert counts.min() == counts.max() == 1260 // len(counts)


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


def real_and_made():
    return tiles([5, 3, 4]).joined(tiles([40, 40, 0], prefix="s")).joined(tiles([0, 30, 0], prefix="u"))


@pytest.mark.parametrize("share", [0, 0.1, 0.25, 0.5, 0.7, 1])
@pytest.mark.parametrize("batch_size", [7, 24])
def test_any_stretch_of_a_class_has_its_share_of_synthetic_tiles(share, batch_size):
    joined = real_and_made()
    source = dict(zip(joined.ids, joined.sources, strict=True))
    seen = {0: [], 1: [], 2: []}
    for k in range(60):
        batch = batch_at(joined, k, batch_size=batch_size, share=share, seed=3)
        for label, name in zip(batch.labels.tolist(), batch.ids, strict=True):
            seen[label].append(source[name])
    for label in (0, 1):
        made = np.cumsum(np.array(seen[label]) > 0)
        assert np.abs(made - share * np.arange(1, len(made) + 1)).max() <= 1
        assert abs(made[30] - made[10] - share * 20) <= 1
    assert set(seen[2]) == {0}, "a class without synthetic tiles shows its real ones"
    first, second = (seen[1].count(s) for s in (1, 2))
    assert abs(first - second) <= 1, "the generators share evenly"
    assert seen[0].count(2) == 0


def test_half_beside_one_generator_is_taking_turns():
    joined = tiles([4, 30]).joined(tiles([200, 20], prefix="s"))
    for k in range(30):
        assert batch_at(joined, k, batch_size=9, share=0.5).ids == batch_at(joined, k, batch_size=9).ids


def test_a_share_changes_how_often_real_tiles_come_but_not_their_order():
    joined, real = real_and_made(), tiles([5, 3, 4])

    def order(array, **settings):
        """The real tiles of the first class, as they come."""
        names = [n for k in range(100) for n in batch_at(array, k, batch_size=6, **settings).ids]
        return [n for n in names if n in real.ids[:5]]

    plain = order(real)
    for share in (0.25, 0.75):
        mixed = order(joined, share=share)
        assert 20 < len(mixed) < len(plain) and mixed == plain[: len(mixed)]
    assert order(real, share=0.5) == plain, "without synthetic tiles a share changes nothing"


def test_a_share_outside_of_its_range_is_named():
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(SettingError, match="share is"):
            batch_at(real_and_made(), 0, batch_size=4, share=share)
    with pytest.raises(SettingError, match="natural sampling"):
        batch_at(real_and_made(), 0, batch_size=4, share=0.5, sampling="natural")
