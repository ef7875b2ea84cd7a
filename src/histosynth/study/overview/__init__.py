"""One page about a tile set."""
