"""Zip and tar archives from anywhere: read in place or unpacked, with every name and size checked first."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import shutil
import struct
import tempfile
import unicodedata
import uuid
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from histosynth.core.errors import DataError, RunError
from histosynth.core.files import ensure_folder, explain_os_error
from histosynth.tiles.sources.archive_index import (
    BLOCK,
    CHUNK,
    Index,
    Limits,
    Member,
    check_total,
    chunks,
    index_tar,
    index_zip,
    refuse,
)

__all__ = ["Archive", "Limits", "is_archive", "open_archive", "unpack"]

_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".rar", ".7z")
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_OTHERS = {b"Rar!": "RAR", b"7z\xbc\xaf": "7-Zip", b"\x28\xb5\x2f\xfd": "Zstandard"}


# what the decompressors and zipfile raise for damaged data; MemoryError for a dictionary of absurd size
_DAMAGE = (
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, IndexError,
    struct.error, NotImplementedError, OverflowError, MemoryError,
)  # fmt: skip


@dataclass
class Archive:
    """The files of a zip or an uncompressed tar, with random access. Can be pickled; holds no open file.

    Attributes:
        path: the archive, named in messages.
        members: files by name; junk of operating systems and hidden files are left out.
        folders: names of the folders it lists, empty ones included.
        stored: where the bytes are; not `path` for a compressed tar, which is decompressed to a plain one.
    """

    path: Path
    members: dict[str, Member]
    folders: set[str]
    stored: Path

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            DataError: no such file, or its bytes are damaged.
        """
        member = self.members.get(name)
        if member is None:
            raise DataError(f"{self.path} holds no file {name!r}.", "Check the path in the table.")
        with _explained(self.path, name), open(self.stored, "rb") as stream:
            return b"".join(chunks(stream, member))


def is_archive(path: Path) -> bool:
    """Whether the file begins, or is called, like an archive (also of a kind that cannot be read)."""
    head = _head(path)
    known = (b"PK\x03\x04", b"PK\x05\x06", *_COMPRESSED, *_OTHERS)
    return head.startswith(known) or head[257:262] == b"ustar" or path.suffix.lower() in _SUFFIXES


def open_archive(path: Path | str, *, cache: Path | str | None = None, limits: Limits = Limits()) -> Archive:
    """Index an archive for reading in place.

    Args:
        path: .zip, .tar, or .tar compressed with gzip, bzip2 or xz (told by content).
        cache: folder in which a compressed tar is kept decompressed, for the next call too; without it, a
            temporary file that goes with the archive object.
        limits: what the archive may ask for.

    Raises:
        DataError: missing, damaged, encrypted, of an unknown kind, over a limit, or with an unsafe name.
    """
    path = Path(path)
    if _head(path).startswith(b"PK"):
        with _explained(path):
            return _archive(index_zip(path, limits), path)
    opener = _opener(path)
    if opener is None:
        with _explained(path):
            return _archive(index_tar(path, path, limits), path)
    folder = Path(tempfile.mkdtemp(prefix="histosynth-")) if cache is None else ensure_folder(cache)
    archive = None
    try:
        plain = _decompressed(path, opener, folder, limits)
        with _explained(path):
            archive = _archive(index_tar(path, plain, limits), plain)
    finally:
        if cache is None and archive is None:
            shutil.rmtree(folder, ignore_errors=True)
    if cache is None:  # a forked worker must not remove the file of its parent
        weakref.finalize(archive, _remove_if_owner, folder, os.getpid())
    return archive


def _archive(index: Index, stored: Path) -> Archive:
    return Archive(index.path, index.members, index.folders, stored)


def unpack(path: Path | str, folder: Path | str, *, limits: Limits = Limits()) -> Path:
    """Unpack an archive into a new folder: all of it or nothing, and nothing outside that folder.

    Returns:
        The folder.

    Raises:
        DataError: as `open_archive`, or two names that are one file on some systems.
        RunError: the folder is not empty, or cannot be written.
    """
    path, folder = Path(path), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"The folder {folder} already exists and is not empty.", "Choose a new or empty folder.")
    ensure_folder(folder.parent)
    temporary = folder.parent / f".{folder.name[:40]}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir()
        archive = open_archive(path, cache=temporary / "tar", limits=limits)
        _check_collisions(path, archive)
        inside = temporary / "files"
        for name in sorted(archive.folders):
            (inside / name).mkdir(parents=True, exist_ok=True)
        inside.mkdir(exist_ok=True)
        with open(archive.stored, "rb") as stream:
            for member in archive.members.values():
                target = inside / member.name
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "xb") as out, _explained(path, member.name):
                    for data in chunks(stream, member):
                        _write(out, data, target)
        if folder.is_dir():
            folder.rmdir()
        os.replace(inside, folder)
    except OSError as error:
        raise explain_os_error(error, f"Cannot unpack {path} into {folder}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _head(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise DataError(f"{path} does not exist or is not a file.", "Check the path.")
        with open(path, "rb") as stream:
            return stream.read(BLOCK)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.", "Check its permissions.") from error


def _opener(path: Path) -> Callable[..., Any] | None:
    head = _head(path)
    for magic, kind in _OTHERS.items():
        if head.startswith(magic):
            raise DataError(f"{path} is a {kind} archive, which is not read here.", "Unpack it, or pack it as zip.")
    return next((opener for magic, opener in _COMPRESSED.items() if head.startswith(magic)), None)


@contextmanager
def _explained(path: Path, name: str = "") -> Iterator[None]:
    where = f"{name!r} in {path}" if name else str(path)
    try:
        yield
    except OSError as error:  # gzip's BadGzipFile among them
        raise DataError(f"{where} cannot be read: {error}.", "Get the archive again.") from error
    except _DAMAGE as error:
        raise DataError(f"{where} is damaged: {error or type(error).__name__}.", "Get the archive again.") from error


def _decompressed(path: Path, opener: Callable[..., IO[bytes]], folder: Path, limits: Limits) -> Path:
    """A compressed tar as a plain one in `folder`; one that is there already is used again."""
    state = path.stat()
    stem = re.sub(r"[^\w.-]", "_", path.name)[:60]
    target = folder / f"{stem}-{state.st_size}-{state.st_mtime_ns}.tar"
    if target.is_file():
        return target
    temporary = folder / f".{uuid.uuid4().hex[:8]}.tmp"
    total = 0
    try:
        with open(temporary, "wb") as out, _explained(path), opener(path) as stream:
            while data := stream.read(CHUNK):
                total += len(data)
                check_total(path, total, state.st_size, limits)
                _write(out, data, target)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _write(out: IO[bytes], data: bytes, target: Path) -> None:
    try:
        out.write(data)
    except OSError as error:  # a full disk is not a damaged archive
        raise explain_os_error(error, f"Cannot write {target}") from error


def _remove_if_owner(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _check_collisions(path: Path, archive: Archive) -> None:
    """Refuse names that are one file where case or Unicode composition does not count, and files used as folders."""
    files: dict[str, str] = {}
    for name in archive.members:
        key = _folded(name)
        if key in files:
            raise refuse(path, f"{files[key]!r} and {name!r} are the same file on some systems")
        files[key] = name
    spellings: dict[str, str] = {}
    for folder in _parents([*archive.members, *(f"{f}/x" for f in archive.folders)]):
        key = _folded(folder)
        if key in files:
            raise refuse(path, f"{files[key]!r} is both a file and a folder")
        if spellings.setdefault(key, folder) != folder:
            raise refuse(path, f"{spellings[key]!r} and {folder!r} are the same folder on some systems")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _parents(names: Iterable[str]) -> set[str]:
    found = set()
    for name in names:
        while "/" in name:
            name = name.rpartition("/")[0]
            found.add(name)
    return found
