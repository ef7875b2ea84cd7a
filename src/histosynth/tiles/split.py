"""Split tiles into train, validation and test so that no patient is on two sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError, SettingError
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.tileset import SPLITS

_HASH_BITS = 64
_NEAR_BITS = 3  # two hashes this close share one of four 16-bit chunks (pigeonhole)


@dataclass(frozen=True)
class SplitConfig:
    """How tiles are divided."""

    val: float = 0.15
    """Share of the tiles for validation (early stopping, calibration)."""
    test: float = 0.25
    """Share of the tiles for the test; touched once, for the report."""
    seed: int = 0
    """Seed of the assignment."""


def split_by_group(groups: Sequence[str], labels: Sequence[str], config: SplitConfig) -> list[str]:
    """Assign whole groups (patients) to splits, keeping each class's shares close to the wanted ones.

    Iterative stratification (Sechidis et al., ECML 2011) over groups: groups are placed one after
    another, those of the rarest classes first, into the split that lacks most of what they bring.
    A class that is in three groups or more gets one on every side wherever the other classes of those
    groups allow it, and no side stays empty.

    Returns:
        N split names.

    Raises:
        SettingError: shares outside (0, 1) or leaving nothing to train on.
        DataError: fewer than three groups.
    """
    check_shares(config)
    frame = pd.DataFrame({"group": list(groups), "label": list(labels)})
    counts = pd.crosstab(frame.group, frame.label)
    if len(counts) < len(SPLITS):
        raise DataError(
            f"The tiles come from {len(counts)} patient(s): {', '.join(map(str, counts.index))}.",
            "At least three are needed for train, validation and test without leakage.",
        )
    shares = np.array([1 - config.val - config.test, config.test, config.val])
    matrix = counts.to_numpy(float)
    totals = matrix.sum(0)
    need = np.outer(shares, totals)  # [split, class]: tiles still wanted
    empty = np.ones_like(need, dtype=bool)  # splits that have no group of that class yet
    spread = (matrix > 0).sum(0)  # groups a class
    rng = numpy_rng(config.seed, "split")
    order = rng.permutation(len(matrix))
    rarest = np.array([min(spread[row > 0]) for row in matrix])
    # the largest group of a rare class comes first and so goes to train, where its tiles are needed most
    order = order[np.lexsort((-matrix.sum(1)[order], rarest[order]))]
    assigned = np.empty(len(matrix), dtype=int)
    size = np.zeros(len(SPLITS), dtype=int)  # groups placed so far
    for place, group in enumerate(order):
        row = matrix[group]
        held = row > 0
        lack = (need[:, held] / totals[held]).mean(1) / shares
        # a split without any group of a class comes before one that only lacks tiles of it
        urgent = (empty[:, held] & (spread[held] >= len(SPLITS))).any(1)
        last_chance = (size == 0) & (len(order) - place <= (size == 0).sum())
        choice = int(np.argmax(lack + 1e6 * urgent + 1e9 * last_chance))
        assigned[group] = choice
        size[choice] += 1
        need[choice] -= row
        empty[choice, held] = False
    side = dict(zip(counts.index, assigned, strict=True))
    return [("train", "test", "val")[side[g]] for g in groups]


def check_shares(config: SplitConfig) -> None:
    """Refuse shares with which a side would be empty.

    Raises:
        SettingError: shares outside (0, 1) or leaving nothing to train on.
    """
    if not (0 < config.val < 1 and 0 < config.test < 1 and config.val + config.test < 1):
        raise SettingError(
            f"The split has val={config.val} and test={config.test}.",
            "Both must be above 0 and leave a share for training.",
        )


def check_no_straddling(table: pd.DataFrame) -> None:
    """Refuse a table in which a patient has tiles in two splits.

    Raises:
        DataError: names the patients.
    """
    rows = table[table.kept & (table.patient != "") & (table.split != "")]
    sides = rows.groupby("patient").split.nunique()
    straddling = sides[sides > 1].index.tolist()
    if straddling:
        names = ", ".join(map(str, straddling[:5])) + (" ..." if len(straddling) > 5 else "")
        raise DataError(
            f"{len(straddling)} patient(s) have tiles in more than one split: {names}.",
            "Move all the tiles of a patient to one split, or drop the split column to have it made.",
        )


def near_duplicate_groups(thumbnails: np.ndarray) -> list[str]:
    """Group tiles that look the same, for sets without patients.

    The perceptual hash is the sign of the 8 x 8 low-frequency cosine coefficients of a grey 32 px
    thumbnail; hashes within 3 bits are joined, candidates being found by their four 16-bit chunks.

    Args:
        thumbnails: uint8 [N, 32, 32], grey.

    Returns:
        N group names.
    """
    from scipy.fft import dctn

    low = dctn(thumbnails.astype(np.float32), axes=(1, 2), norm="ortho")[:, :8, :8].reshape(len(thumbnails), -1)
    low[:, 0] = 0  # the mean brightness says nothing of the layout
    bits = low > np.median(low, axis=1, keepdims=True)
    chunks = np.packbits(bits, axis=1).view(">u2").reshape(len(bits), 4)
    parent = np.arange(len(bits))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for chunk in range(4):
        order = np.argsort(chunks[:, chunk], kind="stable")
        edges = np.flatnonzero(np.diff(chunks[order, chunk].astype(int))) + 1
        for bucket in np.split(order, edges):
            for i, first in enumerate(bucket[:-1]):
                distance = (bits[bucket[i + 1 :]] != bits[first]).sum(1)
                for second in bucket[i + 1 :][distance <= _NEAR_BITS]:
                    parent[root(int(second))] = root(int(first))
    return [f"group-{root(i):06d}" for i in range(len(bits))]
