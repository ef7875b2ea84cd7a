"""Predictions as a CSV: split,image_path,y_true,y_pred,top1_conf,logits_json[,top1_conf_cal][,patient].

y_true and y_pred are indices of classes. Their names stand beside the CSV, in a file that ends in .classes.json: a CSV
without it can be read, and its classes are then called 0, 1, 2, ...
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from histosynth.classify.calibration import softmax
from histosynth.core.errors import DataError
from histosynth.core.files import atomic_path, read_json, write_json

_COLUMNS = ("split", "image_path", "y_true", "y_pred", "top1_conf", "logits_json")
_ONCE = "Give one row a tile: a tile that counts twice makes intervals too narrow, and one in two splits leaks."
_SLACK = 0.01  # confidences may come from half-precision arithmetic


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a classifier said of tiles.

    Attributes:
        split: str [N], such as val or test.
        paths: str [N], a name a tile, none twice.
        y: int64 [N], true classes.
        logits: float64 [N, K], without temperature.
        classes: K names.
        patients: str [N], or None where they are not known.
        notes: what was unusual in reading them.

    Raises:
        DataError: arrays that do not fit together, logits that are not finite, labels out of range, names twice.
    """

    split: np.ndarray
    paths: np.ndarray
    y: np.ndarray
    logits: np.ndarray
    classes: tuple[str, ...]
    patients: np.ndarray | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        for name in ("split", "paths", "patients"):
            if getattr(self, name) is not None:
                set_(self, name, np.asarray(getattr(self, name), dtype=object).astype(str))
        set_(self, "logits", np.asarray(self.logits, dtype=np.float64))
        set_(self, "y", np.asarray(self.y))
        set_(self, "classes", tuple(str(name) for name in self.classes))
        tiles = (len(self.y),)
        columns = [self.split, self.paths, self.y, *([] if self.patients is None else [self.patients])]
        if (
            not len(self.y)
            or self.logits.shape != (*tiles, len(self.classes))
            or any(c.shape != tiles for c in columns)
        ):
            raise DataError(
                f"{[c.shape for c in columns]} values and logits {self.logits.shape} for {len(self.classes)} classes.",
                "Give N of each, N > 0, and logits [N, K] for K classes.",
            )
        if not np.issubdtype(self.y.dtype, np.integer) or self.y.min() < 0 or self.y.max() >= len(self.classes):
            raise DataError(
                f"y has type {self.y.dtype}, from {self.y.min()} to {self.y.max()}, for {len(self.classes)} classes.",
                f"Use integers from 0 to {len(self.classes) - 1}.",
            )
        if not np.isfinite(self.logits).all():
            bad = int((~np.isfinite(self.logits)).any(axis=1).sum())
            raise DataError(f"The logits of {bad} tiles are not finite.", "Check the training: it may have diverged.")
        if len(set(self.classes)) != len(self.classes):
            raise DataError(f"A class is named twice: {', '.join(self.classes)}.", "Give each class its own name.")
        names, counts = np.unique(self.paths, return_counts=True)
        if counts.max() > 1:
            raise DataError(
                f"{int((counts > 1).sum())} tiles come more than once, such as {names[counts.argmax()]}.",
                _ONCE,
            )

    def __len__(self) -> int:
        return len(self.y)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits, in the order of the first tile of each."""
        return tuple(dict.fromkeys(self.split.tolist()))

    def of(self, split: str) -> Predictions:
        """The tiles of one split.

        Raises:
            DataError: there is none.
        """
        own = self.split == split
        if not own.any():
            raise DataError(f"No tile is of the split {split!r}.", f"There are: {', '.join(self.splits)}.")
        patients = None if self.patients is None else self.patients[own]
        return Predictions(
            self.split[own], self.paths[own], self.y[own], self.logits[own], self.classes, patients, self.notes
        )


def write_predictions(path: Path | str, predictions: Predictions, *, temperature: float | None = None) -> None:
    """Write the CSV, and beside it a JSON file with the names of the classes.

    Args:
        path: a name that ends in .csv.
        temperature: adds the column top1_conf_cal, the confidence of the logits divided by it.

    Raises:
        SettingError: a temperature that is not finite and above 0.
        DataError: the name ends otherwise.
        RunError: the folder cannot be written.
    """
    path = _named(path)
    confidence = softmax(predictions.logits).max(axis=1)
    scaled = None if temperature is None else softmax(predictions.logits, temperature).max(axis=1)
    write_json(path.with_suffix(".classes.json"), {"classes": list(predictions.classes), "temperature": temperature})
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        more = (["top1_conf_cal"] if scaled is not None else []) + (
            ["patient"] if predictions.patients is not None else []
        )
        writer.writerow([*_COLUMNS, *more])
        for i, logits in enumerate(predictions.logits):
            row = [predictions.split[i], predictions.paths[i], int(predictions.y[i]), int(logits.argmax())]
            row += [f"{confidence[i]:.6f}", json.dumps(logits.tolist())]
            if scaled is not None:
                row.append(f"{scaled[i]:.6f}")
            if predictions.patients is not None:
                row.append(predictions.patients[i])
            writer.writerow(row)


def read_predictions(path: Path | str, classes: Sequence[str] | None = None) -> Predictions:
    """Read the CSV that `write_predictions` or the prototype wrote; other columns are ignored.

    Args:
        path: the CSV.
        classes: names of the classes; None takes those of the JSON file beside it.

    Raises:
        DataError: it is missing, empty, or has anything in it that cannot be true: columns that lack, logits that
            are no list of numbers, or of two lengths, or not finite; labels out of range, a y_pred that is not the
            largest logit, a confidence that does not follow from the logits, tiles that come twice.
    """
    path = Path(path)
    rows = _rows(path)
    count = len(rows[0][1]["logits"])
    named, notes = _class_names(path, classes, count)
    patients = [row.get("patient") for _, row in rows]
    known = [p for p in patients if p]
    if known and len(known) < len(patients):
        line = next(line for line, row in rows if not row.get("patient"))
        _refuse(path, line, "patient is empty, and not empty elsewhere", "Name a patient for every tile, or for none.")
    seen: dict[str, int] = {}
    for line, row in rows:
        if len(row["logits"]) != count:
            _refuse(path, line, f"there are {len(row['logits'])} logits, and {count} in the first row",
                    "Give one logit a class in every row.")  # fmt: skip
        if row["image_path"] in seen:
            _refuse(path, line, f"{row['image_path']} stands in line {seen[row['image_path']]} already",
                    _ONCE)  # fmt: skip
        seen[row["image_path"]] = line
        _check_row(path, line, row, count)
    return Predictions(
        np.array([row["split"] for _, row in rows], dtype=object),
        np.array([row["image_path"] for _, row in rows], dtype=object),
        np.array([row["y_true"] for _, row in rows], dtype=np.int64),
        np.array([row["logits"] for _, row in rows], dtype=np.float64),
        named,
        np.array(patients, dtype=object) if known else None,
        tuple(notes),
    )


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line number and parsed fields of every row."""
    found: list[tuple[int, dict[str, Any]]] = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            header = reader.fieldnames or []
            missing = [name for name in _COLUMNS if name not in header]
            if missing:
                what = "is empty" if not header else f"lacks the columns {', '.join(missing)}"
                raise DataError(f"{path} {what}.", f"It needs the columns {','.join(_COLUMNS)}.")
            if len(set(header)) < len(header):
                raise DataError(f"{path} has a column twice: {','.join(header)}.", "Keep one of each name.")
            for raw in reader:
                line = reader.line_num
                if None in raw or None in raw.values():
                    _refuse(path, line, "the number of fields is not that of the header", "Write the file again.")
                found.append((line, _parsed(path, line, raw)))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.", "Check the path.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV: {error}.", "Write it as UTF-8 text with commas.") from error
    if not found:
        raise DataError(f"{path} has a header and no tile.", "Export the predictions again.")
    return found


def _parsed(path: Path, line: int, raw: dict[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {name: raw[name].strip() for name in ("split", "image_path")}
    for name, value in row.items():
        if not value:
            _refuse(path, line, f"{name} is empty", "Fill it in.")
    for name in ("y_true", "y_pred"):
        try:
            row[name] = int(raw[name])
        except ValueError:
            _refuse(path, line, f"{name} is {raw[name]!r}", "Give the index of a class, from 0.")
    try:
        logits = json.loads(raw["logits_json"])
    except (ValueError, RecursionError):
        _refuse(path, line, f"logits_json is no JSON: {raw['logits_json'][:40]!r}", "Give a list such as [1.5, -0.2].")
    good = isinstance(logits, list) and len(logits) > 1 and all(type(v) in (int, float) for v in logits)
    if not good:
        _refuse(path, line, f"logits_json is {raw['logits_json'][:40]!r}", "Give a list of two numbers or more.")
    row["logits"] = [float(v) for v in logits] if all(abs(v) < 1e300 for v in logits) else [np.nan]
    if not np.isfinite(row["logits"]).all():
        _refuse(path, line, "a logit is not finite", "Check the training: it may have diverged.")
    try:
        row["top1_conf"] = float(raw["top1_conf"])
    except ValueError:
        _refuse(path, line, f"top1_conf is {raw['top1_conf']!r}", "Give a number from 0 to 1.")
    row["patient"] = (raw.get("patient") or "").strip()
    return row


def _check_row(path: Path, line: int, row: dict[str, Any], count: int) -> None:
    logits = np.array(row["logits"])
    for name in ("y_true", "y_pred"):
        if not 0 <= row[name] < count:
            _refuse(path, line, f"{name} is {row[name]} for {count} classes", f"Use 0 to {count - 1}.")
    if logits[row["y_pred"]] < logits.max():
        _refuse(path, line, f"y_pred is {row['y_pred']} and the largest logit is that of {int(logits.argmax())}",
                "Export both from one network.")  # fmt: skip
    confidence = float(softmax(logits[None]).max())
    if not abs(row["top1_conf"] - confidence) <= _SLACK:
        _refuse(path, line, f"top1_conf is {row['top1_conf']:g} and the logits give {confidence:.4f}",
                "Export logits without softmax and temperature, and the confidence from them.")  # fmt: skip


def _class_names(path: Path, classes: Sequence[str] | None, count: int) -> tuple[tuple[str, ...], list[str]]:
    beside = path.with_suffix(".classes.json")
    if classes is None and beside.exists():
        found = read_json(beside)
        classes = found.get("classes") if isinstance(found, dict) else None
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise DataError(f"{beside} has no list classes.", "Give the names in it, or delete that file.")
    if classes is None:
        return tuple(map(str, range(count))), [f"No class names ({beside.name} is missing): they are called by number."]
    if len(classes) != count:
        raise DataError(f"{path} has {count} logits a tile for {len(classes)} classes.", "Give one name a logit.")
    return tuple(classes), []


def _named(path: Path | str) -> Path:
    if Path(path).suffix != ".csv":
        raise DataError(f"Predictions cannot be written to {path}.", "Give a name that ends in .csv.")
    return Path(path)


def _refuse(path: Path, line: int, what: str, remedy: str) -> NoReturn:
    raise DataError(f"{path}, line {line}: {what}.", remedy)
