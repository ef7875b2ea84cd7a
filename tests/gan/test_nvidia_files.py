"""Files that are no network pickle are named; torch's own archives are read as tensors and nothing else."""

from __future__ import annotations

import gzip
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from histosynth.core.errors import CheckpointError
from histosynth.gan.nvidia.open import open_networks
from tests.gan.pickle_bytes import Run, name, whole, zipped


def _tar(path: Path) -> None:
    (path.parent / "inner").write_text("x")
    with tarfile.open(path, "w") as archive:
        archive.add(path.parent / "inner", arcname="data.pkl")


OTHERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: None, "does not exist"),
    "folder": (lambda p: p.mkdir(), "not a file"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "gzip": (lambda p: p.write_bytes(gzip.compress(b"x")), "gzip"),
    "zip": (lambda p: p.write_bytes(zipped(b"x").replace(b"data.pkl", b"data.txt")), "zip archive"),
    "tar": (_tar, "tar archive"),
    "text": (lambda p: p.write_text("hello, this is text"), "no network pickle"),
    "web page": (lambda p: p.write_text("<!DOCTYPE html><p>Quota exceeded"), "web page"),
    "git lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS"),
    "picture": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n"), "picture"),
    "old torch file": (
        lambda p: torch.save({"a": torch.ones(2)}, p, _use_new_zipfile_serialization=False), "before torch 1.6"
    ),
    "TensorFlow": (lambda p: p.write_bytes(whole(name("dnnlib.tflib.network", "Network"))), "legacy.py"),
    "no network": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "no generator"),
    "a list": (lambda p: p.write_bytes(pickle.dumps([1])), "list"),
}  # fmt: skip


@pytest.mark.parametrize("key", OTHERS)
def test_files_that_are_something_else(key: str, tmp_path: Path) -> None:
    make, named = OTHERS[key]
    path = tmp_path / "net.pkl"
    make(path)
    with pytest.raises(CheckpointError, match="net.pkl") as caught:
        open_networks(path)
    assert named in str(caught.value)


# torch's own archives


def archive(tmp_path: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], method: int = 0) -> Path:
    """A .pt whose records went through `change`."""
    torch.save({"synthesis.b4.const": torch.ones(2, 4, 4)}, tmp_path / "good.pt")
    path = tmp_path / "bad.pt"
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(path, "w", method) as bad:
        for entry in good.infolist():
            record = change(entry.filename, good.read(entry))
            if record is not None:
                bad.writestr(*record)
    return path


def test_archives_of_torch_hold_nothing_but_tensors(tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    evil = pickle.dumps(Run(os.system, f"touch {mark}"), protocol=2)

    def refused(path: Path) -> str:
        with pytest.raises(CheckpointError, match="bad.pt") as caught:
            open_networks(path)
        return str(caught.value)

    assert "mapping.fc0.weight" in refused(archive(tmp_path, lambda n, d: (n, d)))  # whole, but no network
    assert "system" in refused(archive(tmp_path, lambda n, d: (n, evil if n.endswith("data.pkl") else d)))
    assert "elements" in refused(archive(tmp_path, lambda n, d: (n, d[:-4] if "/data/" in n else d)))
    assert "lacks the tensor data" in refused(archive(tmp_path, lambda n, d: None if "/data/" in n else (n, d)))
    assert "big-endian" in refused(archive(tmp_path, lambda n, d: (n, b"big" if n.endswith("byteorder") else d)))
    bomb = archive(tmp_path, lambda n, d: (n, b"\0" * 10**7 if "/data/" in n else d), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**5 and "unpacks to more" in refused(bomb)
    whole_file = (tmp_path / "good.pt").read_bytes()
    for cut in (100, len(whole_file) // 2, len(whole_file) - 5):
        bomb.write_bytes(whole_file[:cut])
        refused(bomb)
    assert not mark.exists()
