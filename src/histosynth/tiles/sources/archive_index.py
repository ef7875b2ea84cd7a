"""Index the members of zip and tar archives, with every name and size checked, and read one member's bytes.

A tar is indexed by its 512-byte headers (POSIX.1-1988 ustar, POSIX.1-2001 pax, GNU long names). Both indexes
are strict: a damaged archive is an error and never a shorter list.
"""

from __future__ import annotations

import os
import re
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO

from histosynth.core.errors import DataError

CHUNK = 1 << 20
BLOCK = 512
_MAX_PART, _MAX_NAME = 255, 1024  # bytes; what usual file systems take
_JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini", "Icon\r"}


@dataclass(frozen=True)
class Limits:
    """What an archive may ask for; a bomb is refused before, or while, it unfolds."""

    members: int = 5_000_000
    """Most files in an archive."""
    member_bytes: int = 2 << 30
    """Largest file, unpacked."""
    total_bytes: int = 512 << 30
    """All files together, unpacked."""
    ratio: int = 200
    """Unpacked size over packed size, of the whole archive, once it exceeds `ratio_from`."""
    ratio_from: int = 256 << 20
    """Archives that unpack to less are never refused for their ratio."""


@dataclass(frozen=True)
class Member:
    """A file in an archive: where its bytes are."""

    name: str
    """Checked name with forward slashes."""
    size: int
    """Unpacked bytes."""
    offset: int
    """Where the data (tar) or the local header (zip) begins."""
    packed: int
    """Bytes in the archive."""
    crc: int = -1
    """CRC-32 of a zip member; -1 in a tar."""
    deflated: bool = False
    """Whether the bytes are a raw deflate stream."""


@dataclass
class Index:
    """The members of an archive, collected while names and limits are checked."""

    path: Path
    limits: Limits
    members: dict[str, Member] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    total: int = 0

    @cached_property
    def packed(self) -> int:
        """Bytes of the archive."""
        return self.path.stat().st_size

    def name(self, raw: str) -> str:
        """The checked name, "" for junk.

        Raises:
            DataError: an unsafe name.
        """
        try:
            return clean_name(raw)
        except ValueError as error:
            raise refuse(self.path, f"the name {raw[:80]!r} {error}") from None

    def add(self, member: Member) -> None:
        """Take a member in.

        Raises:
            DataError: its name is taken, or a limit is passed.
        """
        if member.name in self.members:
            raise refuse(self.path, f"two files are called {member.name!r}")
        if member.size > self.limits.member_bytes:
            most = self.limits.member_bytes
            raise refuse(self.path, f"{member.name!r} has {member.size} bytes; the limit is {most} a file")
        self.total += member.size
        check_total(self.path, self.total, self.packed, self.limits)
        self.members[member.name] = member
        if len(self.members) > self.limits.members:
            raise refuse(self.path, f"it has more files than the limit of {self.limits.members}")


def clean_name(name: str) -> str:
    """A member's name with forward slashes and without "." parts, or "" for junk and hidden files.

    Raises:
        ValueError: a name that could leave the folder, or that a file system or a table cannot hold.
    """
    text = name.replace("\\", "/")
    if text.startswith("/") or re.match(r"[A-Za-z]:", text):
        raise ValueError("is an absolute path")
    parts = [p for p in text.split("/") if p not in ("", ".")]
    if ".." in parts:
        raise ValueError("leaves the folder")
    joined = "/".join(parts)
    if joined.startswith(".") or "/." in joined or not _JUNK.isdisjoint(parts):
        return ""
    if not text.isprintable() and any(unicodedata.category(c) in ("Cc", "Cs", "Cf") for c in text):
        raise ValueError("has characters that cannot be shown")
    if len(joined.encode()) > _MAX_NAME or any(len(p.encode()) > _MAX_PART for p in parts):
        raise ValueError("is too long")
    return joined


def refuse(path: Path, what: str, remedy: str = "Pack the tiles again as plain files.") -> DataError:
    return DataError(f"The archive {path} is refused: {what}.", remedy)


def check_total(path: Path, total: int, packed: int, limits: Limits) -> None:
    if total > limits.total_bytes:
        raise refuse(path, f"it unpacks to more than {limits.total_bytes} bytes, the limit")
    if total > limits.ratio_from and total > limits.ratio * packed:
        raise refuse(path, f"it unpacks to more than {limits.ratio} times its size, the limit")


def index_zip(path: Path, limits: Limits) -> Index:
    """The members of a zip."""
    index = Index(path, limits)
    taken = 0
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    for info in infos:
        name = index.name(info.orig_filename if "\x00" in info.orig_filename else info.filename)
        kind = info.external_attr >> 28 if info.create_system == 3 else 0  # the file type of a Unix mode
        if kind not in (0, 4, 8):
            raise refuse(path, f"{info.filename[:80]!r} is a link or a device")
        if info.flag_bits & 0x41:
            raise refuse(path, f"{info.filename[:80]!r} is encrypted", "Unpack it with its password first.")
        if not name:
            continue
        if info.filename.endswith(("/", "\\")):
            index.folders.add(name)
            continue
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refuse(path, f"{name!r} is packed with method {info.compress_type}", "Pack it as a plain zip.")
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        taken += info.compress_size
        index.add(Member(name, info.file_size, info.header_offset, info.compress_size, info.CRC, deflated))
    if taken > index.packed:
        raise refuse(path, "its files overlap, as those of a bomb do")
    return index


def chunks(stream: IO[bytes], member: Member) -> Iterator[bytes]:
    """The unpacked bytes of a member; never more than it declares."""
    stream.seek(member.offset)
    if member.crc >= 0:
        header = stream.read(30)
        if header[:4] != b"PK\x03\x04" or len(header) < 30:
            raise ValueError("its local header is missing")
        stream.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)
    inflate = zlib.decompressobj(-15) if member.deflated else None
    left, size, crc, held = member.packed, 0, 0, b""
    while left or held:
        data = held or stream.read(min(left, CHUNK))
        if not data:
            raise EOFError("it ends too early")
        left -= 0 if held else len(data)
        held = b""
        if inflate:
            data = inflate.decompress(data, CHUNK)
            held = inflate.unconsumed_tail
            if inflate.eof:
                left, held = 0, b""
        size += len(data)
        if size > member.size:
            raise ValueError(f"it unpacks to more than the {member.size} bytes that it declares")
        crc = zlib.crc32(data, crc)
        yield data
    if size != member.size:
        raise EOFError(f"it has {size} of {member.size} bytes")
    if member.crc not in (-1, crc):
        raise ValueError("its checksum is wrong")


def index_tar(path: Path, stored: Path, limits: Limits) -> Index:
    """The members of an uncompressed tar.

    Args:
        path: the archive, for messages.
        stored: the plain tar.
        limits: what the archive may ask for.
    """
    index = Index(path, limits)
    length = stored.stat().st_size
    long_name, pax, place = "", {}, 0
    with open(stored, "rb") as stream:
        while True:
            stream.seek(place)
            header = stream.read(BLOCK)
            if place and not header.strip(b"\0"):
                break
            kind, size, raw = _parse_header(header, first=place == 0)
            size = int(pax.get("size", size))
            data, place = place + BLOCK, place + BLOCK + -(-size // BLOCK) * BLOCK
            if size < 0 or data + size > length:
                raise EOFError(f"it ends in the middle of {raw[:80]!r}")
            if kind in "LKxgX":  # extended headers describe the member that follows
                if size > CHUNK:
                    raise ValueError("it has an extended header of absurd size")
                text = stream.read(size)
                if kind == "L":
                    long_name = text.split(b"\0")[0].decode("utf-8", "surrogateescape")
                elif kind in "xX":
                    pax = _parse_pax(text)
                continue
            raw = pax.get("path") or long_name or raw
            sparse = kind == "S" or any(key.startswith("GNU.sparse") for key in pax)
            long_name, pax = "", {}
            name = index.name(raw)
            if kind not in "\x00075" or sparse:
                what = "a sparse file" if sparse else "a link, a device, or of an unknown kind"
                raise refuse(path, f"{raw[:80]!r} is {what}")
            if not name:
                continue
            if kind == "5" or raw.endswith("/"):
                index.folders.add(name)
            else:
                index.add(Member(name, size, data, size))
    if not header:
        raise EOFError("it has no end mark, so a part may be missing")
    return index


def _parse_header(header: bytes, first: bool) -> tuple[str, int, str]:
    """(type, size, name) of a tar header."""
    what = "it is no zip or tar archive" if first else "a header is damaged"
    if len(header) < BLOCK:
        raise EOFError("it ends in the middle of a header")
    try:
        wanted = _number(header[148:156])
        size = _number(header[124:136])
    except ValueError:
        raise ValueError(what) from None
    if wanted != sum(header) - sum(header[148:156]) + 8 * 32:
        raise ValueError(what)
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0")[0]):
        name = prefix + b"/" + name
    return chr(header[156]), size, name.decode("utf-8", "surrogateescape")


def _number(text: bytes) -> int:
    if text[0] in (0x80, 0xFF):  # GNU: binary, big-endian; 0xff marks a negative one
        return int.from_bytes(text[1:], "big") * (1 if text[0] == 0x80 else -1)
    return int(text.strip(b"\0 ") or b"0", 8)


def _parse_pax(text: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    text, place = text.rstrip(b"\0"), 0
    while place < len(text):
        space = text.find(b" ", place, place + 20)
        end = place + int(text[place:space]) if space > 0 else 0
        key, equals, value = text[space + 1 : end].partition(b"=")
        if not equals or end > len(text) or not value.endswith(b"\n"):
            raise ValueError("an extended header is damaged")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        place = end
    return records
