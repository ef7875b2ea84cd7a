"""The networks that play against each other, their optimisers, and what a resumed training needs of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from histosynth import encoders
from histosynth.autoencoder.network import AUTOENCODER, Autoencoder, load_autoencoder
from histosynth.core.assets import asset_path
from histosynth.core.checkpoint import read_card, require_kind
from histosynth.core.errors import CheckpointError
from histosynth.core.seeds import derive
from histosynth.core.training import moments_of, restore_moments
from histosynth.core.types import Encoder
from histosynth.gan.config import GanConfig
from histosynth.gan.crew import Crew
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator
from histosynth.gan.head import PathologyHead
from histosynth.gan.layers import place
from histosynth.gan.losses import default_r1_gamma, latent_r1_gamma
from histosynth.gan.transfer import checkpoint_of, start_from

DEFAULT_PERCEPTUAL = "tissue-tiny"


class Players:
    """Generator, its average, discriminator and pathology head, with their optimisers.

    Attributes:
        networks: all of them by name.
        encoders: frozen encoders whose gradients they learn from, by role ("head", "perceptual").
        making, judging: what learns in the generator, and in the discriminators.
        latent_space: identifies the latents they work on; empty on pixels.
        gamma: weight of the gradient penalty.
    """

    def __init__(self, config: GanConfig, classes: Sequence[str], crew: Crew) -> None:
        """Make them from `config.seed`.

        Raises:
            SettingError, CheckpointError: an encoder does not exist, has no weights here, or gives no gradients.
        """
        self.config, self.classes, self.crew = config, tuple(classes), crew
        self.dtype = pick_dtype(config.precision, crew.device)
        torch.manual_seed(derive(config.seed, "gan weights"))
        first_stage = _first_stage(config)
        shape = config.shape(len(classes), first_stage.shape if first_stage else ())
        self.generator, self.discriminator = Generator(shape), Discriminator(shape)
        self.encoders = _load_encoders(config, str(crew.device))
        self.head: PathologyHead | None = None
        if config.head:
            self.head = PathologyHead(self.encoders["head"], shape.classes, config.head_mode)
        self.latent_space = ""
        if first_stage:
            self.set_autoencoder(first_stage.network, first_stage.name)
        for network in (self.generator, self.discriminator, self.head):
            if network is not None:
                place(network, crew.device)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.networks: dict[str, nn.Module] = {
            "generator": self.generator, "average": self.average, "discriminator": self.discriminator,
        }  # fmt: skip
        if self.head is not None:
            self.networks["head"] = self.head
        self.discriminator.freeze_highest(config.freeze_d)
        self.making = _learnable(self.generator)
        self.judging = [*_learnable(self.discriminator), *(_learnable(self.head) if self.head else [])]
        usual = default_r1_gamma(config.size, config.batch)
        if shape.autoencoder:
            usual = latent_r1_gamma(config.architecture, config.loss)
        self.gamma = usual if config.r1_gamma is None else config.r1_gamma

        # lazy regularisation (1912.04958, appendix B): a network makes one more step every so many
        ratio_g = _lazy(config.path_length_every) if config.path_length else 1.0
        ratio_d = _lazy(config.r1_every) if self.gamma and config.r1_lazy else 1.0
        self.optimisers = {
            "generator": self._adam(self.making, config.lr_g, ratio_g),
            "discriminator": self._adam(_learnable(self.discriminator), config.lr_d, ratio_d),
        }
        if self.head is not None:
            self.optimisers["head"] = self._adam(_learnable(self.head), config.lr_head)
        self._rates = {name: adam.param_groups[0]["lr"] for name, adam in self.optimisers.items()}

    def load(self) -> None:
        """Take over other weights, of `config.init`.

        Raises:
            CheckpointError: `config.init` is missing or nothing in it fits.
        """
        if self.config.init != "none":
            start_from(
                self.config.init, self.generator, self.discriminator, self.classes, self.config.seed, self.head
            )  # fmt: skip

    def set_autoencoder(self, network: Autoencoder | None, name: str) -> None:
        """On latents: put in the weights of an autoencoder, and what identifies its latents."""
        assert self.generator.autoencoder is not None
        if network is not None:
            self.generator.autoencoder.load_state_dict(network.state_dict())
        self.generator.autoencoder.name = self.latent_space = name

    def start(self, images: Tensor) -> None:
        """Before the first step, after `load`: the average, and the scale of the head.

        Args:
            images: real tiles, float [N, 3, S, S] in [-1, 1], or latents.
        """
        self.average.load_state_dict(self.generator.state_dict())
        if self.head is not None:
            self.head.calibrate(images)

    def judge_gradients(self, wanted: bool) -> None:
        """Whether the discriminators collect gradients."""
        for parameter in self.judging:
            parameter.requires_grad_(wanted)

    def set_rates(self, progress: float) -> None:
        """The learning rates at `progress`, 0 to 1: half a cosine, or constant."""
        if self.config.lr_schedule == "constant":
            return
        share = self.config.lr_final + (1 - self.config.lr_final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        for name, adam in self.optimisers.items():
            for group in adam.param_groups:
                group["lr"] = self._rates[name] * share

    def descend(self, *names: str, clip: float) -> None:
        """A step of the optimisers of these networks, with gradients averaged over the crew and clipped together."""
        adams = [self.optimisers[name] for name in names if name in self.optimisers]
        parameters = [p for adam in adams for group in adam.param_groups for p in group["params"]]
        self.crew.average_gradients(parameters)
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        for adam in adams:
            adam.step()

    def forget(self, *names: str) -> None:
        """Drop the gradients of these networks."""
        for name in names:
            if name in self.optimisers:
                self.optimisers[name].zero_grad()

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Exponential moving average with a half-life in tiles, short at first (2006.06676, appendix C)."""
        config = self.config
        if config.ema_decay is not None:
            weight = 1 - config.ema_decay
        else:
            half_life = config.ema * 1000
            if config.ema_rampup:
                half_life = min(half_life, config.ema_rampup * (step + 1) * config.batch)
            weight = 1 - 0.5 ** (config.batch / max(half_life, 1e-3))
        pairs = zip(self.average.parameters(), self.generator.parameters(), strict=True)
        averaged, learnt = zip(*((a, p) for a, p in pairs if p.requires_grad), strict=True)
        torch._foreach_lerp_(list(averaged), list(learnt), weight)

    def total(self) -> Tensor:
        """A sum that is not finite when any weight is not."""
        return torch.stack([p.detach().sum() for n in self.networks.values() for p in n.parameters()]).sum()

    def state(self) -> dict[str, Any]:
        """What a resumed training needs; the weights under the names of the networks."""
        moments = {name: moments_of(adam) for name, adam in self.optimisers.items()}
        return {name: dict(network.state_dict()) for name, network in self.networks.items()} | {"adam": moments}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        for name, network in self.networks.items():
            network.load_state_dict(state[name])
        for name, adam in self.optimisers.items():
            restore_moments(adam, state["adam"][name])

    def _adam(self, parameters: Iterable[Tensor], lr: float, ratio: float = 1.0) -> torch.optim.Adam:
        fused = self.crew.device.type in ("cpu", "cuda")
        betas = (self.config.beta1**ratio, self.config.beta2**ratio)
        return torch.optim.Adam(list(parameters), lr=lr * ratio, betas=betas, fused=fused)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the convolutions; "auto" is bfloat16 where the processor multiplies it natively."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # newer torch only
        can = torch.cpu.get_capabilities()
        return torch.bfloat16 if can.get("avx512_bf16") or can.get("amx_bf16") else torch.float32
    return torch.float32


def to_network(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [N, 3, H, W] -> float32 in [-1, 1], channels last; latents, which are floats, stay as they are."""
    moved = images.to(device, non_blocking=True)
    scaled = moved if images.is_floating_point() else moved.float() / 127.5 - 1
    return scaled.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class _FirstStage:
    """The autoencoder of a training on latents: its weights, but where they come with the start."""

    shape: tuple[int, ...]
    name: str
    network: Autoencoder | None = None


def _first_stage(config: GanConfig) -> _FirstStage | None:
    if config.space == "pixels":
        return None
    if config.init != "none":
        path = checkpoint_of(config.init)
        card = read_card(path)
        require_kind(card, "gan", path)
        own = tuple(card.get("shape", {}).get("autoencoder", ()))
        if not own:
            raise CheckpointError(
                f"{path} has networks of pixels, these settings of latents.", "Use space=pixels, or init=none."
            )
        return _FirstStage(own, str(card.get("latent_space", "")))
    path = asset_path(AUTOENCODER) if config.autoencoder == "base" else Path(config.autoencoder)
    network, _ = load_autoencoder(path)
    return _FirstStage(astuple(network.shape), network.name, network)


def _load_encoders(config: GanConfig, device: str) -> dict[str, Encoder]:
    names = {"head": config.head}
    if config.perceptual:
        names["perceptual"] = config.perceptual_encoder or config.head or DEFAULT_PERCEPTUAL
    loaded = {name: encoders.load(name, device) for name in set(names.values()) if name}
    return {role: loaded[name] for role, name in names.items() if name}


def _learnable(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def _lazy(every: int) -> float:
    return every / (every + 1)
