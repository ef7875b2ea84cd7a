"""Shared by all tests: silence, and one thread, so that tests do not fight over two cores."""

import os

os.environ["HISTOSYNTH_QUIET"] = "1"

import numpy as np
import pytest
import torch

import histosynth  # noqa: F401  (installs the torchvision hook before any test imports torchvision)

torch.set_num_threads(1)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
