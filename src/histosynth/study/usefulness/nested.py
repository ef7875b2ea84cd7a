"""Nested by patient: nothing that a classifier learns from may have seen what it is tested on.

A generator that was trained on test patients gives the classifier their tiles through the back door, and every score
is too good. So a synthetic set must say what its generator was trained on, and that must be the training tiles of the
real set, or no tile of it at all. Which tiles these were is told by a digest of their pixels, labels and ids, which
training writes into the checkpoint and `generate` into the tile set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from histosynth.core.errors import DataError
from histosynth.tiles.batches import TileArray
from histosynth.tiles.split.assign import check_no_straddling, check_synthetic, near_duplicate_pairs
from histosynth.tiles.split.duplicates import DuplicateConfig, thumbnails
from histosynth.tiles.tileset import SPLITS, TileSet

Kind = Literal["nested", "other tiles", "unknown"]
_WHOLE = "whole"


@dataclass(frozen=True)
class Origin:
    """Where the tiles of a synthetic set come from.

    Attributes:
        kind: nested: the generator was trained on the training tiles of the real set, and on no other tile of it;
            other tiles: no generator, but tiles of patients that the real set does not name; unknown: nobody says.
        words: the same in a sentence.
    """

    kind: Kind
    words: str

    @property
    def saw_real_training(self) -> bool:
        """Whether its tiles may carry what all real training tiles teach, even where a classifier is given few."""
        return self.kind != "other tiles"


def origin(
    real: TileSet, made: TileSet, name: str, digest: Callable[[str, int], str], *, allow_unknown: bool = False
) -> Origin:
    """Where synthetic tiles come from, as far as the tile set says.

    Args:
        name: of the synthetic set, for the message.
        digest: of the tiles of a split of `real` ("whole": of all splits) at an edge length.
        allow_unknown: take sets of unknown origin.

    Raises:
        DataError: the generator was trained on, or conditioned on, tiles of val or test; tiles of patients whom the
            real set has in val or test; an unknown origin that was not allowed.
    """
    check_synthetic(real.table, made.table)
    if not made.meta.get("synthetic") and not (made.kept.generator != "").any():
        return _of_patients(real, made, name, allow_unknown)
    trained, size = str(made.meta.get("training_data") or ""), int(made.meta.get("size") or 0)
    if trained and size:
        for split in (*SPLITS, _WHOLE):
            if digest(split, size) != trained:
                continue
            if split == "train":
                return Origin(
                    "nested", f"trained on the training tiles of {real.folder.name} and on no other tile of it"
                )
            what = "all tiles" if split == _WHOLE else f"the {split} tiles"
            raise DataError(
                f"The generator of {name} ({made.folder}) was trained on {what} of {real.folder}: it has seen what the "
                "classifiers are tested on.",
                "Train it on the split train, and generate anew.",
            )
    found = (
        f"trained on other tiles than the training tiles of {real.folder.name}; test patients may be among them"
        if trained
        else "it is not recorded which tiles the generator was trained on; test patients may be among them"
    )
    return _unknown(f"{name} ({made.folder}): {found}", found, allow_unknown)


def _of_patients(real: TileSet, made: TileSet, name: str, allow_unknown: bool) -> Origin:
    """Tiles without a generator, such as real or simulated ones of other patients."""
    ours = real.kept[real.kept.split.isin(("val", "test"))].patient
    theirs = set(made.kept.patient) - {""}
    both = sorted(theirs & set(ours))
    if not theirs or (made.kept.patient == "").any():
        found = "tiles without a generator, and without patients; test patients may be among them"
        return _unknown(f"{name} ({made.folder}): {found}", found, allow_unknown)
    if both:
        found = f"{len(both)} of its patients have names of val or test patients of {real.folder.name} ({_some(both)})"
        return _unknown(
            f"{name} ({made.folder}): {found}",
            found,
            allow_unknown,
            "Leave these out, or rename them if they are others;",
        )
    return Origin("other tiles", f"tiles of {len(theirs)} patients whom {real.folder.name} has not in val or test")


def _unknown(message: str, words: str, allowed: bool, remedy: str = "") -> Origin:
    if allowed:
        return Origin("unknown", words)
    raise DataError(
        f"{message[0].upper()}{message[1:]}.",
        (remedy or "Generate from a generator that was trained on the split train of these real tiles;")
        + " or take the risk with --allow-unknown-origin, and the page will say so.",
    )


def check_real(real: TileSet, splits: Mapping[str, TileArray]) -> None:
    """Refuse real tiles in which a patient, or one picture, is on two sides.

    Args:
        splits: the tiles of train, val and test.

    Raises:
        DataError: names them.
    """
    check_no_straddling(real.table)
    names = list(splits)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            refuse_shared(splits[first], splits[second], f"{first} tiles", f"{second} tiles", "Keep each on one side.")


def refuse_shared(first: TileArray, second: TileArray, one: str, other: str, remedy: str) -> None:
    """Refuse two sets of tiles that have a picture in common, as it is, turned or mirrored; blank tiles do not count.

    Raises:
        DataError: names the first of them.
    """
    known = {key: name for key, name in zip(_keys(second), second.ids, strict=True) if key}
    shared = [f"{name} = {known[key]}" for key, name in zip(_keys(first), first.ids, strict=True) if key in known]
    if shared:
        raise DataError(f"{len(shared)} of the {one} are among the {other}: {_some(shared)}.", remedy)


def _keys(array: TileArray) -> list[bytes]:
    """What is the same for a tile and its turns and flips and, but for chance, for no other tile; empty if blank.

    The multiset of its colours: sorting forgets where a pixel was.
    """
    found = []
    weights = np.array([1 << 16, 1 << 8, 1], np.uint32)
    for image in array.images:
        if image.std(axis=(1, 2)).max() < DuplicateConfig().contrast:
            found.append(b"")
            continue
        colours = np.tensordot(weights, image.astype(np.uint32), axes=1)
        found.append(hashlib.blake2b(np.sort(colours, axis=None).tobytes(), digest_size=16).digest())
    return found


def lookalikes(made: TileArray, test: TileArray) -> int:
    """How many synthetic tiles are near-duplicates of test tiles, at any flip or turn."""
    pairs = near_duplicate_pairs(np.concatenate([thumbnails(test.images), thumbnails(made.images)]))
    across = pairs[(pairs[:, 0] < len(test)) & (pairs[:, 1] >= len(test))]
    return len(np.unique(across[:, 1]))


def strangers(real: TileSet, other: TileSet) -> tuple[np.ndarray, str]:
    """Which kept tiles of another hospital are of patients whom the training never saw: bool [N], and a note.

    A patient whose name the real set has in train or val may be the same one, in another stain.

    Raises:
        DataError: nobody is left.
    """
    seen = set(real.kept[real.kept.split.isin(("train", "val"))].patient) - {""}
    fresh = ~other.kept.patient.isin(seen).to_numpy()
    left = int((~fresh).sum())
    if not fresh.any():
        raise DataError(
            f"All patients of {other.folder} have names of train or val patients of {real.folder}.",
            "Give a hospital with other patients, or rename them if they are others.",
        )
    if not left:
        return fresh, ""
    return fresh, (
        f"{left} of {len(fresh)} tiles of {other.folder.name} are left out: their patients have names of training or "
        f"validation patients."
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
