"""Download public tiles."""

from histosynth.tiles.download.job import DATASETS, DownloadConfig, download

__all__ = ["DATASETS", "DownloadConfig", "download"]
