"""From any source to a tile set that is ready for training: filter, split, normalise, resize."""

from histosynth.tiles.prepare.pipeline import PrepareConfig, prepare

__all__ = ["PrepareConfig", "prepare"]
