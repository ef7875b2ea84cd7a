"""The error family. Each message names the setting or file, the value it got, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HistosynthError(Exception):
    """Something that the user can mend. The command line prints it without a traceback and exits with 2."""

    def __init__(self, message: str, remedy: str = "") -> None:
        self.message, self.remedy = message, remedy
        super().__init__(f"{message} {remedy}".strip())


class SettingError(HistosynthError):
    """A setting has a value that cannot be used."""


class DataError(HistosynthError):
    """Tiles, tables or features cannot be used as they are."""


class CheckpointError(HistosynthError):
    """A checkpoint is missing, damaged, or of the wrong kind."""


class RunError(HistosynthError):
    """A run cannot start, go on, or be resumed."""


class PluginError(HistosynthError):
    """A part that another package provides cannot be loaded."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the nearest known names, or all of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    return f"Known: {', '.join(known)}." if known else "There are none."
