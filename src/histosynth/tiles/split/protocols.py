"""Published splits: which collection trains and which one tests. A new one is a line in the table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatch

import pandas as pd

from histosynth.core.errors import DataError, SettingError, did_you_mean

_ARCHIVE = re.compile(r"\.(zip|tar|tgz|tar\.(gz|bz2|xz))$", re.IGNORECASE)


@dataclass(frozen=True)
class Protocol:
    """A published split, by the names of the folders or archives that tiles come from."""

    title: str
    """What it is, for people."""
    train: tuple[str, ...]
    """Collections to train on, as shell patterns; validation is carved out of them."""
    test: tuple[str, ...]
    """Collections to test on."""
    twins: tuple[tuple[str, str], ...] = ()
    """Collections that hold the same tiles under the same file names, such as two stainings."""


PROTOCOLS: dict[str, Protocol] = {
    # Kather, Halama and Marx 2018, Zenodo 1214456: the 7K tiles are of other patients than the 100K
    "nct-crc": Protocol(
        title="train and validation from NCT-CRC-HE-100K, test CRC-VAL-HE-7K",
        train=("NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM"),
        test=("CRC-VAL-HE-7K",),
        twins=(("NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM"),),
    ),
}


def protocol_named(name: str) -> Protocol:
    """A protocol of the table.

    Raises:
        SettingError: there is none of this name.
    """
    if name not in PROTOCOLS:
        raise SettingError(f"protocol is {name!r}.", did_you_mean(name, PROTOCOLS))
    return PROTOCOLS[name]


def protocol_sides(rows: pd.DataFrame, protocol: Protocol) -> pd.Series:
    """ "train" or "test" for each row, by its `origin`.

    Raises:
        DataError: no column `origin`, an origin that the protocol does not know, or a side without tiles.
    """
    if "origin" not in rows:
        raise DataError(
            "The tiles do not say which collection they come from (column origin).",
            f"Prepare them from the collections themselves: {', '.join(protocol.train + protocol.test)}.",
        )
    known = {origin: _side(origin, protocol) for origin in rows.origin.unique()}
    strange = sorted(str(origin) for origin, side in known.items() if not side)
    if strange:
        raise DataError(
            f"The protocol has no place for tiles from {', '.join(map(repr, strange[:5]))}.",
            f"It trains on {', '.join(protocol.train)} and tests on {', '.join(protocol.test)}.",
        )
    for side in ("train", "test"):
        if side not in known.values():
            raise DataError(f"There are no tiles to {side} on.", f"Add {' or '.join(getattr(protocol, side))}.")
    return rows.origin.map(known)


def twin_names(rows: pd.DataFrame, protocol: Protocol) -> pd.Series:
    """For each row a name that it shares with its twins in other collections, or ""."""
    names = pd.Series("", index=rows.index, dtype=object)
    stem = rows.source.str.rsplit("/", n=1).str[-1].str.rsplit(".", n=1).str[0]
    for pair in protocol.twins:
        inside = rows.origin.map(lambda origin, pair=pair: any(_matches(origin, name) for name in pair))
        shared = stem[inside & stem.ne("")]
        shared = shared[shared.duplicated(keep=False)]
        names[shared.index] = "twin " + shared
    return names


def _side(origin: object, protocol: Protocol) -> str:
    for side in ("train", "test"):
        if any(_matches(origin, pattern) for pattern in getattr(protocol, side)):
            return side
    return ""


def _matches(origin: object, pattern: str) -> bool:
    return fnmatch(_ARCHIVE.sub("", str(origin)).lower(), pattern.lower())
