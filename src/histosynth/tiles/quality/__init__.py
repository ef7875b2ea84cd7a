"""Quality of tiles: measures, learned limits, controlled degradations."""

from histosynth.tiles.quality.metrics import METRICS, measure, quality_table
from histosynth.tiles.quality.thresholds import QualityConfig, Thresholds, learn, learn_from

__all__ = ["METRICS", "QualityConfig", "Thresholds", "learn", "learn_from", "measure", "quality_table"]
