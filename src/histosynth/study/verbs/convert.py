"""The verb that reads networks of other programs, and writes ours in their form."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from histosynth.core.errors import SettingError
from histosynth.core.progress import say

_OF_CLASSIFIERS = (".ts", ".pt2", ".onnx")


@dataclass(frozen=True)
class ConvertConfig:
    """How a network is converted."""

    classes: tuple[str, ...] = ()
    """Names of the classes, in the order of the labels, such as ADI,STR,TUM; class-000 and so on by default."""
    to: Literal["histosynth", "nvidia"] | None = None
    """histosynth: a checkpoint for generate and train. nvidia: plain tensors with the names of NVIDIA's networks.
    By default nvidia where the file to write is a .pt, else histosynth."""


def convert(
    network: Path, out: Path, *, config: Annotated[ConvertConfig, Parameter(name="*")] = ConvertConfig()
) -> None:
    """Turn a StyleGAN2-ADA or StyleGAN3 (stylegan2 configuration) pickle into a checkpoint, or a checkpoint back; or
    a trained classifier into a form that other programs load.

    Nothing inside the pickle is run. The converted network makes the same images, or gives the same logits.

    Args:
        network: network-snapshot-*.pkl, or a .pt or .safetensors of NVIDIA's tensors; with --to nvidia, a checkpoint;
            or a classifier's checkpoint.
        out: the .safetensors to write; with --to nvidia, a .pt or a .safetensors; for a classifier, FILE.ts
            (TorchScript), FILE.pt2 (torch.export) or FILE.onnx.
    """
    if out.suffix in _OF_CLASSIFIERS:
        if config.classes or config.to:
            raise SettingError(f"out is {out}, of a classifier.", "Leave out classes and to: its card has its classes.")
        _export_classifier(network, out)
    elif (config.to or ("nvidia" if out.suffix == ".pt" else "histosynth")) == "nvidia":
        if config.classes:
            raise SettingError(
                "classes is given, and the result has NVIDIA's names.", "Leave it out: NVIDIA's networks name no class."
            )
        _export(network, out)
    else:
        _import(network, out, config.classes)


def _export_classifier(checkpoint: Path, out: Path) -> None:
    from histosynth.classify.export import export

    result = export(checkpoint, out)
    say(f"Takes {result.facts['input']}; gives {result.facts['output']} ({result.facts['temperature']:.3g}).")
    say(f"Written: {result.path}, {result.form}; its logits are ours to {result.difference:.1g}.")


def _import(network: Path, out: Path, classes: tuple[str, ...]) -> None:
    from histosynth.gan.nvidia.convert import convert as run

    if out.suffix != ".safetensors":
        raise SettingError(f"out is {out}.", "Name a .safetensors, or add --to nvidia.")
    result = run(network, out, classes, command=shlex.join(["histosynth", *sys.argv[1:]]))
    shape = result.shape
    labels = f"{shape.classes} classes ({', '.join(result.classes[:12])})" if shape.classes else "no classes"
    say(f"Found: {shape.size} px, {labels}, {shape.mapping_depth} mapping layers, from {result.origin}.")
    judge = f"{result.parameters_discriminator:,}" if result.parameters_discriminator else "none"
    say(f"Parameters: generator {result.parameters:,}, discriminator {judge}.")
    for note in result.notes:
        say(note)
    say(f"Licence of these weights: {result.licence}.")
    say(f"Written: {result.path}")


def _export(checkpoint: Path, out: Path) -> None:
    from histosynth.gan.nvidia.export import export_nvidia

    result = export_nvidia(checkpoint, out)
    for note in result.notes:
        say(note)
    say(f"Written: {result.path}, {result.tensors} tensors with NVIDIA's names.")
