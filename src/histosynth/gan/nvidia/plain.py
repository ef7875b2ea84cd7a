"""Files that hold NVIDIA's tensors alone: a state dict in a .pt or a .safetensors, such as `export` writes.

They say nothing about the settings, unless they come from `export`; those that leave no trace in the tensors are
then taken as NVIDIA's usual ones and named in the notes.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, Never

import numpy as np

from histosynth.core.errors import CheckpointError
from histosynth.gan.nvidia.network import CAN, Found, Network
from histosynth.gan.nvidia.opcodes import shortened
from histosynth.gan.nvidia.read import MAX_BYTES, read_stream
from histosynth.gan.nvidia.storage import Reference, Storage, elements

METADATA = "nvidia_kwargs"
"""Where `export` keeps the settings of both networks in a .safetensors."""
_GENERATORS = ("G_ema", "G")
_ROSINALITY = re.compile(r"(g_ema|style\.\d+\.weight|to_rgbs\..+|convs\.\d+\..+)")
_USUAL = "no clamp, noise as stored, groups of 4 and a learning rate of 0.01 in the mapping networks"
Value = dict[str, Any]


def read_torch_zip(path: Path) -> Found:
    """The networks in a .pt file, whose pickle is read as `read_pickle` does and whose tensors are stored as they are.

    Raises:
        CheckpointError: the file is no such file, is compressed, or holds anything else.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            index = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(index) != 1:
                raise CheckpointError(f"{path} is a zip archive, not a network.", "Unpack it first.")
            if size > MAX_BYTES or sum(entry.file_size for entry in entries.values()) > size:
                raise CheckpointError(f"{path} is refused: it unpacks to more than it has.", CAN)
            folder = index[0].removesuffix("data.pkl")
            order = entries.get(f"{folder}byteorder")
            if order is not None and archive.read(order) != b"little":
                raise CheckpointError(f"{path} comes from a big-endian machine.", CAN)

            def storage(reference: Reference) -> Storage:
                entry = entries.get(f"{folder}data/{reference.key}")
                if entry is None:
                    raise CheckpointError(f"{path} lacks the tensor data {shortened(reference.key)!r}.", CAN)
                return elements(archive.read(entry), reference, lambda what: _refuse(path, what))

            cache: dict[Reference, Storage] = {}

            def once(reference: Reference) -> Storage:
                return cache[reference] if reference in cache else cache.setdefault(reference, storage(reference))

            with archive.open(index[0]) as stream:
                value = read_stream(stream, entries[index[0]].file_size, path, once)  # type: ignore[arg-type]
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {shortened(error)}.", "Repeat the download.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} and no tensors.", CAN)
    return _networks(value, path)


def read_safetensors(path: Path) -> Found:
    """The networks in a .safetensors.

    Raises:
        CheckpointError: it is damaged, or is a checkpoint of histosynth.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as stream:  # numpy lacks bfloat16
            about = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key).float().numpy() for key in stream.keys()}  # noqa: SIM118
        settings = json.loads(about.get(METADATA, "{}"))
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {shortened(error)}.", CAN) from error
    if "histosynth" in about:
        raise CheckpointError(f"{path} is a checkpoint of histosynth already.", "Use --to nvidia to convert it back.")
    value: Value = {name: {} for name in ("G_ema", "G", "D")}
    for key, tensor in tensors.items():
        owner, _, name = key.partition(".")
        if owner in value:
            value[owner][name] = tensor
        else:
            value.setdefault("", {})[key] = tensor
    loose = value.pop("", None)
    value = {k: v for k, v in value.items() if v}
    if loose:
        if value:
            raise CheckpointError(f"{path} holds {min(loose)!r} beside networks.", CAN)
        value = loose
    return _networks(value | settings if isinstance(settings, dict) else value, path)


def _networks(value: Value, path: Path) -> Found:
    strangers = [k for k in value if isinstance(k, str) and _ROSINALITY.fullmatch(k)]
    if strangers:
        raise CheckpointError(
            f"{path} is a network of rosinality's stylegan2-pytorch ({shortened(strangers[0])}).",
            "Give the pickle that NVIDIA's training wrote.",
        )
    if value and all(isinstance(v, np.ndarray) for v in value.values()):
        value = {"G_ema": value}
    known = {"G_ema", "G", "D", "G_kwargs", "D_kwargs", "about"}
    odd = [k for k in value if k not in known or not isinstance(value[k], dict)]
    if odd:
        raise CheckpointError(f"{path} holds {shortened(odd[0])!r}, which is unknown.", CAN)
    name = next((n for n in _GENERATORS if n in value), None)
    if name is None:
        raise CheckpointError(f"{path} holds no generator (G_ema or G).", CAN)
    notes = []
    if "G_kwargs" not in value or ("D" in value and "D_kwargs" not in value):
        notes.append(f"The file does not say how the networks were made, so they are taken to have {_USUAL}.")
    generator = _network(path, name, value[name], value.get("G_kwargs"))
    judge = _network(path, "D", value["D"], value.get("D_kwargs")) if "D" in value else None
    return Found(generator, judge, tuple(notes), value.get("about", {}))


def _network(path: Path, where: str, tensors: Value, options: Value | None) -> Network:
    network = Network(path, where, {}, dict(options or {}))
    for name, tensor in tensors.items():
        if type(name) is not str or not isinstance(tensor, np.ndarray):
            network.fail(f"{shortened(name)} is no tensor")
        network.tensors[name] = tensor
    if options is None:
        network.options.update(_guessed_generator(network) if where != "D" else _guessed_discriminator(network))
    return network


def _guessed_generator(network: Network) -> Value:
    const, first = _size(network, "synthesis.b4.const", 3), _size(network, "mapping.fc0.weight", 2)
    classes = _size(network, "mapping.embed.weight", 2)[1] if "mapping.embed.weight" in network.tensors else 0
    edges = {int(m[1]): k for k in network.tensors if (m := re.fullmatch(r"synthesis\.b(\d{1,4})\.conv1\.weight", k))}
    widths = {r: _size(network, k, 4)[0] for r, k in edges.items()} | {4: const[0]}
    depth = sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", k)) for k in network.tensors)
    w_dim = _size(network, f"synthesis.b{max(widths)}.conv1.affine.weight", 2)[1]
    synthesis = _widths(widths) | {"use_noise": "synthesis.b4.conv1.noise_strength" in network.tensors}
    return {
        "z_dim": first[1] - (w_dim if classes else 0), "c_dim": classes, "w_dim": w_dim,
        "img_resolution": max(widths), "img_channels": 3,
        "mapping_kwargs": {"num_layers": depth}, "synthesis_kwargs": synthesis | {"conv_clamp": None},
    }  # fmt: skip


def _guessed_discriminator(network: Network) -> Value:
    edges = {int(m[1]): k for k in network.tensors if (m := re.fullmatch(r"b(\d{1,4})\.conv0\.weight", k))}
    last = _size(network, "b4.conv.weight", 4)
    widths = {r: _size(network, k, 4)[0] for r, k in edges.items()} | {4: last[0]}
    size = max(widths)
    classes = _size(network, "mapping.embed.weight", 2)[1] if "mapping.embed.weight" in network.tensors else 0
    kind = "resnet" if f"b{size}.skip.weight" in network.tensors else "orig"
    depth = sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", k)) for k in network.tensors)
    return _widths(widths) | {
        "c_dim": classes, "img_resolution": size, "img_channels": 3, "conv_clamp": None,
        "architecture": "skip" if "b4.fromrgb.weight" in network.tensors else kind,
        "cmap_dim": _size(network, "b4.out.weight", 2)[0] if classes else None, "mapping_kwargs": {"num_layers": depth},
        "epilogue_kwargs": {"mbstd_num_channels": last[1] - last[0]},
    }  # fmt: skip


def _widths(widths: dict[int, int]) -> Value:
    """channel_base and channel_max of layers with these channels at these resolutions."""
    most = max(widths.values())
    below = [r * c for r, c in widths.items() if c < most]
    return {"channel_max": most, "channel_base": max(below) if below else most * max(widths)}


def _size(network: Network, name: str, dimensions: int) -> tuple[int, ...]:
    if name not in network.tensors or network.tensors[name].ndim != dimensions:
        network.fail(f"it lacks the tensor {name!r} of {dimensions} dimensions")
    return network.tensors[name].shape


def _refuse(path: Path, what: str) -> Never:
    raise CheckpointError(f"{path} is refused: {what}.", CAN)
