"""Features kept on disk, so that the same tiles meet the same encoder once.

A cache file is named after all that its numbers depend on: encoder, weights, precision, data digest and the ids in
their order. Its neighbour .json holds the hash of the file; a pair that does not fit together is computed again.

While it is made, the rows lie in <name>.part and a journal names every chunk of rows with its hash, so that a killed
encoding goes on after the last whole chunk. Only a chunk of tiles and of rows is ever in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from histosynth.core.errors import DataError
from histosynth.core.files import explain_os_error, read_json, sha256_file, write_json
from histosynth.core.progress import bar, say
from histosynth.core.types import Encoder

_CHUNK = 256


def features(encoder: Encoder, images: Any, ids: Sequence[str], digest: str, cache_folder: Path | str) -> np.ndarray:
    """Features of tiles, from the cache where they are there and right.

    Args:
        images: uint8 [N, 3, H, W], an array, memory map or tensor, or anything with a length whose slices are such;
            only a chunk of it is in memory at a time.
        ids: N tile ids.
        digest: names the pixels (a tile set's digest, or a checkpoint's hash with the seeds): the same digest
            and ids must mean the same pixels.
        cache_folder: made when absent; can be deleted at any time.

    Returns:
        float32 [N, dim].

    Raises:
        DataError: not one id an image, or the encoder gave values that are not finite.
        RunError: the cache cannot be written.
    """
    return np.array(feature_file(encoder, images, ids, digest, cache_folder))


def feature_file(
    encoder: Encoder, images: Any, ids: Sequence[str], digest: str, cache_folder: Path | str
) -> np.ndarray:
    """As `features`, but the result is a read-only memory map of the cache file: for sets that fill the memory."""
    if len(images) != len(ids):
        raise DataError(f"{len(images)} tiles came with {len(ids)} ids.", "Give one id a tile.")
    key = {
        "encoder": encoder.card.name,
        "weights": weights_hash(encoder),
        "precision": str(getattr(encoder, "precision", "float32")),
        "digest": digest,
        "ids": _sha(json.dumps(list(ids)).encode()),
    }
    name = f"{encoder.card.name}-{_sha(json.dumps(key, sort_keys=True).encode())[:20]}"
    path = Path(cache_folder) / f"{name}.npy"
    shape = (len(ids), encoder.card.dim)
    kept = _read(path, key, shape)
    if kept is not None:
        return kept
    try:
        with _locked(path.with_suffix(".lock")):
            kept = _read(path, key, shape)  # another process may just have made it
            if kept is None:
                _make(encoder, images, path, key)
    except OSError as error:
        raise explain_os_error(error, f"Cannot write {path}") from error
    return np.load(path, mmap_mode="r", allow_pickle=False) if len(ids) else np.empty(shape, np.float32)


def encode_all(encoder: Encoder, images: Any) -> np.ndarray:
    """Features of all tiles, a chunk at a time: uint8 [N, 3, H, W] -> float32 [N, dim]. Nothing is kept on disk.

    Raises:
        DataError: the encoder gave another shape, or values that are not finite.
    """
    found = np.empty((len(images), encoder.card.dim), np.float32)
    with bar(f"Encode ({encoder.card.name})", len(images)) as tick:
        for start in range(0, len(images), _CHUNK):
            rows = _encode(encoder, images, start)
            found[start : start + len(rows)] = rows
            tick(len(rows))
    return found


def weights_hash(encoder: Encoder) -> str:
    """What tells two encoders of the same name apart: their `weights_hash` where they have one, else a hash of
    what they make of one fixed tile (rounded, so that machines agree)."""
    known = getattr(encoder, "weights_hash", "")
    if known:
        return str(known)
    size = max(encoder.card.input_size, 64)
    tile = np.random.default_rng(0).integers(0, 256, (1, 3, size, size), dtype=np.uint8)
    values = encoder.encode(torch.from_numpy(tile)).cpu().numpy()
    return _sha((np.round(values, 2) + 0.0).tobytes())


def _make(encoder: Encoder, images: Any, path: Path, key: dict[str, str]) -> None:
    """Write the cache file and its .json, going on with what an earlier, killed call left."""
    part, journal = path.with_suffix(".part"), path.with_suffix(".journal")
    count, dim = len(images), encoder.card.dim
    header = _header(count, dim)
    try:
        with open(part, "a+b") as rows, open(journal, "a+", encoding="ascii") as notes:
            done = _take_up(rows, notes, header, count, dim)
            if done:
                say(f"Going on with {encoder.card.name} at tile {done} of {count}.")
            with bar(f"Encode ({encoder.card.name})", count, done) as tick:
                for start in range(done, count, _CHUNK):
                    values = _encode(encoder, images, start)
                    data = values.tobytes()
                    rows.write(data)
                    rows.flush()
                    notes.write(f"{_sha(data)}\n")
                    notes.flush()
                    tick(len(values))
            os.fsync(rows.fileno())
    except DataError:
        part.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
        raise
    digest = sha256_file(part)
    os.replace(part, path)
    write_json(path.with_suffix(".json"), key | {"sha256": digest})
    journal.unlink(missing_ok=True)


def _take_up(rows: IO[bytes], notes: IO[str], header: bytes, count: int, dim: int) -> int:
    """How many tiles an earlier call encoded; what follows its last whole chunk is cut off."""
    notes.seek(0)
    rows.seek(0)
    good: list[str] = []
    if rows.read(len(header)) == header:
        for line in notes.read().split("\n")[:-1]:
            size = min(_CHUNK, count - len(good) * _CHUNK) * dim * 4
            data = rows.read(max(size, 0))
            if not data or len(data) != size or _sha(data) != line:
                break
            good.append(line)
    done = min(len(good) * _CHUNK, count)
    rows.truncate(len(header) + done * dim * 4 if good else 0)
    if not good:
        rows.write(header)
    rows.seek(0, os.SEEK_END)
    notes.truncate(0)
    notes.write("".join(f"{line}\n" for line in good))
    notes.flush()
    return done


def _header(count: int, dim: int) -> bytes:
    """The beginning of a .npy file of float32 [count, dim]."""
    from io import BytesIO

    stream = BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": (count, dim)}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


def _encode(encoder: Encoder, images: Any, start: int) -> np.ndarray:
    """The features of one chunk, checked: float32 [n, dim]."""
    card = encoder.card
    chunk = torch.from_numpy(np.array(images[start : start + _CHUNK], order="C"))  # memory maps are read-only
    values = encoder.encode(chunk).cpu().numpy()
    if values.shape != (len(chunk), card.dim):
        raise DataError(
            f"The encoder {card.name!r} gave {values.shape} for {len(chunk)} tiles.",
            f"Its card promises {card.dim} numbers a tile: mend the encoder or its card.",
        )
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if len(bad):
        raise DataError(
            f"The encoder {card.name!r} gave values that are not finite for tile {start + int(bad[0])}.",
            "Look at that tile, or load the encoder in float32.",
        )
    return np.ascontiguousarray(values, "<f4")


def _read(path: Path, key: dict[str, str], shape: tuple[int, int]) -> np.ndarray | None:
    """The cached features, or None when they are absent, damaged, or of something else."""
    try:
        # the hash first: only a whole file is ever parsed
        if read_json(path.with_suffix(".json")) != key | {"sha256": sha256_file(path)}:
            return None
        values = np.load(path, mmap_mode="r" if shape[0] else None, allow_pickle=False)
    except (DataError, OSError):
        return None
    return values if values.shape == shape and values.dtype == np.float32 else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time make a file; the others wait for it. The lock ends with the process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        stream = open(path, "ab")  # noqa: SIM115 - closed below, in another turn of the loop
        _lock(stream, path)
        # the one before may have removed the file that was waited for; then this lock protects nothing
        if path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
            break
        stream.close()
    with stream:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(stream: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not on Windows; two processes would compute the same numbers twice
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"Another process is making {path.stem}; waiting for it.")
        fcntl.flock(stream, fcntl.LOCK_EX)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
