"""Weights on the move: into a training (other classes, sizes, widths keep what fits), out to a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from histosynth.core.assets import asset_path
from histosynth.core.checkpoint import load_checkpoint, load_state, require_kind, save_checkpoint
from histosynth.core.errors import CheckpointError
from histosynth.core.progress import say
from histosynth.core.seeds import torch_generator
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape

BASE = "gan-base-64.safetensors"

_CLASS_ROWS = ("mapping.embedding", "mapping.w_mean", "embedding")  # one row a class


@dataclass(frozen=True)
class Transferred:
    """What a transfer did: tensors taken over, tensors left at their start, classes that had no row."""

    taken: int
    left: int
    new_classes: tuple[str, ...]


def start_from(
    init: str, generator: Generator, discriminator: Discriminator, classes: Sequence[str], seed: int
) -> None:
    """Take over every tensor that fits from the checkpoint `init`, or from the shipped weights ("base").

    Raises:
        CheckpointError: there is no such checkpoint, or nothing in it fits.
    """
    path = asset_path(BASE) if init == "base" else Path(init)
    tensors, card = load_checkpoint(path)
    require_kind(card, "gan", path)
    taken = 0
    for prefix, network in (("G_ema.", generator), ("D.", discriminator)):
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        report = transfer(network, own, card["classes"], classes, seed)
        taken += report.taken
    if not taken:
        raise CheckpointError(
            f"No tensor of {path} fits these settings.", "Use its channel_base and channel_max, or init=none."
        )
    if report.new_classes:
        say(f"New to the start weights, so they begin as average tissue: {', '.join(report.new_classes)}")


@torch.no_grad()
def transfer(
    network: nn.Module,
    tensors: dict[str, Tensor],
    old_classes: Sequence[str],
    new_classes: Sequence[str],
    seed: int = 0,
) -> Transferred:
    """Copy every tensor of `tensors` that has the same name and shape into `network`.

    Rows that belong to a class follow the class name; a class that the old network did not know gets the mean
    of the old rows plus a little noise, so that it starts as average tissue and can be told apart.
    Layers are named by their resolution, so networks of other sizes share the common ones; the image heads
    of added resolutions start at zero, which makes the larger network begin as the smaller one, enlarged.
    """
    taken = left = 0
    unknown = tuple(c for c in new_classes if c not in old_classes)
    for name, target in network.state_dict().items():
        source = tensors.get(name)
        if source is not None and name in _CLASS_ROWS and source.shape[1:] == target.shape[1:]:
            target.copy_(_class_rows(name, source, old_classes, new_classes, seed))
            taken += 1
        elif source is not None and source.shape == target.shape:
            target.copy_(source)
            taken += 1
        else:
            if source is None and name.endswith("to_rgb.weight"):
                target.zero_()
            left += 1
    return Transferred(taken, left, unknown)


def _class_rows(name: str, source: Tensor, old_classes: Sequence[str], new_classes: Sequence[str], seed: int) -> Tensor:
    mean, spread = source.mean(dim=0), source.std(dim=0, unbiased=False).mean()
    rows = []
    for label in new_classes:
        if label in old_classes:
            rows.append(source[list(old_classes).index(label)])
        else:
            noise = torch.randn(source.shape[1], generator=torch_generator(seed, "new class", name, label))
            rows.append(mean + 0.1 * spread * noise)
    return torch.stack(rows)


def export(source: Path | str, path: Path | str, *, half: bool = False) -> Path:
    """Write the averaged generator and the discriminator of a resume state or a checkpoint as a checkpoint.

    Args:
        source: a run folder, the state file in it, or a checkpoint.
        half: store float16, for weights that are shipped.

    Raises:
        CheckpointError: `source` is missing or is not a GAN.
    """
    source = Path(source)
    if source.is_dir():
        source = source / "state" / "state.safetensors"
    if source.name == "state.safetensors":
        state = load_state(source)
        card = state["card"]
        average = Generator(Shape(**card["shape"]))
        average.load_state_dict(state["average"])
        average.mapping.measure_mean()
        tensors = {f"G_ema.{k}": v for k, v in average.state_dict().items()}
        tensors |= {f"D.{k}": v for k, v in state["discriminator"].items()}
    else:
        tensors, card = load_checkpoint(source)
        require_kind(card, "gan", source)
    return save_checkpoint(path, tensors, card, half=half)


def export_base(source: Path | str, path: Path | str) -> Path:
    """`export` in half precision under the name of the base weights: what is shipped inside the package."""
    return export(source, path, half=True)
