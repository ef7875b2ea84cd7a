"""Which changes a discriminator's images go through, and how strong they are."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from histosynth.core.errors import SettingError


@dataclass(frozen=True)
class Pipe:
    """Strengths of every change, in the order in which they are applied; 0 or False leaves a change out.

    Ranges and standard deviations that StyleGAN2-ADA uses (2006.06676, appendix B) are those of the pipe "bgcfnc".
    """

    flip: bool = False
    """Mirror left and right, every second time."""
    quarter: bool = False
    """Turn by 0, 90, 180 or 270 degrees."""
    shift: float = 0.0
    """Most that the image moves by whole pixels, as a share of its edge."""
    scale: float = 0.0
    """Standard deviation of the logarithm to base 2 of the enlargement."""
    rotation: float = 0.0
    """Most degrees of the rotation, either way."""
    stretch: float = 0.0
    """Standard deviation of the logarithm to base 2 of a stretch along one axis (shrinking along the other)."""
    drift: float = 0.0
    """Standard deviation of the shift by fractions of a pixel, as a share of the edge."""
    brightness: float = 0.0
    """Standard deviation of what is added to all channels (images are in [-1, 1])."""
    contrast: float = 0.0
    """Standard deviation of the logarithm to base 2 of the factor of all channels."""
    luma: bool = False
    """Turn the brightness around and keep the colour, every second time."""
    hue: float = 0.0
    """Most degrees by which colours turn around the grey axis, either way."""
    saturation: float = 0.0
    """Standard deviation of the logarithm to base 2 of the factor of the colour."""
    stain: float = 0.0
    """Standard deviation of the logarithm to base 2 of the amounts of haematoxylin and of eosin."""
    channels: float = 0.0
    """Standard deviation of the logarithm to base 2 of the optical density of every channel."""
    bands: float = 0.0
    """Standard deviation of the logarithm to base 2 of the gains of four bands of detail."""
    noise: float = 0.0
    """Scale of the standard deviation of the noise added to every pixel."""
    cutout: float = 0.0
    """Edges of the rectangle set to mid-grey, as a share of the image's."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = float(getattr(self, field.name))
            if not 0 <= value <= _MOST.get(field.name, 10.0):
                most = _MOST.get(field.name, 10.0)
                raise SettingError(f"{field.name} of the augmentation is {value:g}.", f"Use 0 to {most:g}.")


_MOST = {"shift": 0.5, "rotation": 180.0, "hue": 180.0, "cutout": 1.0, "flip": 1, "quarter": 1, "luma": 1}

_BLIT = Pipe(flip=True, quarter=True, shift=0.125)
_GEOM = Pipe(scale=0.2, rotation=180.0, stretch=0.2, drift=0.125)
_COLOR = Pipe(brightness=0.2, contrast=0.5, luma=True, hue=180.0, saturation=1.0)
_BG = replace(_GEOM, flip=True, quarter=True, shift=0.125)
_BGC = replace(_BG, brightness=0.2, contrast=0.5, luma=True, hue=180.0, saturation=1.0)

ANY_CHANNELS = ("latents", "none", "blit", "geom", "noise", "cutout")
"""Pipes of which no change knows what red, green and blue are."""

PIPES: dict[str, Pipe] = {
    "none": Pipe(),
    # our default: every orientation, sizes, colours and stain strengths; tissue with turned brightness does not exist
    "tissue": Pipe(
        flip=True, quarter=True, shift=0.125, scale=0.2, rotation=180.0,
        brightness=0.2, contrast=0.5, hue=180.0, saturation=1.0, channels=0.5,
    ),
    # only what slides differ in: orientation, a little size, and how much of each stain they took
    "histology": Pipe(flip=True, quarter=True, scale=0.1, rotation=10.0, stain=0.3, channels=0.1),
    # of latents, whose channels are no colours: place, strength and holes
    "latents": Pipe(flip=True, quarter=True, shift=0.125, brightness=0.2, contrast=0.3, cutout=0.4),
    # the first prototype of this project: mirrored, turned and moved a little, colours untouched
    "poc": Pipe(flip=True, rotation=9.0, shift=1 / 32),
    # the names of StyleGAN2-ADA
    "blit": _BLIT,
    "geom": _GEOM,
    "color": _COLOR,
    "filter": Pipe(bands=1.0),
    "noise": Pipe(noise=0.1),
    "cutout": Pipe(cutout=0.5),
    "bg": _BG,
    "bgc": _BGC,
    "bgcf": replace(_BGC, bands=1.0),
    "bgcfn": replace(_BGC, bands=1.0, noise=0.1),
    "bgcfnc": replace(_BGC, bands=1.0, noise=0.1, cutout=0.5),
}  # fmt: skip


def find_pipe(pipe: str | Pipe) -> Pipe:
    """The pipe of that name, or `pipe` itself.

    Raises:
        SettingError: there is no pipe of that name.
    """
    if isinstance(pipe, Pipe):
        return pipe
    if pipe not in PIPES:
        raise SettingError(f"The augmentation pipe is {pipe!r}.", f"Use one of {', '.join(PIPES)}.")
    return PIPES[pipe]
