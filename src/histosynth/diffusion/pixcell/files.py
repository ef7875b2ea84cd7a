"""From a folder, a file or a repository of Hugging Face to tensors and plain JSON. Nothing that is read is ever run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histosynth.core.errors import CheckpointError, DataError
from histosynth.core.files import read_json
from histosynth.encoders.weights import read_tensors

if TYPE_CHECKING:
    from torch import Tensor

STEM = "diffusion_pytorch_model"
_SINGLE = (f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors")
_INDEX = (f"{STEM}.safetensors.index.json", f"{STEM}.fp16.safetensors.index.json")
_PICKLE = (f"{STEM}.bin",)
_FILES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_AGAIN = "Get the folder again from its source."


@dataclass(frozen=True)
class Weights:
    """Where the weights of one network lie.

    Attributes:
        files: the weight files, one or several shards.
        config: its config.json, if there is one.
        folder: the folder of the whole model, in which scheduler and autoencoder have theirs.
        index: the list of shards, if there is one.
    """

    files: tuple[Path, ...]
    config: Path | None
    folder: Path
    index: Path | None = None


def find_weights(source: Path, part: str) -> Weights:
    """The weights of `part` (transformer or vae) in a folder, or a weight file itself.

    Args:
        source: the folder of a model, the folder of the part, or a file.

    Raises:
        CheckpointError: nothing there, or a list of shards that is not safe.
    """
    if source.is_file():
        config = next((p for p in (source.parent / "config.json", source.parent / part / "config.json")
                       if p.is_file()), None)  # fmt: skip
        top = source.parent.parent if source.parent.name == part else source.parent
        if source.name.endswith(".index.json"):
            return Weights(shards(source), config, top, source)
        if source.suffix.lower() not in _FILES:
            raise CheckpointError(f"{source} is no file of weights.", f"It ends with {', '.join(_FILES)}.")
        return Weights((source,), config, top)
    if not source.is_dir():
        raise CheckpointError(
            f"{source} does not exist.",
            "Give a folder, a file of weights, or a repository of Hugging Face (OWNER/NAME).",
        )
    for folder, top in ((source / part, source), (source, source.parent if source.name == part else source)):
        found = _in_folder(folder)
        if found is not None:
            files, index = found
            config = folder / "config.json"
            return Weights(files, config if config.is_file() else None, top, index)
    if part == "transformer" and (originals := sorted(source.glob("pixcell_*.ckpt"))):
        return find_weights(originals[0], part)
    raise CheckpointError(f"{source} holds no weights of a {part} ({part}/{_SINGLE[0]}).", _AGAIN)


def _in_folder(folder: Path) -> tuple[tuple[Path, ...], Path | None] | None:
    """(weight files, index) in a folder; safetensors before pickles."""
    for name in _SINGLE:
        if (folder / name).is_file():
            return (folder / name,), None
    for name in _INDEX:
        if (folder / name).is_file():
            return shards(folder / name), folder / name
    for name in _PICKLE:
        if (folder / name).is_file():
            return (folder / name,), None
    return None


def shards(index: Path) -> tuple[Path, ...]:
    """The files that the index of sharded safetensors names; all of them beside it.

    Raises:
        CheckpointError: no such list, or a name that is no plain name of a safetensors file in the same folder.
    """
    listing = json_object(index).get("weight_map")
    if not isinstance(listing, dict) or not listing:
        raise CheckpointError(f"{index} has no weight_map.", _AGAIN)
    names = list(dict.fromkeys(listing.values()))
    for name in names:
        plain = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_][\w.-]*\.safetensors", name) and ".." not in name
        if not plain:
            raise CheckpointError(
                f"{index} names the shard {name!r}, which is no safetensors file of the same folder.",
                "Do not use this checkpoint: a name like that reaches files outside its folder.",
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names the shard {name}, which is missing.", _AGAIN)
    return tuple(index.parent / name for name in names)


def read_weights(weights: Weights) -> dict[str, Tensor]:
    """All tensors, floats as float32; pickles are read by torch with weights_only.

    Raises:
        CheckpointError: damaged, holding anything but tensors and plain values, or shards that overlap or lack what
            their index says.
    """
    tensors: dict[str, Tensor] = {}
    for file in weights.files:
        part = read_tensors(file)
        if twice := next((name for name in part if name in tensors), None):
            raise CheckpointError(f"{file} has the tensor {twice} again, which another shard has.", _AGAIN)
        tensors |= part
    if weights.index is not None:
        listed = json_object(weights.index)["weight_map"]
        if lost := next((name for name in listed if name not in tensors), None):
            raise CheckpointError(f"{weights.index} names the tensor {lost}, which no shard has.", _AGAIN)
    return tensors


def json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: missing, no JSON, or no object.
    """
    try:
        content = read_json(path)
    except DataError as error:
        raise CheckpointError(error.message, _AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object.", _AGAIN)
    return content


def resolve(source: Path | str, parts: tuple[str, ...], token: str | None) -> Path:
    """A local path as it is; a repository of Hugging Face (OWNER/NAME) from the cache or the network.

    Only JSON and weights are asked for, never code.

    Args:
        parts: folders that are needed, such as ("transformer", "scheduler").
        token: a read token, for gated repositories; HF_TOKEN by default.

    Raises:
        CheckpointError: neither a path nor a repository that can be had.
    """
    path = Path(source).expanduser()
    if path.exists() or not isinstance(source, str) or not _REPOSITORY.fullmatch(source):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    wanted = [f"{part}/{pattern}" for part in parts for pattern in ("*.json", "*.safetensors")]
    try:
        return Path(snapshot_download(source, allow_patterns=wanted, token=token))
    except GatedRepoError as error:
        raise CheckpointError(
            f"The repository {source} is gated, and this token may not read it.",
            f"Accept its licence at https://huggingface.co/{source}, then give a read token (HF_TOKEN=...).",
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(
            f"There is no folder {source}, and the repository of that name cannot be had: {str(error).splitlines()[0]}",
            "Check the name and the network, or give a local folder.",
        ) from error
