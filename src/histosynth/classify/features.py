"""`mobilenet-v2`: what a classifier that was trained here sees in a tile, as an encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from histosynth.classify.model import Classifier
from histosynth.core.device import pick_device
from histosynth.core.errors import CheckpointError
from histosynth.encoders import card
from histosynth.encoders.door import IMAGENET, Door
from histosynth.encoders.frozen import FrozenEncoder, Precision
from histosynth.encoders.weights import file_hash, require

NAME = "mobilenet-v2"


class Pooled(nn.Module):
    """float [N, 3, S, S], scaled -> float [N, D]: the averages before the last layer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.features = model.features

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).float().mean((2, 3))


def load(device: str = "auto", weights: Path | None = None, precision: Precision = "float32") -> FrozenEncoder:
    """The encoder of a classifier's .safetensors file, at the tile size of its training.

    Raises:
        CheckpointError: no file was given, or it is not a classifier of this kind.
    """
    path = require(card(NAME), weights)
    classifier = Classifier.load(path, device="cpu")
    if classifier.architecture != NAME:
        raise CheckpointError(
            f"{path} is a classifier of kind {classifier.architecture!r}.", f"Give one of kind {NAME}."
        )
    dim = classifier.model.last_channel
    made = replace(card(NAME), dim=dim, input_size=classifier.size)
    door = Door(classifier.size, "bilinear", *IMAGENET)
    return FrozenEncoder(
        made, Pooled(classifier.model), door, lambda: file_hash(path), pick_device(device), precision, micro_batch=32
    )
