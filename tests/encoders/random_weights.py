"""Weight files with random numbers in the exact layout of the real ones, for small copies of the networks."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from histosynth.encoders import clip, inception, pathoduet, vit


def spread(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that keep the signal's size, so that outputs differ between images."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if not value.is_floating_point():
            continue
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.ndim > 1:
            fan_in = value[0].numel() if value.ndim != 3 else 1
            value.normal_(0, (1.5 / fan_in) ** 0.5 if fan_in > 1 else 0.3, generator=generator)
        elif name.endswith("weight") or "gamma" in name or "lambda" in name:
            value.uniform_(0.5, 1.5, generator=generator)
        else:
            value.normal_(0, 0.1, generator=generator)
    return network


def inception_file(folder: Path) -> Path:
    """The file of FID: written in 2018, so not a zip archive, and without counters of batch normalisation."""
    path = folder / "pt_inception-2015-12-05-6726825d.pth"
    tensors = {k: v for k, v in spread(inception.build()).state_dict().items() if "num_batches" not in k}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    return path


def shrink(monkeypatch) -> None:
    """Make the loaders build networks of one narrow block; everything else stays as it is."""
    monkeypatch.setattr(vit, "build", partial(vit.build, depth=1, mlp_ratio=0.5))
    monkeypatch.setattr(pathoduet, "PathoDuet", partial(pathoduet.PathoDuet, depth=1))
    monkeypatch.setattr(clip, "ImageHalf", partial(clip.ImageHalf, num_hidden_layers=1, intermediate_size=64))


def small_file(name: str, folder: Path) -> Path:
    """The weight file of an encoder whose loader was shrunk."""
    from safetensors.torch import save_file

    path = folder / f"{name}.pth"
    if name.startswith("inception"):
        return inception_file(folder)
    if name == "pathoduet":
        tensors = spread(pathoduet.PathoDuet()).state_dict() | {"head.weight": torch.zeros(9, 768)}
        torch.save({"state_dict": {f"module.{k}": v for k, v in tensors.items()}, "epoch": 3}, path)
    elif name == "clip":
        tensors = spread(clip.ImageHalf().model).state_dict()
        text = {"text_model.embeddings.token_embedding.weight": torch.zeros(4, 2), "logit_scale": torch.zeros(())}
        indices = {"vision_model.embeddings.position_ids": torch.arange(577)[None]}
        torch.save(tensors | text | indices, path)
    elif name == "mobilenet-v2":
        return classifier_file(folder)
    else:
        save_file(spread(vit.build(name)).state_dict(), path)
    return path


def classifier_file(folder: Path) -> Path:
    from histosynth.classify import network
    from histosynth.classify.model import Classifier

    model = network.build("mobilenet-v2", 3, size=64)
    card = {"config": {"width": 1.0, "depth": 1.0}}
    made = Classifier(spread(model), ("A", "B", "C"), 64, card=card)
    return made.save(folder / "classifier.safetensors")
