"""What a training needs of a device's memory, from the networks themselves and without computing anything.

Weights, gradients and AdamW's moments are counted. What the backward pass keeps is found by running the denoiser on
torch's "meta" device, whose tensors have shapes and no values, while a hook adds up what autograd saves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from histosynth.autoencoder.cache import chunk_of
from histosynth.core.precision import half_type
from histosynth.core.progress import say
from histosynth.diffusion.backbone import Backbone
from histosynth.diffusion.config import DiffusionConfig
from histosynth.diffusion.model import LatentDiffusion

OVERHEAD = 0.8e9
"""Bytes that CUDA's context, its libraries and the allocator's gaps take; between 0.5 and 1 GB on present cards."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the peak of a training step."""

    weights: int
    """Of all networks: denoiser, adapter, autoencoder."""
    gradients: int
    """Of what is trained, float32."""
    optimiser: int
    """AdamW's two moments, and the averaged weights."""
    activations: int
    """What the backward pass of one micro-batch needs."""
    first_stage: int
    """What the autoencoder needs for a few tiles, before training and for panels; never beside the former."""
    overhead: int = 0
    """CUDA's own."""

    @property
    def total(self) -> int:
        """The sum."""
        peak = max(self.activations, self.first_stage)
        return self.weights + self.gradients + self.optimiser + peak + self.overhead

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimiser", "activations", "first_stage", "overhead")
        parts = ", ".join(f"{name.replace('_', ' ')} {getattr(self, name) / 1e9:.2f}" for name in names)
        return f"{self.total / 1e9:.1f} GB ({parts})"


class _Counter:
    """Adds up the bytes that autograd saves, a storage once; parameters and buffers are not counted."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self.total, self._kept = 0, []
        self._seen = {t.untyped_storage()._cdata for t in known}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._kept.append(tensor)  # or its address could be given out again and not be counted
            self.total += storage.nbytes()
        return tensor


def training_memory(model: LatentDiffusion, config: DiffusionConfig, device: torch.device) -> TrainingMemory:
    """What `train_diffusion` needs with these settings, LoRA attached and trained parts chosen.

    Args:
        model: on any device, the meta device included.
        device: where it is going to be trained; it decides what precision "auto" is.
    """
    modules = (*model.modules().values(), model.autoencoder)
    weights = sum(bytes_of(t) for module in modules for t in (*module.parameters(), *module.buffers()))
    trained = sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
    activations = activation_bytes(
        model.backbone, config.batch // config.accumulate, model.conditioner.untold(1).shape[1],
        half=half_type(device, config.precision), checkpointing=config.checkpointing,
    )  # fmt: skip
    own = int(OVERHEAD) if device.type == "cuda" else 0
    return TrainingMemory(weights, 4 * trained, 12 * trained, activations, first_stage_bytes(model), own)


def first_stage_bytes(model: LatentDiffusion) -> int:
    """Bytes that the autoencoder's largest layer needs, without gradients: its input, output and two more such.

    The widest feature maps are as large as the tile and have as many channels as the first convolution gives.
    """
    convolutions = [m for m in model.autoencoder.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    first = convolutions[0]
    edge = model.size // (2 if first.in_channels == 12 else 1)  # ours starts at half the resolution
    return 4 * chunk_of(model.size) * first.out_channels * edge**2 * first.weight.element_size()


def activation_bytes(
    backbone: Backbone, batch: int, context_tokens: int, *, half: torch.dtype | None, checkpointing: bool
) -> int:
    """Bytes that the backward pass of `batch` tiles needs of the denoiser's forward pass.

    With checkpointing these are the inputs of all blocks and what the largest block saves when it is computed again.
    Autocast keeps normalisations and softmax in float32, which a run in 16 bits alone does not show: half as much
    is added for them.
    """
    network, kind = backbone.network, half or torch.float32
    floats = {
        name: torch.empty_like(value, device="meta", dtype=kind if value.is_floating_point() else value.dtype)
        for name, value in (*network.named_parameters(), *network.named_buffers())
    }
    for name, parameter in network.named_parameters():
        floats[name].requires_grad_(parameter.requires_grad)
    counter = _Counter(floats.values())
    blocks = [
        m for name, m in network.named_modules() if name.split(".")[-2:-1] in (["transformer_blocks"], ["blocks"])
    ]
    spans: list[int] = []
    inputs: list[int] = []

    def before(block: nn.Module, given: Any) -> None:
        spans.append(-counter.total)

    def after(block: nn.Module, given: Any, output: Any) -> None:
        spans[-1] += counter.total
        inputs.append(sum(bytes_of(t) for t in given if isinstance(t, Tensor)) or bytes_of(output))

    handles = [h for b in blocks for h in (b.register_forward_pre_hook(before), b.register_forward_hook(after))]
    noisy = torch.empty(batch, *backbone.latent, device="meta", dtype=kind)
    context = torch.empty(batch, context_tokens, backbone.width, device="meta", dtype=kind, requires_grad=True)
    levels = torch.empty(batch, device="meta", dtype=torch.long)
    # computing blocks again hides what they save, and is reckoned below
    again = [m for m in network.modules() if getattr(m, "gradient_checkpointing", False)]
    try:
        for module in again:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        with saved_tensors_hooks(counter.pack, lambda t: t):
            _call(backbone, floats, noisy, levels, context)
    finally:
        for handle in handles:
            handle.remove()
        for module in again:
            module.gradient_checkpointing = True  # type: ignore[assignment]
    found = counter.total
    if checkpointing and spans:
        found += sum(inputs) + max(spans) - sum(spans)
    return found if half is None else found * 3 // 2


def say_memory(model: LatentDiffusion, config: DiffusionConfig, device: torch.device) -> None:
    """Tell the user what the training needs, and whether the card has it."""
    needed = training_memory(model, config, device)
    line = f"Memory of a step: {needed}"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
        line += f"; free on the card {free / 1e9:.1f} GB"
        if needed.total - needed.overhead > free:
            line += ". Raise accumulate, or set checkpointing, half_base and precision=fp16."
    say(line)


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def _call(backbone: Backbone, values: dict[str, Tensor], noisy: Tensor, levels: Tensor, context: Tensor) -> None:
    """`backbone.denoise` with other tensors in the place of the network's own."""
    network = backbone.network

    # a wrapper whose forward swaps the tensors for the time of the call
    class Swapped(nn.Module):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            return torch.func.functional_call(network, values, arguments, options)

    swapped = Swapped()
    first = next(iter(values.values()))
    swapped.register_parameter("first", nn.Parameter(first.detach(), requires_grad=False))
    backbone.network = swapped
    try:
        backbone.denoise(noisy, levels, context)
    finally:
        backbone.network = network
