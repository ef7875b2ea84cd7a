"""Simulated H&E tiles of colorectal tissue with a known truth: stain, patient, hospital, nuclei, glands.

A tile is an absorbing sheet. Layouts lay down the density of haematoxylin and eosin; light through it obeys
Beer-Lambert, I = I0 exp(-(density x stain matrix)) (Ruifrok and Johnston 2001, Anal Quant Cytol Histol
23:291). All that sets one patient or one hospital apart is an explicit number, so domain shift, leakage
between patients and stain normalisation can be measured against what was put in. The nine classes and their
look follow NCT-CRC-HE-100K (Kather et al. 2019, PLoS Med 16:e1002730); no pixel of it was used.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histosynth.core.errors import SettingError
from histosynth.tiles._phantom_anatomy import LAYOUTS
from histosynth.tiles._phantom_canvas import Canvas
from histosynth.tiles._phantom_tissue import Biology
from histosynth.tiles.classes import CLASS_TABLES

_NCT = CLASS_TABLES["nct-crc"]
CLASS_NAMES: dict[str, str] = {label: info.name for label, info in _NCT.items()}
CLASSES: tuple[str, ...] = tuple(CLASS_NAMES)
CLASS_COLOURS: dict[str, str] = {label: info.colour for label, info in _NCT.items()}

MIN_SIZE, MAX_SIZE = 16, 4096
MIN_FIELD_UM, MAX_FIELD_UM = 60.0, 400.0

# The common centre of all staining: log optical densities of R, G, B for haematoxylin and for eosin.
_CENTRE = np.log(np.array([[0.63, 0.74, 0.23], [0.15, 0.91, 0.30]]))
# A coarser grid than this blurs nuclei into blobs; a finer one than the lens resolves is wasted.
_COARSEST_MPP, _FINEST_MPP = 1.0, 0.22


@dataclass(frozen=True)
class Hospital:
    """One laboratory: how it stains and scans, and how much its patients spread around that.

    The arrays are means; `make_patient` draws around them.
    """

    seed: int
    """Seed that this hospital was made from."""
    log_stain: NDArray[np.float64]
    """[2, 3] logarithm of the mean optical densities (R, G, B) of haematoxylin and eosin, before scaling."""
    log_concentration: NDArray[np.float64]
    """[2] logarithm of the mean strength of haematoxylin and eosin."""
    white: NDArray[np.float64]
    """[3] white point of the scanner, 0 to 255."""
    thickness: float
    """Mean section thickness, 1 = 4 micron."""
    blur_um: float
    """Mean blur (sigma, microns) of the scanner."""
    noise: float
    """Sensor noise (standard deviation in grey levels at full light)."""
    stain_spread: float = 0.04
    """Spread of the stain vectors (log) among patients."""
    strength_spread: float = 0.10
    """Spread of the stain strengths (log) among patients."""


@dataclass(frozen=True)
class Patient:
    """One patient: stain, section, scanner and biology, shared by all tiles of the patient."""

    seed: int
    """Seed that this patient was made from."""
    stain_matrix: NDArray[np.float64]
    """[2, 3] optical density of R, G, B per unit of haematoxylin and eosin; rows of unit length."""
    concentrations: NDArray[np.float64]
    """[2] strength of haematoxylin and eosin, about 1."""
    thickness: float = 1.0
    """Section thickness, 1 = 4 micron; multiplies all densities."""
    blur_um: float = 0.5
    """Blur of the image (sigma, microns)."""
    white: NDArray[np.float64] = field(default_factory=lambda: np.full(3, 243.0))
    """[3] white point, the grey levels of empty glass."""
    noise: float = 1.5
    """Sensor noise (standard deviation in grey levels at full light)."""
    biology: Biology = field(default_factory=Biology)
    """Sizes and densities of the tissue itself."""


@dataclass(frozen=True)
class PhantomTile:
    """One simulated tile and everything that is true about it."""

    image: NDArray[np.uint8]
    """[H, W, 3] RGB."""
    nuclei: NDArray[np.int32]
    """[H, W] 0 outside nuclei, else the id of the nucleus (unique in the tile, not always consecutive)."""
    glands: NDArray[np.bool_]
    """[H, W] True inside crypts and tumour glands, lumen included."""
    density: NDArray[np.float32]
    """[2, H, W] density of haematoxylin and eosin: image = white * exp(-(density x stain_matrix))."""
    stain_matrix: NDArray[np.float64]
    """[2, 3] the patient's stain vectors."""
    white: NDArray[np.float64]
    """[3] the patient's white point."""
    label: str
    """One of CLASSES."""


def make_hospital(seed: int, shift: float = 0.5) -> Hospital:
    """A hospital with its own staining and scanner.

    shift: 0 all hospitals stain alike, 1 they lie as far apart as real ones get. Raises SettingError outside
    0 to 1.
    """
    if not 0.0 <= shift <= 1.0:
        raise SettingError(f"shift is {shift}.", "Give a number from 0 (all alike) to 1 (far apart).")
    rng = np.random.default_rng([seed, 11])
    # A direction of fixed length: two hospitals never fall onto each other by an unlucky draw near zero.
    way = rng.normal(size=12)
    way *= np.sqrt(12) / np.linalg.norm(way) * rng.uniform(0.8, 1.2)
    stain = _CENTRE + shift * np.array([[0.14, 0.06, 0.38], [0.42, 0.04, 0.60]]) * way[:6].reshape(2, 3)
    # Beyond these haematoxylin turns grey and eosin brown, which no laboratory accepts.
    stain[0] = np.clip(stain[0], np.log([0.48, 0.68, 0.10]), np.log([0.70, 0.90, 0.34]))
    stain[1] = np.minimum(stain[1], np.log([0.32, 1.1, 0.56]))
    strength = 0.05 + shift * (np.array([0.30, 0.16]) + np.array([0.32, 0.26]) * way[6:8])
    light = 247.0 - shift * 24 * max(0.0, abs(way[8]) - 0.4)
    tint = shift * np.array([0.035, 0.012, 0.035]) * way[9:12]
    return Hospital(
        seed=seed,
        log_stain=stain,
        log_concentration=strength,
        white=np.clip(light * np.exp(tint), 180, 254),
        thickness=float(np.exp(shift * rng.normal(0, 0.08))),
        blur_um=float(0.45 * np.exp(shift * rng.normal(0, 0.45))),
        noise=float(rng.uniform(0.8, 0.8 + 2.2 * shift)),
    )


def make_patient(seed: int, hospital: Hospital) -> Patient:
    """A patient of the hospital: staining near the hospital's, and a biology of its own."""
    rng = np.random.default_rng([seed, hospital.seed, 23])
    stain = np.exp(hospital.log_stain + hospital.stain_spread * rng.normal(size=(2, 3)))
    stain /= np.linalg.norm(stain, axis=1, keepdims=True)
    strength = np.exp(hospital.log_concentration + hospital.strength_spread * rng.normal(size=2))

    def factor(spread: float) -> float:
        return float(np.exp(np.clip(rng.normal(), -2, 2) * spread))

    biology = Biology(
        nucleus_size=factor(0.09),
        chromatin=factor(0.10),
        pleomorphism=factor(0.30),
        crowding=factor(0.07),
        gland_size=factor(0.13),
        goblet=float(rng.beta(4, 2)),
        inflammation=factor(0.40),
        cellularity=factor(0.25),
        collagen=factor(0.12),
        fat_size=factor(0.15),
        grade=float(rng.beta(1.6, 1.6)),
    )
    return Patient(
        seed=seed,
        stain_matrix=stain,
        concentrations=strength,
        thickness=hospital.thickness * factor(0.07),
        blur_um=hospital.blur_um * factor(0.18),
        white=np.clip(hospital.white * np.exp(rng.normal(0, 0.006, 3)), 170, 254),
        noise=hospital.noise,
        biology=biology,
    )


def _check(label: str, size: int, field_um: float) -> None:
    if label not in CLASS_NAMES:
        near = difflib.get_close_matches(str(label).upper(), CLASSES, n=3, cutoff=0.4) or list(CLASSES)
        raise SettingError(f"label is {label!r}, which is not a phantom class.", f"Use {' or '.join(near)}.")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise SettingError(f"size is {size} px.", f"Use {MIN_SIZE} to {MAX_SIZE} px.")
    if not MIN_FIELD_UM <= field_um <= MAX_FIELD_UM:
        raise SettingError(f"field_um is {field_um}.", f"Use {MIN_FIELD_UM:g} to {MAX_FIELD_UM:g} microns.")


def _to_size(values: NDArray, size: int, over: int) -> NDArray[np.float32]:
    """The working grid [.., over * size, ..] averaged, or a capped grid enlarged, to [size, size]."""
    n = values.shape[-1]
    if n == size * over:
        return values.reshape(size, over, size, over).mean(axis=(1, 3), dtype=np.float32) if over > 1 else values
    return ndimage.zoom(values, size / n, order=1, mode="nearest", grid_mode=True)


def render(label: str, *, patient: Patient, seed: int, size: int = 128, field_um: float = 112.0) -> PhantomTile:
    """One tile of `label` from `patient`; the same arguments give the same pixels.

    size: pixels along a side, 16 to 4096; field_um: microns along a side, 60 to 400. The layout follows from
    (label, seed) and the patient's biology: one seed in two patients shows related tissue, so give every tile
    its own seed unless a matched pair is wanted. Raises SettingError for an unknown label, size or field.
    """
    _check(label, size, field_um)
    mpp = field_um / size
    over = min(8, max(1, round(mpp / _COARSEST_MPP)))
    n = size * over
    if mpp < _FINEST_MPP:
        n = min(size, int(np.ceil(field_um / _FINEST_MPP)))
    rng = np.random.default_rng([seed, CLASSES.index(label), 37])
    canvas = Canvas(n, field_um, rng)
    LAYOUTS[label](canvas, patient.biology)
    uneven = 1 + 0.04 * canvas.noise(90.0)
    density = np.empty((2, size, size), np.float32)
    for i, layer in enumerate((canvas.h, canvas.e)):
        scale = float(patient.concentrations[i] * patient.thickness)
        grid = _to_size(np.clip(layer, 0, 4) * uneven, size, over) * np.float32(scale)
        density[i] = ndimage.gaussian_filter(grid, patient.blur_um / mpp, mode="nearest", truncate=3.0)
    np.maximum(density, 0, out=density)

    pick = np.minimum((np.arange(size) + 0.5) * (n / size), n - 1).astype(np.intp)
    light = np.exp(-np.tensordot(density, patient.stain_matrix.astype(np.float32), axes=(0, 0)))
    pixels = light * patient.white.astype(np.float32)
    # Photon noise: its deviation grows with the root of the light.
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(patient.noise) * np.sqrt(light)
    return PhantomTile(
        image=np.clip(np.rint(pixels), 0, 255).astype(np.uint8),
        nuclei=np.ascontiguousarray(canvas.nuclei[np.ix_(pick, pick)]),
        glands=np.ascontiguousarray(canvas.glands[np.ix_(pick, pick)]),
        density=density,
        stain_matrix=patient.stain_matrix.copy(),
        white=patient.white.copy(),
        label=label,
    )


def render_batch(
    labels: Sequence[str],
    *,
    patients: Sequence[Patient],
    seeds: Sequence[int],
    size: int = 128,
    field_um: float = 112.0,
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Many tiles without their truth: images uint8 [N, 3, H, W] and class indices int64 [N].

    labels, patients and seeds have one entry per tile. Raises SettingError if their lengths differ.
    """
    if not len(labels) == len(patients) == len(seeds):
        raise SettingError(
            f"labels, patients and seeds have {len(labels)}, {len(patients)} and {len(seeds)} entries.",
            "Give one of each per tile.",
        )
    images = np.empty((len(labels), 3, size, size), np.uint8)
    for i, (label, patient, seed) in enumerate(zip(labels, patients, seeds, strict=True)):
        tile = render(label, patient=patient, seed=seed, size=size, field_um=field_um)
        images[i] = tile.image.transpose(2, 0, 1)
    return images, np.array([CLASSES.index(label) for label in labels], np.int64)
