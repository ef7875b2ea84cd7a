"""Make torchvision importable beside a torch that cannot load torchvision's compiled extension.

The torchvision wheel of the package index is a CUDA build. Beside a CPU-only torch its extension `_C` does
not load, and `import torchvision` stops at "operator torchvision::nms does not exist", because the package
registers a fake implementation for operators that only the extension declares. timm, peft, diffusers and
transformers import torchvision and go down with it. Declaring the two operator schemas is enough for all
that does not call them: models, transforms, timm, lpips. (`nms`, deformable convolution and image decoding
stay unavailable; images are decoded by Pillow here.)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec
from types import ModuleType
from typing import Any

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: Any = None  # torch forgets the schemas when the Library object is collected


class _Finder:
    """A meta path finder that runs `_declare_missing` once, just before torchvision is first imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare_missing()
        return None


def install() -> None:
    """Install the hook; free of cost until torchvision is imported, and without effect after that."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _declare_missing() -> None:
    global _library
    from importlib.util import find_spec  # here, since it is slow to import and seldom needed

    spec = find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    import torch

    if _extension_loads(torch, spec.submodule_search_locations[0]):
        return
    _library = torch.library.Library("torchvision", "DEF")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _library.define(schema)


def _extension_loads(torch: Any, folder: str) -> bool:
    """True when the compiled operators load, in which case nothing needs declaring."""
    extension = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:  # missing CUDA libraries, or symbols of another torch
        return False
    return True
