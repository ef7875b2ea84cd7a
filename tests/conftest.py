"""Shared by all tests: silence, and one thread, so that tests do not fight over two cores."""

import os

os.environ["HISTOSYNTH_QUIET"] = "1"

from pathlib import Path

import numpy as np
import pytest
import torch

import histosynth  # noqa: F401  (installs the torchvision hook before any test imports torchvision)

torch.set_num_threads(1)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real tiles for measurements, beside the checkout; they are not part of the project."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real tiles, which are not part of the project")
    return folder
