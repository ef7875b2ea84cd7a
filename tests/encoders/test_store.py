"""The feature store: hits, misses, and damaged files."""

import numpy as np
import pytest
import torch

from histosynth import encoders
from histosynth.core.errors import DataError
from histosynth.core.types import EncoderCard
from histosynth.encoders.store import encode_all, features


class Counting:
    """An encoder that counts the tiles it sees."""

    def __init__(self, name: str = "counting", weights: str = "w1", factor: float = 1.0) -> None:
        self.card = EncoderCard(name, 3, 8, "none")
        self.weights_hash, self.factor, self.seen = weights, factor, 0

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return images.float().mean((2, 3)) * self.factor

    def differentiable(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


@pytest.fixture
def tiles():
    return np.random.default_rng(0).integers(0, 256, (600, 3, 8, 8), dtype=np.uint8)


def test_second_time_from_disk(tiles, tmp_path):
    ids = [str(i) for i in range(600)]
    encoder = Counting()
    first = features(encoder, tiles, ids, "digest", tmp_path)
    assert encoder.seen == 600 and first.shape == (600, 3) and first.dtype == np.float32
    assert np.allclose(first, tiles.mean((2, 3)), atol=1e-4)
    again = features(encoder, tiles, ids, "digest", tmp_path)
    assert encoder.seen == 600 and np.array_equal(first, again)
    assert np.array_equal(features(Counting(), torch.from_numpy(tiles), ids, "digest", tmp_path), first)


def test_anything_that_matters_is_a_miss(tiles, tmp_path):
    ids = [str(i) for i in range(600)]
    features(Counting(), tiles, ids, "digest", tmp_path)
    for other, these, digest in (
        (Counting(weights="w2"), ids, "digest"),
        (Counting(name="another"), ids, "digest"),
        (Counting(), ids[::-1], "digest"),
        (Counting(), ids, "other"),
    ):
        features(other, tiles, these, digest, tmp_path)
        assert other.seen == 600


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "json", "gone"])
def test_a_damaged_cache_is_computed_again(tiles, tmp_path, damage):
    ids = [str(i) for i in range(600)]
    first = features(Counting(), tiles, ids, "digest", tmp_path)
    (path,) = tmp_path.glob("*.npy")
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-100])
    elif damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("not numbers")
    elif damage == "json":
        path.with_suffix(".json").write_text("{")
    else:
        path.with_suffix(".json").unlink()
    encoder = Counting()
    assert np.array_equal(features(encoder, tiles, ids, "digest", tmp_path), first)
    assert encoder.seen == 600
    assert np.array_equal(features(encoder, tiles, ids, "digest", tmp_path), first)
    assert encoder.seen == 600


def test_without_a_weights_hash_the_answer_tells_encoders_apart(tiles, tmp_path):
    ids = [str(i) for i in range(600)]
    one, two = Counting(weights=""), Counting(weights="", factor=2.0)
    assert not np.array_equal(
        features(one, tiles, ids, "digest", tmp_path), features(two, tiles, ids, "digest", tmp_path)
    )


def test_refuses_bad_input(tiles, tmp_path):
    with pytest.raises(DataError, match="600 tiles came with 2 ids"):
        features(Counting(), tiles, ["a", "b"], "digest", tmp_path)
    with pytest.raises(DataError, match="not finite for tile 0"):
        features(Counting(factor=float("nan")), tiles, ["x"] * 600, "digest", tmp_path)
    assert not list(tmp_path.glob("*"))


def test_no_tiles(tmp_path):
    assert features(Counting(), np.zeros((0, 3, 8, 8), np.uint8), [], "digest", tmp_path).shape == (0, 3)


@pytest.mark.filterwarnings("error")
def test_read_only_tiles_are_taken_without_a_warning(tmp_path):
    """Decoded tiles are read-only memory maps, and torch warns of these."""
    tiles = np.zeros((3, 3, 32, 32), np.uint8)
    tiles.flags.writeable = False
    assert encode_all(encoders.load("colour", "cpu"), tiles).shape == (3, 66)
