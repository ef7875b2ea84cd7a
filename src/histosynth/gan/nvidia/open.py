"""What a file is, by its first bytes, and the networks in it."""

from __future__ import annotations

from pathlib import Path

from histosynth.core.errors import CheckpointError
from histosynth.gan.nvidia.network import CAN, Found, find_networks
from histosynth.gan.nvidia.plain import read_safetensors, read_torch_zip
from histosynth.gan.nvidia.read import read_pickle

_STRANGERS = (
    (b"\x1f\x8b", "a gzip file", "Unpack it first."),
    (b"BZh", "a bzip2 file", "Unpack it first."),
    (b"\xfd7zXZ", "an xz file", "Unpack it first."),
    (b"7z\xbc\xaf", "a 7-Zip file", "Unpack it first."),
    (b"\x89PNG", "a picture", CAN),
    (b"\x89HDF", "an HDF5 file", CAN),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "Fetch it with `git lfs pull`."),
    (b"<", "a web page or XML, not a network", "Repeat the download."),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9", "a torch file of before torch 1.6", "Save it again with a newer torch."),
)
_PROTOCOL_0 = b"(}]cVSIFL"


def open_networks(path: Path) -> Found:
    """The networks of a pickle, a .pt of tensors or a .safetensors.

    Raises:
        CheckpointError: the file is missing, or is something else.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.", "Check the path.")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file.", "Give a network pickle (network-snapshot-*.pkl).")
    with open(path, "rb") as stream:
        first = stream.read(512)
    if not first:
        raise CheckpointError(f"{path} is empty.", "Repeat the download or the copy.")
    for start, what, remedy in _STRANGERS:
        if first.startswith(start):
            raise CheckpointError(f"{path} is {what}.", remedy)
    if first[257:262] == b"ustar":
        raise CheckpointError(f"{path} is a tar archive.", "Unpack it first.")
    if first.startswith(b"PK"):
        return read_torch_zip(path)
    if first[8:9] == b"{" and len(first) > 8 and int.from_bytes(first[:8], "little") < path.stat().st_size:
        return read_safetensors(path)
    if first[0] != 0x80 and first[0] not in _PROTOCOL_0:
        raise CheckpointError(f"{path} is no network pickle.", CAN)
    return find_networks(read_pickle(path), path)
