"""Weights and resume state as safetensors, with a JSON card in the header. No pickle, ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histosynth.core.errors import CheckpointError, RunError
from histosynth.core.files import atomic_path

if TYPE_CHECKING:
    import torch

_CARD = "histosynth"
_TREE = "tree"


def save_checkpoint(
    path: Path | str, tensors: dict[str, torch.Tensor], card: dict[str, Any], half: bool = False
) -> Path:
    """Write named tensors with their card, atomically.

    Args:
        tensors: any dtypes; `half` stores the floating ones as float16 (for weights that are shipped).
        card: JSON-ready: kind, name, config, classes, size, steps, licence, parents, trained_on, command.
    """
    path = Path(path)
    ready = {k: _storable(v.half() if half and v.is_floating_point() else v) for k, v in tensors.items()}
    _write(path, ready, {_CARD: json.dumps(card)})
    return path


def load_checkpoint(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read (tensors, card); tensors stored as float16 come back as float32.

    Raises:
        CheckpointError: the file is missing, is not safetensors, is damaged, or has no histosynth card.
    """
    import torch

    tensors, card = _read(path, _CARD)
    return {k: v.float() if v.dtype == torch.float16 else v for k, v in tensors.items()}, card


def read_card(path: Path | str) -> dict[str, Any]:
    """Read only the card, without the weights.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    return _read(path, _CARD, tensors=False)[1]


def training_tiles(told: Any) -> dict[str, Any]:
    """`trained_on` of a card in one form: {"tiles": number or words, "per_class": {class: tiles}}, as far as known.

    Args:
        told: as it stands there; the shipped weights have words alone, and GANs call the numbers "classes".
    """
    if not isinstance(told, dict):
        return {"tiles": told} if told else {}
    return {"per_class": told["classes"]} | told if "classes" in told else dict(told)


def learned_before(*starts: str) -> list[dict[str, Any]]:
    """What weights that a training starts from have learned from: [{"data": digest of the tiles, "size": pixels}].

    Newest first, with what these in turn started from. A checkpoint that names no tiles, such as a converted one, has
    the digest "", and one that is no longer there "unknown". What is no checkpoint of this project gives nothing.
    """
    return [ancestor for start in starts for ancestor in _ancestors(start)]


def _ancestors(init: str) -> list[dict[str, Any]]:
    path = Path(init)
    if init in ("base", "none") or not (path.is_file() or path.suffix == ".safetensors"):
        return []
    if not path.is_file():
        return [{"data": "unknown", "size": 0}]
    card = read_card(path)
    return [{"data": card.get("data") or "", "size": card.get("size") or 0}, *(card.get("learned_before") or [])]


def require_kind(card: dict[str, Any], kind: str, path: Path | str) -> None:
    """Refuse a checkpoint of another kind.

    Raises:
        CheckpointError: the card's kind is not `kind`.
    """
    if card.get("kind") != kind:
        raise CheckpointError(
            f"{path} is a checkpoint of kind {card.get('kind')!r}, not {kind!r}.",
            f"Give a checkpoint that `histosynth train {kind}` wrote.",
        )


def save_state(path: Path | str, tree: Any) -> None:
    """Write resume state (nested dicts, lists, tuples, strings, numbers, None, tensors), atomically."""
    tensors: dict[str, torch.Tensor] = {}
    skeleton = _flatten(tree, tensors)
    _write(path, tensors, {_TREE: json.dumps(skeleton)})


def _write(path: Path | str, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file(tensors, str(temporary), metadata=metadata)
        except SafetensorError as error:  # hides the error of the operating system in its text
            raise RunError(f"Cannot write {path}: {error}.", "Free some space on that disk, or check it.") from error


def load_state(path: Path | str) -> Any:
    """Read what `save_state` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    tensors, skeleton = _read(path, _TREE)
    return _unflatten(skeleton, tensors)


def _read(path: Path | str, key: str, tensors: bool = True) -> tuple[dict[str, torch.Tensor], Any]:
    from safetensors import SafetensorError, safe_open

    remedy = "Give a .safetensors file that histosynth wrote, or delete it and repeat the command."
    try:
        with safe_open(str(path), framework="pt") as stream:
            metadata = stream.metadata() or {}
            values = {k: stream.get_tensor(k) for k in stream.keys()} if tensors else {}  # noqa: SIM118
        header = json.loads(metadata[key])
    except FileNotFoundError as error:
        raise CheckpointError(f"The checkpoint {path} does not exist.", "Check the path.") from error
    except KeyError as error:
        raise CheckpointError(f"{path} has no histosynth card in its header.", remedy) from error
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error}.", remedy) from error
    return values, header


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    # safetensors refuses tensors that share storage, so every tensor is stored as its own copy
    return tensor.detach().to("cpu", copy=True).contiguous()


def _flatten(node: Any, tensors: dict[str, torch.Tensor]) -> Any:
    import torch

    if isinstance(node, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = _storable(node)
        return {"t": name}
    if isinstance(node, dict):
        return {"d": [[key, _flatten(value, tensors)] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        return {"l": [_flatten(value, tensors) for value in node], "tuple": isinstance(node, tuple)}
    if node is None or isinstance(node, (bool, int, float, str)):
        return {"v": node}
    raise TypeError(f"resume state cannot hold a {type(node).__name__}")


def _unflatten(node: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    if "t" in node:
        return tensors[node["t"]]
    if "d" in node:
        return {key: _unflatten(value, tensors) for key, value in node["d"]}
    if "l" in node:
        values = [_unflatten(value, tensors) for value in node["l"]]
        return tuple(values) if node["tuple"] else values
    return node["v"]
