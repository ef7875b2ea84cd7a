"""Refuse tables in which something of the test could reach the training."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from histosynth.core.errors import DataError

_TOGETHER = {
    "patient": "patient(s)",
    "slide": "slide(s)",
    "duplicate_group": "group(s) of near-duplicates",
}


def check_no_straddling(table: pd.DataFrame) -> None:
    """Refuse a table in which a patient, a slide or a group of near-duplicates has tiles in two splits.

    A synthetic tile belongs to the tile that it was conditioned on (`reference`): both must be on one side, and
    that side is never the test. Nor are tiles of a `generator` in the test of a set that holds real tiles.

    Raises:
        DataError: names the first of them.
    """
    rows = table[table.kept & (table.split != "")]
    for column, what in _TOGETHER.items():
        if column not in rows:
            continue
        named = rows[rows[column].fillna("") != ""]
        sides = named.groupby(column).split.nunique()
        straddling = sides[sides > 1].index.tolist()
        if straddling:
            raise DataError(
                f"{len(straddling)} {what} have tiles in more than one split: {_some(straddling)}.",
                "Move all the tiles of each to one split, or drop the split column to have it made.",
            )
    _check_children(table)


def check_synthetic(real: pd.DataFrame, synthetic: pd.DataFrame, *, use: str = "train") -> None:
    """Refuse synthetic tiles that were conditioned on tiles which their use must not see.

    Args:
        real: table of the real tile set.
        synthetic: table of a synthetic one; `reference` holds ids of the real one, or "" where a tile was made
            from its label alone.
        use: the split that the synthetic tiles join; never "test".

    Raises:
        DataError: a reference in another split than `use`, one that was set aside or has no split (it may be a
            copy of a test tile), one that the real set does not have, or `use` is the test.
    """
    if use == "test":
        raise DataError("Synthetic tiles cannot join the test split.", "The test must hold real tiles alone.")
    children = _children(synthetic)
    side = real.split.where(real.split != "", "without a split").where(real.kept, "set aside")
    parent = children.reference.map(_by_id(side, real))
    unknown = children[parent.isna()]
    if len(unknown):
        raise DataError(
            f"{len(unknown)} synthetic tile(s) were conditioned on tiles that the real set does not have: "
            f"{_some(unknown.reference)}.",
            "Give the real tile set that the generator was conditioned on.",
        )
    wrong = children[parent != use]
    if len(wrong):
        pairs = [f"{row.id} from {row.reference} ({parent[row.Index]})" for row in wrong.itertuples()]
        raise DataError(
            f"{len(wrong)} synthetic tile(s) for {use} were conditioned on tiles outside {use}: {_some(pairs)}.",
            f"Make them again with references from {use} only.",
        )


def _check_children(table: pd.DataFrame) -> None:
    children = _children(table)
    on_test = pd.concat([children, _made_among_real(table)])
    on_test = on_test[on_test.split == "test"].drop_duplicates("id")
    remedy = "Keep synthetic tiles in train, conditioned on tiles of train."
    if len(on_test):
        raise DataError(f"{len(on_test)} synthetic tile(s) are in the test split: {_some(on_test.id)}.", remedy)
    # a tile that was set aside may be a copy of a test tile; one of another set is for `check_synthetic`
    parent = children.reference.map(_by_id(table.split.where(table.kept, "set aside"), table))
    apart = parent.notna() & (parent != "") & (children.split != "") & (parent != children.split)
    wrong = children[apart | (parent == "test")]
    if len(wrong):
        pairs = [
            f"{row.id} ({row.split or 'no split'}) from {row.reference} ({parent[row.Index]})"
            for row in wrong.itertuples()
        ]
        raise DataError(
            f"{len(wrong)} synthetic tile(s) are on another side than the tile they were conditioned on: "
            f"{_some(pairs)}.",
            remedy,
        )


def _children(table: pd.DataFrame) -> pd.DataFrame:
    if "reference" not in table:
        return table.iloc[:0].assign(reference="")
    return table[table.kept & (table.reference.fillna("") != "")]


def _made_among_real(table: pd.DataFrame) -> pd.DataFrame:
    """Tiles of generators in a set that also holds real ones."""
    if "generator" not in table:
        return table.iloc[:0]
    made = table.generator.fillna("") != ""
    return table[made & table.kept] if (table.kept & ~made).any() else table.iloc[:0]


def _by_id(values: pd.Series, table: pd.DataFrame) -> pd.Series:
    named = values.set_axis(table.id)
    return named[~named.index.duplicated()]


def _some(names: Iterable[object]) -> str:
    names = [str(n) for n in names]
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
