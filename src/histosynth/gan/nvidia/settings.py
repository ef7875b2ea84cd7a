"""What NVIDIA's classes were called with, as our `Shape`. Both repositories' names are known; anything else is refused.

StyleGAN2-ADA gives the synthesis network its settings in `synthesis_kwargs`; StyleGAN3 gives them to the generator.
"""

from __future__ import annotations

from typing import Any

from histosynth.core.errors import SettingError
from histosynth.gan.nvidia.network import Network
from histosynth.gan.nvidia.opcodes import shortened
from histosynth.gan.shape import Shape

FILTER_TAPS = (1, 3, 3, 1)
SIZES = (16, 32, 64, 128, 256, 512, 1024)
_INTERPOLATED = "InterpolatedMappingNetwork"


def shape_of(generator: Network, discriminator: Network | None) -> Shape:
    """The shape of both networks.

    Raises:
        CheckpointError: a setting is unknown, or has a value that our networks do not have.
    """
    fields = _generator(generator)
    if discriminator is not None:
        own = _discriminator(discriminator, fields)
        for name in ("size", "classes"):
            value = own.pop(name)
            if value != fields[name] and (name != "classes" or value):
                discriminator.fail(f"its {name} is {value}, and the generator's is {fields[name]}")
        fields |= own
    try:
        return Shape(**fields)
    except SettingError as error:
        generator.fail(error.message.rstrip("."), error.remedy)


class _Options:
    """Settings that are taken one by one; at the end none may be left."""

    def __init__(self, network: Network, values: Any, where: str = "") -> None:
        if not isinstance(values, dict):
            network.fail(f"{where.rstrip('.') or 'its settings'} is no dict")
        self.network, self.values, self.where = network, dict(values), where

    def nested(self, name: str) -> _Options:
        value = self.values.pop(name, None)
        return _Options(self.network, {} if value is None else value, f"{self.where}{name}.")

    def integer(self, name: str, default: int | None, low: int, high: int) -> int:
        value = self.values.pop(name, default)
        if type(value) is not int or not low <= value <= high:
            self.network.fail(f"{self.where}{name} is {shortened(value)}, not a number from {low} to {high}")
        return value

    def optional(self, name: str, none: int, high: int) -> int:
        """A number from 1, or what stands for None."""
        if self.values.get(name) is None:
            self.drop(name)
            return none
        return self.integer(name, none, 1, high)

    def number(self, name: str, default: float) -> float:
        value = self.values.pop(name, default)
        if type(value) not in (int, float) or not 0 < value < 1e9:
            self.network.fail(f"{self.where}{name} is {shortened(value)}, not a positive number")
        return float(value)

    def only(self, name: str, *allowed: Any) -> Any:
        value = self.values.pop(name, allowed[0])
        if isinstance(value, list) and all(type(v) in (int, float) for v in value):
            value = tuple(value)
        if type(value) not in (int, float, str, bool, tuple, type(None)) or value not in allowed:
            self.network.fail(f"{self.where}{name} is {shortened(value)}, not {' or '.join(str(a) for a in allowed)}")
        return value

    def drop(self, *names: str) -> None:
        for name in names:
            self.values.pop(name, None)

    def end(self) -> None:
        if self.values:
            self.network.fail(f"{self.where}{shortened(min(self.values, key=str))} is a setting that is unknown")


def _generator(network: Network) -> dict[str, Any]:
    options = _Options(network, network.options)
    fields = {"size": _size(options), "classes": _classes(network, options), "noise_const": True}
    for name in ("z_dim", "w_dim"):
        fields[name] = options.integer(name, None, 1, 8192)
    mapping = options.nested("mapping_kwargs")
    fields["mapping_depth"] = mapping.integer("num_layers", 8, 1, 64)
    fields["mapping_lr"] = mapping.number("lr_multiplier", 0.01)
    _plain_mapping(mapping, fields["w_dim"])
    # StyleGAN3 hands whatever it does not know on to the synthesis network
    nested = "synthesis_kwargs" in options.values
    synthesis = options.nested("synthesis_kwargs") if nested else options
    fields["channel_base"] = synthesis.integer("channel_base", 32768, 4, 2**24)
    fields["channel_max"] = synthesis.integer("channel_max", 512, 1, 8192)
    fields["conv_clamp"] = _clamp(network, synthesis, f"synthesis.b{fields['size']}.conv1")
    fields["noise"] = synthesis.only("use_noise", True, False)
    fields["noise_const"] = fields["noise"]
    synthesis.only("architecture", "skip")
    synthesis.only("kernel_size", 3)
    _plain_layers(synthesis)
    synthesis.drop("num_fp16_res", "fp16_channels_last", "fused_modconv_default")
    synthesis.end()
    options.end()
    return fields


def _discriminator(network: Network, generator: dict[str, Any]) -> dict[str, Any]:
    options = _Options(network, network.options)
    size = _size(options)
    fields = {
        "size": size,
        "classes": _classes(network, options),
        "discriminator": options.only("architecture", "resnet", "skip", "orig"),
        "d_channel_base": options.integer("channel_base", 32768, 4, 2**24),
        "d_channel_max": options.integer("channel_max", 512, 1, 8192),
    }
    clamp = _clamp(network, options, f"b{size}.conv0")
    fields["d_conv_clamp"] = -1.0 if clamp == generator["conv_clamp"] else clamp or 0.0
    last = min(fields["d_channel_base"] // 4, fields["d_channel_max"])
    cmap = options.optional("cmap_dim", last, 8192)
    fields["cmap_dim"] = 0 if cmap == last else cmap
    mapping = options.nested("mapping_kwargs")
    fields["d_mapping_depth"] = mapping.integer("num_layers", 8, 0, 64)
    # the networks share one setting; `convert` scales the weights where the two differ
    mapping.number("lr_multiplier", 0.01)
    _plain_mapping(mapping, cmap)
    block, end = options.nested("block_kwargs"), options.nested("epilogue_kwargs")
    _plain_layers(block)
    block.drop("fp16_channels_last", "freeze_layers")
    block.end()
    end.values.setdefault("mbstd_group_size", 4)
    fields["mbstd_group"] = end.optional("mbstd_group_size", 0, 2**16)
    fields["mbstd_channels"] = end.integer("mbstd_num_channels", 1, 0, 8192)
    end.only("activation", "lrelu")
    end.end()
    options.drop("num_fp16_res")
    options.end()
    fields["label_conditioning"] = "mapping" if fields["classes"] else "none"
    for name in ("channel_base", "channel_max"):
        if fields[f"d_{name}"] == generator[name]:
            fields[f"d_{name}"] = 0
    return fields


def lr_multiplier(network: Network) -> float:
    """Of a network's mapping network."""
    return (network.options.get("mapping_kwargs") or {}).get("lr_multiplier", 0.01)


def _size(options: _Options) -> int:
    options.only("img_channels", 3)
    size = options.values.pop("img_resolution", None)
    if type(size) is not int or size not in SIZES:
        options.network.fail(f"img_resolution is {shortened(size)}, not one of {', '.join(map(str, SIZES))}")
    return size


def _classes(network: Network, options: _Options) -> int:
    count = options.integer("c_dim", None, 0, 8192)
    between = options.only("interp_embed", False, True) and count == 1
    mapping = network.modules.get("mapping")
    if between and mapping is not None and mapping.class_name != _INTERPOLATED:
        network.fail(f"interp_embed is True, but its mapping is a {shortened(mapping.class_name)}")
    return 2 if between else count


def _plain_mapping(mapping: _Options, width: int) -> None:
    mapping.only("activation", "lrelu")
    mapping.only("embed_features", None, width)
    mapping.only("layer_features", None, width)
    mapping.drop("w_avg_beta")
    mapping.end()


def _plain_layers(options: _Options) -> None:
    options.only("activation", "lrelu")
    options.only("resample_filter", FILTER_TAPS)


def _clamp(network: Network, options: _Options, layer: str) -> float | None:
    """The repositories have different defaults, so where it was not given a layer is asked."""
    if "conv_clamp" not in options.values and layer in network.modules:
        options.values["conv_clamp"] = network.modules[layer].state.get("conv_clamp")
    if options.values.get("conv_clamp") is None:
        options.drop("conv_clamp")
        return None
    return options.number("conv_clamp", 0.0)
