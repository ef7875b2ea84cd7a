"""Files that are either whole or absent: write to a temporary name beside the target, then rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from histosynth.core.errors import DataError, RunError

_REMEDIES = {
    errno.ENOSPC: "Free some space on that disk, then repeat the command: finished parts are kept.",
    errno.EDQUOT: "Your disk quota is used up; free some space, then repeat the command.",
    errno.EACCES: "Choose a folder that you may write to (--out).",
    errno.EPERM: "Choose a folder that you may write to (--out).",
    errno.EROFS: "That file system is read-only; choose another folder (--out).",
    errno.ENOTDIR: "A part of that path is a file; choose another folder (--out).",
    errno.ENAMETOOLONG: "Choose a shorter path (--out).",
}


def explain_os_error(error: OSError, what: str) -> RunError:
    """An operating-system error as a `RunError` that names the file and the remedy."""
    remedy = _REMEDIES.get(error.errno or 0, "Check the path and its permissions.")
    return RunError(f"{what}: {error.strerror or error}.", remedy)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` on success, remove it on any failure.

    Raises:
        RunError: the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem[:40]}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
        os.replace(temporary, path)
    except OSError as error:
        raise explain_os_error(error, f"Cannot write {path}") from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the first error is the one to report


@lru_cache(maxsize=1)
def _umask() -> int:
    mask = os.umask(0)  # can only be read by setting it
    os.umask(mask)
    return mask


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def new_array(path: Path | str, shape: tuple[int, ...], dtype: Any) -> Any:
    """A new .npy file as a writable memory map, with its space on the disk reserved.

    Without the reservation a disk that fills up later ends the process with a bus error.
    """
    import numpy as np

    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, Path(path).stat().st_size)
    return array


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused, since other readers refuse them."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read JSON.

    Raises:
        DataError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.", "Check the path.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.", "Restore or delete that file.") from error


def sha256_file(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def ensure_folder(path: Path | str) -> Path:
    """Make a folder and prove that it can be written to, before hours of work depend on it.

    Raises:
        RunError: it cannot be made or written.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise explain_os_error(error, f"Cannot write to the folder {path}") from error
    return path
