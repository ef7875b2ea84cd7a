"""Features kept on disk, so that the same tiles meet the same encoder once.

A cache file is named after all that its numbers depend on: encoder, weights, data digest and the ids in their
order. Its neighbour .json holds the hash of the file; a pair that does not fit together is computed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from histosynth.core.errors import DataError
from histosynth.core.files import atomic_path, read_json, sha256_file, write_json
from histosynth.core.progress import bar
from histosynth.core.types import Encoder

_CHUNK = 256


def features(
    encoder: Encoder, images: np.ndarray | torch.Tensor, ids: Sequence[str], digest: str, cache_folder: Path | str
) -> np.ndarray:
    """Features of tiles, from the cache where they are there and right.

    Args:
        images: uint8 [N, 3, H, W], an array, memory map or tensor; only a chunk of it is in memory at a time.
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
    if len(images) != len(ids):
        raise DataError(f"{len(images)} tiles came with {len(ids)} ids.", "Give one id a tile.")
    key = {
        "encoder": encoder.card.name,
        "weights": weights_hash(encoder),
        "digest": digest,
        "ids": _sha(json.dumps(list(ids)).encode()),
    }
    name = f"{encoder.card.name}-{_sha(json.dumps(key, sort_keys=True).encode())[:20]}"
    path = Path(cache_folder) / f"{name}.npy"
    kept = _read(path, key, (len(ids), encoder.card.dim))
    if kept is not None:
        return kept
    computed = encode_all(encoder, images)
    with atomic_path(path) as temporary:
        np.save(temporary, computed, allow_pickle=False)
    write_json(path.with_suffix(".json"), key | {"sha256": sha256_file(path)})
    return computed


def encode_all(encoder: Encoder, images: np.ndarray | torch.Tensor) -> np.ndarray:
    """Features of all tiles, a chunk at a time: uint8 [N, 3, H, W] -> float32 [N, dim].

    Raises:
        DataError: the encoder gave another shape, or values that are not finite.
    """
    card = encoder.card
    found = np.empty((len(images), card.dim), np.float32)
    with bar(f"Encode ({card.name})", len(images)) as tick:
        for start in range(0, len(images), _CHUNK):
            chunk = torch.as_tensor(np.ascontiguousarray(images[start : start + _CHUNK]))
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
            found[start : start + len(chunk)] = values
            tick(len(chunk))
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


def _read(path: Path, key: dict[str, str], shape: tuple[int, int]) -> np.ndarray | None:
    """The cached features, or None when they are absent, damaged, or of something else."""
    try:
        # the hash first: only a whole file is ever parsed
        if read_json(path.with_suffix(".json")) != key | {"sha256": sha256_file(path)}:
            return None
        values = np.load(path, allow_pickle=False)
    except (DataError, OSError):
        return None
    return values if values.shape == shape and values.dtype == np.float32 else None


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
