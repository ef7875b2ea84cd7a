"""Split tiles into train, validation and test so that nothing is on two sides.

A patient, a slide, a group of near-duplicates and a synthetic tile with the tile it was conditioned on each stay
on one side. The split follows from the tiles and the seed alone, whatever the order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError, SettingError
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.split.duplicates import near_duplicate_groups, near_duplicate_pairs, tile_hash
from histosynth.tiles.split.leaks import check_no_straddling, check_synthetic
from histosynth.tiles.split.protocols import protocol_named, protocol_sides, twin_names
from histosynth.tiles.split.ties import guard_sides, mark_duplicates, tie_groups, tie_rows

__all__ = [
    "SplitConfig",
    "carve",
    "check_no_straddling",
    "check_shares",
    "check_synthetic",
    "divide",
    "near_duplicate_groups",
    "near_duplicate_pairs",
    "official_split",
    "split_by_group",
    "tie_groups",
    "tile_hash",
]


@dataclass(frozen=True)
class SplitConfig:
    """How tiles are divided."""

    val: float = 0.15
    """Share of the tiles for validation (early stopping, calibration)."""
    test: float = 0.25
    """Share of the tiles for the test; touched once, for the report."""
    seed: int = 0
    """Seed of the assignment."""
    protocol: str = ""
    """A published split such as nct-crc, told by where the tiles come from; none by default."""


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
    shares = {"train": 1 - config.val - config.test, "test": config.test, "val": config.val}
    return _place(groups, labels, shares, config.seed)


def carve(groups: Sequence[str], labels: Sequence[str], share: float, seed: int) -> list[str]:
    """Divide training tiles into train and val, by whole groups: N names.

    Args:
        share: of these tiles, for validation.

    Raises:
        SettingError: a share outside (0, 1).
        DataError: fewer than two groups.
    """
    if not 0 < share < 1:
        raise SettingError(f"val is {share} of the training tiles.", "Use a share above 0 and below 1.")
    return _place(groups, labels, {"train": 1 - share, "val": share}, seed)


def _place(groups: Sequence[str], labels: Sequence[str], wanted: dict[str, float], seed: int) -> list[str]:
    """Sides of the tiles, when every side is to hold its wanted share of every class."""
    frame = pd.DataFrame({"group": list(groups), "label": list(labels)})
    counts = pd.crosstab(frame.group, frame.label)
    sides = len(wanted)
    if len(counts) < sides:
        raise DataError(
            f"The tiles come from {len(counts)} patient(s) or group(s) of look-alikes: "
            f"{', '.join(map(str, counts.index))}.",
            f"At least {'three' if sides == 3 else 'two'} are needed for {', '.join(sorted(wanted))} without leakage.",
        )
    shares = np.array(list(wanted.values()))
    matrix = counts.to_numpy(float)
    totals = matrix.sum(0)
    need = np.outer(shares, totals)  # [split, class]: tiles still wanted
    empty = np.ones_like(need, dtype=bool)  # splits that have no group of that class yet
    spread = (matrix > 0).sum(0)  # groups a class
    rng = numpy_rng(seed, "split")
    order = rng.permutation(len(matrix))
    rarest = np.where(matrix > 0, spread, len(matrix)).min(axis=1)
    # the largest group of a rare class comes first and so goes to train, where its tiles are needed most
    order = order[np.lexsort((-matrix.sum(1)[order], rarest[order]))]
    assigned = np.empty(len(matrix), dtype=int)
    size = np.zeros(sides, dtype=int)  # groups placed so far
    for place, group in enumerate(order):
        row = matrix[group]
        held = row > 0
        lack = (need[:, held] / totals[held]).mean(1) / shares
        # a split without any group of a class comes before one that only lacks tiles of it
        urgent = (empty[:, held] & (spread[held] >= sides)).any(1)
        last_chance = (size == 0) & (len(order) - place <= (size == 0).sum())
        choice = int(np.argmax(lack + 1e6 * urgent + 1e9 * last_chance))
        assigned[group] = choice
        size[choice] += 1
        need[choice] -= row
        empty[choice, held] = False
    side = dict(zip(counts.index, assigned, strict=True))
    names = list(wanted)
    return [names[side[g]] for g in groups]


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


def divide(
    table: pd.DataFrame, config: SplitConfig, duplicates: Sequence[str] | None = None
) -> tuple[pd.DataFrame, str]:
    """Give every kept tile a side; set tiles aside that would be on two.

    The column `split`, where it is filled, is taken as given and checked: a tile that nearly duplicates one on a
    better guarded side (test before val before train) is set aside, so that nothing of the test is seen in
    training. The column `duplicate_group` names the near-duplicates of the tiles that have any.

    Args:
        table: a tile set's table.
        duplicates: near-duplicate groups of the kept rows, in their order (`near_duplicate_groups`). They stand
            in for patients where none are known.

    Returns:
        The new table, and how it was split, in words.

    Raises:
        SettingError: shares, or a protocol, that cannot be used.
        DataError: a patient on two given sides, a half-filled split column, too few patients, or neither patients
            nor near-duplicate groups.
    """
    if config.protocol:
        title = protocol_named(config.protocol).title
        return official_split(table, config.protocol, config, duplicates), f"published ({config.protocol}): {title}"
    check_shares(config)
    check_no_straddling(table)
    table, words = _with_groups(table, duplicates)
    kept = table[table.kept]
    given = set(kept.split) - {""}
    if not given:
        left, groups = tie_rows(table, kept)
        table.loc[left.index, "split"] = split_by_group(groups, left.label, config)
        check_no_straddling(table)
        return table, words
    if not {"train", "test"} <= given or (kept.split == "").any():
        raise DataError(
            f"The split column has only {sorted(given)}, or empty rows.",
            "Give train and test (and val, if you have it) in every row, or drop the column.",
        )
    guard_sides(table)
    check_no_straddling(table)
    words = f"as given, checked {words}"
    if "val" not in given:
        _carve_validation(table, config.val / (1 - config.test), config.seed)
        words += "; validation taken from train"
    return table, words


def official_split(
    table: pd.DataFrame,
    protocol: str,
    config: SplitConfig = SplitConfig(),
    duplicates: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Split as a published protocol has it: a copy of the table with its splits filled.

    The test is what the protocol says, whole. Validation is `config.val` of the training collections, by patient
    and by group of near-duplicates. Training tiles that nearly duplicate test tiles are set aside. The same tile
    in two stainings is one group, so validation never shows a training tile in other colours.

    Args:
        table: with the column `origin`, the name of the folder or archive that a tile comes from.
        protocol: a name in `protocols.PROTOCOLS`.
        duplicates: near-duplicate groups of the kept rows, in their order; needed where no patients are known.

    Raises:
        SettingError: an unknown protocol, or a share that cannot be used.
        DataError: no column `origin`, an unknown origin, a side without tiles, too few groups, or neither
            patients nor near-duplicate groups.
    """
    chosen = protocol_named(protocol)
    table, _ = _with_groups(table, duplicates)
    kept = table[table.kept]
    table.loc[kept.index, "split"] = protocol_sides(kept, chosen)
    guard_sides(table)
    _carve_validation(table, config.val, config.seed, twin_names(table, chosen))
    return table


def _with_groups(table: pd.DataFrame, duplicates: Sequence[str] | None) -> tuple[pd.DataFrame, str]:
    """A copy with near-duplicates marked and standing in for unknown patients, and what the groups are, in words."""
    table = table.copy() if duplicates is None else mark_duplicates(table, duplicates)
    kept = table[table.kept]
    unknown = kept.patient == ""
    if not unknown.any():
        return table, "by patient"
    if duplicates is None:
        raise DataError(
            f"{unknown.sum()} of {len(kept)} tiles have no patient.",
            "Fill the column patient in every row, or group the near-duplicates and give these groups.",
        )
    table.loc[kept.index[unknown], "patient"] = np.array(list(duplicates), dtype=object)[unknown]
    if not unknown.all():
        return table, "by patient, and by group of near-duplicate tiles where no patient is known"
    return table, (
        "by group of near-duplicate tiles, because no patients were given: tiles of one patient may be "
        "on both sides, so the scores may be too good"
    )


def _carve_validation(table: pd.DataFrame, share: float, seed: int, twins: pd.Series | None = None) -> None:
    """Move whole groups of training tiles to val, in place."""
    train = table[table.kept & (table.split == "train")]
    left, groups = tie_rows(table, train, None if twins is None else twins[train.index])
    table.loc[left.index, "split"] = carve(groups, left.label, share, seed)
    check_no_straddling(table)
