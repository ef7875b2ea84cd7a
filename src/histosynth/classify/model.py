"""What a classifier is: tiles in, logits out, with a temperature; and what both kinds of it share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from histosynth.classify import calibration, network
from histosynth.core.checkpoint import load_checkpoint, require_kind, save_checkpoint
from histosynth.core.device import pick_device
from histosynth.core.errors import CheckpointError, DataError
from histosynth.tiles.batches import TileArray

ENOUGH_TO_CALIBRATE = 20
"""Validation tiles, of two classes, below which no temperature is fitted."""


class Predictor(Protocol):
    """A trained classifier of any kind: a network (`Classifier`) or a probe (`Probe`).

    Attributes:
        classes: names, in the order of the outputs.
        temperature: fitted on validation; `probabilities` divides by it.
        initialisation: what it started from: "imagenet", "tissue", "scratch", or "frozen ENCODER".
        notes: what was unusual in the data or the calibration.
        card: what the checkpoint's header says beside the above.
        history: rows of the learning curve; none for a probe.
    """

    classes: tuple[str, ...]
    temperature: float
    initialisation: str
    notes: tuple[str, ...]
    card: dict[str, Any]
    history: list[dict[str, float]]

    def logits(self, images: Tensor | np.ndarray, batch_size: int = 128) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, K] on the CPU, without temperature."""
        ...

    def probabilities(self, images: Tensor | np.ndarray, batch_size: int = 128) -> Tensor:
        """uint8 [N, 3, H, W] -> float64 [N, K] on the CPU, calibrated: rows sum to 1."""
        ...

    def save(self, path: Path | str) -> Path:
        """Write everything to a .safetensors file."""
        ...


@dataclass(eq=False)
class Classifier:
    """A trained network. The one that is evaluated is the one that `save` writes.

    Attributes:
        model: the network, in evaluation mode.
        classes: names, in the order of the outputs.
        size: edge length that tiles are brought to, pixels.
        architecture: a name in `network.ARCHITECTURES`.
        temperature: fitted on validation; `probabilities` divides by it.
        initialisation: "imagenet", "tissue" or "scratch".
        notes: what was unusual in the data or the calibration.
        card: what the checkpoint's header says beside the above.
        history: step, loss, lr and, where looked at, val_loss, val_nll and val_balanced_accuracy.
    """

    model: nn.Module
    classes: tuple[str, ...]
    size: int
    architecture: str = "mobilenet-v2"
    temperature: float = 1.0
    initialisation: str = "scratch"
    notes: tuple[str, ...] = ()
    card: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)

    @torch.inference_mode()
    def logits(self, images: Tensor | np.ndarray, batch_size: int = 128) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, K] on the CPU, without temperature.

        Tiles of another size are resized (bilinear, antialiased) to `size`.

        Raises:
            DataError: not uint8 [N, 3, H, W].
        """
        images = checked_images(images)
        device = next(self.model.parameters()).device
        self.model.eval()
        parts = [torch.zeros(0, len(self.classes))]
        for start in range(0, len(images), batch_size):
            tiles = images[start : start + batch_size].to(device).float()
            if tiles.shape[-2:] != (self.size, self.size):
                tiles = nn.functional.interpolate(
                    tiles, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False
                )
            parts.append(self.model(network.normalise(tiles)).float().cpu())
        return torch.cat(parts)

    def probabilities(self, images: Tensor | np.ndarray, batch_size: int = 128) -> Tensor:
        """uint8 [N, 3, H, W] -> float64 [N, K] on the CPU, calibrated: rows sum to 1."""
        return torch.softmax(self.logits(images, batch_size).double() / self.temperature, dim=1)

    def save(self, path: Path | str) -> Path:
        """Write weights, temperature and card to a .safetensors file."""
        card = {
            **self.card,
            "kind": "classifier",
            "architecture": self.architecture,
            "classes": list(self.classes),
            "size": self.size,
            "temperature": self.temperature,
            "initialisation": self.initialisation,
            "notes": list(self.notes),
        }
        return save_checkpoint(path, self.model.state_dict(), card)

    @classmethod
    def load(cls, path: Path | str, *, device: str = "auto") -> Classifier:
        """Read what `save` wrote.

        Raises:
            CheckpointError: missing, damaged, or not a network's.
        """
        tensors, card = load_checkpoint(path)
        require_kind(card, "classifier", path)
        config = card["config"]
        architecture = card.get("architecture", "mobilenet-v2")
        model = network.build(
            architecture, len(card["classes"]), size=card["size"], width=config["width"], depth=config["depth"]
        )
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(
                f"The tensors in {path} are not those of its {architecture}.", "Train it again."
            ) from error
        return cls(
            placed(model, device).eval(),
            tuple(card["classes"]),
            card["size"],
            architecture,
            card["temperature"],
            card["initialisation"],
            tuple(card["notes"]),
            card,
        )


def placed(model: nn.Module, device: str) -> nn.Module:
    """The network on a device, its weights laid out as its images are."""
    return model.to(pick_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]


def checked_images(images: Tensor | np.ndarray) -> Tensor:
    """Tiles as a tensor.

    Raises:
        DataError: not uint8 [N, 3, H, W].
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
        images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"Tiles have shape {tuple(images.shape)} and type {images.dtype}.", "Give uint8 [N, 3, H, W].")
    return images


def can_calibrate(val: TileArray) -> bool:
    """Whether there are validation tiles enough to fit anything to them."""
    return len(val) >= ENOUGH_TO_CALIBRATE and len(np.unique(val.labels)) >= 2


def temperature_of(logits: Callable[[np.ndarray], Tensor], val: TileArray) -> tuple[float, list[str]]:
    """The temperature from validation, and what was unusual about it.

    Args:
        logits: of a finished classifier.
        val: tiles that it has not learned from; may be too few.
    """
    if not can_calibrate(val):
        found = f"{len(val)} tiles of {len(np.unique(val.labels))} classes"
        needed = f"needs {ENOUGH_TO_CALIBRATE} tiles of two classes"
        return 1.0, [f"Not calibrated (temperature 1): validation has {found}; it {needed}."]
    fitted = calibration.Temperature.fit(logits(np.asarray(val.images)).numpy(), val.labels)
    return fitted.temperature, list(fitted.notes)


def inspected(train: TileArray, val: TileArray) -> list[str]:
    """Refuse data that cannot be learned from; name classes that lack tiles.

    Raises:
        DataError: no tile, tiles of one class only, or `val` with other classes than `train`.
    """
    if len(train) == 0:
        raise DataError("The training set has no tile.", "Check the split and the quality filter.")
    if train.classes != val.classes:
        raise DataError(
            f"Training has the classes {train.classes}, validation {val.classes}.",
            "Import both with the same classes.",
        )
    absent = [name for name, n in train.counts().items() if n == 0]
    if len(train.classes) - len(absent) < 2:
        present = next(name for name, n in train.counts().items() if n)
        raise DataError(
            f"The training set has tiles of one class only, {present!r}.",
            "A classifier needs tiles of at least two classes.",
        )
    if not absent:
        return []
    return [f"No training tile of {', '.join(absent)}: the classifier cannot have learned it."]
