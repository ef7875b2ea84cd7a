"""What colour pixels have: one affine map of RGB per sample, then one linear map of its optical densities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from histosynth.gan.augmentation.draws import Draws
from histosynth.gan.augmentation.geometry import on_some
from histosynth.gan.augmentation.pipe import Pipe

# optical densities (red, green, blue) of haematoxylin and of eosin (Ruifrok and Johnston 2001, table 1)
HAEMATOXYLIN, EOSIN = (0.650, 0.704, 0.286), (0.072, 0.990, 0.105)
_DARKEST = 1 / 255  # a transmission of nothing has no density


def colour(images: Tensor, pipe: Pipe, draws: Draws) -> Tensor:
    """Brightness, contrast, luma, hue and saturation of float32 [N, 3, S, S] (2006.06676, appendix B).

    Of images with other channels, brightness and contrast, which treat all channels alike.
    """
    names = ("brightness", "contrast", "luma", "hue", "saturation")
    used = [name for name in names if getattr(pipe, name)]
    if not used:
        return images
    on = torch.stack([draws.on(name) for name in used]).any(dim=0)
    if images.shape[1] != 3:
        lift = torch.where(draws.on("brightness"), pipe.brightness * draws.normal("brightness"), 0.0)
        factor = torch.where(draws.on("contrast"), torch.exp2(pipe.contrast * draws.normal("contrast")), 1.0)
        lift, factor = (value.to(images.dtype)[:, None, None, None] for value in (lift, factor))
        return (images + lift) * factor
    return on_some(on, images, recolour, colour_matrix(pipe, draws))


def colour_matrix(pipe: Pipe, draws: Draws) -> Tensor:
    """[N, 4, 4]: what happens to (red, green, blue, 1), the changes multiplied from the left in their order."""
    device = draws.numbers.device
    one = torch.eye(4, device=device)
    grey = torch.zeros(4, 4, device=device)
    grey[:3, :3] = 1 / 3  # onto the axis of greys
    whole = one.repeat(len(draws), 1, 1)

    def choose(name: str, value: Tensor, otherwise: float) -> Tensor:
        return torch.where(draws.on(name), value, otherwise)[:, None, None]

    if pipe.brightness:
        lift = torch.zeros(4, 4, device=device)
        lift[:3, 3] = 1.0
        whole = (one + choose("brightness", pipe.brightness * draws.normal("brightness"), 0.0) * lift) @ whole
    if pipe.contrast:
        factor = choose("contrast", torch.exp2(pipe.contrast * draws.normal("contrast")), 1.0)
        rgb = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], device=device))
        whole = (one + (factor - 1) * rgb) @ whole
    if pipe.luma:
        turned = choose("luma", (draws.uniform("luma") < 0.5).float(), 0.0)
        whole = (one - 2 * turned * grey) @ whole
    if pipe.hue:
        angle = choose("hue", draws.angle("hue", pipe.hue), 0.0)
        # Rodrigues' formula around the axis of greys
        cross = torch.zeros(4, 4, device=device)
        cross[:3, :3] = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3.0)
        whole = (one + torch.sin(angle) * cross + (1 - torch.cos(angle)) * (cross @ cross)) @ whole
    if pipe.saturation:
        factor = choose("saturation", torch.exp2(pipe.saturation * draws.normal("saturation")), 1.0)
        last = torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0], device=device))  # the constant is no colour
        whole = (grey + last + (one - grey - last) * factor) @ whole
    return whole


def recolour(images: Tensor, matrix: Tensor) -> Tensor:
    """[N, 3, S, S] through [N, 4, 4]."""
    flat = torch.baddbmm(matrix[:, :3, 3:], matrix[:, :3, :3], images.flatten(2))
    return flat.view(images.shape)


def stain(images: Tensor, pipe: Pipe, draws: Draws) -> Tensor:
    """More or less haematoxylin and eosin, and stronger or weaker channels, in optical density (Beer-Lambert).

    What is neither of the two stains keeps its density; white stays white.
    """
    on, whole = None, None
    device = draws.numbers.device
    if pipe.stain:
        on = draws.on("stain")
        amounts = torch.where(on[:, None], torch.exp2(pipe.stain * draws.normal("stain")), 1.0)
        amounts = torch.cat([amounts, torch.ones_like(amounts[:, :1])], dim=1)
        columns = stain_columns().to(device)
        whole = columns @ (amounts[:, :, None] * torch.linalg.inv(columns))
    if pipe.channels:
        also = draws.on("channels")
        strength = torch.where(also[:, None], torch.exp2(pipe.channels * draws.normal("channels")), 1.0)
        on = also if on is None else on | also
        whole = torch.diag_embed(strength) if whole is None else strength[:, :, None] * whole
    return images if on is None or whole is None else on_some(on, images, redye, whole)


def stain_columns() -> Tensor:
    """[3, 3]: unit densities of haematoxylin, of eosin, and of what is across both, as columns."""
    pair = torch.nn.functional.normalize(torch.tensor([HAEMATOXYLIN, EOSIN]), dim=1)
    return torch.cat([pair, torch.nn.functional.normalize(torch.linalg.cross(*pair), dim=0)[None]]).t()


def redye(images: Tensor, matrix: Tensor) -> Tensor:
    """[N, 3, S, S] in [-1, 1], its optical densities mapped by [N, 3, 3]."""
    transmission = (images.flatten(2) * 0.5 + 0.5).clamp_min(_DARKEST)
    return (torch.exp(matrix @ torch.log(transmission)) * 2 - 1).view(images.shape)
