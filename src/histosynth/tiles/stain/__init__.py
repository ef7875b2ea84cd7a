"""Stain separation, normalisation and augmentation behind one interface.

`load_normaliser("vahadane").fit(reference).transform(tiles)` gives tiles uint8 [N, 3, H, W] and bool [N], which of
them passed through unchanged. A reference is a tile, a set of tiles, or a saved profile.
"""

from histosynth.tiles.stain.augment import RandStainNA, stain_augment
from histosynth.tiles.stain.light import LightConfig
from histosynth.tiles.stain.methods import STAINS, StainNormaliser, load_normaliser
from histosynth.tiles.stain.profile import Profile, load_profile
from histosynth.tiles.stain.quantities import concentrations, recombine, stain_matrix, tissue_mask, white_points

__all__ = [
    "STAINS",
    "LightConfig",
    "Profile",
    "RandStainNA",
    "StainNormaliser",
    "concentrations",
    "load_normaliser",
    "load_profile",
    "recombine",
    "stain_augment",
    "stain_matrix",
    "tissue_mask",
    "white_points",
]
