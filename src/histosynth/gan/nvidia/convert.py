"""A checkpoint from a network that NVIDIA's training wrote."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from histosynth.core.checkpoint import save_checkpoint
from histosynth.core.errors import SettingError
from histosynth.core.files import sha256_file
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator
from histosynth.gan.nvidia.check import check_layers
from histosynth.gan.nvidia.names import EMBED, filters, theirs
from histosynth.gan.nvidia.network import Network
from histosynth.gan.nvidia.open import open_networks
from histosynth.gan.nvidia.settings import FILTER_TAPS, lr_multiplier, shape_of
from histosynth.gan.sample import UNLABELLED
from histosynth.gan.shape import Shape

LICENCE = "NVIDIA Source Code License (non-commercial)"


@dataclass(frozen=True)
class Converted:
    """What a conversion found and wrote."""

    path: Path
    shape: Shape
    classes: tuple[str, ...]
    parameters: int
    """Of the generator."""
    parameters_discriminator: int
    """0 where there was none."""
    origin: str
    """Name and SHA-256 of the file."""
    licence: str
    notes: tuple[str, ...]


def convert(source: Path | str, out: Path | str, classes: Sequence[str] = (), command: str = "") -> Converted:
    """Write a checkpoint of kind "gan" from a network pickle, or from a file of tensors under NVIDIA's names.

    The converted generator is the same function: its images differ from those of NVIDIA's code by rounding alone.

    Args:
        source: the file.
        out: the checkpoint to write.
        classes: names of the classes, in the order of the labels; class-000, class-001 ... by default.
        command: for the card.

    Raises:
        CheckpointError: the file is missing, is no network, or holds anything unexpected.
        SettingError: the names do not fit the number of classes.
    """
    source = Path(source)
    found = open_networks(source)
    generator, discriminator, notes = found.generator, found.discriminator, list(found.notes)
    shape = shape_of(generator, discriminator)
    names = _class_names(classes or _known_names(found.about, shape.classes), shape.classes)
    tensors = {f"G_ema.{k}": v for k, v in translate(generator, shape).items()}
    counts = {"G_ema": _count(Generator, shape), "D": 0}
    if discriminator is not None:
        tensors |= {f"D.{k}": v for k, v in translate(discriminator, shape).items()}
        counts["D"] = _count(Discriminator, shape)
    else:
        notes.append("There is no discriminator (D): the checkpoint makes tiles, and a training starts a new one.")
    origin = f"{source.name} sha256:{sha256_file(source)}"
    card: dict[str, Any] = {
        "kind": "gan", "name": source.stem, "config": {}, "shape": dataclasses.asdict(shape), "classes": list(names),
        "size": shape.size, "parameters": counts["G_ema"], "parameters_discriminator": counts["D"],
        "licence": str(found.about.get("licence") or LICENCE), "parents": [origin], "command": command,
    }  # fmt: skip
    path = save_checkpoint(out, tensors, card)
    return Converted(path, shape, names, counts["G_ema"], counts["D"], origin, card["licence"], tuple(notes))


def translate(network: Network, shape: Shape) -> dict[str, Tensor]:
    """Our tensors, by our names, from a network of this shape; every one of its tensors is used exactly once.

    Raises:
        CheckpointError: a tensor is missing, left over, of another size, or not finite; or a layer differs.
    """
    check_layers(network, shape)
    generator = network.where != "D"
    left = dict(network.tensors)
    _take_filters(network, left, filters(shape, generator))
    out: dict[str, Tensor] = {}
    for name, wanted in blank(Generator if generator else Discriminator, shape).items():
        twin = theirs(name, shape, generator)
        if twin is not None and (twin in left or twin != "mapping.w_avg"):
            out[name] = _taken(network, left, twin, tuple(wanted.shape))
    if shape.classes and (generator or shape.conditioning == "mapping"):
        out["mapping.embedding"] = _embedding(network, left, shape, generator)
    if left:
        network.fail(f"it has a tensor {min(left)!r}, which our network of these settings lacks")
    if generator:
        _averages(network, out, shape)
    elif lr_multiplier(network) != shape.mapping_lr:
        for name in [n for n in out if n.startswith("mapping.layers.")]:
            out[name] = out[name] * (lr_multiplier(network) / shape.mapping_lr)
    return out


def blank(kind: type[Generator] | type[Discriminator], shape: Shape) -> dict[str, Tensor]:
    """The state of a network without any values: its names and sizes."""
    with torch.device("meta"):
        return kind(shape).state_dict()


def _taken(network: Network, left: dict[str, np.ndarray], name: str, wanted: tuple[int, ...]) -> Tensor:
    if name not in left:
        network.fail(f"it lacks the tensor {name!r}")
    found = left.pop(name)
    # a constant and noise planes have no batch in NVIDIA's networks
    own = wanted[1:] if name.endswith(".const") else wanted[2:] if name.endswith(".noise_const") else wanted
    if found.shape != own:
        network.fail(f"{name} has the size {list(found.shape)}, not {list(own)}")
    if found.dtype.kind != "f":
        network.fail(f"{name} does not hold real numbers but {found.dtype}")
    values = np.array(found, dtype=np.float32, order="C")
    if not np.isfinite(values).all():
        network.fail(f"{name} holds values that are not finite", "It comes from a failed training.")
    return torch.from_numpy(values).reshape(wanted)


def _embedding(network: Network, left: dict[str, np.ndarray], shape: Shape, generator: bool) -> Tensor:
    """A row a class: what NVIDIA's linear layer of the one-hot label gives."""
    width = shape.w_dim if generator else shape.cmap_dim or shape.d_channels(4)
    weight = _taken(network, left, EMBED[0], (width, shape.classes))
    bias = _taken(network, left, EMBED[1], (width,))
    return weight.t() / math.sqrt(shape.classes) + bias


def _averages(network: Network, out: dict[str, Tensor], shape: Shape) -> None:
    """NVIDIA keeps one mean of w; truncation must pull every class towards it, as theirs does."""
    rows = max(shape.classes, 1)
    if "mapping.w_avg" in out:
        out["mapping.w_mean"] = out["mapping.w_avg"].expand(rows, -1).clone()
        return
    mapping = Generator(shape).mapping  # a network without a mean can still be truncated: it is measured
    own = {k.removeprefix("mapping."): v for k, v in out.items() if k.startswith("mapping.")}
    mapping.load_state_dict(own, strict=False)
    mapping.measure_mean()
    out["mapping.w_mean"], out["mapping.w_avg"] = mapping.w_mean, mapping.w_avg


def _take_filters(network: Network, left: dict[str, np.ndarray], names: Sequence[str]) -> None:
    taps = np.array(FILTER_TAPS, dtype=np.float64)
    wanted = np.outer(taps, taps) / taps.sum() ** 2
    for name in names:
        found = left.pop(name, None)
        if found is not None and (found.shape != (4, 4) or not np.allclose(found, wanted, atol=1e-6)):
            network.fail(f"{name} is not the filter {list(FILTER_TAPS)}")


def _known_names(about: dict[str, Any], count: int) -> list[str]:
    names = about.get("classes")
    fits = isinstance(names, list) and len(names) == count and all(isinstance(n, str) for n in names)
    return list(names) if fits and names else []


def _class_names(given: Sequence[str], count: int) -> tuple[str, ...]:
    names = [n.strip() for text in given for n in text.split(",") if n.strip()]
    if not names:
        return tuple(f"class-{k:03d}" for k in range(count)) or (UNLABELLED,)
    if len(names) != max(count, 1) or len(set(names)) != len(names):
        raise SettingError(
            f"classes names {len(names)} classes ({', '.join(names)}), and the network has {count or 'no'} labels.",
            f"Give {max(count, 1)} different names, in the order of the labels.",
        )
    return tuple(names)


def _count(kind: type[nn.Module], shape: Shape) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in kind(shape).parameters())  # type: ignore[call-arg]
