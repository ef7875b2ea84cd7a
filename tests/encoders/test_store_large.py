"""The feature store with large sets: flat memory, and going on after a kill."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from histosynth.core.errors import DataError
from histosynth.core.types import EncoderCard
from histosynth.encoders.store import feature_file, features


class Lazy:
    """Tiles that exist only while somebody looks at a slice of them; it may fail at a tile."""

    def __init__(self, count: int, edge: int = 8, fails_at: int | None = None) -> None:
        self.count, self.edge, self.fails_at, self.read, self.largest = count, edge, fails_at, 0, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, which: slice) -> np.ndarray:
        start, stop, _ = which.indices(self.count)
        if self.fails_at is not None and stop > self.fails_at:
            raise KeyboardInterrupt
        self.read += stop - start
        self.largest = max(self.largest, stop - start)
        ramp = np.arange(start, stop, dtype=np.int64)[:, None, None, None] + np.arange(3)[:, None, None]
        return np.broadcast_to(ramp % 251, (stop - start, 3, self.edge, self.edge)).astype(np.uint8)


class Mean:
    """An encoder whose features can be said without it."""

    def __init__(self, dim: int = 6, weights: str = "w", precision: str = "float32") -> None:
        self.card = EncoderCard("mean", dim, 8, "none")
        self.weights_hash, self.precision = weights, precision

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((2, 3)).repeat(1, self.card.dim // 3)

    def differentiable(self, images: torch.Tensor) -> torch.Tensor:
        return self.encode(images)


def expected(count: int, dim: int = 6) -> np.ndarray:
    return np.tile((np.arange(count)[:, None] + np.arange(3)) % 251, (1, dim // 3)).astype(np.float32)


def test_a_hundred_thousand_tiles_are_never_in_memory(tmp_path):
    count, dim = 100_000, 96
    tiles = Lazy(count)
    ids = [str(i) for i in range(count)]
    tracemalloc.start()
    found = feature_file(Mean(dim), tiles, ids, "digest", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(found, np.memmap) and found.shape == (count, dim) and not found.flags.writeable
    assert tiles.read == count and tiles.largest <= 256
    # the tiles would be 19 MB, the features 38 MB; what is there is the names, and a chunk
    assert peak < 16e6
    assert np.array_equal(found[[0, 255, 256, 99_999]], expected(count, dim)[[0, 255, 256, 99_999]])


def test_an_interrupted_encoding_goes_on(tmp_path):
    count = 2000
    ids = [str(i) for i in range(count)]
    with pytest.raises(KeyboardInterrupt):
        features(Mean(), Lazy(count, fails_at=1100), ids, "digest", tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    rest = Lazy(count)
    found = features(Mean(), rest, ids, "digest", tmp_path)
    assert rest.read == count - 1024 and np.array_equal(found, expected(count))
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".npy"]


@pytest.mark.parametrize("damage", ["half a row", "a torn chunk", "a changed chunk", "no journal", "half a line"])
def test_what_a_kill_left_half_written_is_made_again(tmp_path, damage):
    count = 1000
    ids = [str(i) for i in range(count)]
    with pytest.raises(KeyboardInterrupt):
        features(Mean(), Lazy(count, fails_at=800), ids, "digest", tmp_path)
    (part,) = tmp_path.glob("*.part")
    journal = part.with_suffix(".journal")
    data = part.read_bytes()
    if damage == "half a row":
        part.write_bytes(data + b"1234567")
    elif damage == "a torn chunk":
        part.write_bytes(data[:-3000])
    elif damage == "a changed chunk":
        part.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "no journal":
        journal.unlink()
    else:
        journal.write_text(journal.read_text()[:-20])
    assert np.array_equal(features(Mean(), Lazy(count), ids, "digest", tmp_path), expected(count))


def test_after_a_real_kill(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; from histosynth.encoders.store import features\n"
        "from tests.encoders.test_store_large import Lazy, Mean\n"
        "class Deadly(Lazy):\n"
        "    def __getitem__(self, which):\n"
        "        if which.start >= 768: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().__getitem__(which)\n"
        "features(Mean(), Deadly(1500), [str(i) for i in range(1500)], 'digest', Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    rest = Lazy(1500)
    found = features(Mean(), rest, [str(i) for i in range(1500)], "digest", tmp_path)
    assert rest.read == 1500 - 768 and np.array_equal(found, expected(1500))


def test_two_processes_do_not_spoil_each_other(tmp_path):
    code = (
        "import sys; from pathlib import Path; from histosynth.encoders.store import features\n"
        "from tests.encoders.test_store_large import Lazy, Mean, expected\n"
        "found = features(Mean(), Lazy(5000, 32), [str(i) for i in range(5000)], 'digest', Path(sys.argv[1]))\n"
        "assert (found == expected(5000)).all()"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".npy"]


def test_precision_and_weights_have_their_own_files(tmp_path):
    ids = ["a", "b"]
    for encoder in (Mean(), Mean(precision="bfloat16"), Mean(weights="other")):
        features(encoder, Lazy(2), ids, "digest", tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 3


def test_nothing_is_left_of_features_that_are_refused(tmp_path):
    class Bad(Mean):
        def encode(self, images):
            return super().encode(images) / (images.float().mean((1, 2, 3))[:, None] != 100)

    with pytest.raises(DataError, match="not finite for tile 99"):
        feature_file(Bad(), Lazy(600), [str(i) for i in range(600)], "digest", tmp_path)
    assert not list(tmp_path.iterdir())
