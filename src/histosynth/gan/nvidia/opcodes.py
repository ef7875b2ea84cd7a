"""The opcodes of a pickle, interpreted one by one. Nothing that the pickle names is ever imported or called.

A pickle is a program for a small stack machine, which may call any function by its name. This machine knows the
opcodes that network pickles use; any other is refused. A name becomes a `Name` only where a subclass gives it a
harmless meaning. The length of everything is compared with what is left of the file before it is read.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Never

from histosynth.core.errors import CheckpointError

MAX_OPCODES = 1_000_000
"""Most opcodes in a file; a network of 1024 px takes about 25 000."""
REMEDY = "Only what NVIDIA's training itself writes is read. Do not load this file another way unless you trust it."
_CONSTANTS = frozenset((
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Name:
    """A name that the pickle refers to, and what it means here."""

    module: str
    name: str
    meaning: str


class Bounded:
    """A stream that never reads, nor makes room for, more than there is."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size

    def left(self) -> int:
        """Bytes to its end."""
        return self.size - self.stream.tell()

    def tell(self) -> int:
        """As of files."""
        return self.stream.tell()

    def read(self, count: int) -> bytes:
        """As of files; ValueError where there are fewer bytes."""
        if not 0 <= count <= self.left():
            raise ValueError("it ends too early")
        return self.stream.read(count)

    def readline(self) -> bytes:
        """As of files."""
        return self.stream.readline(self.left())


class _Mark:
    """The opcode MARK on the stack."""


class Machine:
    """Runs one pickle of a stream. As it is, it reads plain data and refuses every name.

    Args:
        stream: at the start of the pickle.
        path: for messages.
        budget: items and bytes that calls may make from those of the file, so that a small file stays small.
    """

    def __init__(self, stream: Bounded, path: Path, budget: int = 0) -> None:
        self.stream, self.path, self.budget = stream, path, budget
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    # what a subclass allows

    def meaning(self, module: str, name: str) -> str | None:
        """What a name means; None: refused."""
        return None

    def call(self, function: Name, arguments: tuple[Any, ...]) -> Any:
        """What a call of a name makes."""
        self.fail(f"it calls {function.module}.{function.name}")

    def new(self, kind: Name, arguments: tuple[Any, ...]) -> Any:
        """A new object of a named class."""
        self.fail(f"it makes a {kind.module}.{kind.name}")

    def set_state(self, target: Any, state: Any) -> None:
        """What BUILD does to the object on top of the stack."""
        self.fail(f"it sets the state of a {type(target).__name__}")

    def resolve(self, reference: Any) -> Any:
        """What a persistent id stands for."""
        self.fail("it refers to an object outside of itself")

    # running

    def fail(self, what: str) -> Never:
        """Refuse the file.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{self.path} is refused: {what}.", REMEDY)

    def spend(self, count: int) -> None:
        """Count what a call makes."""
        self.budget -= count
        if self.budget < 0:
            self.fail("it makes more data than it holds")

    def run(self) -> Any:
        """The value of the pickle.

        Raises:
            CheckpointError: an opcode, a name or a size is refused, or the stream is damaged.
        """
        count, name = 0, ""
        try:
            for opcode, argument, _ in pickletools.genops(self.stream):  # type: ignore[arg-type]
                count += 1
                if count > MAX_OPCODES:
                    self.fail(f"it has more than {MAX_OPCODES} opcodes")
                name = opcode.name
                if name in _CONSTANTS:
                    self._constant(argument)
                else:
                    handler = _HANDLERS.get(name)
                    if handler is None:
                        self.fail(f"it uses the opcode {name}, which no network needs")
                    handler(self, argument)
        except (ValueError, OverflowError) as error:  # what genops, int() and encode() raise for a damaged stream
            self.fail(f"it is not a whole pickle ({shortened(error)})")
        if name != "STOP" or len(self.stack) != 1:
            self.fail("it is not a whole pickle")
        return self.stack.pop()

    # the stack and the memo

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _Mark:
            self.fail("it takes from an empty stack")
        return self.stack.pop()

    def _pop_mark(self) -> list[Any]:
        position = len(self.stack) - 1
        while position >= 0 and self.stack[position] is not _Mark:
            position -= 1
        if position < 0:
            self.fail("it closes a group that it never opened")
        items = self.stack[position + 1 :]
        del self.stack[position:]
        return items

    def _top(self, kind: type, what: str) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            self.fail(f"it {what} something else")
        return self.stack[-1]

    def _constant(self, value: Any) -> None:
        if type(value) is int and value.bit_length() > 128:
            self.fail("it holds a number of more than 128 bits")
        self.stack.append(value)

    def _get(self, index: int) -> None:
        if index not in self.memo:
            self.fail(f"it recalls item {index}, which it never stored")
        self.stack.append(self.memo[index])

    def _put(self, index: int | None) -> None:
        if not self.stack or self.stack[-1] is _Mark:
            self.fail("it stores from an empty stack")
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    # containers

    def _tuple(self, count: int) -> None:
        self.stack.append(tuple([self._pop() for _ in range(count)][::-1]))

    def _extend(self, items: list[Any]) -> None:
        self._top(list, "appends to").extend(items)

    def _add(self, items: list[Any]) -> None:
        self._top(set, "adds to").update(self._key(item) for item in items)

    def _assign(self, items: list[Any]) -> None:
        if len(items) % 2:
            self.fail("a key has no value")
        target = self._top(dict, "sets keys of")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._key(key)] = value

    def _dict(self, items: list[Any]) -> None:
        self.stack.append({})
        self._assign(items)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._assign([key, value])

    def _key(self, key: Any) -> Any:
        # hashing a tuple recurses without a limit, and large numbers can be chosen to collide
        if not (isinstance(key, (str, bytes, bool, type(None))) or (type(key) is int and abs(key) < 2**60)):
            self.fail(f"it has a key of type {type(key).__name__}")
        return key

    # names and calls

    def _name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            self.fail("it names something by other than text")
        meaning = self.meaning(module, name)
        if meaning is None:
            self.fail(f"it asks for {shortened(module)}.{shortened(name)}, which is not on the list of harmless names")
        self.stack.append(Name(module, name, meaning))

    def _stack_name(self) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _apply(self, make: Callable[[Name, tuple[Any, ...]], Any]) -> None:
        arguments, function = self._pop(), self._pop()
        if type(function) is not Name or type(arguments) is not tuple:
            self.fail("it calls something that is no name")
        self.stack.append(make(function, arguments))

    def _build(self) -> None:
        state = self._pop()
        if not self.stack:
            self.fail("it takes from an empty stack")
        self.set_state(self.stack[-1], state)


def shortened(value: Any) -> str:
    """A piece of a foreign text that can be shown."""
    return (
        ascii(str(value)[:60]).strip("'\"") if isinstance(value, (str, int, float, Exception)) else type(value).__name__
    )


_HANDLERS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": lambda m, a: None if a <= 5 else m.fail(f"it is of pickle protocol {a}"),
    "FRAME": lambda m, a: None,
    "STOP": lambda m, a: None,
    "MARK": lambda m, a: m.stack.append(_Mark),
    "NONE": lambda m, a: m.stack.append(None),
    "NEWTRUE": lambda m, a: m.stack.append(True),
    "NEWFALSE": lambda m, a: m.stack.append(False),
    "EMPTY_LIST": lambda m, a: m.stack.append([]),
    "EMPTY_DICT": lambda m, a: m.stack.append({}),
    "EMPTY_SET": lambda m, a: m.stack.append(set()),
    "EMPTY_TUPLE": lambda m, a: m.stack.append(()),
    "TUPLE1": lambda m, a: m._tuple(1),
    "TUPLE2": lambda m, a: m._tuple(2),
    "TUPLE3": lambda m, a: m._tuple(3),
    "TUPLE": lambda m, a: m.stack.append(tuple(m._pop_mark())),
    "LIST": lambda m, a: m.stack.append(m._pop_mark()),
    "DICT": lambda m, a: m._dict(m._pop_mark()),
    "APPEND": lambda m, a: m._extend([m._pop()]),
    "APPENDS": lambda m, a: m._extend(m._pop_mark()),
    "SETITEM": lambda m, a: m._set_item(),
    "SETITEMS": lambda m, a: m._assign(m._pop_mark()),
    "ADDITEMS": lambda m, a: m._add(m._pop_mark()),
    "GET": Machine._get, "BINGET": Machine._get, "LONG_BINGET": Machine._get,
    "PUT": Machine._put, "BINPUT": Machine._put, "LONG_BINPUT": Machine._put, "MEMOIZE": Machine._put,
    "GLOBAL": lambda m, a: m._name(a.partition(" ")[0], a.partition(" ")[2]),
    "STACK_GLOBAL": lambda m, a: m._stack_name(),
    "REDUCE": lambda m, a: m._apply(m.call),
    "NEWOBJ": lambda m, a: m._apply(m.new),
    "BUILD": lambda m, a: m._build(),
    "BINPERSID": lambda m, a: m.stack.append(m.resolve(m._pop())),
}  # fmt: skip
