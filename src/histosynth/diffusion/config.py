"""Settings of the diffusion recipe. They are the command line of `histosynth train diffusion`, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from histosynth.core.errors import DataError, SettingError
from histosynth.core.precision import Precision
from histosynth.core.settings import check_settings
from histosynth.core.training import Schedule
from histosynth.diffusion.adapter import Join
from histosynth.tiles.batches import Sampling

if TYPE_CHECKING:
    from histosynth.tiles.batches import TileArray

Finetune = Literal["auto", "adapter_lora", "lora", "adapter", "full"]
Levels = Literal["uniform", "logit-normal"]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class DiffusionConfig:
    """Settings of `train_diffusion`."""

    size: int = 64
    """Edge of a tile in pixels, a multiple of 8."""
    steps: int = 2000
    """Training steps: updates of the weights."""
    batch: int = 32
    """Tiles a step."""
    accumulate: int = 1
    """Micro-batches that a step's tiles are computed in, one after the other, to save memory."""
    init: str = "base"
    """Where to start: "base" (shipped, nine tissue classes), "none" (random weights), a checkpoint's path,
    "pixcell-256", or the folder or Hugging Face id of a PixCell, or the folder of a Stable Diffusion."""
    vae: str = ""
    """With a start from such a folder: the folder or id of its autoencoder, if that lies elsewhere."""
    backbone: Literal["unet", "transformer"] = "unet"
    """With init=none: a small convolutional U-Net, which needs fewer steps in a laptop's training, or a small PixArt
    transformer."""
    autoencoder: str = "base"
    """With init=none: "base", "train" (on these tiles, first) or a path. Otherwise the start's own is used."""
    autoencoder_steps: int = 2000
    """Steps of autoencoder=train."""
    decoder: float = 0.2
    """Steps, as a share of `steps` (and of `seconds`), that come first and teach the start's decoder the texture of
    these tiles; the latents stay. 0 for none. For starts of this project, and with init=none for an autoencoder that is
    not trained on these tiles anyway."""
    encoder: str = "tissue-tiny"
    """The frozen encoder whose embeddings condition the denoiser."""
    finetune: Finetune = "auto"
    """What is trained of a start: "full", "adapter_lora" (a few megabytes to share), "adapter" or "lora"; "auto" is
    "full" for the compact networks, which learn far more that way in the same time, and "adapter_lora" for models of
    others. With init=none, always all."""
    lora_rank: int = 8
    """Rank of the low-rank matrices."""
    lora_alpha: float = 16.0
    """Scale of the low-rank change, over the rank."""
    lora_targets: tuple[str, ...] = ()
    """Layers that get low-rank matrices, by the end of their names; "attn2.to_q" is cross-attention alone. None: the
    attention, and the convolutions of the compact U-Net."""
    lora_blocks: str = "all"
    """Blocks that get them: "all", or numbers from 0 and ranges, such as "14-27" or "0,3,8-11"."""
    class_join: Join = "auto"
    """How the class joins the context: a "token" of its own, "add" to every token, "none", or "auto" (a token for
    networks trained here; added, from zero, to a pretrained one, which then starts as it was)."""
    lr_base: float = 5e-4
    """Peak learning rate of the denoiser's own weights (init=none or finetune=full)."""
    lr_lora: float = 1e-3
    """Peak learning rate of the low-rank matrices."""
    lr_adapter: float = 5e-4
    """Peak learning rate of the adapter and the class tokens."""
    warmup: int = 100
    """Steps until the learning rates have their peaks."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    sampling: Sampling = "balanced"
    """"balanced" (every class the same share) or "natural"."""
    cfg_dropout: float = 0.1
    """Share of tiles told nothing, for classifier-free guidance."""
    class_dropout: float = 0.1
    """Share of tiles told the embedding only."""
    embedding_dropout: float = 0.1
    """Share of tiles told the class only."""
    ce_weight: float = 0.05
    """Weight of the cross-entropy that keeps classes apart in the adapter's tokens."""
    min_snr: float = 0.0
    """Clamp of the signal-to-noise weight of the loss (5 in the paper); 0 for the plain squared error, which leaves the
    high noise levels, where layout is decided, their weight."""
    levels: Levels = "uniform"
    """How noise levels are drawn: "uniform", or "logit-normal" (more of the middle ones)."""
    align: float = 0.0
    """Of a transformer: weight of the alignment of its middle tokens with the encoder's feature maps; 0 is none."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones saved."""
    bank: int = 256
    """Training embeddings kept a class, from which generation draws its conditions."""
    width: int = 0
    """Channels of the denoiser (a start brings its own); 0: 64 of a U-Net, 192 of a transformer."""
    layers: int = 0
    """Blocks of the denoiser, a resolution of a U-Net (a start brings its own); 0: 1 of a U-Net, 6 of a transformer."""
    heads: int = 4
    """Attention heads of the denoiser (a start brings its own)."""
    tokens: int = 4
    """Context tokens made of an embedding (a start brings its own)."""
    seed: int = 0
    """Seed of everything random."""
    seconds: float | None = None
    """Wall-clock cap, or none."""
    schedule: Schedule = "steps"
    """The learning rate falls to zero over the "steps", or over the cap's "clock"."""
    save_every: int = 250
    """Steps between resume states."""
    sample_every: int = 1000
    """Steps between panels of reference and synthetic tiles; 0 for only the last."""
    guidance: float = 2.0
    """Classifier-free guidance of the panels."""
    sample_steps: int = 20
    """Solver steps of the panels."""
    validate_every: int = 0
    """Steps between losses on the tiles of other patients; the best weights are then kept. 0 is never."""
    validate_tiles: int = 256
    """How many of those tiles, the same every time."""
    precision: Precision = "auto"
    """Arithmetic: "auto", "fp32", "bf16" or "fp16"."""
    half_base: bool = False
    """Keep the frozen weights in the 16-bit format of bf16 or fp16: half their memory."""
    checkpointing: bool = False
    """Compute the blocks again for the gradients instead of keeping them: less memory, a third more time."""
    vae_tiling: bool = False
    """Let a pretrained autoencoder work in tiles, for less memory."""


_COUNTS = (
    "steps", "batch", "accumulate", "save_every", "bank", "tokens", "heads", "sample_steps", "validate_tiles",
)  # fmt: skip
_RATES = ("lr_base", "lr_lora", "lr_adapter", "clip")
_NOT_NEGATIVE = ("warmup", "weight_decay", "ce_weight", "min_snr", "align", "guidance", "validate_every",
                 "sample_every", "layers", "width")  # fmt: skip


def check_config(config: DiffusionConfig) -> None:
    """Refuse settings that cannot be used, whatever the tiles.

    Raises:
        SettingError: names the setting and its value.
    """
    check_settings(config, counts=_COUNTS, positive=_RATES, not_negative=_NOT_NEGATIVE)
    if not 0 <= config.decoder < 1:
        raise SettingError(f"decoder is {config.decoder}.", "Give a share from 0 to below 1.")
    if not 0 <= config.ema < 1:
        raise SettingError(f"ema is {config.ema}.", "Give a decay from 0 to below 1.")
    if config.batch % config.accumulate:
        near = [n for n in range(1, config.batch + 1) if config.batch % n == 0]
        raise SettingError(
            f"accumulate is {config.accumulate}, which does not divide batch {config.batch}.",
            f"Give one of {', '.join(map(str, near))}, or another batch.",
        )
    shares = (config.cfg_dropout, config.class_dropout, config.embedding_dropout)
    if min(shares) < 0 or sum(shares) > 1:
        raise SettingError(
            f"cfg_dropout, class_dropout and embedding_dropout are {shares}.", "Give shares that add up to at most 1."
        )
    if config.half_base and config.precision not in ("bf16", "fp16"):
        raise SettingError(f"half_base is set with precision {config.precision!r}.", "Set precision to bf16 or fp16.")
    if config.init == "none":  # before the minutes of an autoencoder that is trained first
        refuse_idle_lora(config)


def refuse_idle_lora(config: DiffusionConfig) -> None:
    """Refuse LoRA targets and blocks; called where LoRA has no part.

    Raises:
        SettingError: either is set.
    """
    idle = "lora_targets" if config.lora_targets else "lora_blocks" if config.lora_blocks != "all" else ""
    if idle:
        raise SettingError(
            f"{idle} is {getattr(config, idle)!r}, but nothing of low rank is trained here (init={config.init}, "
            f"finetune={config.finetune}).",
            "Set finetune to lora or adapter_lora, with a start to tune, or leave it out.",
        )


def check_tiles(data: TileArray, config: DiffusionConfig, held_out: TileArray | None) -> None:
    """Refuse tiles that the settings do not fit, and patients on both sides.

    Raises:
        DataError, SettingError: names what does not fit.
    """
    if len(data) == 0:
        raise DataError("The training set has no tile.", "Check the split and the quality filter.")
    for tiles in (data, *([held_out] if held_out is not None else [])):
        if tiles.size != config.size or tiles.images.shape[-2] != config.size:
            height = tiles.images.shape[-2]
            raise DataError(
                f"The tiles have {tiles.size} px{f' by {height}' if height != tiles.size else ''}, "
                f"but size is {config.size}.",
                "Import the tiles at that size, or set size.",
            )
    if not config.validate_every:
        return
    if held_out is None or len(held_out) == 0:
        raise SettingError(
            f"validate_every is {config.validate_every}, but there are no held-out tiles.",
            "Use a tile set with a val split, or leave validate_every out.",
        )
    if held_out.classes != data.classes:
        raise DataError(
            f"The held-out tiles have the classes {held_out.classes}, the training tiles {data.classes}.",
            "Take both from one tile set.",
        )
    shared = set(data.ids) & set(held_out.ids) or (set(data.groups or ()) & set(held_out.groups or ())) - {""}
    if shared:
        raise DataError(
            f"{len(shared)} patients or tiles are in the training set and in the held-out set, {min(shared)!r} first.",
            "Split by patient: histosynth tiles prepare.",
        )
