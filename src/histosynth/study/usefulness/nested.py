"""Nested by patient: nothing that a classifier learns from may have seen what it is tested on.

A generator that was trained on test patients gives the classifier their tiles through the back door, and every score
is too good. So a synthetic set must say what its generator was trained on, and that must be the training tiles of the
real set, or no tile of it at all. Which tiles these were is told by a digest of their pixels, labels and ids, which
training writes into the checkpoint and `generate` into the tile set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
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
_CHANCE = 0.02  # share of synthetic tiles that may look like test tiles


@dataclass(frozen=True)
class Origin:
    """Where the tiles of a synthetic set come from.

    Attributes:
        kind: nested: the generator was trained on the training tiles of the real set, and on no other tile of it;
            other tiles: no generator, but tiles of patients that the real set does not name; unknown: nobody says.
        words: the same in a sentence.
        of_training: some of the tiles themselves are of training patients of the real set.
    """

    kind: Kind
    words: str
    of_training: bool = False

    @property
    def saw_real_training(self) -> bool:
        """Whether its tiles may carry what all real training tiles teach, even where a classifier is given few."""
        return self.kind != "other tiles" or self.of_training


def origin(
    real: TileSet, made: TileSet, name: str, digest: Callable[[str, int], str], *, allow_unknown: bool = False
) -> Origin:
    """Where synthetic tiles come from, as far as the tile set says.

    Args:
        name: of the synthetic set, for the message.
        digest: of the tiles of a split of `real` ("whole": of all splits) at an edge length.
        allow_unknown: take sets of unknown origin.

    Raises:
        DataError: the generator was trained on, or conditioned on, tiles of val or test, or began from weights that
            were; tiles of patients whom the real set has in val or test; an unknown origin that was not allowed.
    """
    check_synthetic(real.table, made.table)
    if not made.meta.get("synthetic") and not (made.kept.generator != "").any():
        return _of_patients(real, made, name, allow_unknown)

    def seen(trained: str, size: int, how: str) -> str:
        """The split that has this digest, "" if none has."""
        splits = (*SPLITS, _WHOLE) if trained and size else ()
        split = next((one for one in splits if digest(one, size) == trained), "")
        if split in ("", "train"):
            return split
        what = "all tiles" if split == _WHOLE else f"the {split} tiles"
        raise DataError(
            f"The generator of {name} ({made.folder}) {how} trained on {what} of {real.folder}: it has seen what the "
            "classifiers are tested on.",
            "Train it on the split train, and generate anew.",
        )

    trained = str(made.meta.get("training_data") or "")
    direct = seen(trained, int(made.meta.get("size") or 0), "was")
    before = [
        seen(str(one.get("data") or ""), int(one.get("size") or 0), "began from weights that were") or one.get("data")
        for one in made.meta.get("learned_before") or []
    ]
    if direct and all(one == "train" for one in before if one):  # weights of others say nothing of tiles of ours
        return Origin("nested", f"trained on the training tiles of {real.folder.name} and on no other tile of it")
    if direct:
        found = "its generator began from weights that were trained on other tiles; test patients may be among them"
    elif trained:
        found = f"trained on other tiles than the training tiles of {real.folder.name}; test patients may be among them"
    else:
        found = "it is not recorded which tiles the generator was trained on; test patients may be among them"
    return _unknown(f"{name} ({made.folder}): {found}", found, allow_unknown)


def _of_patients(real: TileSet, made: TileSet, name: str, allow_unknown: bool) -> Origin:
    """Tiles without a generator, such as real or simulated ones of other patients."""
    theirs = patients_of(made)
    both = sorted(theirs & patients_of(real, ("val", "test")))
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
    words = f"tiles of {len(theirs)} patients whom {real.folder.name} has not in val or test"
    known = len(theirs & patients_of(real, ("train",)))
    return Origin("other tiles", f"{words}, {known} of them in train" if known else words, known > 0)


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
    found = shared(first, second)
    if found:
        raise DataError(f"{len(found)} of the {one} are among the {other}: {_some(found)}.", remedy)


def shared(first: TileArray, second: TileArray) -> list[str]:
    """Pairs of ids, "one = other", of pictures that both sets have, in any turn or mirrored."""
    known = {key: name for key, name in zip(_keys(second), second.ids, strict=True) if key}
    return [f"{name} = {known[key]}" for key, name in zip(_keys(first), first.ids, strict=True) if key in known]


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


def check_alike(
    found: Origin, made: TileArray, test: TileArray, name: str, where: str, *, allow_unknown: bool = False
) -> tuple[Origin, str]:
    """Refuse synthetic tiles of which many look like test tiles, whatever is said of their origin.

    Test tiles with some noise, other colours or another compression are near-duplicates and no longer equal. Real
    tiles of two patients are near-duplicates in less than one of a thousand cases, so a few are chance and many are
    not.

    Args:
        name: of the synthetic set, and `where`: of the test set, for the message.
        allow_unknown: call the origin unknown instead.

    Returns:
        The origin, and a note or "".

    Raises:
        DataError: more than 2 % of the tiles, and more than two.
    """
    alike = lookalikes(made, test)
    if not alike:
        return found, ""
    words = f"{alike} of {len(made)} tiles of {name} look almost like a tile of {where}"
    if alike > max(_CHANCE * len(made), 2):
        _unknown(f"{words}: they may be copies", words, allow_unknown, "Make them anew without test tiles;")
        found = Origin("unknown", words, found.of_training)
    return found, f"{words}."


def check_patients(made: TileSet, other: TileSet, name: str) -> None:
    """Refuse tiles without a generator that are of patients of an external set.

    Raises:
        DataError: names them. Patients of two sets with one name may be two, and then one set is to be renamed.
    """
    both = sorted(patients_of(made) & patients_of(other))
    if both:
        raise DataError(
            f"{len(both)} patients of {name} ({made.folder}) have names of patients of {other.folder} ({_some(both)}).",
            "Leave these out, or rename them if they are others.",
        )


def strangers(real: TileSet, other: TileSet) -> tuple[np.ndarray, str]:
    """Which kept tiles of another hospital are of patients whom the training never saw: bool [N], and a note.

    A patient whose name the real set has in train or val may be the same one, in another stain.

    Raises:
        DataError: nobody is left.
    """
    seen = patients_of(real, ("train", "val"))
    fresh = np.array([_plain(one) not in seen for one in other.kept.patient], dtype=bool)
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


def patients_of(tiles: TileSet, splits: Iterable[str] = ()) -> set[str]:
    """The names of the patients of these splits, or of all; without capitals and outer spaces."""
    rows = tiles.kept[tiles.kept.split.isin(tuple(splits))] if splits else tiles.kept
    return {_plain(one) for one in rows.patient} - {""}


def _plain(name: object) -> str:
    return str(name).strip().casefold()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
