"""The stain reference of `tiles prepare`: which tiles it is fitted on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError, SettingError
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.images import EXTENSIONS, read_rgb
from histosynth.tiles.stain import STAINS, StainNormaliser, load_normaliser
from histosynth.tiles.tileset import TileSet


def check_reference(stain: str, reference: str) -> None:
    """Refuse what cannot be a reference before hours are spent.

    Raises:
        SettingError: an unknown method, a reference that is not there, or one without a method.
        DataError: a profile that cannot be read.
    """
    STAINS.load(stain)
    if reference == "train":
        return
    if stain == "none":
        raise SettingError(f"stain_reference is {reference!r}, but stain is none.", "Name the method with --stain.")
    if not Path(reference).exists():
        raise SettingError(
            f"stain_reference is {reference!r}, which does not exist.",
            "Give train, or the path of a tile, of a tile set, or of a saved profile (.json).",
        )
    if reference.endswith(".json"):
        _saved(stain, reference)


def fit_reference(
    stain: str, reference: str, train: pd.DataFrame, read: Callable[[int, str], np.ndarray], count: int, seed: int
) -> tuple[StainNormaliser, list[str]]:
    """A fitted normaliser, and the ids (or the path) of what it was fitted on.

    Args:
        stain: the method.
        reference: "train", or the path of a tile, of a tile set (its training tiles), or of a saved profile.
        train: accepted training tiles: columns id, number, source, width, height.
        read: gives uint8 [H, W, 3] of (number of the source, path in it).
        count: most tiles to fit on.
        seed: of the sample.

    Raises:
        DataError: no training tiles, or none with stained tissue.
    """
    if reference.endswith(".json"):
        return _saved(stain, reference), [reference]
    normaliser = load_normaliser(stain)
    path = Path(reference)
    if reference != "train" and path.suffix.lower() in EXTENSIONS:
        return normaliser.fit(_stack([read_rgb(path)[0]])), [reference]
    if reference != "train":
        tileset = TileSet.open(path)
        train = tileset.rows("train").assign(number=0)
        train["source"] = train.path

        def read(number: int, relative: str) -> np.ndarray:
            return read_rgb(tileset.folder / relative)[0]

    if train.empty:
        raise DataError(f"The stain reference {reference} has no training tile.", "Give another reference.")
    # tiles of one size, the commonest, so that they can be fitted together
    sizes = train.groupby(["width", "height"]).size()
    width, height = sizes.idxmax()
    train = train[(train.width == width) & (train.height == height)].sort_values("id")
    chosen = numpy_rng(seed, "stain reference").permutation(len(train))[:count]
    rows = train.iloc[np.sort(chosen)]
    images = [read(int(n), p) for n, p in zip(rows.number, rows.source, strict=True)]
    return normaliser.fit(_stack(images)), rows.id.tolist()


def _saved(stain: str, path: str) -> StainNormaliser:
    from histosynth.tiles.stain.profile import load_profile

    method = load_profile(path).method
    if method != stain:
        raise SettingError(f"stain is {stain}, but {path} is a profile of {method}.", f"Use --stain {method}.")
    return load_normaliser(path)


def _stack(images: Sequence[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2))
