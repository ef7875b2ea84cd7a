"""Train, validation and test without a patient, a look-alike or a synthetic child on two sides."""

from histosynth.tiles.split.assign import SplitConfig, divide, official_split, split_by_group
from histosynth.tiles.split.duplicates import near_duplicate_groups, tile_hash
from histosynth.tiles.split.leaks import check_no_straddling, check_synthetic

__all__ = [
    "SplitConfig",
    "check_no_straddling",
    "check_synthetic",
    "divide",
    "near_duplicate_groups",
    "official_split",
    "split_by_group",
    "tile_hash",
]
