"""Unpack a RAR archive with a program of the system: its decompression is free to use, but not free to rewrite."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import uuid
from pathlib import Path

from histosynth.core.errors import DataError, RunError
from histosynth.core.files import ensure_folder, explain_os_error

_MAGIC = b"Rar!\x1a\x07"
# in order of how carefully they treat the names in an archive
_TOOLS = {
    "bsdtar": ("-x", "-f", "{archive}", "-C", "{folder}"),
    "unar": ("-quiet", "-no-directory", "-output-directory", "{folder}", "{archive}"),
    "7zz": ("x", "-y", "-bd", "-o{folder}", "{archive}"),
    "7z": ("x", "-y", "-bd", "-o{folder}", "{archive}"),
    "unrar": ("x", "-y", "-idq", "{archive}", "{folder}/"),
}


def is_rar(path: Path) -> bool:
    """Whether the file is a RAR archive, or, when it is not there yet, will be one by its name."""
    if not path.is_file():
        return path.suffix.lower() == ".rar"
    with open(path, "rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


def unrar_tool(out: Path) -> tuple[str, tuple[str, ...]]:
    """(program, arguments) to unpack a RAR archive.

    Raises:
        RunError: the system has none of the programs.
    """
    for name, arguments in _TOOLS.items():
        program = shutil.which(name)
        if program:
            return program, arguments
    tar = shutil.which("tar")
    if tar and b"bsdtar" in subprocess.run([tar, "--version"], capture_output=True, check=False).stdout:
        return tar, _TOOLS["bsdtar"]  # the tar of macOS and Windows
    raise RunError(
        f"The archive is a RAR, and none of {', '.join(_TOOLS)} is there to unpack it into {out}.",
        "Install one (Debian, Ubuntu: apt install libarchive-tools; conda: conda install libarchive).",
    )


def unpack_rar(archive: Path, folder: Path) -> Path:
    """Unpack into a new folder: all of it or nothing, plain files only.

    Raises:
        DataError: damaged, or with links in it.
        RunError: no program to unpack it, or the folder cannot be written.
    """
    program, arguments = unrar_tool(folder)
    ensure_folder(folder.parent)
    temporary = (folder.parent / f".{folder.name[:40]}.{uuid.uuid4().hex[:8]}.tmp").absolute()
    filled = [a.format(archive=archive.absolute(), folder=temporary) for a in arguments]
    try:
        temporary.mkdir()
        result = subprocess.run(
            [program, *filled], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
        if result.returncode:
            said = (result.stderr or result.stdout).strip()[-300:]
            raise DataError(
                f"{program} cannot unpack {archive} (exit {result.returncode}): {said}",
                "It may be too old for this archive: install another one (bsdtar, unar, 7z, unrar), or remove the "
                "archive and download it again.",
            )
        _check_plain(archive, temporary)
        os.replace(temporary, folder)
    except OSError as error:
        raise explain_os_error(error, f"Cannot unpack {archive} into {folder}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check_plain(archive: Path, folder: Path) -> None:
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            mode = os.lstat(Path(parent) / name).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise DataError(f"The archive {archive} is refused: {name!r} is a link.", "Unpack it by hand.")
