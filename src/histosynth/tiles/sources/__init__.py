"""Where tiles come from: class folders, tables, archives, `dataset_tool` zips."""

from histosynth.tiles.sources.source import ImportConfig, Source, import_tiles, list_tiles, open_source

__all__ = ["ImportConfig", "Source", "import_tiles", "list_tiles", "open_source"]
