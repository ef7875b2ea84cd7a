"""Near-duplicates: found through shifts, compression and flips; strangers and blank tiles are left alone."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from histosynth.core.errors import DataError, SettingError
from histosynth.tiles.split import duplicates
from histosynth.tiles.split.duplicates import (
    DuplicateConfig,
    aligned_correlation,
    near_duplicate_groups,
    near_duplicate_pairs,
    thumbnails,
    tile_hash,
)
from tests.tiles.conftest import texture


def fields(n, size, seed=0, contrast=30.0):
    """Grey textures with the 1/f spectrum of natural images, uint8 [N, size, size]."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequency[0, 0] = np.inf
    noise = rng.normal(size=(2, n, size, frequency.shape[1]))
    found = np.fft.irfft2((noise[0] + 1j * noise[1]) / frequency)
    found *= contrast / found.std(axis=(1, 2), keepdims=True)
    return np.clip(160 + found, 0, 255).astype(np.uint8)


def coloured(grey):
    return np.stack([grey, grey // 2 + 60, np.clip(grey.astype(int) + 20, 0, 255).astype(np.uint8)], axis=1)


def jpeg(tile, quality):
    stream = io.BytesIO()
    Image.fromarray(tile.transpose(1, 2, 0)).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream)).transpose(2, 0, 1)


def moved(tile, down, across):
    padded = np.pad(tile, ((0, 0), (2, 2), (2, 2)), mode="reflect")
    return padded[:, 2 + down : 2 + down + tile.shape[1], 2 + across : 2 + across + tile.shape[2]]


CHANGES = {
    "jpeg": lambda t: jpeg(t, 40),
    "brightness": lambda t: np.clip(t * 0.8 + 25, 0, 255).astype(np.uint8),
    "shift": lambda t: moved(t, 1, -2),
    "flip": lambda t: t[:, :, ::-1],
    "turn and shift": lambda t: moved(np.rot90(t, 3, (1, 2)), -1, 1),
    "transpose and jpeg": lambda t: jpeg(np.ascontiguousarray(t.transpose(0, 2, 1)), 70),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_among_strangers(change):
    tiles = coloured(fields(150, 160))
    copies = np.stack([CHANGES[change](t) for t in tiles[:40]])
    groups = near_duplicate_groups(thumbnails(np.concatenate([tiles, copies])))
    recalled = np.mean([a == b for a, b in zip(groups[:40], groups[150:], strict=True)])
    assert recalled >= 0.95
    assert len(set(groups[:150])) == 150, "strangers are never joined"


def test_symmetries_count_only_where_they_are_wanted():
    small = thumbnails(coloured(fields(3, 64)))
    pair = np.stack([small[0], small[0].T, small[1]])
    assert near_duplicate_pairs(pair).tolist() == [[0, 1]]
    assert near_duplicate_pairs(pair, DuplicateConfig(symmetries=False)).tolist() == []


def test_thumbnails_are_area_averages():
    for size in (32, 96, 224):
        tile = texture(3, size)
        expected = np.asarray(Image.fromarray(tile).convert("L").resize((32, 32), Image.Resampling.BOX)).astype(int)
        assert np.abs(thumbnails(tile.transpose(2, 0, 1)[None])[0].astype(int) - expected).max() <= 1
    for size in (50, 20):  # pixels on the border of two averages count in both, by their share
        tile = texture(3, size)
        fine = (tile @ np.array([0.299, 0.587, 0.114])).repeat(32, axis=0).repeat(32, axis=1)
        expected = fine.reshape(32, size, 32, size).mean(axis=(1, 3))
        assert np.abs(thumbnails(tile.transpose(2, 0, 1)[None])[0] - expected).max() <= 0.51


def test_the_hash_is_that_of_its_definition():
    from scipy.fft import dctn

    small = fields(20, 32)
    for tile, found in zip(small, tile_hash(small), strict=True):
        low = dctn(tile.astype(float), norm="ortho")[:8, :8]
        order = sorted((u * u + v * v, u, v) for u in range(8) for v in range(8))
        bits = "".join("0" if (u, v) == (0, 0) else str(int(low[u, v] > 1e-3)) for _, u, v in order)
        assert int(found) == int(bits, 2)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 7))
def test_invariant_hashes_are_equal_for_all_symmetries(seed, which):
    tile = fields(1, 32, seed)[0]
    turned = np.rot90(tile, which % 4)
    turned = turned[:, ::-1] if which >= 4 else turned
    both = tile_hash(np.stack([tile, turned]), invariant=True)
    assert both.dtype == np.uint64 and both[0] == both[1]


def test_search_finds_every_pair_within_seven_bits():
    rng = np.random.default_rng(1)
    base = rng.integers(0, 2**63, 300, dtype=np.uint64)
    changed = base.copy()
    for i in range(300):
        for bit in rng.permutation(64)[: i % 8]:
            changed[i] ^= np.uint64(1) << np.uint64(bit)
    hashes = np.concatenate([base, changed])[None]
    found = {(i, j) for _, i, j in duplicates._search(hashes, 7).tolist()}
    distance = np.array([[bin(int(a ^ b)).count("1") for b in hashes[0]] for a in hashes[0]])
    assert found == {(i, j) for i in range(600) for j in range(i + 1, 600) if distance[i, j] <= 7}
    assert len(found) >= 300


def test_longer_chunks_for_large_sets_find_every_pair_within_four_bits(monkeypatch):
    monkeypatch.setattr(duplicates, "_MANY", 1)
    rng = np.random.default_rng(2)
    base = rng.integers(0, 2**63, 60, dtype=np.uint64)
    changed = base.copy()
    for i in range(60):
        for bit in rng.permutation(64)[:4]:
            changed[i] ^= np.uint64(1) << np.uint64(bit)
    found = {(i, j) for _, i, j in duplicates._search(np.concatenate([base, changed])[None], 4).tolist()}
    assert {(i, i + 60) for i in range(60)} <= found


def test_small_blocks_give_the_same_pairs(monkeypatch):
    small = fields(200, 32)
    small = np.concatenate([small, small[:50, ::-1], np.clip(small[:50].astype(int) + 4, 0, 255).astype(np.uint8)])
    whole = near_duplicate_pairs(small)
    monkeypatch.setattr(duplicates, "_BLOCK", 3)
    monkeypatch.setattr(duplicates, "_PROOFS", 2)
    assert np.array_equal(whole, near_duplicate_pairs(small)) and len(whole) >= 99


def test_bits_are_counted_alike_without_the_new_function(monkeypatch):
    words = np.random.default_rng(0).integers(0, 2**63, 50, dtype=np.uint64)
    expected = [bin(int(w)).count("1") for w in words]
    assert duplicates._ones(words).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert duplicates._ones(words).tolist() == expected


def test_thousands_of_blank_tiles_are_fast_and_do_not_chain():
    rng = np.random.default_rng(0)
    blank = np.full((4000, 32, 32), 243, np.uint8)
    noisy = np.clip(rng.normal(240, 0.7, (4000, 32, 32)), 0, 255).astype(np.uint8)
    tissue = fields(500, 32)
    groups = near_duplicate_groups(np.concatenate([blank, noisy, tissue]))
    assert len(set(groups[:4000])) == 1, "equal thumbnails are one group"
    assert len(set(groups[4000:])) == 4500, "noise and tissue are left alone"
    assert not set(groups[:4000]) & set(groups[4000:])


def test_thousands_of_equal_hashes_are_proven_against_one():
    base = fields(1, 32)[0].astype(int)
    many = np.clip(base + np.arange(-3, 3)[:, None, None], 0, 255)
    rng = np.random.default_rng(0)
    copies = np.clip(many[rng.integers(0, 6, 3000)] + (rng.random((3000, 32, 32)) < 0.01), 0, 255).astype(np.uint8)
    assert len(set(near_duplicate_groups(copies))) == 1
    assert len(near_duplicate_pairs(copies)) == 2999


def test_equal_hashes_without_likeness_are_not_joined(monkeypatch):
    monkeypatch.setattr(
        duplicates, "_hashes", lambda low, symmetries: np.zeros((8 if symmetries else 1, len(low)), np.uint64)
    )
    small = fields(30, 32)
    groups = near_duplicate_groups(np.concatenate([small, small[:3, :, ::-1]]))
    assert len(set(groups)) == 30 and groups[:3] == groups[30:]


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(30)))
def test_groups_do_not_depend_on_the_order_of_the_tiles(order):
    small = fields(20, 32)
    small = np.concatenate([small, small[:5, ::-1], small[:3], np.full((2, 32, 32), 7, np.uint8)])
    straight, shuffled = near_duplicate_groups(small), near_duplicate_groups(small[list(order)])
    assert shuffled == [straight[i] for i in order]


def test_pairs_are_those_of_the_groups():
    small = fields(60, 32)
    small = np.concatenate([small, small[:20, ::-1], small[:10]])
    groups = np.array(near_duplicate_groups(small))
    pairs = near_duplicate_pairs(small)
    assert (pairs[:, 0] < pairs[:, 1]).all() and (groups[pairs[:, 0]] == groups[pairs[:, 1]]).all()
    assert len(pairs) >= len(small) - len(set(groups))


def test_correlation_ignores_brightness_and_small_shifts():
    big = fields(10, 256)
    first = thumbnails(coloured(big))
    second = thumbnails(coloured((np.roll(big, (3, -4), (1, 2)) * 0.7 + 30).astype(np.uint8)))
    assert aligned_correlation(first, first) == pytest.approx(1, abs=1e-6)
    assert aligned_correlation(first, second).min() > 0.9
    assert aligned_correlation(first[:5], first[5:]).max() < 0.8
    assert aligned_correlation(np.full((1, 32, 32), 9, np.uint8), first[:1]) == pytest.approx(0, abs=1e-3)


def test_odd_input_is_named():
    assert near_duplicate_groups(np.zeros((0, 32, 32), np.uint8)) == []
    assert near_duplicate_pairs(np.zeros((0, 32, 32), np.uint8)).shape == (0, 2)
    assert thumbnails(np.zeros((0, 3, 64, 64), np.uint8)).shape == (0, 32, 32)
    with pytest.raises(DataError, match=r"\(2, 16, 16\)"):
        near_duplicate_groups(np.zeros((2, 16, 16), np.uint8))
    with pytest.raises(DataError, match="float64"):
        thumbnails(np.zeros((2, 3, 16, 16)))
    with pytest.raises(SettingError, match="bits is 40"):
        near_duplicate_groups(fields(2, 32), DuplicateConfig(bits=40))
    with pytest.raises(SettingError, match="correlation is 0"):
        near_duplicate_groups(fields(2, 32), DuplicateConfig(correlation=0))


def test_real_tiles_of_different_patients_are_not_joined(real_data):
    import pandas as pd

    table = pd.read_csv(real_data / "ebhi-seg-128" / "tiles.csv", dtype=str)[::3].reset_index(drop=True)
    tiles = [np.asarray(Image.open(real_data / "ebhi-seg-128" / p).convert("RGB")) for p in table.path]
    small = thumbnails(np.stack(tiles).transpose(0, 3, 1, 2))
    table["group"] = near_duplicate_groups(small)
    assert (table.groupby("group").patient.nunique() == 1).all()
    assert table.group.nunique() > 0.99 * len(table)
