"""A network pickle as plain values, without any of the code that it holds.

NVIDIA's pickles carry the source code of their classes, to be executed while loading. Here a short table of names,
each with its own harmless meaning (`_MEANINGS`), says what a pickle may refer to; the source code is dropped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from histosynth.core.errors import CheckpointError
from histosynth.gan.nvidia.opcodes import Bounded, Machine, Name, shortened
from histosynth.gan.nvidia.storage import STORAGE_NAMES, Reference, Storage, read_storage, strided

MAX_BYTES = 2**31
"""Largest file that is read; the largest official network (1024 px) has 0.4 GB."""
MAX_VERSION = 6
"""Newest version of NVIDIA's `persistence` whose fields are known."""
Resolve = Callable[[Reference], Storage]
_FORMS = re.compile(r"[<|=]?(f[248]|[iu][1248]|b1)")
_KIND = "kind of storage"


@dataclass(frozen=True, slots=True)
class Persistent:
    """An object that NVIDIA's `persistence` wrote: its class name and attributes. Its source code is dropped."""

    class_name: str
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """A numpy dtype, such as f8, or an array whose values do not matter (`whole`)."""

    code: str
    whole: bool = False


def read_pickle(path: Path) -> Any:
    """The value in a pickle: dicts, lists, tuples, sets, text, numbers, numpy arrays (tensors), `Persistent`, `Form`.

    Raises:
        CheckpointError: the file is too large, damaged, or asks for anything that NVIDIA's pickles do not.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise CheckpointError(f"{path} has {size} bytes.", f"Networks of up to {MAX_BYTES} bytes are read.")
    with open(path, "rb") as stream:
        return read_stream(stream, size, path)


def read_stream(stream: BinaryIO, size: int, path: Path, resolve: Resolve | None = None) -> Any:
    """The value of the one pickle in a stream of `size` bytes.

    Args:
        stream: at its start.
        size: bytes in it.
        path: for messages.
        resolve: gives the storages that lie outside; without it the pickle must hold its tensor data itself.

    Raises:
        CheckpointError: as `read_pickle`.
    """
    # a file uses each of its bytes once, or twice in old protocols
    machine = _Reader(Bounded(stream, size), path, 2 * size, resolve)
    value = machine.run()
    if machine.stream.left():
        machine.fail(f"{machine.stream.left()} bytes follow its end")
    return value


class _StorageMachine(Machine):
    """One of the small pickles before tensor data: they name kinds of storage and call nothing."""

    def meaning(self, module: str, name: str) -> str | None:
        return _KIND if (module, name) in STORAGE_NAMES else None

    def resolve(self, reference: Any) -> Any:
        if type(reference) is not tuple or not 5 <= len(reference) <= 6 or any(reference[5:]):
            self.fail("it refers to something that is no storage")
        mark, kind, key, _, count = reference[:5]
        if mark != "storage" or type(kind) is not Name or kind.meaning != _KIND:
            self.fail("it refers to something that is no storage")
        if type(key) is not str or type(count) is not int:
            self.fail("it refers to a storage without a key or a length")
        return Reference(kind.name, key, count)


class _Reader(_StorageMachine):
    """A pickle of networks; the methods `_make_...` take the arguments of the call."""

    def __init__(self, stream: Bounded, path: Path, budget: int, outside: Resolve | None) -> None:
        super().__init__(stream, path, budget)
        self.outside = outside

    def meaning(self, module: str, name: str) -> str | None:
        if (module, name) == ("dnnlib.tflib.network", "Network"):
            raise CheckpointError(
                f"{self.path} is a network of the TensorFlow StyleGAN.",
                "Convert it to PyTorch first, with legacy.py of NVIDIA's stylegan2-ada-pytorch.",
            )
        if self.outside is not None and (module, name) in STORAGE_NAMES:
            return _KIND
        packaged = _PACKAGED.fullmatch(module)
        return _MEANINGS.get(f"{packaged[1] if packaged else _OLD_MODULES.get(module, module)}.{name}")

    def resolve(self, reference: Any) -> Any:
        if self.outside is None:
            self.fail("it refers to an object outside of itself")
        return self.outside(super().resolve(reference))

    def call(self, function: Name, arguments: tuple[Any, ...]) -> Any:
        maker = _MAKERS.get(function.meaning)
        if maker is None:
            self.fail(f"it calls {function.module}.{function.name}")
        return maker(self, arguments)

    def new(self, kind: Name, arguments: tuple[Any, ...]) -> Any:
        if kind.meaning != "dict":
            self.fail(f"it makes a {kind.module}.{kind.name}")
        return self._make_dict(arguments)

    def set_state(self, target: Any, state: Any) -> None:
        if type(target) is dict and type(state) is dict:
            return  # attributes of an OrderedDict: torch keeps the versions of modules there
        if type(target) is not Form or type(state) is not tuple:
            self.fail(f"it sets the state of a {type(target).__name__}")
        if target.whole:  # (version, shape, dtype, order, values); what they hold is of no use here
            if len(state) != 5 or type(state[4]) is not bytes:
                self.fail("it holds an array of objects")
        elif len(state) < 2 or state[1] not in ("<", "|", "="):
            self.fail("it holds numbers of a big-endian machine")

    def _make_persistent(self, arguments: tuple[Any, ...]) -> Persistent:
        meta = arguments[0] if len(arguments) == 1 else None
        if type(meta) is not dict or set(meta) != {"type", "version", "module_src", "class_name", "state"}:
            self.fail("a persistent object does not have the fields that NVIDIA's have")
        if meta["type"] != "class" or type(meta["version"]) is not int or not 0 < meta["version"] <= MAX_VERSION:
            self.fail(
                f"a persistent object is of version {shortened(meta['version'])}, and 1 to {MAX_VERSION} are known"
            )
        state = meta["state"]
        if type(meta["class_name"]) is not str or type(state) is not dict or not all(type(k) is str for k in state):
            self.fail("a persistent object has no class name or no state")
        self.spend(len(state))
        return Persistent(meta["class_name"], state)

    def _make_tensor(self, arguments: tuple[Any, ...]) -> np.ndarray:
        if not 6 <= len(arguments) <= 7 or type(arguments[0]) is not Storage or any(arguments[6:]):
            self.fail("a tensor is not made of a storage, a size and a stride")
        return strided(*arguments[:4], self.fail)

    def _make_parameter(self, arguments: tuple[Any, ...]) -> np.ndarray:
        if len(arguments) != 3 or type(arguments[0]) is not np.ndarray or arguments[2]:
            self.fail("a parameter is not made of a tensor")
        return arguments[0]

    def _make_storage(self, arguments: tuple[Any, ...]) -> Storage:
        data = arguments[0] if len(arguments) == 1 else None
        if type(data) is not bytes:
            self.fail("tensor data are not bytes")
        if data[:2] in (b"PK", b"\x1f\x8b"):
            self.fail("its tensor data is a compressed archive")
        self.spend(len(data))
        stream = Bounded(io.BytesIO(data), len(data))
        parts = [_StorageMachine(stream, self.path).run() for _ in range(5)]
        return read_storage(data, parts, stream.tell(), self.fail)

    def _make_bytes(self, arguments: tuple[Any, ...]) -> bytes:
        """How protocols before 3 write bytes: as text, each character a byte."""
        if len(arguments) != 2 or type(arguments[0]) is not str or arguments[1] not in ("latin1", "latin-1"):
            self.fail("it encodes something that is not bytes")
        self.spend(len(arguments[0]))
        return arguments[0].encode("latin-1")  # a ValueError, caught in `run`, where there are other characters

    def _make_number(self, arguments: tuple[Any, ...]) -> int | float | bool:
        """A numpy scalar."""
        form, data = arguments if len(arguments) == 2 else (None, None)
        if type(form) is not Form or form.whole or type(data) is not bytes:
            self.fail("a number has no type or no bytes")
        dtype = np.dtype(form.code).newbyteorder("<")
        if len(data) != dtype.itemsize:
            self.fail("a number has a wrong length")
        return np.frombuffer(data, dtype)[0].item()

    def _make_form(self, arguments: tuple[Any, ...]) -> Form:
        if not arguments or type(arguments[0]) is not str or not _FORMS.fullmatch(arguments[0]):
            self.fail("it holds numbers of an unknown type")
        return Form(arguments[0])

    def _make_array(self, arguments: tuple[Any, ...]) -> Form:
        if len(arguments) != 3 or type(arguments[0]) is not Name or arguments[0].meaning != "array":
            self.fail("an array is made of something else")
        return Form("", whole=True)

    def _make_dict(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        if arguments != ():
            self.fail("a dict is made with arguments")
        return {}

    def _make_subclass(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        """How protocols 0 and 1 write a subclass of dict: class, dict, content."""
        kinds = [a.meaning for a in arguments[:2] if type(a) is Name]
        if len(arguments) != 3 or kinds != ["dict", "plain dict"] or type(arguments[2]) is not dict:
            self.fail("it makes an object of a class that no network needs")
        self.spend(len(arguments[2]))
        return dict(arguments[2])

    def _make_set(self, arguments: tuple[Any, ...]) -> set[Any]:
        if len(arguments) != 1 or type(arguments[0]) is not list:
            self.fail("a set is not made of a list")
        self.spend(len(arguments[0]))
        return {self._key(item) for item in arguments[0]}

    def _make_no_bytes(self, arguments: tuple[Any, ...]) -> bytes:
        if arguments != ():
            self.fail("bytes are made with arguments")
        return b""


_MEANINGS = {
    "collections.OrderedDict": "dict", "dnnlib.util.EasyDict": "dict", "torch_utils.persistence.EasyDict": "dict",
    "torch_utils.persistence._reconstruct_persistent_obj": "persistent", "builtins.set": "set",
    "builtins.dict": "plain dict", "builtins.bytes": "no bytes", "copyreg._reconstructor": "subclass",
    "torch._utils._rebuild_tensor_v2": "tensor", "torch._utils._rebuild_parameter": "parameter",
    "torch.storage._load_from_bytes": "storage", "_codecs.encode": "bytes", "numpy.dtype": "form",
    "numpy.ndarray": "array", "numpy.core.multiarray.scalar": "number", "numpy._core.multiarray.scalar": "number",
    "numpy.core.multiarray._reconstruct": "new array", "numpy._core.multiarray._reconstruct": "new array",
}  # fmt: skip
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
# a package that holds NVIDIA's repository writes its own name before theirs
_PACKAGED = re.compile(r"(?:\w+\.)+(dnnlib\.util|torch_utils\.persistence)")
_MAKERS: dict[str, Callable[[_Reader, tuple[Any, ...]], Any]] = {
    "persistent": _Reader._make_persistent, "dict": _Reader._make_dict, "subclass": _Reader._make_subclass,
    "set": _Reader._make_set, "no bytes": _Reader._make_no_bytes, "bytes": _Reader._make_bytes,
    "tensor": _Reader._make_tensor, "parameter": _Reader._make_parameter, "storage": _Reader._make_storage,
    "form": _Reader._make_form, "number": _Reader._make_number, "new array": _Reader._make_array,
}  # fmt: skip
