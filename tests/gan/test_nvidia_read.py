"""Pickles that attack, damage or overload their reader are refused with a message, and nothing in them is run."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import pickletools
import random
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from histosynth.core.errors import CheckpointError
from histosynth.gan.nvidia import opcodes, read
from histosynth.gan.nvidia.open import open_networks
from histosynth.gan.nvidia.read import read_pickle
from tests.gan.nvidia_pickles import dump, network
from tests.gan.pickle_bytes import Run, call, name, old_name, ops, raw, text, whole, zipped


def refusal(data: bytes, tmp_path: Path) -> str:
    path = tmp_path / "evil.pkl"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_networks(path)
    assert "evil.pkl" in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


LOAD = name("torch.storage", "_load_from_bytes")
ORDERED = name("collections", "OrderedDict")
META = name("torch_utils.persistence", "_reconstruct_persistent_obj")
TENSOR = name("torch._utils", "_rebuild_tensor_v2")
NUMBER = name("numpy.core.multiarray", "scalar")
FORM = name("numpy", "dtype")


def meta(state: bytes, extra: bytes = b"", version: int = 6) -> bytes:
    """A persistent object with this state."""
    items = text("type") + text("class") + text("version") + ops["BININT1"] + bytes([version])
    items += text("module_src") + text("raise SystemExit") + text("class_name") + text("Generator")
    return call(META, ops["EMPTY_DICT"] + ops["MARK"] + items + text("state") + state + extra + ops["SETITEMS"])


NAMES = {
    "os.system": name("os", "system"),
    "posix.system": old_name("posix", "system"),
    "builtins.eval": name("builtins", "eval"),
    "builtins.exec": old_name("__builtin__", "exec"),
    "builtins.getattr": name("builtins", "getattr"),
    "builtins.object": name("builtins", "object"),
    "importlib.import_module": name("importlib", "import_module"),
    "subprocess.Popen": name("subprocess", "Popen"),
    "torch.load": name("torch", "load"),
    "torch.serialization.load": name("torch.serialization", "load"),
    "FloatStorage in the open": name("torch", "FloatStorage"),
    "another attribute of an allowed module": name("torch._utils", "_import_dotted_name"),
    "another attribute of numpy": name("numpy", "load"),
    "another of persistence": name("torch_utils.persistence", "_src_to_module"),
    "another of dnnlib": name("dnnlib.util", "call_func_by_name"),
    "dots": name("collections", "OrderedDict.__init__.__globals__"),
    "dots in the module": name("collections.OrderedDict", "__init__"),
    "persistence of nobody": name("evil-torch_utils.persistence", "_reconstruct_persistent_obj"),
    "a longer module": name("torch_utils.persistence.evil", "_reconstruct_persistent_obj"),
    "empty": name("", ""),
    "spaces": old_name("os system", "x"),
    "no ascii": name("оs", "system"),
    "copyreg extension table": name("copyreg", "_inverted_registry"),
}


@pytest.mark.parametrize("key", NAMES)
def test_names_that_are_not_on_the_list(key: str, tmp_path: Path) -> None:
    called = whole(call(NAMES[key], text("touch evil")))
    named_alone = whole(NAMES[key])
    for data in (called, named_alone):
        assert "not on the list" in refusal(data, tmp_path)
    wanted = key if "." in key and " " not in key else ""
    assert wanted.replace("builtins.exec", "__builtin__.exec") in refusal(called, tmp_path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_calls_that_python_itself_pickles(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    for evil in (Run(os.system, f"touch {mark}"), Run(eval, f"open({str(mark)!r}, 'w')"), Run(exec, "x = 1")):
        for value in (evil, {"G_ema": evil}, [[{"a": (evil,)}]], OrderedDict(a=evil)):
            assert "not on the list" in refusal(pickle.dumps(value, protocol=protocol), tmp_path)
    assert not mark.exists()


def test_source_code_is_not_run_and_not_kept(tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    layer = network("Generator", {"mapping.w_avg": torch.ones(3)}, {"z_dim": 4})
    layer.source = f"open({str(mark)!r}, 'w')"
    value = read_pickle(dump({"G_ema": layer}, tmp_path / "n.pkl"))["G_ema"]
    assert value.class_name == "Generator" and value.state["_init_kwargs"] == {"z_dim": 4}
    mean = value.state["_modules"]["mapping"].state["_buffers"]["w_avg"]
    assert isinstance(mean, np.ndarray) and mean.tolist() == [1, 1, 1]
    assert not mark.exists() and str(mark) not in repr(value)


BODIES: dict[str, tuple[bytes, str]] = {
    "a number is called": (ops["NONE"] + ops["EMPTY_TUPLE"] + ops["REDUCE"], "no name"),
    "a stored result is called": (
        call(ORDERED) + ops["MEMOIZE"] + ops["POP"] + ops["BINGET"] + b"\0" + ops["EMPTY_TUPLE"] + ops["REDUCE"], "POP"
    ),
    "a dict is called": (ops["EMPTY_DICT"] + ops["EMPTY_TUPLE"] + ops["REDUCE"], "no name"),
    "arguments are a list": (ORDERED + ops["EMPTY_LIST"] + ops["REDUCE"], "no name"),
    "a class is only named": (call(name("numpy", "ndarray"), text("x")), "numpy.ndarray"),
    "OrderedDict of things": (call(ORDERED, text("x")), "arguments"),
    "class made without a call": (FORM + ops["EMPTY_TUPLE"] + ops["NEWOBJ"], "numpy.dtype"),
    "class made with keywords": (ORDERED + ops["EMPTY_TUPLE"] + ops["EMPTY_DICT"] + ops["NEWOBJ_EX"], "NEWOBJ_EX"),
    "state of a list": (ops["EMPTY_LIST"] + ops["EMPTY_DICT"] + ops["BUILD"], "state of a list"),
    "state of a name": (LOAD + ops["EMPTY_DICT"] + ops["BUILD"], "state of a Name"),
    "state of nothing": (ops["EMPTY_DICT"] + ops["BUILD"], "empty stack"),
    "setstate of a network": (
        meta(ops["EMPTY_DICT"]) + ops["EMPTY_DICT"] + text("__setstate__") + LOAD + ops["SETITEM"] + ops["BUILD"],
        "state of a Persistent",
    ),
    "EXT1": (ops["EXT1"] + b"\1", "EXT1"),
    "EXT2": (ops["EXT2"] + b"\1\0", "EXT2"),
    "EXT4": (ops["EXT4"] + b"\1\0\0\0", "EXT4"),
    "INST": (ops["MARK"] + ops["INST"] + b"os\nsystem\n", "INST"),
    "OBJ": (ops["MARK"] + ORDERED + ops["OBJ"], "OBJ"),
    "persistent id": (text("storage") + ops["BINPERSID"], "outside of itself"),
    "persistent id as text": (ops["PERSID"] + b"abc\n", "PERSID"),
    "out-of-band buffer": (ops["NEXT_BUFFER"], "NEXT_BUFFER"),
    "bytearray": (ops["BYTEARRAY8"] + struct.pack("<Q", 1) + b"x", "BYTEARRAY8"),
    "doubled": (ops["EMPTY_LIST"] + ops["DUP"], "DUP"),
    "never stored": (ops["BINGET"] + b"\7", "item 7"),
    "stored from nothing": (ops["MEMOIZE"], "empty stack"),
    "tuple of nothing": (ops["TUPLE2"], "empty stack"),
    "group never opened": (ops["TUPLE"], "never opened"),
    "mark taken as a value": (ops["MARK"] + ops["TUPLE1"], "empty stack"),
    "append to a dict": (ops["EMPTY_DICT"] + ops["NONE"] + ops["APPEND"], "appends to"),
    "keys of a list": (ops["EMPTY_LIST"] + ops["NONE"] * 2 + ops["SETITEM"], "sets keys of"),
    "a key alone": (ops["EMPTY_DICT"] + ops["MARK"] + ops["NONE"] + ops["SETITEMS"], "no value"),
    "a list as a key": (ops["EMPTY_DICT"] + ops["EMPTY_LIST"] + ops["NONE"] + ops["SETITEM"], "key of type list"),
    "a tuple as a key": (ops["EMPTY_DICT"] + ops["EMPTY_TUPLE"] + ops["NONE"] + ops["SETITEM"], "key of type tuple"),
    "a name by a number": (ops["NONE"] + text("x") + ops["STACK_GLOBAL"], "other than text"),
    "two values": (ops["NONE"] + ops["NONE"], "whole pickle"),
    "no value": (b"", "whole pickle"),
    "protocol 9": (ops["PROTO"] + b"\x09" + ops["NONE"], "protocol 9"),
    "network without a state": (call(META, ops["EMPTY_DICT"]), "fields"),
    "network with another field": (meta(ops["EMPTY_DICT"], text("hook") + text("os.system")), "fields"),
    "state that is no dict": (meta(ops["EMPTY_LIST"]), "no state"),
    "version 7": (meta(ops["EMPTY_DICT"], version=7), "version 7"),
    "tensor of nothing": (call(TENSOR, ops["NONE"]), "not made of a storage"),
    "tensor of text": (call(TENSOR, *[text("x")] * 6), "not made of a storage"),
    "objects in an array": (call(FORM, text("O8")), "unknown type"),
    "a structured array": (call(FORM, text("f8,O")), "unknown type"),
    "number of no bytes": (call(NUMBER, call(FORM, text("f8")), raw(b"abc")), "wrong length"),
    "number of no type": (call(NUMBER, ops["NONE"], raw(b"12345678")), "no type"),
    "encode as a codec": (call(name("_codecs", "encode"), text("abc"), text("zip")), "not bytes"),
    "text beyond bytes": (call(name("_codecs", "encode"), text("é€"), text("latin1")), "whole pickle"),
    "storage of text": (call(LOAD, text("abc")), "not bytes"),
    "storage of nothing": (call(LOAD, raw(b"")), "whole pickle"),
    "set of text": (call(name("builtins", "set"), text("abc")), "not made of a list"),
}  # fmt: skip


@pytest.mark.parametrize("key", BODIES)
def test_bodies_that_no_network_has(key: str, tmp_path: Path) -> None:
    body, named = BODIES[key]
    assert named in refusal(whole(body), tmp_path)


def test_a_name_from_the_memo_is_still_checked_when_called(tmp_path: Path) -> None:
    body = LOAD + ops["MEMOIZE"] + ops["EMPTY_TUPLE"] + ops["REDUCE"]
    assert "not bytes" in refusal(whole(body), tmp_path)
    swapped = text("os") + ops["BINPUT"] + b"\0" + text("system") + ops["BINPUT"] + b"\1" + ops["TUPLE2"]
    swapped += ops["BINGET"] + b"\0" + ops["BINGET"] + b"\1" + ops["STACK_GLOBAL"]
    assert "os.system" in refusal(whole(swapped), tmp_path)


# tensor data


def storage_bytes(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor.untyped_storage(), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def stored(tensor: torch.Tensor) -> bytes:
    """The bytes of a typed storage, as tensors pickle it."""
    found = [a for o, a, _ in pickletools.genops(pickle.dumps(tensor)) if isinstance(a, bytes) and len(a) > 100]
    return found[0]


def tensor_of(data: bytes, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    def numbers(values: tuple[int, ...]) -> bytes:
        packed = [ops["LONG1"] + bytes([16]) + v.to_bytes(16, "little", signed=True) for v in values]
        return ops["MARK"] + b"".join(packed) + ops["TUPLE"]

    start = ops["BININT"] + struct.pack("<i", offset)
    arguments = [call(LOAD, raw(data)), start, numbers(size), numbers(stride), ops["NEWFALSE"], call(ORDERED)]
    return call(TENSOR, *arguments)


def test_tensors_are_read_as_torch_wrote_them(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    made = {
        "whole": base, "part": base[1, 1:], "turned": base.permute(2, 0, 1), "none": base[:0], "one": torch.tensor(3.5),
        "half": base.half(), "double": base.double(), "brain": base.bfloat16(), "long": base.long(),
        "small": base.to(torch.int8), "bool": base > 3,
    }  # fmt: skip
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "t.pkl").write_bytes(pickle.dumps(made, protocol=protocol))
        found = read_pickle(tmp_path / "t.pkl")
        for key, tensor in made.items():
            expected = tensor.float() if key == "brain" else tensor
            assert np.array_equal(found[key], expected.numpy()), key


def test_tensors_of_a_gpu_are_read(tmp_path: Path) -> None:
    data = stored(torch.arange(4.0))
    moved = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    assert moved != data
    assert read_back(tensor_of(moved, (4,), (1,)), tmp_path).tolist() == [0, 1, 2, 3]


SIZES = {
    "too long": ((5,), (1,), 0), "moved": ((4,), (1,), 1), "enlarged": ((2**20, 2**20), (0, 0), 0),
    "too many": ((2**62, 2**62), (1, 1), 0), "negative": ((-1,), (1,), 0), "stride": ((2, 2), (4, 1), 0),
    "no stride": ((4,), (), 0), "back": ((4,), (-1,), 3), "before": ((1,), (1,), -1), "deep": ((1,) * 40, (1,) * 40, 0),
}  # fmt: skip


@pytest.mark.parametrize("key", SIZES)
def test_tensors_that_reach_beyond_their_data(key: str, tmp_path: Path) -> None:
    data = stored(torch.arange(4.0))
    assert read_back(tensor_of(data, (2, 2), (2, 1)), tmp_path).tolist() == [[0, 1], [2, 3]]
    assert "tensor" in refusal(whole(tensor_of(data, *SIZES[key])), tmp_path)


def read_back(body: bytes, tmp_path: Path) -> Any:
    path = tmp_path / "fine.pkl"
    path.write_bytes(whole(body))
    return read_pickle(path)


def test_tensor_data_is_never_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    evil = pickle.dumps(Run(os.system, f"touch {mark}"), protocol=2)
    good = stored(torch.arange(4.0))
    first = good.index(b".") + 1
    later = good.index(b"}q\x00")  # the third pickle
    attacks = {
        "at its start": evil,
        "after the magic number": good[:first] + evil + good[first:],
        "in the description": good[: later - 2] + evil + good[later - 2 :],
        "in a zip": zipped(evil),
        "as gzip": gzip.compress(good),
        "allowed name elsewhere": good.replace(b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
        "allowed call inside": whole(call(ORDERED)) + good,
    }
    for where, data in attacks.items():
        assert data != good, where
        refusal(whole(call(LOAD, raw(data))), tmp_path)
    assert not mark.exists()
    for cut in range(0, len(good), 7):
        refusal(whole(call(LOAD, raw(good[:cut]))), tmp_path)
    refusal(whole(call(LOAD, raw(good + b"\0"))), tmp_path)
    assert "two different" in refusal(whole(call(LOAD, raw(good[:-24] + b"\5" + good[-23:]))), tmp_path)
    assert "kind" not in refusal(whole(call(LOAD, raw(storage_bytes(torch.ones(3))))), tmp_path)


# bombs: refused by arithmetic, without the memory or time that they ask for


def test_lengths_beyond_the_file(tmp_path: Path) -> None:
    for start in (
        ops["BINBYTES8"] + struct.pack("<Q", 2**62), ops["BINBYTES"] + struct.pack("<I", 2**32 - 1),
        ops["BINUNICODE8"] + struct.pack("<Q", 2**40), ops["LONG4"] + struct.pack("<i", 2**31 - 1),
        ops["LONG4"] + struct.pack("<i", -1), ops["BINUNICODE"] + struct.pack("<I", 2**31),
    ):  # fmt: skip
        assert "whole pickle" in refusal(whole(start + b"abc"), tmp_path)
    frame = ops["FRAME"] + struct.pack("<Q", 2**63)
    assert "whole pickle" in refusal(whole(frame + ops["NONE"] + ops["NONE"]), tmp_path)


def test_numbers_beyond_use(tmp_path: Path) -> None:
    assert "128 bits" in refusal(whole(ops["LONG4"] + struct.pack("<i", 10_000) + b"\1" * 10_000), tmp_path)
    assert "whole pickle" in refusal(whole(ops["LONG"] + b"9" * 100_000 + b"L\n"), tmp_path)
    high = ops["NONE"] + ops["LONG_BINPUT"] + struct.pack("<I", 2**32 - 1)  # other readers make a table of that length
    assert "NoneType" in refusal(whole(high), tmp_path)


def test_lists_of_lists_of_lists(tmp_path: Path) -> None:
    laughs = ops["EMPTY_LIST"] + ops["MEMOIZE"]
    for level in range(200):  # each holds the last one ten times
        laughs += ops["EMPTY_LIST"] + ops["MEMOIZE"] + ops["MARK"] + (ops["BINGET"] + bytes([level])) * 10
        laughs += ops["APPENDS"]
    assert "whole pickle" in refusal(whole(laughs), tmp_path)
    one = ops["EMPTY_DICT"] + text("training_set_kwargs") + laughs[:-1] + ops["APPENDS"]
    refusal(whole(one), tmp_path)


@pytest.mark.parametrize("kind", ["EMPTY_LIST", "TUPLE1", "dict"])
def test_deep_nesting(kind: str, tmp_path: Path) -> None:
    depth = 60_000
    if kind == "EMPTY_LIST":
        body = ops["EMPTY_LIST"] * depth + ops["APPEND"] * (depth - 1)
    elif kind == "TUPLE1":
        body = ops["NONE"] + ops["TUPLE1"] * depth
    else:
        body = (ops["EMPTY_DICT"] + ops["NONE"]) * depth + ops["NONE"] + ops["SETITEM"] * depth
    assert "no networks" in refusal(whole(body), tmp_path) or kind == "dict"
    nested = ops["EMPTY_DICT"] + text("G_ema") + body + ops["SETITEM"]
    assert "G_ema" in refusal(whole(nested), tmp_path)
    key = ops["EMPTY_DICT"] + body + ops["NONE"] + ops["SETITEM"]
    assert "key of type" in refusal(whole(key), tmp_path)


def test_data_that_is_used_again_and_again(tmp_path: Path) -> None:
    # each result is left on the stack
    body = name("_codecs", "encode") + ops["MEMOIZE"] + text("a" * 1000) + ops["MEMOIZE"]
    again = (ops["BINGET"] + b"\0" + ops["BINGET"] + b"\1" + text("latin1") + ops["TUPLE2"] + ops["REDUCE"]) * 100
    assert "more data than it holds" in refusal(whole(body + again), tmp_path)
    data = stored(torch.arange(1000.0))
    body = LOAD + ops["MEMOIZE"] + raw(data) + ops["MEMOIZE"]
    again = (ops["BINGET"] + b"\0" + ops["BINGET"] + b"\1" + ops["TUPLE1"] + ops["REDUCE"]) * 100
    assert "more data than it holds" in refusal(whole(body + again), tmp_path)


def test_limits_on_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dump({"G_ema": None}, tmp_path / "n.pkl")
    monkeypatch.setattr(read, "MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=f"{path.stat().st_size} bytes"):
        read_pickle(path)
    monkeypatch.undo()
    monkeypatch.setattr(opcodes, "MAX_OPCODES", 50)
    assert "more than 50 opcodes" in refusal(whole(ops["EMPTY_LIST"] + (ops["NONE"] + ops["APPEND"]) * 40), tmp_path)


# damage


def test_every_truncation_and_random_damage_is_refused_or_read(tmp_path: Path) -> None:
    layer = network("Generator", {"mapping.w_avg": torch.ones(3), "b4.affine.weight": torch.ones(2, 3)}, {"z_dim": 4})
    good = dump({"G_ema": layer}, tmp_path / "n.pkl").read_bytes()
    for cut in range(1, len(good), 29):
        refusal(good[:cut], tmp_path)
    assert "follow its end" in refusal(good + b"\0", tmp_path)
    path, rng = tmp_path / "damaged.pkl", random.Random(0)
    read_anyway = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data))
        try:
            read_pickle(path)
            read_anyway += 1  # damage in a number or a text is not seen here
        except CheckpointError:
            pass
    assert 0 < read_anyway < 400
