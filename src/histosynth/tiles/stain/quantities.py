"""What a tile's stains are: white point, tissue, stain vectors, concentrations, and tiles from concentrations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from histosynth.core.errors import DataError, SettingError
from histosynth.core.threads import on_one_thread
from histosynth.tiles.stain.codes import CODE_SPARSITY, check_matrices, code_matrix, codes
from histosynth.tiles.stain.light import LightConfig, Scene, check_images, luminosity, white_point
from histosynth.tiles.stain.methods import STAINS
from histosynth.tiles.stain.separating import SeparatingNormaliser, stain_matrices


def stain_matrix(
    images: NDArray[np.uint8], method: str = "vahadane", config: LightConfig | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The stain vectors of each tile.

    Args:
        images: uint8 [N, 3, H, W].
        method: "vahadane" and "macenko" as published; "anchored" for the vectors nearest those of the pure stains.
        config: what counts as light and tissue.

    Returns:
        (float64 [N, 2, 3] unit optical densities of R, G, B, haematoxylin first; bool [N], whether they were found:
        where not, the rows are the mean of published vectors, never NaN.)

    Raises:
        SettingError: the method has no stain vectors.
        DataError: images are not uint8 [N, 3, H, W].
    """
    normaliser = STAINS.load(method)
    if not issubclass(normaliser, SeparatingNormaliser):
        raise SettingError(f"{method} has no stain vectors.", "Use vahadane, macenko or anchored.")
    return stain_matrices(images, normaliser, config or LightConfig())


def white_points(images: NDArray[np.uint8], config: LightConfig | None = None) -> NDArray[np.float64]:
    """[N, 3] grey levels of empty glass in each tile uint8 [N, 3, H, W], estimated unless `config` gives them."""
    pixels = check_images(images).reshape(len(images), 3, -1) if len(images) else []
    config = config or LightConfig()
    return np.array([white_point(p, luminosity(p), config) for p in pixels]).reshape(-1, 3)


def tissue_mask(images: NDArray[np.uint8], config: LightConfig | None = None) -> NDArray[np.bool_]:
    """bool [N, H, W] of uint8 [N, 3, H, W]: the pixels that normalisation and augmentation may change."""
    images = check_images(images)
    n, _, h, w = images.shape
    scene = Scene(h * w, config or LightConfig())
    out = np.empty((n, h, w), bool)
    for i, p in enumerate(images.reshape(n, 3, h * w)):
        out[i] = (scene.read(p).dense > scene.config.density).reshape(h, w)
    return out


@on_one_thread
def concentrations(
    images: NDArray[np.uint8],
    matrices: NDArray[np.floating],
    *,
    sparsity: float = CODE_SPARSITY,
    config: LightConfig | None = None,
) -> NDArray[np.float32]:
    """Concentrations of the stains in every pixel, by non-negative lasso in closed form.

    Args:
        images: uint8 [N, 3, H, W].
        matrices: [N, 2, 3] or one [2, 3] for all; rows of unit length, as from `stain_matrix`.
        sparsity: weight of the sum of concentrations; 0 is plain non-negative least squares.
        config: the white point.

    Returns:
        float32 [N, 2, H, W], at least 0.

    Raises:
        DataError: images or matrices have another shape, or rows are not of unit length.
    """
    images = check_images(images)
    n, _, h, w = images.shape
    matrices = check_matrices(matrices, n)
    scene = Scene(h * w, config or LightConfig())
    out = np.empty((n, 2, h, w), np.float32)
    for i, p in enumerate(images.reshape(n, 3, h * w)):
        scene.read(p)
        out[i] = codes(scene.od, code_matrix(matrices[i], sparsity), scene.work).reshape(2, h, w)
    return out


def recombine(
    concentrations: NDArray[np.floating], matrices: NDArray[np.floating], white: NDArray[np.floating] | float = 255.0
) -> NDArray[np.uint8]:
    """Tiles uint8 [N, 3, H, W] of concentrations [N, 2, H, W] in stains [N, 2, 3] or [2, 3].

    white: grey levels of empty glass, [N, 3], [3] or one number. Raises DataError for other shapes.
    """
    c = np.asarray(concentrations, np.float32)
    if c.ndim != 4 or c.shape[1] != 2:
        raise DataError(f"concentrations are {list(c.shape)}, not [N, 2, H, W].", "Give two stains a pixel.")
    n, _, h, w = c.shape
    mix = check_matrices(matrices, n).transpose(0, 2, 1).astype(np.float32)
    light = np.broadcast_to(np.asarray(white, np.float32), (n, 3))[:, :, None]
    colours = light * np.exp(-(mix @ c.reshape(n, 2, h * w)))
    return np.clip(np.rint(colours), 0, 255).astype(np.uint8).reshape(n, 3, h, w)
