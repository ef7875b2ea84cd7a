"""Arithmetic of latent codes: which space a code is of, ways between two codes, codes mixed by layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from histosynth.core.errors import DataError, SettingError

Space = Literal["z", "w", "w+"]
SPANS = ("coarse", "middle", "fine")


def spherical(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Codes on the great circle from a to b [..., C] at t [...] in [0, 1]; lengths go evenly from |a| to |b|.

    Gaussian codes of many dimensions lie near a sphere; a straight line between two leaves it (1609.04468).
    """
    length_a, length_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    one, two = a / length_a.clamp_min(1e-12), b / length_b.clamp_min(1e-12)
    t = t[..., None]
    angle = torch.acos((one * two).sum(dim=-1, keepdim=True).clamp(-1, 1))
    sine = torch.sin(angle)
    # (almost) the same or opposite directions leave the circle undefined: a straight line instead
    plain = sine < 1e-4
    safe = torch.where(plain, torch.ones_like(sine), sine)
    first = torch.where(plain, 1 - t, torch.sin((1 - t) * angle) / safe)
    second = torch.where(plain, t, torch.sin(t * angle) / safe)
    return (first * one + second * two) * (length_a + t * (length_b - length_a))


def between(a: Tensor, b: Tensor, steps: int, space: Space) -> Tensor:
    """`steps` codes from a to b, both ends included: spherical in z, straight in w and w+.

    Args:
        a, b: one code each, [C] or [layers, C].

    Returns:
        [steps, C] or [steps, layers, C].

    Raises:
        SettingError: fewer than two steps.
        DataError: the codes have different shapes.
    """
    if steps < 2:
        raise SettingError(f"steps is {steps}.", "An interpolation has at least 2 steps.")
    if a.shape != b.shape:
        raise DataError(f"The codes have shapes {tuple(a.shape)} and {tuple(b.shape)}.", "Take both from one space.")
    t = torch.linspace(0, 1, steps, device=a.device)
    if space == "z":
        return spherical(a.expand(steps, *a.shape), b.expand(steps, *b.shape), t)
    return torch.lerp(a[None], b[None], t.view(-1, *[1] * a.ndim))


def span(layers: int, which: str | Sequence[int]) -> list[int]:
    """The layers of a network that a style-mixing grid takes from its columns.

    Args:
        layers: how many codes an image takes.
        which: coarse, middle or fine (a third of the layers each, from the smallest resolution), or layer numbers.

    Raises:
        SettingError: an unknown name, or a layer that does not exist.
    """
    if isinstance(which, str):
        if which not in SPANS:
            raise SettingError(f"layers is {which!r}.", f"Use {', '.join(SPANS)}, or layer numbers.")
        edges = [round(layers * k / 3) for k in range(4)]
        at = SPANS.index(which)
        return list(range(edges[at], edges[at + 1]))
    chosen = [_whole(k, "layer") for k in which]
    wrong = [k for k in chosen if not 0 <= k < layers]
    if wrong or not chosen:
        raise SettingError(f"layers is {list(which)}.", f"Use numbers from 0 to {layers - 1}.")
    return chosen


def crossed(rows: Tensor, columns: Tensor, layers: int, taken: Sequence[int]) -> Tensor:
    """Style mixing (1812.04948, figure 3): w [R, C], [K, C] -> w+ [R, K, layers, C], `taken` from the columns."""
    late = torch.zeros(layers, dtype=torch.bool, device=rows.device)
    late[list(taken)] = True
    return torch.where(late[:, None], layered(columns, layers)[None], layered(rows, layers)[:, None])


def space_of(latents: Tensor, z_dim: int, w_dim: int, layers: int, labelled: bool) -> Space:
    """The space that codes are of, by their shape.

    [N, layers, w_dim] is w+. Two-dimensional codes are z if labels came with them, else w.

    Raises:
        DataError: no space has codes of this shape, or a value is not finite.
    """
    shape = tuple(latents.shape)
    remedy = f"Give z [N, {z_dim}] with labels, w [N, {w_dim}] or w+ [N, {layers}, {w_dim}], floats."
    if not latents.is_floating_point():
        raise DataError(f"The latents are {latents.dtype}.", remedy)
    if not torch.isfinite(latents).all():
        row = int((~torch.isfinite(latents)).flatten(1).any(dim=1).nonzero()[0]) if latents.ndim > 1 else 0
        raise DataError(f"Latent {row} has a value that is not finite.", "Project or sample it anew.")
    if latents.ndim == 3 and shape[1:] == (layers, w_dim):
        return "w+"
    if latents.ndim == 2 and shape[1] == (z_dim if labelled else w_dim):
        return "z" if labelled else "w"
    raise DataError(f"The latents have the shape {shape}.", remedy)


def checked_labels(labels: Sequence[int], seeds: Sequence[int], classes: Sequence[str]) -> tuple[list[int], list[int]]:
    """Labels and seeds as lists of plain integers.

    Raises:
        SettingError: lengths differ, a label is not a class, a seed is negative, or one is not a whole number.
    """
    if len(labels) != len(seeds):
        raise SettingError(f"{len(labels)} labels came with {len(seeds)} seeds.", "Give one seed a label.")
    whole_labels, whole_seeds = [_whole(k, "label") for k in labels], [_whole(s, "seed") for s in seeds]
    wrong = [k for k in whole_labels if not 0 <= k < len(classes)]
    if wrong:
        raise SettingError(
            f"Label {wrong[0]} is not a class of this generator.",
            f"Use 0 to {len(classes) - 1}: {', '.join(classes)}.",
        )
    if negative := [s for s in whole_seeds if s < 0]:
        raise SettingError(f"Seed {negative[0]} is negative.", "Use 0 or more.")
    return whole_labels, whole_seeds


def _whole(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise SettingError(f"The {what} {value!r} is not a whole number.", "Use whole numbers.") from error


def layered(w: Tensor, layers: int) -> Tensor:
    """w [N, w_dim] as w+ [N, layers, w_dim]."""
    return w[:, None].expand(-1, layers, -1)
