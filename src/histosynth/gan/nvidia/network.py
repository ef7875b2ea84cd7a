"""The networks in what a file holds: their tensors under NVIDIA's names, and the settings they were made with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Never

import numpy as np

from histosynth.core.errors import CheckpointError
from histosynth.gan.nvidia.opcodes import shortened
from histosynth.gan.nvidia.read import Persistent

CAN = "StyleGAN2-ADA networks and networks of StyleGAN3's stylegan2 configuration can be converted."
_NETWORKS = ("G", "D", "G_ema", "augment_pipe")
_TOP = (*_NETWORKS, "training_set_kwargs")
_MOST_MODULES, _DEEPEST = 5_000, 12
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GENERATOR_ARGUMENTS = ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels")
_DISCRIMINATOR_ARGUMENTS = (
    "c_dim", "img_resolution", "img_channels", "architecture", "channel_base", "channel_max", "num_fp16_res",
    "conv_clamp", "cmap_dim",
)  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A generator or a discriminator as it was read."""

    path: Path
    where: str
    """For messages: G_ema, G or D."""
    tensors: dict[str, np.ndarray]
    """Parameters and buffers, under NVIDIA's names."""
    options: dict[str, Any]
    """What its class was called with."""
    modules: dict[str, Persistent] = field(default_factory=dict)
    """All its layers; none where the file holds tensors alone."""

    def fail(self, what: str, remedy: str = CAN) -> Never:
        """Refuse the network.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"{self.where} in {self.path} cannot be converted: {what}.", remedy)


@dataclass(frozen=True)
class Found:
    """What a file holds."""

    generator: Network
    discriminator: Network | None
    notes: tuple[str, ...] = ()
    """For the user."""
    about: dict[str, Any] = field(default_factory=dict)
    """What `export` said about the checkpoint: classes and licence."""


def find_networks(value: Any, path: Path) -> Found:
    """The generator (averaged, if there is one) and the discriminator in what `read_pickle` gave.

    Raises:
        CheckpointError: there is no generator, or what stands in its place is none.
    """
    notes = []
    if isinstance(value, Persistent):
        value = {"G_ema": value}
        notes.append("The file holds one network alone; it is taken as the averaged generator.")
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} and no networks.", CAN)
    found = {k: v for k, v in value.items() if k in _NETWORKS and isinstance(v, Persistent)}
    odd = [k for k in _NETWORKS if k not in found and value.get(k) is not None]
    if odd:
        raise CheckpointError(f"{odd[0]} in {path} is a {type(value[odd[0]]).__name__} and no network.", CAN)
    for key in [k for k in value if k not in _TOP]:
        if not isinstance(value[key], (int, float, str, type(None))):
            raise CheckpointError(f"{path} holds {shortened(key)!r}, which is unknown.", f"Known: {', '.join(_TOP)}.")
        notes.append(f"Left out: {shortened(key)} = {shortened(value[key])}.")
    if "G_ema" not in found and "G" not in found:
        raise CheckpointError(f"{path} holds no generator (G_ema or G).", CAN)
    name = "G_ema" if "G_ema" in found else "G"
    if name == "G":
        notes.append("There is no averaged generator (G_ema); the one that was trained (G) stands in for it.")
    generator = _network(found[name], path, name, "Generator", _GENERATOR_ARGUMENTS)
    judge = _network(found["D"], path, "D", "Discriminator", _DISCRIMINATOR_ARGUMENTS) if "D" in found else None
    return Found(generator, judge, tuple(notes))


def _network(root: Persistent, path: Path, where: str, expected: str, arguments: tuple[str, ...]) -> Network:
    state = root.state
    given, named = state.get("_init_args", ()), state.get("_init_kwargs", {})
    network = Network(path, where, {}, {}, {})
    if type(given) is not tuple or type(named) is not dict or not all(type(k) is str for k in named):
        network.fail("its settings (_init_args, _init_kwargs) are not a tuple and a dict")
    if root.class_name != expected:
        network.fail(f"it is of the class {shortened(root.class_name)!r}, not {expected!r}")
    if len(given) > len(arguments) or set(arguments[: len(given)]) & set(named):
        network.fail(f"it was made with {len(given)} settings without a name")
    network.options.update(zip(arguments, given, strict=False))
    network.options.update(named)
    for name, module in _walk(network, root, "", 0):
        network.modules[name] = module
        _refuse_hooks(network, name, module)
        for key, tensor in _own_tensors(network, name, module):
            network.tensors[key] = tensor
    if "synthesis.input" in network.modules:
        network.fail(
            "it is an alias-free network of StyleGAN3 (configuration T or R)",
            f"{CAN} Train it anew with --cfg=stylegan2, or make tiles with NVIDIA's code and import them.",
        )
    return network


def _walk(network: Network, module: Persistent, name: str, depth: int) -> Iterator[tuple[str, Persistent]]:
    if depth > _DEEPEST or len(network.modules) > _MOST_MODULES:
        network.fail("its layers are nested without an end")
    yield name, module
    children = module.state.get("_modules", {})
    if type(children) is not dict:
        network.fail(f"the layers of {name or 'the network'} are not a dict")
    for key, child in children.items():
        if child is None:
            continue
        if not isinstance(child, Persistent) or type(key) is not str or "." in key:
            network.fail(f"{_joined(name, shortened(key))} is a {type(child).__name__} and no layer")
        yield from _walk(network, child, _joined(name, shortened(key)), depth + 1)


def _own_tensors(network: Network, name: str, module: Persistent) -> Iterator[tuple[str, np.ndarray]]:
    for group in ("_parameters", "_buffers"):
        members = module.state.get(group, {})
        if type(members) is not dict:
            network.fail(f"the tensors of {name or 'the network'} are not a dict")
        for key, tensor in members.items():
            full = _joined(name, shortened(key))
            if tensor is None:
                continue
            if not isinstance(tensor, np.ndarray) or full in network.tensors:
                network.fail(f"{full} is there twice, or is no tensor")
            yield full, tensor
    loose = [key for key, value in module.state.items() if isinstance(value, np.ndarray)]
    if loose:
        network.fail(f"{_joined(name, shortened(loose[0]))} is a tensor that belongs to no layer")


def _refuse_hooks(network: Network, name: str, module: Persistent) -> None:
    hooks = [key for key in _HOOKS if module.state.get(key)]
    if hooks:
        network.fail(f"{name or 'it'} has {hooks[0]}, which change what it computes")


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
