"""Near-duplicates that lie across patients or across given splits: tie the patients, or set tiles aside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from histosynth.core.errors import DataError

FEW = 0.1  # largest share of the tiles that tied patients may hold, and of a side that may be set aside
_GUARD = ("train", "val", "test")  # a near-duplicate stays on the last of these sides


def tie_groups(
    patients: Sequence[str], duplicates: Sequence[str], *, limit: float = FEW
) -> tuple[list[str], np.ndarray]:
    """Make one group of patients who share near-duplicate tiles.

    A group of near-duplicates that lies across patients ties these patients together, so that they go to one
    side. Where the tied patients would hold more than `limit` of all tiles the split would be ruled by a few
    look-alikes; then the look-alikes of all but one patient (the one with most of them) are set aside instead.

    Args:
        patients: N patients; "" where not known: such a tile belongs to its near-duplicates only.
        duplicates: N groups of near-duplicates.
        limit: largest share of the N tiles that tied patients may hold.

    Returns:
        N groups to split by (each named after one of its patients), and bool [N]: the tiles to set aside.
    """
    own = np.array([p or d for p, d in zip(patients, duplicates, strict=True)], dtype=object)
    frame = pd.DataFrame({"patient": own, "duplicate": list(duplicates)})
    size = frame.groupby("patient").size().to_dict()
    leader = {p: p for p in size}

    def root(patient: str) -> str:
        while leader[patient] != patient:
            leader[patient] = leader[leader[patient]]
            patient = leader[patient]
        return patient

    spread = frame.groupby("duplicate").patient.transform("nunique")
    across = {name: rows.patient for name, rows in frame[spread > 1].groupby("duplicate")}
    aside = np.zeros(len(frame), dtype=bool)
    # small ties first, then by name: the order of the rows must not matter
    for _, held in sorted(across.items(), key=lambda item: (item[1].nunique(), sorted(set(item[1])), item[0])):
        owners = held.map(root)
        roots = sorted(set(owners))
        total = sum(size[r] for r in roots)
        if len(roots) > 1 and total > limit * len(frame):
            counts = owners.value_counts()
            stays = min(roots, key=lambda r: (-counts[r], r))
            aside[held.index[owners != stays]] = True
            continue
        for r in roots:
            leader[r] = roots[0]
        size[roots[0]] = total
    return [root(p) for p in own], aside


def mark_duplicates(table: pd.DataFrame, duplicates: Sequence[str]) -> pd.DataFrame:
    """A copy of the table with the column `duplicate_group`, "" for a tile that has no near-duplicate.

    Args:
        duplicates: groups of the kept rows, in their order.

    Raises:
        DataError: not one group for each kept row.
    """
    table = table.copy()
    kept = table.index[table.kept]
    if len(duplicates) != len(kept):
        raise DataError(
            f"{len(duplicates)} near-duplicate groups came with {len(kept)} kept tiles.", "Give one for each."
        )
    names = pd.Series(list(duplicates), index=kept, dtype=object)
    table["duplicate_group"] = ""
    table.loc[kept, "duplicate_group"] = names.where(names.map(names.value_counts()) > 1, "")
    return table


def tie_rows(table: pd.DataFrame, rows: pd.DataFrame, twins: pd.Series | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Tie the patients of some rows of a table; rows that stand in the way are set aside in the table, in place.

    Args:
        twins: for each row a name that it shares with another version of the same tile, or "".

    Returns:
        The rows that are left, and the group of each.
    """
    none = pd.Series("", index=rows.index)
    alike = rows.duplicate_group if "duplicate_group" in rows else none
    groups: Sequence[str] = rows.patient.tolist()
    aside = np.zeros(len(rows), dtype=bool)
    for shared in (none if twins is None else twins, alike):
        names = [name or f"tile {tile}" for name, tile in zip(shared, rows.id, strict=True)]
        groups, more = tie_groups(groups, names)
        aside |= more
    _set_aside(table, rows.index[aside], "another patient")
    return rows[~aside], [g for g, a in zip(groups, aside, strict=True) if not a]


def guard_sides(table: pd.DataFrame) -> None:
    """Set aside, in place, training tiles that nearly duplicate val or test tiles, and val tiles likewise.

    Raises:
        DataError: these are so many that the sides show the same tiles.
    """
    if "duplicate_group" not in table:
        return
    rows = table[table.kept & (table.duplicate_group != "") & (table.split != "")]
    rank = rows.split.map(_GUARD.index)
    best = rank.groupby(rows.duplicate_group).transform("max")
    doubtful = rows.index[rank < best]
    for side, number in table.loc[doubtful].split.value_counts().items():
        total = int((table.kept & (table.split == side)).sum())
        if number > max(1, FEW * total):
            raise DataError(
                f"{number} of the {total} {side} tiles look like tiles of a split that must stay unseen.",
                "Two splits hold the same tiles, such as two stainings of one set; let the split be made instead.",
            )
    for position, name in enumerate(_GUARD):
        _set_aside(table, doubtful[best[doubtful] == position], f"the {name} split")


def _set_aside(table: pd.DataFrame, index: pd.Index, where: str) -> None:
    reason = f"near-duplicate: looks like a tile of {where}"
    table.loc[index, ["kept", "split", "reason"]] = [False, "", reason]
