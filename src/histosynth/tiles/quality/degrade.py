"""Controlled damage: what goes wrong on glass and in scanners, in known amounts, to test what notices it.

Every function takes uint8 [N, 3, H, W] tiles, a strength from 0 (nothing) to 1 (gross) and one seed a tile, and
returns new tiles of the same shape. A tile's damage follows from its own seed, whatever else is in the batch.
Lengths are in parts of the tile's shorter side, so that a strength means the same at any size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
from scipy import ndimage

from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.core.seeds import numpy_rng
from histosynth.tiles.quality.shapes import Shape, blend, disc, distance_to_path, from_density, ripple, to_density

Degradation = Callable[[np.ndarray, float, Sequence[int]], np.ndarray]
# absorbance of pens in red, green and blue light: what is left is the pen's colour
INKS = {
    "green": (1.25, 0.40, 0.95),
    "blue": (1.60, 0.95, 0.20),
    "black": (1.55, 1.60, 1.55),
    "red": (0.08, 1.35, 1.15),
}


def degrade(name: str, images: np.ndarray, strength: float, seeds: Sequence[int]) -> np.ndarray:
    """Apply the degradation called `name`.

    Raises:
        SettingError: an unknown name, or a strength outside 0 to 1.
        DataError: images of another type or shape, or another number of seeds.
    """
    if name not in DEGRADATIONS:
        raise SettingError(f"There is no degradation {name!r}.", did_you_mean(name, DEGRADATIONS))
    return DEGRADATIONS[name](images, strength, seeds)


def _each(purpose: str) -> Callable[[Callable[..., np.ndarray]], Degradation]:
    """Make of a function of one float32 [3, H, W] tile, a strength and a generator one of a batch."""

    def wrap(one: Callable[..., np.ndarray]) -> Degradation:
        def many(images: np.ndarray, strength: float, seeds: Sequence[int]) -> np.ndarray:
            images = np.asarray(images)
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
                raise DataError(
                    f"Tiles to degrade have shape {images.shape} and type {images.dtype}.",
                    "They must be uint8 [N, 3, H, W].",
                )
            if len(seeds) != len(images):
                raise DataError(f"{len(images)} tiles came with {len(seeds)} seeds.", "Give one seed a tile.")
            if not 0 <= strength <= 1:
                raise SettingError(f"strength is {strength}.", "Give a number from 0 to 1.")
            out = images.copy()
            if strength == 0:
                return out
            for k, seed in enumerate(seeds):
                tile = one(images[k].astype(np.float32), strength, numpy_rng(int(seed), purpose))
                out[k] = np.clip(np.rint(tile), 0, 255)
            return out

        many.__doc__, many.__name__ = one.__doc__, purpose
        return many

    return wrap


@_each("defocus")
def defocus(tile: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Out of focus: a disc of confusion of up to 3 % of the side in radius (6.7 px of 224)."""
    return _filter(tile, disc(0.03 * strength * min(tile.shape[1:]) * rng.uniform(0.9, 1.1)))


@_each("motion")
def motion(tile: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The stage moved during the exposure: a streak of up to 8 % of the side (18 px of 224)."""
    length = 0.08 * strength * min(tile.shape[1:]) * rng.uniform(0.9, 1.1)
    angle = rng.uniform(0, np.pi)
    half = int(np.ceil(length / 2)) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    kernel = np.clip(length / 2 + 0.5 - np.abs(along), 0, 1) * np.clip(1 - np.abs(across), 0, 1)
    return _filter(tile, kernel)


@_each("jpeg")
def jpeg(tile: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Compressed as JPEG, quality 95 down to 5, with the colours at half resolution."""
    from PIL import Image

    quality = round(95 - 90 * strength)
    stream = io.BytesIO()
    pixels = np.ascontiguousarray(tile.astype(np.uint8).transpose(1, 2, 0))
    Image.fromarray(pixels).save(stream, format="JPEG", quality=quality, subsampling=2)
    with Image.open(stream) as decoded:
        return np.asarray(decoded, np.float32).transpose(2, 0, 1)


@_each("noise")
def noise(tile: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A dim lamp: shot noise, which grows with the light, and noise of the sensor, up to 33 grey levels at white."""
    shot = 26 * strength * np.sqrt(tile / 255)
    return tile + rng.normal(size=tile.shape) * np.hypot(shot, 20 * strength)


@_each("brightness")
def brightness(tile: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The lamp too bright or too dim: light times 1.6 or divided by 2.2 at the most."""
    factor = 1 + 0.6 * strength if rng.random() < 0.5 else 1 / (1 + 1.2 * strength)
    return tile * factor


@_each("stain_shift")
def stain_shift(tile: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Another laboratory's stain: the optical density of every channel scaled by up to 1.8 times, or 1 / 1.8."""
    shift = np.exp(rng.uniform(-1, 1, size=(3, 1, 1)) * strength * np.log(1.8))
    return from_density(to_density(tile) * shift)


@_each("fold")
def fold(tile: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """The section lies double along a strip across the tile: both layers absorb, the upper one mirrored.

    The strip is 8 to 22 % of the side wide; the tissue beside it is sheared along it, and the raised layer is a
    little out of focus.
    """
    side = min(tile.shape[1:])
    shape = Shape.of(tile)
    width = side * (0.08 + 0.14 * strength) * rng.uniform(0.8, 1.2)
    across, along = shape.line(rng, spread=0.25)
    across = across + ripple(along / side, rng, 0.03 * side)
    # the layer on top is the tissue behind the crease, turned over
    normal = np.stack([*np.gradient(across)])
    normal /= np.maximum(np.hypot(*normal), 1e-6)
    shear = side * 0.04 * strength * rng.normal()
    y, x = shape.y, shape.x
    tangent = np.stack([-normal[1], normal[0]])
    slipped = np.where(across > 0, shear, 0.0)
    under = to_density(shape.sample(tile, y + tangent[0] * slipped, x + tangent[1] * slipped))
    offset = 2 * across - width
    upper = to_density(shape.sample(tile, y - normal[0] * offset, x - normal[1] * offset))
    upper = ndimage.gaussian_filter(upper, (0, 0.006 * side, 0.006 * side), mode="nearest")
    inside = np.clip(width / 2 - np.abs(across) + 0.5, 0, 1)
    inside = ndimage.gaussian_filter(inside, 0.004 * side)
    # where the layer bends over, light crosses it lengthwise
    crease = np.exp(-0.5 * ((np.abs(across) - width / 2) / (0.008 * side)) ** 2)
    layers = (0.35 + 0.75 * strength) * inside + 0.3 * strength * crease
    return from_density(under + upper * layers + 0.12 * strength * inside)


@_each("ink")
def ink(tile: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """A stroke of a green, blue, black or red marker on the glass, 10 to 35 % of the side wide, see-through."""
    side = min(tile.shape[1:])
    shape = Shape.of(tile)
    colour = np.array(list(INKS.values())[rng.integers(len(INKS))])[:, None, None]
    width = side * (0.10 + 0.25 * strength) * rng.uniform(0.8, 1.2)
    across, along = shape.line(rng, spread=0.3, bend=0.5)
    across = across + ripple(along / side, rng, 0.015 * side)
    inside = np.clip((width / 2 - np.abs(across)) / (0.012 * side) + 0.5, 0, 1)
    # the felt leaves streaks along the stroke, and more ink at its edges
    streaks = 1 + 0.15 * ripple(across / side * 12, rng, 1.0) + 0.1 * shape.clouds(rng, 0.08)
    edge = 1 + 0.25 * np.exp(-0.5 * ((np.abs(across) - 0.46 * width) / (0.02 * side)) ** 2)
    amount = (0.45 + 0.75 * strength) * inside * np.clip(streaks * edge, 0.3, 2)
    return from_density(to_density(tile) + colour * amount)


@_each("bubble")
def bubble(tile: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """An air bubble under the cover slip: a dark refracting rim, a bright line inside it, and a blurred inside."""
    side = min(tile.shape[1:])
    shape = Shape.of(tile)
    radius = side * rng.uniform(0.24, 0.42)
    centre = rng.uniform(0.2, 0.8, 2) * np.array(tile.shape[1:])
    dy, dx = shape.y - centre[0], shape.x - centre[1]
    angle = np.arctan2(dy, dx)
    wobble = 1 + 0.05 * np.sin(2 * angle + rng.uniform(0, 6.3)) + 0.02 * np.sin(3 * angle + rng.uniform(0, 6.3))
    distance = np.hypot(dy, dx) / wobble
    inside = np.clip(radius - distance + 0.5, 0, 1)
    # the curved surface is a lens: it makes the inside smaller, most of all near the rim
    pull = 1 + 0.35 * strength * np.clip(distance / radius, 0, 1) ** 4
    bent = shape.sample(tile, centre[0] + dy * pull, centre[1] + dx * pull)
    bent = _filter(bent, disc(side * (0.006 + 0.022 * strength)))
    bent = 255 - (255 - bent) * (1 - 0.25 * strength)  # air scatters: less contrast
    rim = side * (0.018 + 0.022 * strength)
    dark = np.exp(-0.5 * ((distance - radius) / rim) ** 2)
    bright = np.exp(-0.5 * ((distance - (radius - 2.4 * rim)) / (0.6 * rim)) ** 2)
    side_light = 1 + 0.35 * np.cos(angle - rng.uniform(0, 6.3))
    light = blend(tile, bent, inside)
    light = light + (255 - light) * 0.7 * strength * bright
    return light * np.exp(-(0.5 + 1.3 * strength) * dark * side_light)


@_each("dust")
def dust(tile: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Dark specks and a fibre on the glass, a little out of focus."""
    side = min(tile.shape[1:])
    shape = Shape.of(tile)
    shade = np.zeros(tile.shape[1:], np.float32)
    for _ in range(1 + rng.poisson(6 * strength)):
        centre = rng.uniform(0, 1, 2) * np.array(tile.shape[1:])
        radius = side * rng.uniform(0.008, 0.015 + 0.03 * strength)
        distance = np.hypot(shape.y - centre[0], shape.x - centre[1])
        shade = np.maximum(shade, np.clip((radius - distance) / (0.006 * side) + 0.5, 0, 1))
    if rng.random() < strength:
        start, bend = rng.uniform(0, 1, 2), rng.normal(0, 0.6)
        fibre = distance_to_path(shape, start, rng.uniform(0, 2 * np.pi), 0.5 + 0.4 * rng.random(), bend)
        shade = np.maximum(shade, np.clip((0.008 * side - fibre) / (0.006 * side) + 0.5, 0, 1))
    return tile * np.exp(-(0.8 + 1.4 * strength) * shade)


def _filter(tile: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve each channel with a kernel of any positive sum, the border mirrored; mixes light, not density."""
    from scipy.signal import fftconvolve

    kernel = kernel / kernel.sum()
    half = [(k // 2, k // 2) for k in kernel.shape]
    padded = np.pad(tile, [(0, 0), *half], mode="symmetric")
    return fftconvolve(padded, kernel[None].astype(np.float32), mode="valid", axes=(1, 2)).astype(np.float32)


DEGRADATIONS: dict[str, Degradation] = {
    "defocus": defocus,
    "motion": motion,
    "jpeg": jpeg,
    "noise": noise,
    "fold": fold,
    "ink": ink,
    "bubble": bubble,
    "dust": dust,
    "brightness": brightness,
    "stain_shift": stain_shift,
}
