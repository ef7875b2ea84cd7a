"""Network pickles in the layout of NVIDIA's training, made from plain tensors: none of NVIDIA's code is needed.

Stand-ins for the modules `torch_utils.persistence` and `dnnlib.util` are there while a pickle is written and gone when
it is read. The function that such a pickle calls, and the source code in it, would raise if they were run.
"""

from __future__ import annotations

import math
import pickle
import re
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BOMB = "raise AssertionError('the source code in the pickle was run')\n"


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("an object in the pickle was built")


class EasyDict(dict):
    """Of dnnlib."""


class Layer:
    """A module as NVIDIA's persistence pickles it."""

    def __init__(self, class_name: str, version: int = 6) -> None:
        self.class_name, self.version = class_name, version
        self.source = BOMB
        self.state: dict[str, Any] = {
            "training": False, "_parameters": OrderedDict(), "_buffers": OrderedDict(), "_modules": OrderedDict(),
            "_non_persistent_buffers_set": set(), "_forward_hooks": OrderedDict(), "_init_args": (),
            "_init_kwargs": EasyDict(),
        }  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {
            "type": "class", "version": self.version, "module_src": self.source, "class_name": self.class_name,
            "state": self.state,
        }  # fmt: skip
        return _reconstruct_persistent_obj, (meta,)

    def child(self, path: str) -> Layer:
        """The layer at a dotted path."""
        at = self
        for part in path.split(".") if path else []:
            at = at.state["_modules"][part]
        return at


def network(kind: str, tensors: dict[str, Tensor], settings: dict[str, Any], flat: bool = False) -> Layer:
    """A generator ("Generator") or discriminator of these tensors and settings; `flat`: as the StyleGAN3 repository."""
    root = Layer(kind)
    settings = {k: EasyDict(v) if isinstance(v, dict) else v for k, v in settings.items()}
    if flat:
        settings |= settings.pop("synthesis_kwargs", {})
    root.state["_init_kwargs"] = EasyDict(settings)
    clamp = settings.get("conv_clamp", settings.get("synthesis_kwargs", {}).get("conv_clamp"))
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        at = root
        for depth, part in enumerate(path):
            at = at.state["_modules"].setdefault(part, Layer(_class_of(kind, ".".join(path[: depth + 1]))))
        group = "_buffers" if last in ("resample_filter", "noise_const", "w_avg") else "_parameters"
        at.state[group][last] = tensor.clone() if group == "_buffers" else torch.nn.Parameter(tensor.clone())
        if last == "weight" and "affine" in path:
            at.state |= {"activation": "linear", "weight_gain": np.float64(1 / math.sqrt(tensor.shape[1]))}
        if last == "weight" and path[-1] in ("conv0", "conv1"):
            at.state |= {"activation": "lrelu", "conv_clamp": clamp, "up": 2 if path[-1] == "conv0" else 1}
            if kind == "Discriminator":
                at.state |= {"up": 1, "down": 2 if path[-1] == "conv1" else 1}
    return root


def _class_of(kind: str, path: str) -> str:
    last = path.rpartition(".")[2]
    if path == "mapping":
        return "MappingNetwork"
    if path == "synthesis":
        return "SynthesisNetwork"
    if re.fullmatch(r"b\d+", last):
        if kind == "Generator":
            return "SynthesisBlock"
        return "DiscriminatorEpilogue" if last == "b4" else "DiscriminatorBlock"
    if last == "torgb":
        return "ToRGBLayer"
    if last in ("conv0", "conv1") and kind == "Generator":
        return "SynthesisLayer"
    return "Conv2dLayer" if last in ("conv", "conv0", "conv1", "skip", "fromrgb") else "FullyConnectedLayer"


def dump(value: Any, path: Path, protocol: int = 4, package: str = "") -> Path:
    """Pickle it as if it came from NVIDIA's repository, or from a package that holds it."""
    owners = {f"{package}torch_utils.persistence": _reconstruct_persistent_obj, f"{package}dnnlib.util": EasyDict}
    made = []
    try:
        for module, thing in owners.items():
            parts = module.split(".")
            for depth in range(1, len(parts) + 1):
                name = ".".join(parts[:depth])
                if name not in sys.modules:
                    sys.modules[name] = types.ModuleType(name)
                    made.append(name)
            thing.__module__ = module
            setattr(sys.modules[module], thing.__name__, thing)
        path.write_bytes(pickle.dumps(value, protocol=protocol))
    finally:
        for name in made:
            del sys.modules[name]
    return path


def snapshot(exported: dict[str, Any], flat: bool = False) -> dict[str, Any]:
    """What a training writes, from what `export_nvidia` wrote."""
    value = {
        "G": network("Generator", exported["G_ema"], exported["G_kwargs"], flat),
        "G_ema": network("Generator", exported["G_ema"], exported["G_kwargs"], flat),
        "augment_pipe": None,
        "training_set_kwargs": {"class_name": "training.dataset.ImageFolderDataset", "use_labels": True},
    }
    if "D" in exported:
        value["D"] = network("Discriminator", exported["D"], exported["D_kwargs"], flat)
    return value


def known_tensors(exported: dict[str, Any]) -> dict[str, Any]:
    """The same networks with numbers that follow from the names alone, so that any code can compute with them."""
    from histosynth.core.seeds import torch_generator

    out = dict(exported)
    for part in ("G_ema", "D"):
        out[part] = {}
        for name, tensor in exported[part].items():
            if name.endswith("resample_filter"):
                out[part][name] = tensor
                continue
            scale = 30.0 if re.fullmatch(r"mapping\.fc\d+\.bias", name) else 1.0 if tensor.ndim > 1 else 0.3
            scale = 100.0 if re.fullmatch(r"mapping\.fc\d+\.weight", name) else scale
            values = torch.randn(tensor.shape, generator=torch_generator(0, part, name)) * scale
            out[part][name] = values + (1.0 if name.endswith("affine.bias") else 0.0)
    return out
