"""Whole slides: read, find tissue, cut into tiles."""

from histosynth.tiles.slides.cutting import cut
from histosynth.tiles.slides.plan import CutConfig

__all__ = ["CutConfig", "cut"]
