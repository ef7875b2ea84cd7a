"""A trained network in a form that other programs load: TorchScript, torch.export, or ONNX."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from histosynth.classify.fit import load
from histosynth.classify.model import Classifier
from histosynth.classify.network import MEAN, STD
from histosynth.core.errors import RunError, SettingError
from histosynth.core.files import atomic_path

TOLERANCE = 1e-5
"""Largest difference between the logits of the exported network and ours, relative to the largest logit or 1."""
FACTS = "histosynth.json"
"""Name of the facts inside a TorchScript or torch.export file; in ONNX they are the metadata "histosynth"."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        form: its form, for people.
        difference: largest difference of its logits to ours on random tiles.
        facts: what the file says of itself: classes, size, temperature, input, output, licence.
    """

    path: Path
    form: str
    difference: float
    facts: dict[str, Any]


class WithDoor(nn.Module):
    """uint8 [N, 3, S, S] RGB -> float32 logits [N, K]: the network with its pixel door."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) * 255)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.float() - self.mean) / self.std)


def export(checkpoint: Path | str, out: Path | str) -> Exported:
    """Write the network of a classifier's checkpoint for other programs; its form follows from the name of `out`.

    The exported network takes uint8 [N, 3, S, S] RGB, S being its tile size and N any number, and gives logits
    float32 [N, K]. Divide these by the temperature among the facts before the softmax.

    Args:
        checkpoint: a .safetensors that `train classifier` wrote.
        out: FILE.ts (TorchScript), FILE.pt2 (torch.export) or FILE.onnx.

    Raises:
        SettingError: another ending, a probe, or a package that is missing.
        CheckpointError: `checkpoint` cannot be used.
        RunError: the exported network gives other logits.
    """
    out = Path(out)
    if out.suffix not in FORMS:
        raise SettingError(f"out is {out}.", f"End it in {', '.join(FORMS)}.")
    classifier = load(checkpoint, device="cpu")
    if not isinstance(classifier, Classifier):
        raise SettingError(
            f"{checkpoint} is a probe, {classifier.card['name']}.", "Only networks can be exported: a probe is numbers."
        )
    size = classifier.size
    facts = {
        "classes": list(classifier.classes),
        "size": size,
        "temperature": classifier.temperature,
        "architecture": classifier.architecture,
        "input": f"images: uint8 [N, 3, {size}, {size}], RGB",
        "output": "logits: float32 [N, classes]; divide by temperature before the softmax",
        "licence": classifier.card.get("licence", ""),
    }
    network = WithDoor(classifier.model.eval()).eval()
    tiles = torch.randint(0, 256, (5, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.inference_mode():
        expected = network(tiles)
    form, write = FORMS[out.suffix]
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn of their own future
        run = write(network, tiles[:2], Path(temporary), facts)
        difference = float((run(tiles) - expected).abs().max())
        if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
            raise RunError(
                f"The logits of the {form} file differ from ours by {difference:.2g}.", "Use another form, and tell us."
            )
    return Exported(out, form, difference, facts)


Run = Callable[[Tensor], Tensor]


def _torchscript(network: nn.Module, tiles: Tensor, path: Path, facts: dict[str, Any]) -> Run:
    torch.jit.save(torch.jit.trace(network, tiles), str(path), _extra_files={FACTS: json.dumps(facts)})
    return torch.jit.load(str(path))


def _torch_export(network: nn.Module, tiles: Tensor, path: Path, facts: dict[str, Any]) -> Run:
    program = torch.export.export(network, (tiles,), dynamic_shapes=({0: torch.export.Dim("tiles")},))
    torch.export.save(program, str(path), extra_files={FACTS: json.dumps(facts)})
    return torch.export.load(str(path)).module()


def _onnx(network: nn.Module, tiles: Tensor, path: Path, facts: dict[str, Any]) -> Run:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SettingError(
            f"ONNX needs the package {error.name}, which is not installed.", "Run: pip install 'histosynth[export]'"
        ) from error
    torch.onnx.export(
        network,
        (tiles,),
        str(path),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("tiles")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {"histosynth": json.dumps(facts)})
    onnx.save(model, str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


FORMS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Path, dict[str, Any]], Run]]] = {
    ".ts": ("TorchScript", _torchscript),
    ".pt2": ("torch.export", _torch_export),
    ".onnx": ("ONNX", _onnx),
}
