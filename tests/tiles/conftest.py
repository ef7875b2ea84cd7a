"""A small folder of class folders with everything that goes wrong in real ones."""

import numpy as np
import pytest
from PIL import Image


def texture(seed: int, size: int = 40) -> np.ndarray:
    """A random smooth tile, uint8 [size, size, 3]; every seed gives other low frequencies."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC))


def mutated(data: bytes, seed: int) -> bytes:
    """Damage a file: cut, overwrite, remove, insert, or set extreme numbers, most often near its start."""
    rng = np.random.default_rng(seed)
    out = bytearray(data)
    kind = rng.integers(6)
    place = int(rng.integers(len(out)))
    if kind == 0:
        return bytes(out[:place])
    if kind in (1, 2):
        reach = len(out) if kind == 1 else min(len(out), 400)
        for _ in range(int(rng.integers(1, 8))):
            out[int(rng.integers(reach))] = int(rng.integers(256))
    elif kind == 3:
        del out[place : place + int(rng.integers(1, 64))]
    elif kind == 4:
        out[place:place] = rng.bytes(int(rng.integers(1, 64)))
    else:
        out[place : place + 4] = (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\0\0")[rng.integers(4)]
    return bytes(out)


@pytest.fixture
def folders(tmp_path):
    """SOURCE/<CLASS>/<k>.png, three classes with eight tiles each."""
    root = tmp_path / "source"
    for i, label in enumerate(("A", "B", "C c")):
        (root / label).mkdir(parents=True)
        for k in range(8):
            Image.fromarray(texture(100 * i + k)).save(root / label / f"{k}.png")
    return root
