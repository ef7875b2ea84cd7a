"""Planted copies are found, and honest tiles are not accused."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import ndimage

from histosynth.core.errors import DataError
from histosynth.evaluate.copies import copies, pixel_copies, thumbnails


def textures(n: int, seed: int, size: int = 64) -> np.ndarray:
    """Smooth random tiles, uint8 [n, 3, size, size], of various contrast."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(n, 3, size, size)), (0, 0, 4, 4))
    noise /= noise.std((1, 2, 3), keepdims=True)
    return (150 + rng.uniform(8, 50, (n, 1, 1, 1)) * noise).clip(0, 255).astype(np.uint8)


def jpeg(tile: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(tile.transpose(1, 2, 0)).save(buffer, "JPEG", quality=60)
    return np.asarray(Image.open(buffer)).transpose(2, 0, 1)


def zoomed(tile: np.ndarray) -> np.ndarray:
    image = Image.fromarray(tile.transpose(1, 2, 0)).crop((3, 3, 61, 61))
    return np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


@pytest.fixture(scope="module")
def sets():
    return textures(200, 1), textures(200, 2), textures(160, 3)


@pytest.mark.parametrize("kind", ["exact", "flipped", "turned", "jittered", "jpeg", "shifted", "zoomed", "blurred"])
def test_finds_planted_copies(sets, kind):
    train, held_out, synthetic = sets
    planted = synthetic.copy()
    noise = np.random.default_rng(0).normal(0, 6, train[0].shape)
    change = {
        "exact": lambda t: t,
        "flipped": lambda t: t[..., ::-1],
        "turned": lambda t: np.rot90(t, 3, axes=(-2, -1)),
        "jittered": lambda t: (0.85 * t.astype(float) + 20 + noise).clip(0, 255),
        "jpeg": jpeg,
        "shifted": lambda t: np.roll(t, (4, -3), axis=(1, 2)),
        "zoomed": zoomed,
        "blurred": lambda t: ndimage.gaussian_filter(t, (0, 1.5, 1.5)),
    }[kind]
    for i in range(40):
        planted[i] = change(train[5 * i])
    alarm, equal, twin = pixel_copies(train, held_out, planted)
    assert alarm[:40].mean() >= 0.95
    assert alarm[40:].mean() <= 0.05
    assert (twin[:40] == 5 * np.arange(40)).mean() >= 0.95
    assert equal.sum() == (40 if kind in ("exact", "flipped", "turned") else 0)


def test_thumbnail_forgets_brightness_and_contrast():
    tile = textures(1, 5)
    darker = (tile * 0.8 + 20).astype(np.uint8)
    assert np.abs(thumbnails(tile) - thumbnails(darker)).max() < 0.2
    assert thumbnails(textures(2, 5, 50)).shape == (2, 16, 16)
    assert np.abs(thumbnails(np.full((1, 3, 64, 64), 240, np.uint8))).max() == 0


def test_features_tell_copying_from_learning(sets):
    rng = np.random.default_rng(4)
    train, held_out, honest = (rng.normal(size=(n, 10)) for n in (300, 200, 200))
    result, _ = copies(train, held_out, honest)
    assert result["nn_ratio"] == pytest.approx(1, abs=0.1)
    assert result["nn_below_5pct"] == pytest.approx(0.05, abs=0.05)
    assert 0.35 < result["authenticity"] < 0.65
    copied = train[:200] + 0.01 * rng.normal(size=(200, 10))
    result, pairs = copies(train, held_out, copied)
    assert result["nn_ratio"] < 0.05 and result["nn_below_5pct"] == 1 and result["authenticity"] == 0
    assert (pairs.synthetic == pairs.training).all()


def test_pairs_put_equal_tiles_first(sets):
    train, held_out, synthetic = sets
    planted = synthetic.copy()
    planted[50] = train[123][..., ::-1]
    rng = np.random.default_rng(6)
    features = [rng.normal(size=(len(x), 8)) for x in sets]
    result, pairs = copies(*features, train, held_out, planted, pairs=5)
    assert (pairs.synthetic[0], pairs.training[0], pairs.alarm[0]) == (50, 123, True)
    assert len(pairs.distance) == 5
    assert result["pixel_equal"] == pytest.approx(1 / 160)


def test_refuses_images_of_other_tiles(sets):
    features = [np.random.default_rng(0).normal(size=(len(x), 8)) for x in sets]
    with pytest.raises(DataError, match="all three"):
        copies(*features, train_images=sets[0])
    with pytest.raises(DataError, match="held-out images"):
        copies(*features, sets[0], sets[1][:5], sets[2])


def test_real_tiles_planted_copies_and_other_patients(real_data):
    """Recall at least 0.95 on planted copies, and no more alarms on patients never seen than were allowed."""
    table = pd.read_csv(real_data / "ebhi-seg-128" / "tiles.csv")
    names = np.random.default_rng(0).permutation(table.patient.unique())
    sides = []
    for part, most in zip(np.array_split(names, 3), (200, 150, 80), strict=True):
        rows = table[table.patient.isin(part)].sample(frac=1, random_state=0)[:most]
        tiles = [Image.open(real_data / "ebhi-seg-128" / p).convert("RGB").resize((64, 64)) for p in rows.path]
        sides.append(np.stack([np.asarray(t).transpose(2, 0, 1) for t in tiles]))
    train, held_out, honest = sides
    for change in (lambda t: t[..., ::-1], jpeg, lambda t: 0.8 * t.astype(float) + 30, zoomed):
        planted = np.stack([change(t) for t in train[:40]]).astype(np.uint8)
        assert pixel_copies(train, held_out, planted)[0].mean() >= 0.95
    assert pixel_copies(train, held_out, honest)[0].mean() <= 0.05
