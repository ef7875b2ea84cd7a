"""Tiles of two simulated patients, and real ones."""

import numpy as np
import pytest
from PIL import Image

from histosynth.tiles.phantom import make_hospital, make_patient, render

TISSUES = ("ADI", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")


def simulated(hospital: int, labels=TISSUES, size: int = 96, shift: float = 0.6):
    """(uint8 [N, 3, H, W], the patient)."""
    patient = make_patient(hospital, make_hospital(hospital, shift))
    tiles = [render(label, patient=patient, seed=hospital, size=size, field_um=96.0) for label in labels]
    return np.stack([t.image.transpose(2, 0, 1) for t in tiles]), patient


@pytest.fixture(scope="session")
def tiles():
    return simulated(1)[0]


@pytest.fixture(scope="session")
def reference():
    return simulated(2, ("TUM",), 128)[0]


def read(path, edge: int) -> np.ndarray:
    """The top left of a picture, uint8 [3, edge, edge]."""
    return np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)[:, :edge, :edge].copy()


@pytest.fixture(scope="session")
def real_tiles(real_data):
    """Eight tiles of eight patients, and a field of another source."""
    paths = sorted((real_data / "ebhi-seg-224-sample").glob("*/*.png"))[::8]
    return np.stack([read(p, 80) for p in [*paths, real_data / "stain" / "source.png"]])


@pytest.fixture(scope="session")
def all_real_tiles(real_data):
    return np.stack([read(p, 160) for p in sorted((real_data / "ebhi-seg-224-sample").glob("*/*.png"))])


@pytest.fixture(scope="session")
def real_reference(real_data):
    return read(real_data / "stain" / "target.png", 128)[None]
