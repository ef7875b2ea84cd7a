"""`clip`: the image half of CLIP ViT-L/14 at 336 px, the encoder of CMMD.

Jayasumana et al. 2024 (arXiv:2401.09603): the projected image embedding, divided by its length, of images resized by
bicubic interpolation; Radford et al. 2021 (arXiv:2103.00020) for the network and its normalisation. The resize here
is antialiased (Pillow's), where the authors' code is not, so that tiles larger than 336 px do not alias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from histosynth.core.device import pick_device
from histosynth.encoders import card
from histosynth.encoders.door import Door
from histosynth.encoders.frozen import FrozenEncoder, Precision
from histosynth.encoders.weights import file_hash, fit, read_tensors, require

NAME = "clip"
_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_MEAN = tuple(255 * v for v in (0.48145466, 0.4578275, 0.40821073))
_STD = tuple(255 * v for v in (0.26862954, 0.26130258, 0.27577711))
DOOR = Door(336, "bicubic", _MEAN, _STD)
# the text half of the file, the temperature, and indices that the network makes itself
_UNUSED = ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")


class ImageHalf(nn.Module):
    """float [N, 3, 336, 336] -> float [N, 768] of unit length."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        self.model = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**_VISION, **changes}))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(self.model(pixel_values=x).image_embeds.float(), dim=1)


def load(device: str = "auto", weights: Path | None = None, precision: Precision = "float32") -> FrozenEncoder:
    """The encoder.

    Raises:
        CheckpointError: the weights are missing or are not those of this network.
    """
    path = require(card(NAME), weights)
    with torch.device("meta"):
        network = ImageHalf()
    place(network, read_tensors(path), path)
    return wrap(network, path, device, precision)


def place(network: ImageHalf, tensors: dict[str, Tensor], path: Path) -> None:
    """Put the tensors of a CLIP file into the network; the text half is left out.

    Raises:
        CheckpointError: they do not fit.
    """
    fit(network.model, tensors, path, card(NAME), _UNUSED)
    embeddings = network.model.vision_model.embeddings
    count = embeddings.position_embedding.weight.shape[0]
    embeddings.register_buffer("position_ids", torch.arange(count)[None], persistent=False)


def wrap(network: ImageHalf, path: Path, device: str = "cpu", precision: Precision = "float32") -> FrozenEncoder:
    """An encoder of a network that `place` filled from `path`."""
    return FrozenEncoder(
        card(NAME), network, DOOR, lambda: file_hash(path), pick_device(device), precision, micro_batch=8
    )
