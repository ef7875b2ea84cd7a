"""LPIPS: how different two tiles look (Zhang et al. 2018, arXiv:1801.03924, version 0.1).

The linear heads come with the `lpips` package. The networks under them are torchvision's ImageNet classifiers, whose
weights no package ships.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from histosynth.core.device import pick_device
from histosynth.core.errors import CheckpointError, DataError, SettingError, did_you_mean
from histosynth.core.types import EncoderCard
from histosynth.encoders.frozen import whole_float32
from histosynth.encoders.weights import fit, read_tensors, require

Net = Literal["alex", "vgg", "squeeze"]

SMALLEST = 32
"""Shortest edge of a tile, pixels."""
# subtracted from and divided into pixels in [-1, 1]: ImageNet's statistics on that scale, as LPIPS rounds them
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# the layers of torchvision's `features` whose outputs are compared, and how many channels they have
_TAPS = {
    "alex": {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},
    "vgg": {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
    "squeeze": {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512},
}
_MODELS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
_PAIRS_AT_ONCE = 16


def _backbone(net: str, file: str) -> EncoderCard:
    return EncoderCard(
        f"lpips-{net}",
        dim=0,
        input_size=0,
        licence="BSD-3-Clause",
        source=f"torchvision's {_MODELS[net]} (ImageNet), under the heads of LPIPS 0.1",
        citation="Zhang et al. 2018, arXiv:1801.03924",
        url="https://download.pytorch.org/models/",
        weights=file,
        files=(file,),
        how="histosynth encoders --fetch {name}",
        optional=True,
        download=f"https://download.pytorch.org/models/{file}",
        sha256=file.rpartition("-")[2].removesuffix(".pth"),
    )


BACKBONES = {
    "alex": _backbone("alex", "alexnet-owt-7be5be79.pth"),
    "vgg": _backbone("vgg", "vgg16-397923af.pth"),
    "squeeze": _backbone("squeeze", "squeezenet1_1-b8a52dc0.pth"),
}


class Lpips(nn.Module):
    """The distance. Call it with two uint8 batches; the range of the pixels is its own business."""

    shift: Tensor
    scale: Tensor

    def __init__(self, net: Net, features: nn.Module, heads: list[Tensor]) -> None:
        super().__init__()
        self.net, self.taps = net, tuple(_TAPS[net])
        self.features = features
        for i, head in enumerate(heads):
            self.register_buffer(f"head{i}", head)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))

    @torch.no_grad()
    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] twice -> float32 [N] on the CPU; 0 for the same tile.

        Raises:
            DataError: another type, or shapes that differ or are too small.
        """
        _check(one, two, one.dtype == two.dtype == torch.uint8, "torch.uint8 [N, 3, H, W] twice")
        found = [torch.empty(0)]
        if len(one):
            for a, b in zip(one.split(_PAIRS_AT_ONCE), two.split(_PAIRS_AT_ONCE), strict=True):
                found.append(self._distance(*(x.to(self.shift.device).float() / 127.5 - 1 for x in (a, b))).cpu())
        return torch.cat(found)

    def differentiable(self, one: Tensor, two: Tensor) -> Tensor:
        """float [N, 3, H, W] in [-1, 1] twice -> float32 [N], with gradients to both.

        Raises:
            DataError: another type, or shapes that differ or are too small.
        """
        right = one.is_floating_point() and two.is_floating_point()
        _check(one, two, right, "floats [N, 3, H, W] in [-1, 1] twice")
        return self._distance(one.to(self.shift.device).float(), two.to(self.shift.device).float())

    def _distance(self, one: Tensor, two: Tensor) -> Tensor:
        count = len(one)
        x = (torch.cat([one, two]) - self.shift) / self.scale
        total = torch.zeros(count, device=x.device)
        tapped = 0
        for i, layer in enumerate(self.features):
            with whole_float32():
                x = layer(x)
            if i in self.taps:
                unit = x / (x.square().sum(1, keepdim=True) + 1e-20).sqrt()
                difference = (unit[:count] - unit[count:]).square()
                head = getattr(self, f"head{tapped}").view(1, -1, 1, 1)
                total = total + (difference * head).sum(1).mean((1, 2))
                tapped += 1
        return total


def build(net: Net) -> nn.ModuleDict:
    """The layers under the heads, under the names of torchvision's files, with random weights.

    Raises:
        SettingError: an unknown network.
    """
    from torchvision import models

    if net not in _MODELS:
        raise SettingError(f"The LPIPS network is {net!r}.", did_you_mean(net, _MODELS))
    whole = getattr(models, _MODELS[net])(weights=None)
    return nn.ModuleDict({"features": whole.features[: max(_TAPS[net]) + 1]})


def load_lpips(net: Net = "alex", backbone: Path | None = None, device: str = "cpu") -> Lpips:
    """LPIPS on one of its three networks.

    Args:
        net: alex (the authors' choice for measuring), vgg or squeeze.
        backbone: torchvision's weight file; None looks in the weights folder and torch hub's cache.

    Raises:
        SettingError: an unknown network.
        CheckpointError: the backbone or the heads are missing, or not those of this network.
    """
    if net not in BACKBONES:
        raise SettingError(f"The LPIPS network is {net!r}.", did_you_mean(net, BACKBONES))
    card = BACKBONES[net]
    path = require(card, backbone)
    with torch.device("meta"):
        layers = build(net)
    # the file goes on beyond the last layer that is compared
    tensors = {k: v for k, v in read_tensors(path).items() if not _beyond(k, max(_TAPS[net]))}
    fit(layers, tensors, path, card, ("classifier.",))
    return Lpips(net, layers["features"], read_heads(net)).eval().requires_grad_(False).to(pick_device(device))


def read_heads(net: Net) -> list[Tensor]:
    """The non-negative weight of every channel at every tap, from the `lpips` package.

    Raises:
        CheckpointError: the package is not installed, or its heads are others.
    """
    spec = find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError("The heads of LPIPS come with the package lpips.", "Install it: pip install lpips.")
    path = Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / f"{net}.pth"
    tensors = read_tensors(path)
    names = [f"lin{i}.model.1.weight" for i in range(len(_TAPS[net]))]
    widths = list(_TAPS[net].values())
    if any(n not in tensors or tensors[n].numel() != w for n, w in zip(names, widths, strict=True)):
        raise CheckpointError(f"{path} does not hold the heads of LPIPS 0.1.", "Install lpips 0.1.4.")
    return [tensors[n].flatten() for n in names]


def _beyond(key: str, last: int) -> bool:
    number = key.removeprefix("features.").partition(".")[0]
    return key.startswith("features.") and number.isdecimal() and int(number) > last


def _check(one: Tensor, two: Tensor, right_type: bool, wanted: str) -> None:
    fits = one.ndim == 4 and one.shape[1] == 3 and one.shape == two.shape and right_type
    if not fits:
        raise DataError(
            f"LPIPS got {tuple(one.shape)} ({one.dtype}) and {tuple(two.shape)} ({two.dtype}).", f"Give {wanted}."
        )
    if len(one) and min(one.shape[-2:]) < SMALLEST:
        raise DataError(
            f"LPIPS got tiles of {one.shape[-2]} x {one.shape[-1]} px.", f"It needs at least {SMALLEST} px."
        )
