"""Where pixels go: one map from output to input places per sample, executed by one inverse warp.

Places are in units of half the image, (x, y) from -1 to 1; beyond its edges an image is its mirror image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from histosynth.gan.augmentation.draws import Draws
from histosynth.gan.augmentation.pipe import Pipe
from histosynth.gan.augmentation.wavelets import DELAY, MARGIN, filters

BLIT = ("flip", "quarter", "shift")  # changes that move pixels without mixing them
SELECTING = ("cpu",)  # devices that can count samples without waiting


def geometry(images: Tensor, pipe: Pipe, draws: Draws, fine: bool) -> Tensor:
    """Mirror, turn, move, scale and stretch float32 [N, 3, S, S] (2006.06676, appendix B and algorithm 1).

    Samples that only the pixel-exact changes touch are exact, the others are interpolated: from an enlargement by a
    band-limited filter if `fine`, else linearly from the pixels.
    """
    size = images.shape[-1]
    maps = {name: make(pipe, draws, size) for name, make in _MAPS.items() if _wanted(pipe, name)}
    if not maps:
        return images
    place = torch.eye(3, device=images.device)
    for _, inverse in maps.values():
        # the first change acts first on the image, so its inverse comes last on the way from output to input
        place = place @ inverse
    place = place[:, :2]
    blit = [on for name, (on, _) in maps.items() if name in BLIT]
    rest = [on for name, (on, _) in maps.items() if name not in BLIT]
    mixed = torch.stack(rest).any(dim=0) if rest else None
    if blit:
        moved = torch.stack(blit).any(dim=0)
        exact = moved if mixed is None else moved & ~mixed
        images = on_some(exact, images, lambda x, m: warp(x, m, "nearest"), place)
    return images if mixed is None else on_some(mixed, images, fine_warp if fine else warp, place)


def on_some(which: Tensor, images: Tensor, change: Any, *arguments: Tensor) -> Tensor:
    """`change(images, *arguments)` for the samples of the mask; the others stay as they are, bit for bit.

    A CPU computes only those samples; a GPU computes all, since asking how many there are would make it wait.
    """
    arguments = tuple(a.to(images.dtype) for a in arguments)
    if images.device.type not in SELECTING:
        return torch.where(which.view(-1, 1, 1, 1), change(images, *arguments), images)
    some = which.nonzero().squeeze(1)
    if len(some) == 0:
        return images
    if len(some) == len(images):
        return change(images, *arguments)
    return images.index_copy(0, some, change(images[some], *(a[some] for a in arguments)))


def warp(images: Tensor, place: Tensor, mode: str = "bilinear", size: int | None = None) -> Tensor:
    """Output pixels take the input at `place` [N, 2, 3] of their own place; differentiable twice to the images."""
    size = size or images.shape[-1]
    middles = (torch.arange(size, device=images.device) * 2 + 1).to(images.dtype) / size - 1
    # by broadcasting, which is five times as fast as torch's product of matrices
    across = middles[:, None] * place[:, None, :, 0] + place[:, None, :, 2]
    down = middles[:, None] * place[:, None, :, 1]
    return _Sample.apply(images, across[:, None, :, :] + down[:, :, None, :], mode)


def fine_warp(images: Tensor, place: Tensor) -> Tensor:
    """The warp at twice the size, between band-limited filters: little aliasing, little blur.

    The place is exact for slow signals: symlet 6 is not quite symmetric, and its delay is taken out. The identity
    comes back as the same image, but for rounding and the outermost pixels.
    """
    size = images.shape[-1]
    double, halve = (filters(kind, size, images.device).to(images.dtype) for kind in ("double", "halve"))
    large = double @ images @ double.t()
    late = DELAY / size  # the delay of `double`, in units of half the image
    wide = 1 + MARGIN / size
    linear, offset = place[:, :, :2], place[:, :, 2:]
    # `halve` is delayed as well: its input sample belongs to a place further on
    offset = offset + linear.sum(dim=2, keepdim=True) * late - late
    large = warp(large, torch.cat([linear * wide, offset], dim=2), size=2 * size + 2 * MARGIN)
    return halve @ large @ halve.t()


class _Sample(torch.autograd.Function):
    """`grid_sample` is linear in the image, but torch has no gradient of its gradient; the adjoint gives it."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, grid: Tensor, mode: str) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.mode, ctx.shape = mode, images.shape
        return F.grid_sample(images, grid, mode, "reflection", align_corners=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(gradient, *ctx.saved_tensors, ctx.mode, ctx.shape), None, None


class _Spread(torch.autograd.Function):
    """The adjoint of `_Sample`: every output pixel gives its value back to where it was read."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, mode: str, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.mode = mode
        like = gradient.new_empty(1).expand(shape)  # only its shape is read, as the grid needs no gradient
        number = {"bilinear": 0, "nearest": 1}[mode]
        spread = torch.ops.aten.grid_sampler_2d_backward
        return spread(gradient, like, grid, number, 2, False, [True, False])[0]  # 2: reflection

    @staticmethod
    def backward(ctx: Any, second: Tensor) -> tuple[Tensor, None, None, None]:
        return _Sample.apply(second, *ctx.saved_tensors, ctx.mode), None, None, None


# Every change below gives bool [N], the samples that it happens to, and [N, 3, 3], its inverse as a map of places.


def _wanted(pipe: Pipe, name: str) -> bool:
    if name == "turn again":  # only a stretch between them makes two rotations differ from one
        return pipe.rotation > 0 and pipe.stretch > 0
    return bool(pipe.rotation if name == "turn" else getattr(pipe, name))


def _flip(pipe: Pipe, draws: Draws, size: int) -> tuple[Tensor, Tensor]:
    on = draws.on("flip") & (draws.uniform("flip") < 0.5)
    across = torch.where(on, -1.0, 1.0)
    return on, _diagonal(across, torch.ones_like(across))


def _quarter(pipe: Pipe, draws: Draws, size: int) -> tuple[Tensor, Tensor]:
    turns = torch.where(draws.on("quarter"), (draws.uniform("quarter") * 4).floor(), 0.0)
    cos = (turns == 0).float() - (turns == 2).float()  # exact, so that places stay on pixels
    sin = (turns == 1).float() - (turns == 3).float()
    return turns > 0, _linear(cos, sin, -sin, cos)


def _shift(pipe: Pipe, draws: Draws, size: int) -> tuple[Tensor, Tensor]:
    on = draws.on("shift")
    pixels = torch.where(on[:, None], (draws.sign("shift") * (pipe.shift * size)).round(), 0.0)
    return on, _offset(-pixels * (2 / size))


def _scale(pipe: Pipe, draws: Draws, size: int) -> tuple[Tensor, Tensor]:
    on = draws.on("scale")
    shrink = torch.where(on, torch.exp2(-pipe.scale * draws.normal("scale")), 1.0)
    return on, _diagonal(shrink, shrink)


def _turn(name: str) -> Any:
    def make(pipe: Pipe, draws: Draws, size: int) -> tuple[Tensor, Tensor]:
        # two rotations with this probability each are none at all with probability 1 - p (appendix B)
        on = draws.on(name, 1 - math.sqrt(1 - draws.p) if pipe.stretch else None)
        angle = torch.where(on, draws.angle(name, pipe.rotation), 0.0)
        cos, sin = torch.cos(angle), torch.sin(angle)
        return on, _linear(cos, sin, -sin, cos)

    return make


def _stretch(pipe: Pipe, draws: Draws, size: int) -> tuple[Tensor, Tensor]:
    on = draws.on("stretch")
    shrink = torch.where(on, torch.exp2(-pipe.stretch * draws.normal("stretch")), 1.0)
    return on, _diagonal(shrink, 1 / shrink)


def _drift(pipe: Pipe, draws: Draws, size: int) -> tuple[Tensor, Tensor]:
    on = draws.on("drift")
    return on, _offset(torch.where(on[:, None], -2 * pipe.drift * draws.normal("drift"), 0.0))


_MAPS = {
    "flip": _flip, "quarter": _quarter, "shift": _shift, "scale": _scale, "turn": _turn("turn"),
    "stretch": _stretch, "turn again": _turn("turn again"), "drift": _drift,
}  # fmt: skip


def _linear(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """[[a, b, 0], [c, d, 0], [0, 0, 1]] of every sample."""
    nil, one = torch.zeros_like(a), torch.ones_like(a)
    return torch.stack([a, b, nil, c, d, nil, nil, nil, one], dim=1).view(-1, 3, 3)


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    nil = torch.zeros_like(x)
    return _linear(x, nil, nil, y)


def _offset(move: Tensor) -> Tensor:
    """The map that adds `move` [N, 2]."""
    matrix = torch.eye(3, device=move.device).repeat(len(move), 1, 1)
    matrix[:, :2, 2] = move
    return matrix
