"""Names and colours of classes: known tables as data, your own tables, and a colour for any other class."""

from __future__ import annotations

import colorsys
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from histosynth.core.errors import DataError, SettingError, did_you_mean

_KEYS = {"name", "colour", "also"}


@dataclass(frozen=True)
class ClassInfo:
    """A class as people know it."""

    label: str
    """Short code: the name of its folder, or its value in the column `label`."""
    name: str
    """What it is, in words."""
    colour: str
    """#RRGGBB for figures; "" = an evenly spaced hue."""


def _table(entries: Any, where: str) -> dict[str, ClassInfo]:
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{where} is no table of classes.", "Write LABEL: {name: ..., colour: '#RRGGBB'} a class.")
    table: dict[str, ClassInfo] = {}
    for label, entry in entries.items():
        entry = {"name": entry} if isinstance(entry, str) else entry or {}
        if not isinstance(entry, dict):
            raise DataError(f"{where}: class {label!r} has {entry!r}.", "Write {name: ..., colour: '#RRGGBB'}.")
        if unknown := sorted(set(map(str, entry)) - _KEYS):
            raise DataError(f"{where}: class {label!r} has the key {unknown[0]!r}.", did_you_mean(unknown[0], _KEYS))
        colour, also = str(entry.get("colour", "")), entry.get("also", [])
        if colour and not re.fullmatch(r"#[0-9A-Fa-f]{6}", colour):
            raise DataError(f"{where}: class {label!r} has the colour {colour!r}.", "Write it as '#RRGGBB'.")
        if not isinstance(also, list):
            raise DataError(f"{where}: class {label!r} has also: {also!r}.", "Write a list of spellings.")
        for spelling in (label, *also):
            if str(spelling) in table:
                raise DataError(f"{where} has {str(spelling)!r} twice.", "Keep one of them.")
            table[str(spelling)] = ClassInfo(str(label), str(entry.get("name", label)), colour.upper())
    return table


def _load(path: Path) -> Any:
    try:
        # BaseLoader makes strings only: the class NO stays "NO" and is not false
        return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"The table of classes {path} cannot be read: {error}.", "Write it as YAML.") from error


_SPELLINGS = {
    name: _table(entries, f"class_tables.yaml: {name}")
    for name, entries in _load(Path(__file__).with_name("class_tables.yaml")).items()
}
CLASS_TABLES: dict[str, dict[str, ClassInfo]] = {
    name: {label: info for label, info in table.items() if label == info.label} for name, table in _SPELLINGS.items()
}
"""The known tables, {name: {label: ClassInfo}}."""


def load_class_table(name: str) -> dict[str, ClassInfo]:
    """A known table by name, or your own from a YAML file {LABEL: {name, colour}}; by label and other spellings.

    Raises:
        SettingError: neither a known table nor a file.
        DataError: the file is no table of classes.
    """
    if name in _SPELLINGS:
        return _SPELLINGS[name]
    path = Path(name)
    if not path.is_file():
        raise SettingError(
            f"class_table is {name!r}, neither a known table nor a YAML file.", did_you_mean(name, CLASS_TABLES)
        )
    return _table(_load(path), str(path))


def class_entry(label: str, index: int, count: int, table: dict[str, ClassInfo] | None = None) -> dict[str, str]:
    """Label, name and colour of a class: from a table, or else the label itself and an evenly spaced hue.

    Args:
        label: the class.
        index: its place among the classes of the set.
        count: number of classes of the set.
        table: where to look; all known tables by default.
    """
    tables = _SPELLINGS.values() if table is None else [table]
    info = next((t[label] for t in tables if label in t), ClassInfo(label, label, ""))
    red, green, blue = colorsys.hls_to_rgb(index / max(count, 1), 0.45, 0.65)
    hue = f"#{round(red * 255):02X}{round(green * 255):02X}{round(blue * 255):02X}"
    return {"label": label, "name": info.name, "colour": info.colour or hue}
