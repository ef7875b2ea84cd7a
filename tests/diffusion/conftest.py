"""A tiny autoencoder, a base trained on it, and the base adapted: made once for all tests of the room."""

from __future__ import annotations

from pathlib import Path

import pytest

from histosynth.autoencoder.train import AutoencoderConfig, train_autoencoder
from histosynth.diffusion.train import DiffusionConfig, train_diffusion
from histosynth.tiles.batches import TileArray
from tests.diffusion.helpers import CLASSES, TINY, UNET, ColourMeans, make_tiles, tuning


@pytest.fixture(scope="session")
def tiles() -> TileArray:
    return make_tiles(dict(zip(CLASSES, (9, 7, 8), strict=True)))


@pytest.fixture(scope="session")
def encoder() -> ColourMeans:
    return ColourMeans()


@pytest.fixture(scope="session")
def autoencoder_path(tiles: TileArray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = AutoencoderConfig(size=16, steps=8, batch=4, width=8, blocks=1, save_every=4, precision="fp32")
    return train_autoencoder(tiles, config, tmp_path_factory.mktemp("autoencoder") / "run", device="cpu")


@pytest.fixture(scope="session")
def base_path(
    tiles: TileArray, encoder: ColourMeans, autoencoder_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A "base" trained from random weights for a few steps, at a rate that makes every weight move."""
    config = DiffusionConfig(init="none", autoencoder=str(autoencoder_path), lr_base=2e-2, **TINY)
    return train_diffusion(tiles, config, tmp_path_factory.mktemp("base") / "run", device="cpu", encoder=encoder)


@pytest.fixture(scope="session")
def tuned_path(
    tiles: TileArray, encoder: ColourMeans, base_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The base adapted with adapter and LoRA."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    return train_diffusion(tiles, tuning(base_path), folder, device="cpu", encoder=encoder)


@pytest.fixture(scope="session")
def unet_path(
    tiles: TileArray, encoder: ColourMeans, autoencoder_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A compact U-Net from random weights; what `base_path` is of the transformer."""
    config = DiffusionConfig(**UNET, init="none", autoencoder=str(autoencoder_path), lr_base=1e-2)
    return train_diffusion(tiles, config, tmp_path_factory.mktemp("unet") / "run", device="cpu", encoder=encoder)
