"""Pickles put together byte by byte, for what Python itself would not write."""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from typing import Any

ops = {o.name: o.code.encode("latin-1") for o in pickletools.opcodes}


def text(value: str) -> bytes:
    data = value.encode()
    return ops["BINUNICODE"] + struct.pack("<I", len(data)) + data


def raw(data: bytes) -> bytes:
    return ops["BINBYTES"] + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + ops["STACK_GLOBAL"]


def old_name(module: str, attribute: str) -> bytes:
    return ops["GLOBAL"] + f"{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + ops["MARK"] + b"".join(arguments) + ops["TUPLE"] + ops["REDUCE"]


def whole(body: bytes, protocol: int = 4) -> bytes:
    return ops["PROTO"] + bytes([protocol]) + body + ops["STOP"]


class Run:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.pair = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.pair


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data)
    return buffer.getvalue()
