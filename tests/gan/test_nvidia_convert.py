"""Networks in NVIDIA's layout become ours and go back; whatever is unexpected is refused by name."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from histosynth.core.checkpoint import load_checkpoint, read_card, save_checkpoint
from histosynth.core.errors import CheckpointError, HistosynthError, SettingError
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.nvidia.convert import LICENCE, convert
from histosynth.gan.nvidia.export import export_nvidia
from histosynth.gan.sample import GanGenerator, load_discriminator
from tests.gan.nvidia_pickles import EasyDict, Layer, dump, known_tensors, network, snapshot

SHAPE = Shape(
    size=16, classes=3, channel_base=128, channel_max=16, z_dim=8, w_dim=12, noise_const=True, conv_clamp=256.0,
    label_conditioning="mapping", mbstd_group=3,
)  # fmt: skip
BATCH = 6


def exported(shape: Shape, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Random networks of this shape as `export_nvidia` writes them; the checkpoint is folder/own.safetensors."""
    torch.manual_seed(seed)
    generator, discriminator = Generator(shape), Discriminator(shape)
    with torch.no_grad():
        for parameter in [*generator.parameters(), *discriminator.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
        generator.mapping.w_avg.normal_()
        generator.mapping.w_mean.copy_(generator.mapping.w_avg.expand_as(generator.mapping.w_mean))
    tensors = {f"G_ema.{k}": v for k, v in generator.state_dict().items()}
    tensors |= {f"D.{k}": v for k, v in discriminator.state_dict().items()}
    names = [f"c{k}" for k in range(shape.classes)] or ["tissue"]
    card = {"kind": "gan", "shape": dataclasses.asdict(shape), "classes": names, "licence": "own"}
    save_checkpoint(folder / "own.safetensors", tensors, card)
    export_nvidia(folder / "own.safetensors", folder / "own.pt")
    return torch.load(folder / "own.pt", weights_only=True)


def inputs(shape: Shape = SHAPE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(BATCH, shape.z_dim, generator=generator)
    return z, torch.arange(BATCH) % max(shape.classes, 1)


@torch.no_grad()
def outputs(path: Path) -> dict[str, Tensor]:
    """What the networks of a checkpoint compute: images with constant noise, truncated, without noise; logits."""
    generator, judge = GanGenerator.from_checkpoint(path, "cpu").network, load_discriminator(path, "cpu")
    z, labels = inputs(generator.shape)
    noise = generator.const_noise() if generator.shape.noise else None
    images = generator.synthesise(generator.codes(z, labels), noise)
    return {
        "const": images,
        "psi": generator.synthesise(generator.codes(z, labels, 0.7), noise),
        "none": generator.synthesise(generator.codes(z, labels), None),
        "logits": judge(images / 10, labels),
    }


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], within: float = 1e-5) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=within, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


VARIANTS = {
    "nine classes": {"classes": 9},
    "unconditional": {"classes": 0, "label_conditioning": "none"},
    "deep": {"mapping_depth": 8, "d_mapping_depth": 2, "cmap_dim": 5},
    "slow mapping": {"mapping_lr": 0.1},
    "no noise": {"noise": False, "noise_const": False},
    "no clamp": {"conv_clamp": None},
    "tight clamp": {"conv_clamp": 0.5, "d_conv_clamp": 0.25},
    "other judge": {"discriminator": "skip", "d_channel_base": 256, "d_channel_max": 24, "mbstd_group": 0},
    "plain judge": {"discriminator": "orig", "mbstd_channels": 2},
    "blind judge": {"label_conditioning": "none", "mbstd_channels": 0},
    "no mapping layer": {"d_mapping_depth": 0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back_is_the_same_function(name: str, tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPE, **VARIANTS[name])
    value = exported(shape, tmp_path)
    for flat in (False, True):
        pickle = dump(snapshot(value, flat), tmp_path / "network-snapshot-000100.pkl")
        result = convert(pickle, tmp_path / "back.safetensors")
        assert result.shape == shape
        assert_same(outputs(tmp_path / "own.safetensors"), outputs(tmp_path / "back.safetensors"))


def test_the_projection_of_our_own_networks_survives(tmp_path: Path) -> None:
    shape = Shape(size=16, classes=4, channel_base=128, channel_max=16, z_dim=8, w_dim=12)
    value = exported(shape, tmp_path)
    result = convert(dump(snapshot(value), tmp_path / "n.pkl"), tmp_path / "back.safetensors")
    assert (result.shape.label_conditioning, result.shape.cmap_dim, result.shape.d_mapping_depth) == ("mapping", 18, 0)
    assert_same(outputs(tmp_path / "own.safetensors"), outputs(tmp_path / "back.safetensors"), within=1e-4)


def test_numbers_of_nvidias_own_code(tmp_path: Path) -> None:
    """Computed once with NVIDIA's classes from these tensors; stylegan2-ada and stylegan3 gave the same."""
    value = known_tensors(exported(SHAPE, tmp_path))
    convert(dump(snapshot(value), tmp_path / "n.pkl"), tmp_path / "known.safetensors")
    found = outputs(tmp_path / "known.safetensors")
    for name in ("const", "psi", "none"):
        pixels = found[name][:2, :, 5, 9].flatten().tolist()
        assert pixels == pytest.approx(KNOWN[name], abs=1e-4), name
    assert found["logits"].tolist() == pytest.approx(KNOWN["logits"], abs=1e-4)


KNOWN = {
    "const": [-0.60161, 1.85529, -0.57656, -0.59542, 1.51955, 0.16963],
    "psi": [-1.61751, 1.63412, 0.06506, -1.37326, 1.87304, 0.39965],
    "none": [-0.78393, 1.78454, -0.13543, -0.85340, 1.28842, 0.51121],
    "logits": [-0.20955, 0.00795, 0.03249, -0.18581, 0.01537, 0.05474],
}


@pytest.fixture(scope="module")
def value(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return exported(SHAPE, tmp_path_factory.mktemp("own"))


def refusal(broken: Any, tmp_path: Path) -> str:
    """The message with which a pickle of this is refused; nothing is written."""
    out = tmp_path / "out.safetensors"
    with pytest.raises(CheckpointError) as caught:
        convert(dump(broken, tmp_path / "net.pkl"), out)
    assert not out.exists()
    assert "net.pkl" in str(caught.value)
    return str(caught.value)


def test_every_protocol_and_a_package_around_the_repository(value: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        package = "slideflow.gan.stylegan2.stylegan2." if protocol % 2 else ""
        convert(dump(snapshot(value), tmp_path / "n.pkl", protocol, package), tmp_path / "x.safetensors")
        results.append(load_checkpoint(tmp_path / "x.safetensors")[0])
    for tensors in results[1:]:
        assert tensors.keys() == results[0].keys()
        assert all(torch.equal(v, results[0][k]) for k, v in tensors.items())


def test_the_card_says_where_it_came_from(value: dict[str, Any], tmp_path: Path) -> None:
    path = dump(snapshot(value), tmp_path / "network-snapshot-025000.pkl")
    convert(path, tmp_path / "x.safetensors", classes=("ADI, STR", "TUM"), command="histosynth convert")
    card = read_card(tmp_path / "x.safetensors")
    assert (card["kind"], card["classes"], card["size"]) == ("gan", ["ADI", "STR", "TUM"], 16)
    assert card["licence"] == LICENCE and "non-commercial" in LICENCE
    assert card["parents"] == [f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"]
    tiles = next(GanGenerator.from_checkpoint(tmp_path / "x.safetensors", "cpu").sample([2], [7]))
    assert tiles.shape == (1, 3, 16, 16)


def test_classes_without_names_are_numbered_and_wrong_numbers_of_names_refused(
    value: dict[str, Any], tmp_path: Path
) -> None:
    path = dump(snapshot(value), tmp_path / "n.pkl")
    assert convert(path, tmp_path / "x.safetensors").classes == ("class-000", "class-001", "class-002")
    for names in (("a", "b"), ("a", "b", "b"), ("a,b,c,d",)):
        with pytest.raises(SettingError, match="3"):
            convert(path, tmp_path / "y.safetensors", classes=names)


def test_without_an_average_or_a_judge(value: dict[str, Any], tmp_path: Path) -> None:
    whole = snapshot(value)
    both = convert(dump(whole, tmp_path / "n.pkl"), tmp_path / "a.safetensors")
    assert not both.notes
    first = convert(dump({"G": whole["G"]}, tmp_path / "n.pkl"), tmp_path / "b.safetensors")
    assert any("G_ema" in n for n in first.notes) and any("(D)" in n for n in first.notes)
    assert first.parameters_discriminator == 0
    alone = convert(dump(whole["G_ema"], tmp_path / "n.pkl"), tmp_path / "c.safetensors")
    assert any("alone" in n for n in alone.notes)
    a, b = (GanGenerator.from_checkpoint(tmp_path / f"{k}.safetensors", "cpu") for k in "bc")
    assert torch.equal(next(a.sample([0], [1])), next(b.sample([0], [1])))
    with pytest.raises(CheckpointError):
        load_discriminator(tmp_path / "b.safetensors", "cpu")


def test_a_network_without_a_mean_gets_one_that_is_measured(value: dict[str, Any], tmp_path: Path) -> None:
    whole = snapshot(value)
    del whole["G_ema"].child("mapping").state["_buffers"]["w_avg"]
    convert(dump(whole, tmp_path / "n.pkl"), tmp_path / "x.safetensors")
    network = GanGenerator.from_checkpoint(tmp_path / "x.safetensors", "cpu").network
    z = torch.randn(4096, 8, generator=torch.Generator().manual_seed(3))
    mean = network.mapping(z, torch.ones(4096, dtype=torch.long)).mean(dim=0)
    torch.testing.assert_close(network.mapping.w_mean[1], mean, atol=0.1, rtol=0.1)


def test_a_number_between_two_labels_becomes_two_classes(value: dict[str, Any], tmp_path: Path) -> None:
    two = exported(dataclasses.replace(SHAPE, classes=2), tmp_path)
    whole = snapshot(two)
    for part in ("G_ema", "G", "D"):
        whole[part].state["_init_kwargs"] |= {"c_dim": 1, "interp_embed": True}
        whole[part].child("mapping").class_name = "InterpolatedMappingNetwork"
    assert convert(dump(whole, tmp_path / "n.pkl"), tmp_path / "x.safetensors").shape.classes == 2
    assert_same(outputs(tmp_path / "own.safetensors"), outputs(tmp_path / "x.safetensors"))
    whole["G_ema"].child("mapping").class_name = "MappingNetwork"
    assert "interp_embed" in refusal(whole, tmp_path)


def test_half_precision_and_other_memory_layouts_are_read(value: dict[str, Any], tmp_path: Path) -> None:
    whole = snapshot(value)
    convert(dump(whole, tmp_path / "n.pkl"), tmp_path / "a.safetensors")
    layer = whole["G_ema"].child("synthesis.b8.conv1")
    weight = layer.state["_parameters"]["weight"]
    for changed in (
        weight.data.to(memory_format=torch.channels_last),
        torch.cat([weight.data, weight.data])[len(weight) :],  # the second half of a storage
        weight.data.double(),
    ):
        layer.state["_parameters"]["weight"] = torch.nn.Parameter(changed)
        convert(dump(whole, tmp_path / "n.pkl"), tmp_path / "b.safetensors")
        one, two = (load_checkpoint(tmp_path / f"{k}.safetensors")[0] for k in "ab")
        assert all(torch.equal(one[k], two[k]) for k in one)
    for dtype in (torch.float16, torch.bfloat16):
        layer.state["_parameters"]["weight"] = torch.nn.Parameter(weight.data.to(dtype))
        convert(dump(whole, tmp_path / "n.pkl"), tmp_path / "b.safetensors")
        found = load_checkpoint(tmp_path / "b.safetensors")[0]["G_ema.blocks.b8.conv1.conv.weight"]
        assert torch.equal(found, weight.data.to(dtype).float())


# refusals: each change must be named in the message


def _state(part: str, path: str, group: str, key: str, new: Any) -> Callable[[dict[str, Any]], None]:
    """Replace a member of a layer; None takes it away."""

    def change(whole: dict[str, Any]) -> None:
        members = whole[part].child(path).state[group] if group else whole[part].child(path).state
        if new is None:
            del members[key]
        else:
            members[key] = new(members[key]) if callable(new) else new

    return change


def _setting(part: str, key: str, new: Any, nested: str = "") -> Callable[[dict[str, Any]], None]:
    def change(whole: dict[str, Any]) -> None:
        kwargs = whole[part].state["_init_kwargs"]
        (kwargs.setdefault(nested, EasyDict()) if nested else kwargs)[key] = new

    return change


def _transposed(tensor: Tensor) -> Tensor:
    return torch.nn.Parameter(tensor.data.transpose(0, 1).contiguous())


def _with_nan(tensor: Tensor) -> Tensor:
    return torch.nn.Parameter(tensor.data * float("nan"))


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing tensor": (_state("G_ema", "synthesis.b8.conv0", "_parameters", "weight", None), "b8.conv0.weight"),
    "missing noise": (_state("G_ema", "synthesis.b16.conv1", "_buffers", "noise_const", None), "noise_const"),
    "extra tensor": (_state("G_ema", "synthesis.b8", "_buffers", "extra", torch.ones(2)), "synthesis.b8.extra"),
    "extra in D": (_state("D", "b8.conv0", "_buffers", "scale", torch.ones(2)), "b8.conv0.scale"),
    "transposed": (_state("G_ema", "synthesis.b16.torgb", "_parameters", "weight", _transposed), "b16.torgb.weight"),
    "transposed embedding": (_state("G_ema", "mapping.embed", "_parameters", "weight", _transposed), "mapping.embed"),
    "transposed in D": (_state("D", "b4.fc", "_parameters", "weight", _transposed), "b4.fc.weight"),
    "not finite": (_state("G_ema", "mapping.fc1", "_parameters", "weight", _with_nan), "mapping.fc1.weight"),
    "whole numbers": (_state("G_ema", "mapping", "_buffers", "w_avg", torch.ones(12, dtype=torch.int64)), "w_avg"),
    "other filter": (_state("D", "b8.conv1", "_buffers", "resample_filter", torch.ones(4, 4) / 16), "conv1.resample"),
    "small filter": (_state("D", "b8.conv1", "_buffers", "resample_filter", torch.ones(2, 2) / 4), "conv1.resample"),
    "filter elsewhere": (_state("G_ema", "mapping", "_buffers", "resample_filter", torch.ones(4, 4)), "resample"),
    "loose tensor": (_state("G_ema", "synthesis", "", "secret", torch.ones(3)), "synthesis.secret"),
    "text for a tensor": (_state("G_ema", "mapping", "_buffers", "w_avg", "abc"), "mapping.w_avg"),
    "layer of a list": (_state("G_ema", "", "_modules", "mapping", [1]), "mapping"),
    "unknown layer": (_state("G_ema", "", "_modules", "extra", Layer("FullyConnectedLayer")), "extra"),
    "other class": (_state("G_ema", "", "_modules", "mapping", Layer("MyMapping")), "MyMapping"),
    "hooks": (_state("G_ema", "mapping", "_forward_hooks", 0, Layer("X")), "_forward_hooks"),
    "relu": (_state("G_ema", "synthesis.b8.conv1", "", "activation", "relu"), "relu"),
    "other gain": (_state("G_ema", "synthesis.b8.conv1.affine", "", "weight_gain", 0.5), "weight_gain"),
    "other clamp": (_state("D", "b16.conv0", "", "conv_clamp", 8), "b16.conv0.conv_clamp"),
    "other size": (_setting("G_ema", "img_resolution", 32), "generator's is 32"),
    "size 8": (_setting("G_ema", "img_resolution", 8), "img_resolution is 8"),
    "size as text": (_setting("G_ema", "img_resolution", "16"), "img_resolution is 16"),
    "grey": (_setting("G_ema", "img_channels", 1), "img_channels is 1"),
    "unknown setting": (_setting("G_ema", "attention", True), "attention"),
    "unknown in mapping": (_setting("G_ema", "depth", 3, "mapping_kwargs"), "mapping_kwargs.depth"),
    "relu setting": (_setting("G_ema", "activation", "relu", "mapping_kwargs"), "mapping_kwargs.activation is relu"),
    "wide mapping": (_setting("G_ema", "layer_features", 64, "mapping_kwargs"), "layer_features is 64"),
    "resnet generator": (_setting("G_ema", "architecture", "resnet", "synthesis_kwargs"), "architecture is resnet"),
    "other kernel": (_setting("G_ema", "resample_filter", [1, 2, 1], "synthesis_kwargs"), "resample_filter"),
    "odd filter": (_setting("D", "resample_filter", [[1, 3], 3, 1], "block_kwargs"), "block_kwargs.resample_filter"),
    "endless mapping": (_setting("G_ema", "num_layers", 10**9, "mapping_kwargs"), "num_layers is 1000000000"),
    "endless channels": (_setting("G_ema", "channel_base", 10**12, "synthesis_kwargs"), "channel_base is 10000"),
    "channels as bool": (_setting("D", "channel_max", True), "channel_max is True"),
    "no rate": (_setting("D", "lr_multiplier", None, "mapping_kwargs"), "lr_multiplier"),
    "other labels in D": (_setting("D", "c_dim", 4), "classes is 4"),
    "other group": (_setting("D", "mbstd_group_size", 0, "epilogue_kwargs"), "mbstd_group_size is 0"),
    "settings of a list": (_setting("G_ema", "mapping_kwargs", [1]), "mapping_kwargs is no dict"),
    "generator for D": (lambda w: w.update(D=w["G"]), "'Generator', not 'Discriminator'"),
    "a tensor for G_ema": (lambda w: w.update(G_ema=torch.ones(2)), "G_ema"),
    "more networks": (lambda w: w.update(G2=w["G"]), "G2"),
    "no generator": (lambda w: (w.pop("G"), w.pop("G_ema")), "no generator"),
    "newer pickle": (lambda w: setattr(w["G_ema"], "version", 7), "version 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_unexpected_is_refused_by_name(name: str, value: dict[str, Any], tmp_path: Path) -> None:
    change, named = REFUSED[name]
    whole = snapshot(value)
    change(whole)
    assert named in refusal(whole, tmp_path)


def test_plain_numbers_beside_the_networks_are_left_out_with_a_note(value: dict[str, Any], tmp_path: Path) -> None:
    result = convert(dump(snapshot(value) | {"cur_nimg": 25_000_000}, tmp_path / "n.pkl"), tmp_path / "x.safetensors")
    assert result.notes == ("Left out: cur_nimg = 25000000.",)


def test_an_alias_free_network_is_refused_with_what_to_do(value: dict[str, Any], tmp_path: Path) -> None:
    whole = snapshot(value)
    whole["G_ema"].child("synthesis").state["_modules"] = {"input": Layer("SynthesisInput"), "L0_36_512": Layer("X")}
    text = refusal(whole, tmp_path)
    assert "T or R" in text and "--cfg=stylegan2" in text


def test_a_network_whose_layers_contain_themselves_is_refused(value: dict[str, Any], tmp_path: Path) -> None:
    for depth in (10, 60):
        whole, layer = snapshot(value), Layer("SynthesisBlock")
        for _ in range(depth):  # each holds the last one ten times: 10 ** depth layers, were they all visited
            outer = Layer("SynthesisBlock")
            outer.state["_modules"] |= {f"part{k}": layer for k in range(10)}
            layer = outer
        whole["G_ema"].state["_modules"]["deep"] = layer
        assert "nested without an end" in refusal(whole, tmp_path)


# state dicts


def test_state_dicts_without_settings_are_read_with_a_note(value: dict[str, Any], tmp_path: Path) -> None:
    own = exported(dataclasses.replace(SHAPE, conv_clamp=None, mbstd_group=4), tmp_path)
    torch.save({k: own[k] for k in ("G_ema", "D")}, tmp_path / "plain.pt")
    result = convert(tmp_path / "plain.pt", tmp_path / "x.safetensors")
    assert any("does not say" in n for n in result.notes) and result.licence == LICENCE
    assert_same(outputs(tmp_path / "own.safetensors"), outputs(tmp_path / "x.safetensors"))
    torch.save(own["G_ema"], tmp_path / "alone.pt")
    alone = convert(tmp_path / "alone.pt", tmp_path / "y.safetensors")
    assert (alone.shape.size, alone.shape.classes, alone.shape.mapping_depth) == (16, 3, 2)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_export_wrote_comes_back_with_its_settings(suffix: str, tmp_path: Path) -> None:
    exported(SHAPE, tmp_path)
    export_nvidia(tmp_path / "own.safetensors", tmp_path / f"nv{suffix}")
    result = convert(tmp_path / f"nv{suffix}", tmp_path / "back.safetensors")
    assert (result.shape, result.classes, result.licence, result.notes) == (SHAPE, ("c0", "c1", "c2"), "own", ())
    assert_same(outputs(tmp_path / "own.safetensors"), outputs(tmp_path / "back.safetensors"))


@pytest.mark.parametrize(
    ("setting", "value"), [("start", "code"), ("class_embedding", "add"), ("architecture", "lite")]
)
def test_networks_without_a_counterpart_name_the_setting(setting: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{setting}={value}.*lack.*space=pixels.*start=constant"):
        exported(dataclasses.replace(SHAPE, **{setting: value}), tmp_path)


def test_an_export_is_the_same_bytes_again(tmp_path: Path) -> None:
    exported(SHAPE, tmp_path)
    for name in ("a.pt", "b.pt"):
        export_nvidia(tmp_path / "own.safetensors", tmp_path / name)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_state_dicts_of_others_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"g_ema": {"style.1.weight": torch.ones(2, 2)}, "latent_avg": torch.ones(2)}, tmp_path / "r.pt")
    with pytest.raises(CheckpointError, match="rosinality"):
        convert(tmp_path / "r.pt", tmp_path / "x.safetensors")
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "resnet.pt")
    with pytest.raises(CheckpointError, match="synthesis.b4.const"):
        convert(tmp_path / "resnet.pt", tmp_path / "x.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="list"):
        convert(tmp_path / "list.pt", tmp_path / "x.safetensors")
    exported(SHAPE, tmp_path)
    with pytest.raises(CheckpointError, match="already"):
        convert(tmp_path / "own.safetensors", tmp_path / "x.safetensors")


def test_networks_without_a_counterpart_are_not_exported(tmp_path: Path) -> None:
    for changes in ({"architecture": "lite"}, {"class_embedding": "add"}, {"channel_min": 12}):
        shape = dataclasses.replace(SHAPE, noise_const=False, **changes)
        with pytest.raises(CheckpointError, match=next(iter(changes))):
            exported(shape, tmp_path)
    exported(SHAPE, tmp_path)
    with pytest.raises(SettingError, match="onnx"):
        export_nvidia(tmp_path / "own.safetensors", tmp_path / "x.onnx")
    with pytest.raises(HistosynthError, match="absent"):
        export_nvidia(tmp_path / "absent.safetensors", tmp_path / "x.pt")


def test_the_helper_writes_numbers_as_numpy_does() -> None:
    layer = network("Generator", {"mapping.fc0.affine.weight": torch.ones(2, 3)}, {})
    assert isinstance(layer.child("mapping.fc0.affine").state["weight_gain"], np.float64)
