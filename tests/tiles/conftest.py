"""A small folder of class folders with everything that goes wrong in real ones."""

import numpy as np
import pytest
from PIL import Image


def texture(seed: int, size: int = 40) -> np.ndarray:
    """A random smooth tile, uint8 [size, size, 3]; every seed gives other low frequencies."""
    noise = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture
def folders(tmp_path):
    """SOURCE/<CLASS>/<k>.png, three classes with eight tiles each."""
    root = tmp_path / "source"
    for i, label in enumerate(("A", "B", "C c")):
        (root / label).mkdir(parents=True)
        for k in range(8):
            Image.fromarray(texture(100 * i + k)).save(root / label / f"{k}.png")
    return root
