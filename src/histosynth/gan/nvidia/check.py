"""Whether the layers of a network compute what ours do: their classes and the numbers that they keep as attributes.

A changed network can have the same tensors and another function. Its source code is not read, but NVIDIA's layers
keep their gains, activations and clamps as attributes, and those must be the known ones.
"""

from __future__ import annotations

import math
import re
from typing import Any

from histosynth.gan.nvidia.network import Network
from histosynth.gan.nvidia.opcodes import shortened
from histosynth.gan.nvidia.settings import lr_multiplier
from histosynth.gan.shape import Shape

_ROLES = (
    (r"mapping", "MappingNetwork InterpolatedMappingNetwork"),
    (r"mapping\.(embed|fc\d+)", "FullyConnectedLayer"),
    (r"synthesis", "SynthesisNetwork"),
    (r"synthesis\.b\d+", "SynthesisBlock"),
    (r"synthesis\.b\d+\.conv[01]", "SynthesisLayer"),
    (r"synthesis\.b\d+\.torgb", "ToRGBLayer"),
    (r"synthesis\.b\d+\.(conv[01]|torgb)\.affine", "FullyConnectedLayer"),
    (r"b\d+", "DiscriminatorBlock DiscriminatorEpilogue"),
    (r"b\d+\.(fromrgb|conv0|conv1|skip)|b4\.conv", "Conv2dLayer"),
    (r"b4\.mbstd", "MinibatchStdLayer"),
    (r"b4\.(fc|out)", "FullyConnectedLayer"),
)


def check_layers(network: Network, shape: Shape) -> None:
    """Compare every layer with what the shape says.

    Raises:
        CheckpointError: a layer is unknown, of another class, or has another gain, activation, clamp or direction.
    """
    for name, module in network.modules.items():
        if not name:
            continue
        role = next((classes for pattern, classes in _ROLES if re.fullmatch(pattern, name)), None)
        if role is None:
            network.fail(f"it has a layer {name!r}, which is unknown")
        if module.class_name not in role.split():
            network.fail(f"its layer {name!r} is a {shortened(module.class_name)!r}, not a {role.split()[0]!r}")
        for key, wanted in _expected(network, shape, name, module.class_name).items():
            if key in module.state and not _same(module.state[key], wanted):
                network.fail(f"{name}.{key} is {shortened(module.state[key])}, not {wanted}")


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, float):
        return type(value) in (int, float) and math.isclose(value, wanted, rel_tol=1e-5)
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        return type(value) is int and value == wanted
    return type(value) is type(wanted) and value == wanted


def _expected(network: Network, shape: Shape, name: str, kind: str) -> dict[str, Any]:
    last, weight = name.rpartition(".")[2], network.tensors.get(f"{name}.weight")
    if weight is None or not weight.size or not weight.ndim:
        return _expected_container(shape, name, kind)
    fan = 1 / math.sqrt(weight[0].size)
    if kind == "FullyConnectedLayer":
        mapped, active = re.fullmatch(r"mapping\.fc\d+", name), last.startswith("fc")
        rate = float(lr_multiplier(network)) if mapped else 1.0
        return {"activation": "lrelu" if active else "linear", "weight_gain": rate * fan, "bias_gain": rate}
    if kind == "ToRGBLayer":
        return {"conv_clamp": shape.conv_clamp, "weight_gain": fan}
    if kind == "SynthesisLayer":
        up = 2 if last == "conv0" else 1
        return {
            "up": up, "use_noise": shape.noise, "activation": "lrelu", "conv_clamp": shape.conv_clamp, "padding": 1,
            "act_gain": math.sqrt(2), "resolution": int(name.split(".")[1][1:]),
        }  # fmt: skip
    active = last != "skip"
    clamp = None if not active or name == "b4.fromrgb" else shape.d_clamp
    return {
        "up": 1, "down": 2 if last in ("conv1", "skip") else 1, "activation": "lrelu" if active else "linear",
        "act_gain": math.sqrt(2) if active else 1.0, "weight_gain": fan, "conv_clamp": clamp,
        "padding": 1 if last in ("conv", "conv0", "conv1") else 0,
    }  # fmt: skip


def _expected_container(shape: Shape, name: str, kind: str) -> dict[str, Any]:
    if kind == "SynthesisBlock":
        return {"architecture": "skip", "resolution": int(name.rpartition(".b")[2])}
    if kind.startswith("Discriminator"):
        return {"architecture": shape.discriminator, "resolution": int(name[1:])}
    if kind == "MinibatchStdLayer":
        return {"group_size": shape.mbstd_group or None, "num_channels": shape.mbstd_channels}
    return {}
