"""Starting from trained weights: other classes, other sizes, other widths keep whatever still fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from histosynth.core.seeds import torch_generator

_CLASS_ROWS = ("mapping.embedding", "mapping.w_mean", "embedding")  # one row a class


@dataclass(frozen=True)
class Transferred:
    """What a transfer did: tensors taken over, tensors left at their start, classes that had no row."""

    taken: int
    left: int
    new_classes: tuple[str, ...]


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
    grows = not all(f"{name}.rgb_bias" in tensors for name in _blocks_with_heads(network))
    for name, target in network.state_dict().items():
        source = tensors.get(name)
        if source is not None and name in _CLASS_ROWS and source.shape[1:] == target.shape[1:]:
            target.copy_(_class_rows(name, source, old_classes, new_classes, seed))
            taken += 1
        elif source is not None and source.shape == target.shape:
            target.copy_(source)
            taken += 1
        else:
            if source is None and grows and name.endswith("to_rgb.weight"):
                target.zero_()
            left += 1
    return Transferred(taken, left, unknown)


def _blocks_with_heads(network: nn.Module) -> list[str]:
    return [name.removesuffix(".rgb_bias") for name in network.state_dict() if name.endswith(".rgb_bias")]


def _class_rows(
    name: str, source: Tensor, old_classes: Sequence[str], new_classes: Sequence[str], seed: int
) -> Tensor:
    mean, spread = source.mean(dim=0), source.std(dim=0, unbiased=False).mean()
    rows = []
    for label in new_classes:
        if label in old_classes:
            rows.append(source[list(old_classes).index(label)])
        else:
            noise = torch.randn(source.shape[1], generator=torch_generator(seed, "new class", name, label))
            rows.append(mean + 0.1 * spread * noise)
    return torch.stack(rows)
