"""histosynth: synthetic histology tiles from a GAN and a diffusion model, and whether they help.

Importing the package imports neither torch nor any model; public names load when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from histosynth.core import torchvision_hook

__version__ = "0.1.0"

torchvision_hook.install()

_PUBLIC = {
    "TileSet": "histosynth.tiles.tileset",
    "import_tiles": "histosynth.tiles.sources.source",
    "load_encoder": "histosynth.encoders:load",
    "load_generator": "histosynth.study.generators:load",
    "compare": "histosynth.study.compare",
    "CompareConfig": "histosynth.study.compare",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'histosynth' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
