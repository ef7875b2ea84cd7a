"""The model that a training starts from: random, ours, or a pretrained one of others; and what of it is trained."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from histosynth.autoencoder.network import AUTOENCODER, Autoencoder, check_size, load_autoencoder
from histosynth.core.assets import asset_path
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.core.seeds import derive
from histosynth.core.types import EncoderCard
from histosynth.diffusion.adapter import carry_over
from histosynth.diffusion.backbone import SHAPES, Backbone, Compact, architecture_in
from histosynth.diffusion.config import DiffusionConfig, Finetune, refuse_idle_lora
from histosynth.diffusion.lora import LoraShape, attach_lora, lora_shape, lora_targets
from histosynth.diffusion.model import LatentDiffusion, load_model, with_conditioner
from histosynth.diffusion.pixcell.cards import CARDS

_SHAPE = ("width", "layers", "heads", "tokens")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def start_model(
    classes: tuple[str, ...], config: DiffusionConfig, encoder: EncoderCard, first_stage: Callable[[], Path]
) -> tuple[LatentDiffusion, bool]:
    """The model before training, and whether its adapter is new (and must measure its embeddings).

    Args:
        classes: of the tiles.
        encoder: card of the encoder that makes the embeddings.
        first_stage: trains an autoencoder on the tiles; called with init=none and autoencoder=train.

    Raises:
        SettingError, CheckpointError: the start cannot be read, or settings contradict it.
    """
    told = {"name": encoder.name, "dim": encoder.dim}
    if config.init == "none":
        check_size(config.size, patch=2)
        backbone = _fresh(config, first_stage)
        return with_conditioner(backbone, told, classes, config.size, config.class_join), True
    torch.manual_seed(derive(config.seed, "diffusion", "weights"))
    foreign = foreign_source(config)
    if foreign:
        if config.finetune in ("full", "lora"):
            raise SettingError(
                f"finetune is {config.finetune!r} with init {config.init!r}.",
                "Use adapter_lora or adapter: the class and the adapter are new, and a copy of its weights is not ours "
                "to write.",
            )
        backbone = open_backbone(foreign, config.size)
        model = with_conditioner(backbone, told, classes, config.size, config.class_join)
        return model, True
    check_size(config.size, patch=2)
    return _from_checkpoint(classes, config, told)


def foreign_source(config: DiffusionConfig) -> dict[str, Any]:
    """What `open_backbone` takes when init names a model of others, else nothing."""
    init = config.init
    path = Path(init)
    if init in ("base", "none") or path.is_file() or path.suffix == ".safetensors":
        return {}
    if not path.is_dir() and not _HUB_ID.fullmatch(init) and init not in CARDS:
        return {}  # an error of `load_model` then names the file that is not there
    from histosynth.diffusion.unet import is_unet

    kind = "unet" if path.is_dir() and is_unet(path) else "pixcell"
    source = {"kind": kind, "path": init, "vae": config.vae, "vae_tiling": config.vae_tiling}
    return source | ({"tokens": config.tokens} if kind == "unet" else {})


def open_backbone(source: dict[str, Any], size: int) -> Backbone:
    """A pretrained backbone of others, frozen, on the CPU.

    Args:
        source: {"kind": "pixcell" or "unet", "path", "vae"}; "tokens" for a U-Net.
        size: edge of a tile in pixels.

    Raises:
        CheckpointError: it cannot be read, or the kind is unknown.
    """
    if source["kind"] == "unet":
        from histosynth.diffusion.unet import UNet

        return UNet.open(source["path"], size, source.get("vae", ""), int(source.get("tokens", 4)))
    if source["kind"] == "pixcell":
        from histosynth.diffusion.pixcell_backbone import PixCellBackbone

        return PixCellBackbone.open(source, size)
    raise CheckpointError(f"The checkpoint's backbone is a {source['kind']!r}.", "Update histosynth.")


def way_of_tuning(model: LatentDiffusion, config: DiffusionConfig) -> Finetune:
    """What is trained: `config.finetune` without its "auto"."""
    if config.init == "none":
        return "full"
    if config.finetune != "auto":
        return config.finetune
    return "full" if model.backbone.whole else "adapter_lora"


def choose_trained(model: LatentDiffusion, config: DiffusionConfig) -> list[dict[str, Any]]:
    """Freeze and thaw as `config.finetune` says, attach LoRA, and give AdamW's parameter groups.

    "lora" also trains the class tokens: a class that the start did not have could not be told otherwise.

    Raises:
        SettingError: a LoRA target that matches nothing, blocks that are not there, or either where LoRA has no part.
    """
    mode = way_of_tuning(model, config)
    low_rank = isinstance(model.transformer, PeftModel) or mode in ("lora", "adapter_lora")
    if not low_rank:
        refuse_idle_lora(config)
    conditioner = model.conditioner
    model.transformer.requires_grad_(mode == "full").train()
    fixed = conditioner.shape.identity  # "told nothing" is then the pretrained one, through the adapter
    conditioner.requires_grad_(mode in ("full", "adapter", "adapter_lora")).train()
    conditioner.no_embedding.requires_grad_(conditioner.no_embedding.requires_grad and not fixed)
    joined = conditioner.shape.join != "none"
    conditioner.class_tokens.requires_grad_(joined)
    conditioner.no_class.requires_grad_(conditioner.no_class.requires_grad and joined)
    if config.ce_weight == 0:
        conditioner.head.requires_grad_(False)
    model.autoencoder.requires_grad_(False).eval()
    if low_rank:
        targets = tuple(config.lora_targets) or lora_targets(model.transformer)
        shape = LoraShape(config.lora_rank, config.lora_alpha, targets, config.lora_blocks)
        model.transformer = _with_lora(model.transformer, shape, mode != "adapter")
    if config.checkpointing:
        base: Any = (
            model.transformer.get_base_model() if isinstance(model.transformer, PeftModel) else model.transformer
        )
        base.enable_gradient_checkpointing()
    lr = config.lr_base if mode == "full" else config.lr_lora
    peaks = {"transformer": lr, "conditioner": config.lr_adapter}
    groups = []
    for name, module in model.modules().items():
        trained = [p for p in module.parameters() if p.requires_grad]
        if trained:
            groups.append({"params": trained, "peak": peaks[name]})
    return groups


def _with_lora(network: nn.Module, shape: LoraShape, trained: bool) -> PeftModel:
    """LoRA around a network; a start that has LoRA already goes on with it."""
    if not isinstance(network, PeftModel):
        return attach_lora(network, shape)
    if lora_shape(network) != shape:
        raise SettingError(f"The start's LoRA is {lora_shape(network)}, the settings ask for {shape}.",
                           "Give the start's lora_rank, lora_alpha, lora_targets and lora_blocks.")  # fmt: skip
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(trained and "lora_" in name)
    return network


def halve(model: LatentDiffusion, kind: torch.dtype) -> None:
    """Keep frozen weights in a 16-bit format; what is trained stays in float32.

    An autoencoder whose configuration says that float16 is too narrow for it stays in float32.
    """
    upcast = kind == torch.float16 and bool(getattr(getattr(model.autoencoder, "config", None), "force_upcast", False))
    for module in (model.transformer, *(() if upcast else (model.autoencoder,))):
        for parameter in module.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(kind)


def _fresh(config: DiffusionConfig, first_stage: Callable[[], Path]) -> Backbone:
    autoencoder = _autoencoder(config, first_stage)
    torch.manual_seed(derive(config.seed, "diffusion", "weights"))
    given = {name: getattr(config, name) for name in _SHAPE if getattr(config, name)}
    return Compact.new(SHAPES[config.backbone](**given), autoencoder, config.size)


def _autoencoder(config: DiffusionConfig, first_stage: Callable[[], Path]) -> Autoencoder:
    named = {"base": lambda: asset_path(AUTOENCODER), "train": first_stage}
    path = named[config.autoencoder]() if config.autoencoder in named else config.autoencoder
    return load_autoencoder(path)[0]


def _from_checkpoint(
    classes: tuple[str, ...], config: DiffusionConfig, told: dict[str, Any]
) -> tuple[LatentDiffusion, bool]:
    start = load_model(config.init)
    for name in _SHAPE:
        default = DiffusionConfig.__dataclass_fields__[name].default
        own = getattr(getattr(start.backbone, "shape", None), name, default)
        if getattr(config, name) not in (default, own):
            raise SettingError(
                f"{name} is {getattr(config, name)}, but the start {config.init!r} has {own}.",
                f"Leave {name} out, or set init=none.",
            )
    if config.backbone == "transformer" and architecture_in(start.backbone.card()) != config.backbone:
        raise SettingError(
            f"backbone is 'transformer', but the start {config.init!r} is a U-Net.",
            "Leave backbone out, or set init=none.",
        )
    shape = start.conditioner.shape
    if config.class_join not in ("auto", shape.join):
        raise SettingError(
            f"class_join is {config.class_join!r}, but the start {config.init!r} was trained with {shape.join!r}.",
            "Leave class_join out, or start elsewhere.",
        )
    if start.size != config.size and not start.backbone.whole:
        raise SettingError(f"size is {config.size}, but the start has {start.size}.", f"Set size to {start.size}.")
    backbone = resized(start.backbone, config.size)
    model = with_conditioner(backbone, told, classes, config.size, shape.join)
    kept = carry_over(start.conditioner.state_dict(), start.classes, classes, config.seed)
    if told == start.encoder:
        model.conditioner.load_state_dict(kept)
        return model, False
    if config.finetune == "lora":
        raise SettingError(
            f"encoder is {told['name']!r} with finetune=lora, but the start's adapter knows {start.encoder['name']!r}.",
            "Use finetune=adapter_lora, which trains a new adapter, or the start's encoder.",
        )
    # another encoder speaks another language: the adapter starts anew, the class tokens need not
    own_state = model.conditioner.state_dict()
    foreign = {k for k in own_state if k.startswith(("adapter.", "mean", "deviation", "head."))}
    model.conditioner.load_state_dict({k: own_state[k] if k in foreign else kept[k] for k in own_state})
    return model, True


def resized(backbone: Backbone, size: int) -> Backbone:
    """A compact backbone for tiles of another size: its weights do not depend on it."""
    if not isinstance(backbone, Compact) or backbone.size == size:
        return backbone
    other = Compact.new(backbone.shape, backbone.autoencoder, size, backbone.process)
    weights: dict[str, Tensor] = backbone.network.state_dict()
    other.network.load_state_dict(weights)
    return other
