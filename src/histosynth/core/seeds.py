"""Randomness without state: every random draw comes from a seed and the name of what it is for.

A training step's numbers follow from (seed, step), so a resumed run needs no generator state to go on
exactly as if it had never stopped, and a tile's numbers follow from its own seed at any batch size.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def derive(seed: int, *keys: int | str) -> int:
    """A 63-bit seed for one purpose, the same on every platform and Python version."""
    text = "\x1f".join([str(int(seed)), *(f"{type(k).__name__}:{k}" for k in keys)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_rng(seed: int, *keys: int | str) -> np.random.Generator:
    """A NumPy generator for one purpose."""
    return np.random.default_rng(derive(seed, *keys))


def torch_generator(seed: int, *keys: int | str) -> torch.Generator:
    """A torch generator on the CPU for one purpose (CPU, so that every device sees the same numbers)."""
    import torch

    return torch.Generator().manual_seed(derive(seed, *keys))
