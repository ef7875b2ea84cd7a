"""Adaptive discriminator augmentation (2006.06676): the discriminator sees real and fake tiles alike through
differentiable random changes, each with probability p, and p follows how much the discriminator over-fits.

Tissue has no up and no left, so flips and quarter turns are free; the colour changes imitate staining. What the
changes are is in `histosynth.gan.augmentation`; which of them happen is a pipe (`PIPES`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from histosynth.core.errors import DataError, SettingError
from histosynth.gan.augmentation.colour import colour, stain
from histosynth.gan.augmentation.corruption import bands, cutout, noise
from histosynth.gan.augmentation.draws import Draws
from histosynth.gan.augmentation.geometry import geometry
from histosynth.gan.augmentation.pipe import PIPES, Pipe, find_pipe
from histosynth.gan.guards import AdaController

__all__ = ["PIPES", "AdaController", "Pipe", "augment"]

DEFAULT_PIPE = "tissue"


def augment(
    images: Tensor,
    p: float,
    generator: torch.Generator,
    pipe: str | Pipe = DEFAULT_PIPE,
    fine: bool | None = None,
) -> Tensor:
    """Change every sample on its own, each change of the pipe with probability `p`; p = 0 returns `images` itself.

    What happens to a sample depends on the state of `generator` and on its place in the batch, not on the other
    samples. Gradients flow to the images, also those of gradients.

    Args:
        images: float [N, 3, S, S] in [-1, 1], or latents [N, C, S, S], for which there are the pipes `ANY_CHANNELS`;
            half precision is computed in float32 and returned as it came.
        p: 0 to 1.
        generator: on the device of the images.
        pipe: a name of `PIPES`, or strengths of your own.
        fine: interpolate from an enlargement by a band-limited filter, as the paper does; none: on a GPU. On a CPU
            it costs two to three times the rest of the pipe (about 4 % of a training step at 64 px).

    Raises:
        SettingError: no such pipe, or p outside 0 to 1.
        DataError: the images are not square, or have not the three channels that the pipe is about.
    """
    strengths = find_pipe(pipe)
    if not 0 <= p <= 1:
        raise SettingError(f"The augmentation probability is {p}.", "Use a number from 0 to 1.")
    colours = any(getattr(strengths, name) for name in ("luma", "hue", "saturation", "stain", "channels"))
    if images.ndim != 4 or images.shape[2] != images.shape[3] or (colours and images.shape[1] != 3):
        raise DataError(f"The images to augment are {list(images.shape)}.", "Use square RGB images, [N, 3, S, S].")
    if p == 0 or strengths == PIPES["none"]:
        return images
    draws = Draws.new(len(images), p, generator)
    x = images if images.dtype in (torch.float32, torch.float64) else images.float()
    x = geometry(x, strengths, draws, x.device.type != "cpu" if fine is None else fine)
    x = colour(x, strengths, draws)
    x = stain(x, strengths, draws)
    x = bands(x, strengths, draws)
    x = noise(x, strengths, draws, generator)
    x = cutout(x, strengths, draws)
    return x.to(images.dtype)
