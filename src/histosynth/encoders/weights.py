"""Weight files of other people: where they lie, reading them without running code, and whether they fit.

Files are safetensors, or pickles of which `torch.load(weights_only=True)` accepts tensors alone.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from histosynth.core.errors import CheckpointError, SettingError
from histosynth.core.files import sha256_file
from histosynth.core.types import EncoderCard

if TYPE_CHECKING:
    from torch import Tensor, nn

_COMMON = ("pytorch_model.bin", "model.safetensors", "classifier.safetensors")  # names that say nothing
_WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "net")
_PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")
_COUNTERS = "num_batches_tracked"  # of batch normalisation; files of 2018 have none, and nothing reads them
_BROKEN = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    OverflowError,
    pickle.PickleError,
    struct.error,
    zipfile.BadZipFile,
)


def folder() -> Path:
    """The weights folder: HISTOSYNTH_WEIGHTS, else ~/.cache/histosynth/weights."""
    return Path(os.environ.get("HISTOSYNTH_WEIGHTS") or Path.home() / ".cache" / "histosynth" / "weights")


def variable(name: str) -> str:
    """The environment variable that names the weight file of an encoder."""
    return "HISTOSYNTH_WEIGHTS_" + name.upper().replace("-", "_")


def home(card: EncoderCard, file: str = "") -> Path:
    """Where a weight file of this encoder belongs in the weights folder."""
    return folder() / (card.shared_with or card.name) / (file or card.weights)


def find(card: EncoderCard, weights: Path | None = None) -> Path | None:
    """The weight file, or None. A file that was named (by argument or variable) is never replaced by another."""
    from histosynth.core.assets import asset_path, has_asset

    named = weights or find_named(card)
    if named is not None:
        if named.is_dir():
            return next((named / f for f in card.files if (named / f).is_file()), None)
        return named if named.is_file() else None
    if card.weights == "shipped":
        asset = f"{card.name}.safetensors"
        return asset_path(asset) if has_asset(asset) else None
    return next((path for path in candidates(card) if path.is_file()), None)


def candidates(card: EncoderCard) -> list[Path]:
    """Where an encoder's weights are looked for, in this order."""
    telling = [f for f in card.files if f not in _COMMON]
    found = [home(card, f) for f in card.files] + [folder() / f for f in telling]
    found += [hub_folder() / f for f in telling]
    if card.repository:
        found += [snapshot / f for snapshot in _snapshots(card.repository) for f in card.files]
    return found


def require(card: EncoderCard, weights: Path | None = None) -> Path:
    """As `find`, but missing weights are an error with the remedy.

    Raises:
        CheckpointError: there are none.
    """
    path = find(card, weights)
    if path is not None:
        return path
    named = weights or find_named(card)
    if named is not None:
        origin = "" if weights else f" (from {variable(card.name)})"
        what = "a folder without " + " or ".join(card.files) if named.is_dir() else "not there"
        raise CheckpointError(f"The weights of {card.name}, {named}{origin}, are {what}.", remedy(card))
    terms = "gated" if card.gated else "not shipped"
    raise CheckpointError(
        f"The weights of {card.name} ({card.weights}; {card.licence}, {terms}) are not on this machine.", remedy(card)
    )


def remedy(card: EncoderCard) -> str:
    """What to do when the weights are missing."""
    how = card.how.format(folder=folder(), name=card.name)
    if not card.files:
        return how
    # in brackets, so that no full stop sticks to a command or a path
    return (
        f"{how} (Without a network: copy the file to {home(card)} or say where it is "
        f"with --weights {card.name}=FILE or {variable(card.name)}=FILE )"
    )


def parse_weights(given: Sequence[str], names: Sequence[str], others: Sequence[str] = ()) -> dict[str, Path]:
    """The values of --weights, "NAME=FILE" or "FILE", by encoder.

    Args:
        names: the encoders that are going to be used.
        others: what else takes weights, such as lpips-alex; FILE alone never means one of these.

    Raises:
        SettingError: a name that is not used, or FILE alone beside several encoders.
    """
    from histosynth.encoders import REGISTRY

    known = REGISTRY.targets()
    found: dict[str, Path] = {}
    for text in given:
        name, equals, file = text.partition("=")
        # a path may hold an equals sign too
        named = name in known or name in names or name in others or name.startswith("lpips-")
        if not (equals and file and named):
            if len(set(names)) != 1:
                raise SettingError(
                    f"--weights is {text!r}, and the encoders are {', '.join(names) or 'none'}.",
                    "Say which one it belongs to: --weights NAME=FILE.",
                )
            name, file = names[0], text
        if name not in names and name not in others:
            option = "variety" if name.startswith("lpips-") else "encoder"
            raise SettingError(
                f"--weights names {name!r}, but the encoders are {', '.join(names) or 'none'}.",
                f"Add --{option} {name}, or leave these weights out.",
            )
        found[name] = Path(file).expanduser()
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, in float32 where they are floats, without wrapper and common prefix.

    Raises:
        CheckpointError: missing, damaged, or holding anything but tensors and plain values.
    """
    import torch

    tree = _read(path)
    for key in _WRAPPERS:
        inner = tree.get(key)
        if isinstance(inner, Mapping) and any(isinstance(v, torch.Tensor) for v in inner.values()):
            tree = dict(inner)
            break
    tensors = {str(k): v.detach() for k, v in tree.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.", "Give a file of weights (a state dict).")
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), ""):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def _read(path: Path) -> dict[str, Any]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if _is_safetensors(path):
            return load_file(str(path))
        tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"The weights {path} do not exist.", "Check the path.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a plain file of weights: it holds objects whose loading runs code, or it is damaged.",
            "Get the file again from its source, or convert it to safetensors where you trust it.",
        ) from error
    except (*_BROKEN, SafetensorError) as error:
        raise CheckpointError(
            f"The weights {path} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}.",
            "The file is damaged, cut short, or no file of weights: get it again.",
        ) from error
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{path} holds a {type(tree).__name__}.", "Give a file of weights (a state dict).")
    return dict(tree)


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as stream:
        head = stream.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def fit(
    network: nn.Module, tensors: dict[str, Tensor], path: Path, card: EncoderCard, ignore: tuple[str, ...] = ()
) -> None:
    """Put tensors into a network, which may lie on the meta device; every name and shape must match.

    Args:
        ignore: beginnings of names that the file may have and the network does not use.

    Raises:
        CheckpointError: something is missing, unknown or of another shape; the message says what.
    """
    wanted = {k: v for k, v in network.state_dict().items() if not k.endswith(_COUNTERS)}
    given = {k: v for k, v in tensors.items() if not k.endswith(_COUNTERS)}
    missing = [k for k in wanted if k not in given]
    unknown = [k for k in given if k not in wanted and not k.startswith(ignore or "\0")]
    other = [
        f"{k} is {tuple(given[k].shape)} instead of {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape
    ]
    if missing or unknown or other:
        faults = [
            f"{len(missing)} of {len(wanted)} tensors are missing ({_some(missing)})" if missing else "",
            f"{len(unknown)} are unknown ({_some(unknown)})" if unknown else "",
            f"{len(other)} have another shape ({_some(other)})" if other else "",
        ]
        raise CheckpointError(
            f"{path} does not fit {card.name}: {', '.join(f for f in faults if f)}. It seems to be {guess(tensors)}.",
            f"Give {card.weights} of {card.url or card.source}.",
        )
    network.load_state_dict({k: given[k] for k in wanted}, strict=False, assign=True)


def guess(tensors: Mapping[str, Tensor]) -> str:
    """Which network a file seems to belong to, in words."""
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    registers = {(1, 8, 1536): "UNI2-h", (1, 4, 1536): "H-optimus-0", (1, 4, 1280): "Virchow2"}
    if "pretext_token" in shapes:
        return "PathoDuet"
    if "Conv2d_1a_3x3.conv.weight" in shapes:
        outputs = shapes.get("fc.weight", (0,))[0]
        return "the Inception-v3 of FID" if outputs == 1008 else f"another Inception-v3, with {outputs} outputs"
    if any(k.startswith("vision_model.") for k in shapes):
        return "CLIP"
    if "embeddings.cls_token" in shapes:
        return f"a vision transformer in the layout of transformers ({shapes['embeddings.cls_token'][-1]} wide)"
    if "cls_token" in shapes:
        width = shapes["cls_token"][-1]
        patch = shapes.get("patch_embed.proj.weight", (0,))[-1]
        name = registers.get(shapes.get("reg_token", ()), "a vision transformer")
        return f"{name} ({width} wide, patches of {patch} px)"
    if "features.0.0.weight" in shapes:
        return "a MobileNet"
    if "features.0.weight" in shapes:
        return "a plain convolutional network (AlexNet, VGG or SqueezeNet)"
    first = next(iter(shapes), "nothing")
    return f"another network ({len(shapes)} tensors, the first {first})"


def file_hash(path: Path) -> str:
    """SHA-256 of a file; kept while its size and time of change stay the same."""
    stat = path.stat()
    return _hash(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash(path: str, size: int, changed: int) -> str:
    return sha256_file(path)


def hub_folder() -> Path:
    """Where torch keeps downloaded weights."""
    if "torch" in sys.modules:
        import torch

        return Path(torch.hub.get_dir()) / "checkpoints"
    root = os.environ.get("TORCH_HOME") or _cache() / "torch"
    return Path(root).expanduser() / "hub" / "checkpoints"


def hugging_face_folder() -> Path:
    """Where the libraries of Hugging Face keep downloads."""
    root = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or _cache() / "huggingface") / "hub"
    return Path(root).expanduser()


def _snapshots(repository: str) -> list[Path]:
    """Folders of a repository in the cache of Hugging Face, the one that "main" points to first.

    The server takes a name in any case (MahmoodLab/uni and MahmoodLab/UNI are both in use), and the cache is named
    after what was asked for.
    """
    root, wanted = hugging_face_folder(), ("models--" + repository.replace("/", "--"))
    kept = [path for path in root.glob("models--*") if path.name.lower() == wanted.lower()]
    found: list[Path] = []
    for folder in sorted(kept, key=lambda path: (path.name != wanted, path.name)):
        main = folder / "refs" / "main"
        first = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
        found += sorted((folder / "snapshots").glob("*"), key=lambda path: (path.name != first, path.name))
    return [path for path in found if path.is_dir()]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def find_named(card: EncoderCard) -> Path | None:
    """The weight file that an environment variable names, whether it is there or not."""
    value = os.environ.get(variable(card.name))
    if not value and card.shared_with:
        value = os.environ.get(variable(card.shared_with))
    return Path(value).expanduser() if value else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
