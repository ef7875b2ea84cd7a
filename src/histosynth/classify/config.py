"""How classifiers are trained: every setting, checked when it is made. Importing this imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from histosynth.core.errors import SettingError
from histosynth.tiles.batches import Sampling

Weights = Literal["auto", "imagenet", "tissue", "none"]
Augment = Literal["none", "classical", "strong"]
Schedule = Literal["cosine", "plateau"]


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained."""

    steps: int = 150
    """Optimisation steps. The same in every arm: more tiles must not mean more training."""
    epochs: int | None = None
    """Length in epochs, instead of `steps`."""
    samples_per_class: int | None = None
    """Tiles of a class in an epoch; as many as the training tiles divided by the classes by default."""
    batch: int = 32
    """Tiles a step."""
    lr: float = 1e-2
    """Highest learning rate."""
    schedule: Schedule = "cosine"
    """cosine: a linear rise over the first quarter, then a cosine to zero. plateau: lr, halved whenever the validation
    loss has stood still (needs val_every)."""
    plateau_patience: int = 3
    """plateau: looks at validation without a better loss (by 0.001) before the learning rate is halved."""
    weight_decay: float = 0.05
    """Of AdamW (decoupled)."""
    clip: float = 0.0
    """Longest gradient, all weights together (0 = no limit)."""
    width: float = 0.5
    """Multiplier of the channels. ImageNet weights exist for 1.0 only."""
    depth: float = 0.25
    """Multiplier of the blocks a stage (at least one). ImageNet weights exist for 1.0 only."""
    dropout: float = 0.1
    """Before the last layer."""
    weights: Weights = "auto"
    """auto: ImageNet weights if they are on this disk and fit, else the shipped weights of simulated tissue if they
    fit, else none. imagenet: insist, and download. tissue: insist. none: from scratch."""
    freeze: int = 0
    """Steps at the start in which only the last layer learns."""
    augment: Augment = "none"
    """classical: flips, quarter turns, stain jitter in optical density, blur, and JPEG where `jpeg` asks for it.
    strong: any turn, crops, another staining and scanner too, as for an encoder."""
    jitter: float = 0.1
    """classical: how much stronger or weaker each stain may get (0 = off)."""
    blur: float = 0.3
    """classical: share of tiles that are blurred, by up to 1 pixel."""
    jpeg: float = 0.0
    """classical: share of tiles that are compressed, at a quality from 30 to 95."""
    mixup: float = 0.0
    """Alpha of MixUp (0 = off). With label smoothing it makes a network under-confident; the temperature
    mends that."""
    mixup_until: int = 0
    """MixUp stops after so many steps (0 = never)."""
    label_smoothing: float = 0.1
    """Probability taken from the true class and spread over all classes."""
    sampling: Sampling = "balanced"
    """balanced: every class the same share of a batch; natural: as they come."""
    share: float | None = None
    """Share of synthetic tiles (sources above 0) in what is seen of a class that has both; with balanced sampling.
    None: every source of a class the same share."""
    average: float = 0.9
    """Decay of the moving average of the weights, which is what is kept (0 = the last weights)."""
    swa_from: int = 0
    """Keep the plain mean of the weights from this step on instead (0 = off)."""
    swa_lr: float = 0.0
    """Learning rate from that step on, as a share of lr (0 = the schedule goes on)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is for GPUs and CPUs with matrix units; elsewhere it is slower."""
    val_every: int = 0
    """Look at the validation tiles every so many steps (0 = never): for the learning curve, for plateau and for
    early stopping."""
    patience: int = 0
    """Early stopping: looks without a better smoothed validation loss before the training ends; the weights of the best
    look are kept (0 = off, as it must be in an experiment: validation then chooses nothing)."""
    patience_from: int = 3
    """Early stopping: looks at the start that do not count."""
    overfit: int = 0
    """Early stopping: so many looks in a row at which the smoothed validation loss lies above the training loss
    (0 = off)."""
    copies: int = 8
    """Probes with augmentation: features of so many copies of each training tile, turned, flipped and restained."""

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise SettingError(f"{name} is {value}.", f"Use a number from {low:g} to {high:g}.")
        for name, known in _CHOICES:
            if getattr(self, name) not in known:
                raise SettingError(f"{name} is {getattr(self, name)!r}.", f"Use {' or '.join(known)}.")
        if self.share is not None and self.sampling != "balanced":
            raise SettingError(f"share is {self.share}, but sampling is {self.sampling!r}.", "Use sampling balanced.")
        for name, wants in (("schedule", self.schedule == "plateau"), ("patience", self.patience > 0)):
            if wants and not self.val_every:
                raise SettingError(
                    f"{name} is {getattr(self, name)}, but nobody looks at validation.", "Set val-every to some steps."
                )
        if self.overfit and not self.patience:
            raise SettingError(f"overfit is {self.overfit}, without early stopping.", "Set patience too.")
        if self.swa_lr and not self.swa_from:
            raise SettingError(f"swa_lr is {self.swa_lr}, but swa_from is 0.", "Set swa-from to the step it begins at.")

    def length(self, tiles: int, classes: int) -> int:
        """Training steps in all, for so many tiles of so many classes."""
        if self.epochs is None:
            return self.steps
        per_epoch = tiles if self.samples_per_class is None else self.samples_per_class * classes
        return self.epochs * math.ceil(per_epoch / self.batch)


_RANGES = (
    ("steps", 1, math.inf),
    ("epochs", 1, math.inf),
    ("samples_per_class", 1, math.inf),
    ("batch", 2, math.inf),
    ("lr", 1e-12, math.inf),
    ("plateau_patience", 0, math.inf),
    ("weight_decay", 0, math.inf),
    ("clip", 0, math.inf),
    ("dropout", 0, 0.99),
    ("freeze", 0, math.inf),
    ("jitter", 0, 1),
    ("blur", 0, 1),
    ("jpeg", 0, 1),
    ("mixup", 0, math.inf),
    ("mixup_until", 0, math.inf),
    ("label_smoothing", 0, 0.99),
    ("share", 0, 1),
    ("average", 0, 0.9999),
    ("swa_from", 0, math.inf),
    ("swa_lr", 0, math.inf),
    ("val_every", 0, math.inf),
    ("patience", 0, math.inf),
    ("patience_from", 0, math.inf),
    ("overfit", 0, math.inf),
    ("copies", 1, 64),
)
_CHOICES = (
    ("schedule", get_args(Schedule)),
    ("weights", get_args(Weights)),
    ("augment", get_args(Augment)),
    ("sampling", get_args(Sampling)),
    ("precision", ("float32", "bfloat16")),
)


@dataclass(frozen=True)
class TrainClassifierConfig:
    """A classifier on a tile set."""

    kind: str = "mobilenet-v2"
    """mobilenet-v2, efficientnet-b0, resnet-18; or a probe on an encoder, such as linear:tissue-tiny or knn:colour."""
    classifier: ClassifierConfig = ClassifierConfig()
    """The training."""
    size: int = 64
    """Edge length in pixels."""
    seed: int = 0
    """Seed of the training."""
    threads: int = 1
    """Threads of the processor. With 1 the weights do not depend on how many cores the machine has; 0 takes all."""
    replicates: int = 1000
    """Of the bootstrap over patients."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        for name, least in (("size", 8), ("threads", 0), ("replicates", 2)):
            if getattr(self, name) < least:
                raise SettingError(f"{name} is {getattr(self, name)}.", f"Use at least {least}.")
