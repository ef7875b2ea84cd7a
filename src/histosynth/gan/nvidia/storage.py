"""The numbers of a tensor, from the bytes that torch writes inside a pickle (its format of before torch 1.6).

Those bytes are a stream of five small pickles (magic number, version, machine, type, keys) and then an element count
and the elements. Loading them with torch would unpickle again; here every size is compared with what is there, and
the elements are read as plain numbers.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Never

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
"""First value of every file that torch writes in that format."""
_VERSION = 1001
_TYPES = {
    "FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "BFloat16Storage": "<u2",
    "LongStorage": "<i8", "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "<i1",
    "ByteStorage": "<u1", "BoolStorage": "|b1",
}  # fmt: skip
STORAGE_NAMES = frozenset(("torch", name) for name in _TYPES)
"""The only names that the small pickles may hold."""
Fail = Callable[[str], Never]


@dataclass(frozen=True, slots=True)
class Storage:
    """The elements of one or more tensors, [count]."""

    values: np.ndarray


@dataclass(frozen=True, slots=True)
class Reference:
    """What a pickle says about a storage that lies outside of it."""

    kind: str
    key: str
    count: int


def read_storage(data: bytes, parts: Sequence[Any], start: int, fail: Fail) -> Storage:
    """The storage in `data`.

    Args:
        data: what torch wrote.
        parts: the values of its five pickles.
        start: where the last of them ends.
        fail: raises the error that is given as text.
    """
    magic, version, machine, reference, keys = parts
    if magic != MAGIC or version != _VERSION:
        fail("its tensor data does not begin as torch's")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        fail("its tensor data comes from a big-endian machine")
    if type(reference) is not Reference or keys != [reference.key]:
        fail("its tensor data refers to another storage")
    if len(data) < start + 8 or struct.unpack_from("<q", data, start)[0] != reference.count:
        fail("a storage gives two different element counts")
    return elements(memoryview(data)[start + 8 :], reference, fail)


def elements(data: bytes | memoryview, reference: Reference, fail: Fail) -> Storage:
    """The storage whose elements are exactly these bytes."""
    form = np.dtype(_TYPES[reference.kind])
    if reference.count < 0 or reference.count * form.itemsize != len(data):
        fail(f"a storage says it has {str(reference.count)[:24]} elements, and its data has {len(data)} bytes")
    values = np.frombuffer(data, form)
    if reference.kind == "BFloat16Storage":  # the upper half of a float32; numpy has no such type
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return Storage(values)


def strided(storage: Storage, offset: Any, size: Any, stride: Any, fail: Fail) -> np.ndarray:
    """A read-only view [size] of a storage; never larger than the storage."""
    numbers = [offset, *size, *stride] if isinstance(size, tuple) and isinstance(stride, tuple) else [-1]
    if len(numbers) > 17 or not all(type(n) is int and 0 <= n < 2**40 for n in numbers) or len(size) != len(stride):
        fail("a tensor has no proper size")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > len(storage.values) or (count and last >= len(storage.values)):
        fail(f"a tensor of size {size} does not fit into its storage of {len(storage.values)} elements")
    if not count:
        return np.empty(size, storage.values.dtype)
    step = storage.values.itemsize
    return np.lib.stride_tricks.as_strided(
        storage.values[offset:], size, tuple(s * step for s in stride), writeable=False
    )
