"""Normalisers that separate two stains. They differ only in how they find the stain vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from histosynth import __version__
from histosynth.core.errors import DataError, SettingError
from histosynth.core.threads import on_one_thread
from histosynth.tiles.stain import anchored, macenko, vahadane
from histosynth.tiles.stain.codes import CODE_SPARSITY, STANDARD, code_matrix, codes, high_percentile
from histosynth.tiles.stain.light import LightConfig, Scene, check_images
from histosynth.tiles.stain.profile import Profile, load_profile

_LEAST_STRENGTH = 0.02
_MOST_GAIN = 20.0
_FULL_LIGHT = 6.0  # times `density`: from here on tissue is seen in the reference's light


@dataclass(frozen=True)
class StainConfig(LightConfig):
    """Settings of stain separation."""

    percentile: float = 99.0
    """Percentile of each stain's concentrations that is matched to the reference's."""
    sparsity: float | None = None
    """Weight of the sum of concentrations when a tile is recoloured; none takes the method's own (`code_sparsity`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 50 <= self.percentile <= 100:
            raise SettingError(f"percentile is {self.percentile}.", "Use 50 to 100.")
        if self.sparsity is not None and not 0 <= self.sparsity <= 1:
            raise SettingError(f"sparsity is {self.sparsity}.", "Use 0 to 1, or none.")


class SeparatingNormaliser:
    """Separates a tile into two stains and lays the same concentrations down in the stains of a reference."""

    name: ClassVar[str]
    find: ClassVar[Callable[[Scene], tuple[NDArray[np.float64], bool]]]
    """Stain matrix [2, 3] of a tile and whether it could be found."""
    code_sparsity: ClassVar[float]

    def __init__(self, config: StainConfig = StainConfig()) -> None:
        self.config = config
        self.sparsity = type(self).code_sparsity if config.sparsity is None else config.sparsity
        self.profile: Profile | None = None

    @on_one_thread
    def fit(self, images: NDArray[np.uint8]) -> Self:
        """Take the reference from uint8 [N, 3, H, W]: one tile, or a set.

        A set gives the median over its tiles of the stain vectors, of the strengths in them and of the white
        points, so that a few odd tiles do not matter.

        Raises:
            DataError: no tile has enough stained tissue.
        """
        images = check_images(images)
        pixels = images.reshape(len(images), 3, images.shape[2] * images.shape[3])
        scene = Scene(pixels.shape[2], self.config)
        found = [(scene.white, m) for p in pixels if (m := self._find(scene.read(p))) is not None]
        if not found:
            raise DataError(
                f"None of the {len(images)} reference tiles has enough stained tissue.", "Choose another reference."
            )
        matrix = np.median([m for _, m in found], axis=0)
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
        strengths = []
        for p in pixels:
            if scene.read(p).enough:
                c = codes(scene.od, code_matrix(matrix, self.sparsity), scene.work)
                strengths.append(self._strength(c, scene))
        strength = np.median(strengths, axis=0)
        if strength.min() < _LEAST_STRENGTH:
            raise DataError("The reference shows only one of the two stains.", "Choose another reference.")
        self.profile = Profile(
            method=self.name,
            settings=asdict(self.config),
            white=tuple(np.median([w for w, _ in found], axis=0).tolist()),
            stain_matrix=tuple(map(tuple, matrix.tolist())),
            strength=tuple(strength.tolist()),
            tiles=len(found),
            version=__version__,
        )
        return self

    @on_one_thread
    def transform(
        self, images: NDArray[np.uint8], source: Profile | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Give tiles uint8 [N, 3, H, W] the stains of the reference.

        Every tile is measured by itself unless `source` gives the stains, strengths and white point of all of
        them: `fit` on tiles of their slide makes one, and differences between the tiles then stay.

        Returns:
            (uint8 [N, 3, H, W]; bool [N], True for tiles that passed through unchanged because they hold too
            little stained tissue, one colour only, or too little of one stain to scale it).
            Pixels that are not tissue keep their bytes (`Scene.blend`).

        Raises:
            SettingError: there is no reference yet, or `source` holds no stains.
        """
        target = self._fitted()
        if source is not None and not source.stain_matrix:
            raise SettingError(f"source is a {source.method} profile.", "Give one that holds stain vectors.")
        images = check_images(images)
        out = images.copy()
        unchanged = np.ones(len(images), bool)
        size = images.shape[2] * images.shape[3]
        scene = Scene(size, self.config)
        for i, (p, o) in enumerate(zip(images.reshape(-1, 3, size), out.reshape(-1, 3, size), strict=True)):
            scene.read(p, None if source is None else np.array(source.white))
            if source is None:
                matrix, own = self._find(scene), None
            else:
                matrix, own = np.array(source.stain_matrix) if scene.enough else None, np.array(source.strength)
            if matrix is not None:
                unchanged[i] = not self._recolour(scene, matrix, own, target, o)
        return out, unchanged

    def save(self, path: Path | str) -> None:
        """Write the profile as JSON. Raises SettingError when there is no reference yet."""
        self._fitted().save(path)

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """A normaliser with the reference of a saved profile.

        Raises:
            DataError: the file is no stain profile, or one of another method.
        """
        profile = load_profile(path)
        if profile.method != cls.name or not (profile.stain_matrix and profile.strength and profile.white):
            raise DataError(f"{path} is not a whole profile of {cls.name}.", "Save it again from its reference.")
        normaliser = cls(profile.config(StainConfig, path))
        normaliser.profile = profile
        return normaliser

    def _fitted(self) -> Profile:
        if self.profile is None:
            raise SettingError(f"The {self.name} normaliser has no reference.", "Fit it, or load a saved profile.")
        return self.profile

    def _find(self, scene: Scene) -> NDArray[np.float64] | None:
        if not scene.enough:
            return None
        matrix, ok = type(self).find(scene)
        return matrix if ok else None

    def _strength(self, c: NDArray[np.float32], scene: Scene) -> NDArray[np.float64]:
        return np.array([high_percentile(row, scene.stained, self.config.percentile) for row in c])

    def _recolour(
        self, scene: Scene, matrix: NDArray, own: NDArray | None, target: Profile, out: NDArray[np.uint8]
    ) -> bool:
        c = codes(scene.od, code_matrix(matrix, self.sparsity), scene.work)
        if own is None:
            own = self._strength(c, scene)
        gain = np.array(target.strength) / np.maximum(own, 1e-9)
        if own.min() < _LEAST_STRENGTH or gain.max() > _MOST_GAIN:
            return False
        mix = np.empty((3, 4), np.float32)
        mix[:, :2] = -np.array(target.stain_matrix).T * gain
        mix[:, 2] = np.log(scene.white)
        mix[:, 3] = np.log(target.white) - mix[:, 2]
        scene.work[2] = 1
        # The reference's light comes in with the density: at once, it would draw a halo around the tissue.
        np.multiply(scene.dense, 1 / (_FULL_LIGHT * self.config.density), out=scene.work[3])
        np.minimum(scene.work[3], 1, out=scene.work[3])
        colours = np.matmul(mix, scene.work, out=scene.stained_od[:3])
        np.exp(colours, out=colours)
        scene.blend(colours, out)
        return True


class Vahadane(SeparatingNormaliser):
    """Structure-preserving normalisation (Vahadane et al. 2016, IEEE TMI 35:1962).

    The factorisation's penalty shrinks concentrations by a constant, which leaves every tile some 3 to 8 grey levels
    lighter than its reference. As in StainTools, a tenth of it is used once the vectors are known;
    `StainConfig(sparsity=0.1)` is the paper to the letter.
    """

    name, find, code_sparsity = "vahadane", staticmethod(vahadane.stain_vectors), CODE_SPARSITY


class Macenko(SeparatingNormaliser):
    """Normalisation by the edges of the optical densities (Macenko et al. 2009, ISBI), concentrations >= 0."""

    name, find, code_sparsity = "macenko", staticmethod(macenko.stain_vectors), 0.0


class Anchored(SeparatingNormaliser):
    """Normalisation by the vectors of `anchored`, which depend least on what a tile happens to show."""

    name, find, code_sparsity = "anchored", staticmethod(anchored.stain_vectors), 0.0


@on_one_thread
def stain_matrices(
    images: NDArray[np.uint8], normaliser: type[SeparatingNormaliser], config: LightConfig
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Stain matrices [N, 2, 3] of uint8 [N, 3, H, W] and whether each was found [N]; `STANDARD` where not."""
    images = check_images(images)
    size = images.shape[2] * images.shape[3]
    scene = Scene(size, config)
    matrices, ok = np.repeat(STANDARD[None], len(images), axis=0), np.zeros(len(images), bool)
    for i, p in enumerate(images.reshape(-1, 3, size)):
        if scene.read(p).enough:
            matrix, ok[i] = normaliser.find(scene)
            if ok[i]:
                matrices[i] = matrix
    return matrices, ok
