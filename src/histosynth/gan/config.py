"""Settings of the GAN's training. The defaults suit small sets of 64 px tiles and a laptop without a GPU; the
presets gan/poc-cgan, gan/stylegan2-64, gan/stylegan2-ada-256 and gan/skin-transfer hold other recipes whole.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from histosynth.gan.augmentation.pipe import ANY_CHANNELS
from histosynth.gan.checks import check
from histosynth.gan.shape import Shape
from histosynth.gan.usual import LATENTS, usual


@dataclass(frozen=True)
class GanConfig:
    """Settings of `train gan`. A weight of 0 leaves its term out, an interval of 0 its picture or check."""

    # --- what, how long
    size: int = 64
    """Edge length of the tiles in pixels, a power of two from 16 to 1024."""
    conditional: bool = True
    """Learn the classes; no: one kind of tile, whatever the labels say."""
    steps: int = 2000
    """Training steps of `batch` tiles each."""
    kimg: float | None = None
    """Length in thousand tiles, instead of `steps`."""
    epochs: int | None = None
    """Length in epochs, instead of `steps`."""
    samples_per_class: int | None = None
    """Tiles of each class in an epoch; none: an epoch has as many tiles as the set."""
    seconds: float | None = None
    """Stop after this many seconds of training (all sessions of this run together)."""
    batch: int = 32
    """Tiles a step, over all GPUs and parts."""
    accumulate: int = 1
    """Parts into which a GPU takes its share of a batch, one after another, to save memory."""
    sampling: Literal["balanced", "natural"] = "balanced"
    """balanced: every class has the same share of a batch; natural: as in the set."""
    workers: int = 0
    """Threads that prepare batches ahead; 0: in the training itself. The result is the same."""
    init: str = "base"
    """base: the shipped weights; none: from scratch; or the path of a GAN checkpoint."""
    freeze_d: int = 0
    """Blocks of the discriminator, from the finest, that do not learn (for very small sets, with init)."""
    seed: int = 0
    """Everything random follows from it."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the convolutions; auto takes bf16 where the processor has it (about twice as fast)."""

    # --- networks
    space: Literal["auto", "latents", "pixels"] = "auto"
    """What both networks work on: latents of an autoencoder, a quarter as wide as the tile, whose decoder adds the
    texture (many more tiles an hour); or pixels. auto: as the start; from scratch, latents for tiles
    of 64 px and more, where no head and no loss needs pixels."""
    autoencoder: str = "base"
    """latents: the autoencoder, base (the shipped one) or the path of one; with another init than none, the start's
    own is used."""
    decoder: float = 0.2
    """latents: steps, as a share of `steps` (and of `seconds`), that come first and teach the decoder the texture of
    these tiles; 0: none."""
    architecture: Literal["auto", "stylegan2", "lite", "residual"] = "auto"
    """residual: both networks residual and without equalised learning rates, after R3GAN; stylegan2: skip generator,
    residual discriminator; lite: plain blocks, spectral normalisation. auto: as the start; from scratch, residual on
    latents and stylegan2 on pixels."""
    label_conditioning: Literal["projection", "mapping"] = "projection"
    """How the discriminator knows the class: an embedding, or a mapping network as in StyleGAN2-ADA."""
    class_embedding: Literal["concat", "add"] = "concat"
    """How z and the class meet: side by side (StyleGAN2-ADA), or z + embedding(class)."""
    start: Literal["auto", "constant", "code"] = "auto"
    """What the generator begins with at 4 px: a constant (StyleGAN2), or that plus a linear map of the style code, with
    which tiles differ in layout much earlier. auto: as the start weights; from scratch, code."""
    channel_base: int | None = None
    """Feature channels at r pixels are channel_base / r, at most channel_max; none: 2048 on pixels, channel_max at
    every width on latents."""
    channel_max: int | None = None
    """Most feature channels anywhere; none: 128 on pixels, 64 on latents."""
    channel_min: int = 1
    """Fewest feature channels anywhere."""
    d_channel_base: int = 0
    """channel_base of the discriminator; 0: as the generator."""
    d_channel_max: int = 0
    """channel_max of the discriminator; 0: as the generator."""
    z_dim: int = 256
    """Length of the random code z."""
    w_dim: int = 256
    """Length of the style code w."""
    mapping_depth: int = 2
    """Layers of the mapping network."""
    mapping_lr: float = 0.0
    """Learning rate of the mapping networks relative to the rest; 0: 0.01 for stylegan2, else 1."""
    noise: bool | None = None
    """Noise in every place of the generator's layers (StyleGAN2). On pixels, in short trainings, it takes the place of
    structure; latents are partly noise, and without it the discriminator wins at once. none: as the start weights;
    from scratch, on latents alone."""
    output_clamp: float = 0.0
    """Tiles are cut to +- this value, in a range from -1 to 1; 0: never."""
    conv_clamp: float = 0.0
    """Features are cut to +- this value (256 keeps half precision safe); 0: never."""
    mbstd_group: int = 4
    """Tiles over which the discriminator compares the spread of features; 0: the whole batch."""
    class_groups: bool | None = None
    """Deal tiles of one class to each group, so that the discriminator sees when the tiles of a class grow alike; no:
    a group mixes classes, whose differences hide that (StyleGAN2). none: on latents, where sampling is balanced."""
    style_mixing: float = 0.5
    """Probability that a fake tile takes its fine layers from a second code of its class."""

    # --- pathology head: a second judge that sees through a frozen encoder
    head: str = "auto"
    """Encoder of the pathology head, such as tissue-tiny or pathoduet; empty: no head; auto: tissue-tiny on pixels,
    none on latents, which no encoder knows."""
    head_mode: Literal["auto", "features", "maps"] = "auto"
    """maps: small judges on feature maps of several depths; features: one on the encoder's features; auto: maps
    where the encoder has them."""
    head_joint: bool = False
    """Add the head's logit to that of the discriminator; no: it has a loss of its own."""
    alpha_max: float = 1.0
    """Weight alpha of the head: the most it may have where a gate moves it."""
    alpha_gate: bool = False
    """Raise alpha from 0 while the discriminator is right about real tiles, and lower it otherwise."""
    alpha_on: float = 0.78
    """Gate: accuracy (moving average) from which alpha rises."""
    alpha_off: float = 0.70
    """Gate: accuracy at which alpha falls."""
    alpha_step: float = 1e-4
    """Gate: most that alpha changes in a step."""
    alpha_tau: float = 400.0
    """Gate: steps in which alpha goes most of its way."""
    alpha_freeze: int = 500
    """Gate: steps at the start with alpha = 0."""
    alpha_dwell: int = 200
    """Gate: steps before it may turn again."""

    # --- losses
    loss: Literal["auto", "logistic", "bce", "relativistic"] = "auto"
    """logistic: non-saturating; bce: cross-entropy with smoothed labels; relativistic: every fake tile against a real
    one of its class, with the gradient penalty on both (R3GAN); auto: relativistic on latents, logistic on pixels."""
    label_real: float = 0.9
    """bce: label of real tiles."""
    label_fake: float = 0.0
    """bce: label of fake tiles."""
    r1_gamma: float | None = None
    """Weight of the gradient penalty R1; none: 0.0002 size^2 / batch on pixels; on latents 0.2 for residual networks,
    else 0.01 where the loss is relativistic and 0.3 where it is not; 0: no penalty."""
    r1_every: int = 0
    """Steps from one gradient penalty to the next; 0: 4 for residual networks, else 16."""
    r1_lazy: bool = True
    """A step of its own, r1_every times as strong (StyleGAN2); no: added as it is to the loss of that step."""
    drift: float = 0.0
    """Weight of the mean squared logit of real tiles."""
    path_length: float = 0.0
    """Weight of the path-length penalty of the generator (StyleGAN2: 2)."""
    path_length_every: int = 4
    """Steps from one path-length penalty to the next."""
    channel_stats: float = 0.0
    """Weight of the distance between mean and spread of the channels of fake and real tiles."""
    channel_stats_decay: float = 0.995
    """Decay of the moving average of the real mean and spread."""
    perceptual: float = 0.0
    """Weight of the distance between features of fake and real tiles."""
    perceptual_encoder: str = ""
    """Encoder of the perceptual loss; that of the head by default, otherwise tissue-tiny."""
    paired: bool = False
    """Perceptual loss and feature matching compare tile k with tile k; no: the statistics of the batches."""
    saturation: float = 0.0
    """Weight of the penalty on a mean |pixel| above `saturation_above`."""
    saturation_above: float = 0.6
    """Mean |pixel| of fake tiles from which they count as saturated."""
    saturation_relative: bool = True
    """Fake tiles that are as bright as the real ones of their classes do not count as saturated."""
    feature_matching: float = 0.0
    """Weight of the distance between features of the discriminator."""
    diversity: float = 0.0
    """Weight of the penalty on a batch whose fake tiles vary less than `diversity_below`."""
    diversity_below: float = 0.1
    """Variance of the fake pixels under which a batch counts as uniform."""

    spread: float = 60.0
    """Weight of the penalty on fake tiles of a class that differ less from one another than real ones do, as the
    encoder of the head sees them; without a head it does nothing."""

    # --- adaptive augmentation of what the discriminators see
    ada: Literal["sign", "accuracy", "fixed"] = "sign"
    """What moves p: r_t, the mean sign of the logits of real tiles; their accuracy; or nothing."""
    ada_pipe: str = "auto"
    """Which changes: tissue, histology, poc, latents, or a pipe of StyleGAN2-ADA (blit, geom, color, bg, bgc, ...);
    auto: tissue on pixels, latents on latents."""
    ada_p: float = 0.0
    """Probability p of a change at the start (fixed: all the time)."""
    ada_target: float | None = None
    """Where r_t or the accuracy is held; 0: no augmentation that adapts; none: 0.95 where the loss is relativistic,
    where r_t counts pairs told apart and is high while the generator still learns, else 0.6."""
    ada_max: float = 1.0
    """Largest p."""
    ada_speed: float = 100.0
    """sign: thousand tiles in which p can go from 0 to 1."""
    ada_decay: float = 0.99
    """Decay of the moving average of the accuracy."""
    ada_gain: float = 1e-3
    """accuracy: p changes by ada_gain * ada_rate * (accuracy - target) a step."""
    ada_rate: float = 0.2
    """accuracy: see ada_gain."""
    ada_freeze: int = 0
    """accuracy: steps at the start in which p stays."""
    ada_cap: float = 1.0
    """accuracy: largest p while the accuracy is above `ada_cap_above`."""
    ada_cap_above: float = 0.9
    """accuracy: see ada_cap."""

    # --- optimisers
    lr_g: float = 0.0
    """Learning rate of the generator; 0: 0.001 for residual networks, else 0.0025."""
    lr_d: float = 0.0
    """Learning rate of the discriminator; 0: 0.001 for residual networks, else 0.0025."""
    lr_head: float = 0.002
    """Learning rate of the pathology head."""
    beta1: float = 0.0
    """Adam: decay of the mean gradient."""
    beta2: float = 0.99
    """Adam: decay of the mean squared gradient."""
    clip_g: float = 0.0
    """Largest norm of the generator's gradient."""
    clip_d: float = 0.0
    """Largest norm of the discriminator's gradient, its head included."""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """cosine: half a cosine down to `lr_final`, over the whole training."""
    lr_final: float = 0.1
    """cosine: learning rate at the end, as a share of the first."""
    schedule: Literal["steps", "clock"] = "steps"
    """What the cosine follows: steps; or, under `seconds`, the clock, so that it ends with the training."""
    ema: float = 0.0
    """Half-life, in thousand tiles, of the averaged generator that is kept; 0: 20 for residual networks, else 5."""
    ema_rampup: float = 0.05
    """The half-life is at most this share of the tiles seen so far; 0: no such limit."""
    ema_decay: float | None = None
    """Decay of the averaged generator a step, instead of `ema`."""

    # --- guards
    saturation_guard: bool = False
    """Weaken head and perceptual loss, and shut the gate, while fake tiles saturate."""
    saturation_limit: float = 0.75
    """Guard: mean |pixel| of fake tiles above which it acts."""
    saturation_perceptual: float = 0.9
    """Guard: factor on the perceptual weight."""
    saturation_perceptual_min: float = 0.005
    """Guard: smallest perceptual weight that it leaves."""
    saturation_alpha: float = 0.95
    """Guard: factor on alpha_max."""
    saturation_alpha_min: float = 0.1
    """Guard: smallest alpha_max that it leaves."""
    saturation_say_every: int = 50
    """Guard: steps from one message to the next."""
    d_stop_steps: int = 0
    """Stop when the discriminator has been right about nearly every real tile for so many steps."""
    d_stop_acc: float = 0.995
    """Accuracy of a step that counts as such."""
    d_stop_ema: float = 0.985
    """Moving average of the accuracy that counts as such."""
    collapse: float = 0.2
    """Warn when fake tiles of a class vary less than this share of what real ones do."""
    collapse_stop: int = 0
    """Stop after so many rows of metrics.csv in a row like that; 0: only warn."""

    # --- books
    validate_every: int = 500
    """Steps from one score on the validation tiles to the next, by which the checkpoint is chosen."""
    validate_per_class: int = 50
    """Validation tiles a class that fake ones are scored against; classes without any are left out."""
    validate_draws: int = 4
    """Fake tiles for each of them; with one, chance in the draw decides (docs/results.md)."""
    choose_encoder: str = "tissue-tiny"
    """Encoder of that score, the kernel distance KID."""
    patience: int = 0
    """Stop after so many scores without a better one; 0: never."""
    save_every: int = 250
    """Steps from one resume state to the next."""
    snapshots: bool = False
    """Keep the weights of every resume state as a checkpoint of its own."""
    sample_every: int = 500
    """Steps from one picture in samples/ to the next; 0: only at the end."""
    log_every: int = 25
    """Steps from one row of metrics.csv to the next."""
    film: bool = True
    """Make a film (GIF) of the pictures in samples/ at the end."""

    def __post_init__(self) -> None:
        of_pixels = self._of_pixels()
        for name, value in usual(self, bool(of_pixels)).items():
            object.__setattr__(self, name, value)
        check(self, of_pixels)
        self.shape(2)

    def _of_pixels(self) -> list[str]:
        """Settings in use that need pixels."""
        used = [
            name for name in ("perceptual", "saturation", "saturation_guard", "output_clamp") if getattr(self, name)
        ]
        used += ["head"] if self.head not in ("", "auto") else []
        return used + (["ada_pipe"] if self.ada_pipe not in ("auto", *ANY_CHANNELS) else [])

    def shape(self, classes: int, first_stage: tuple[int, ...] = LATENTS) -> Shape:
        """The shape of the networks for this many classes (none of them where `conditional` is off).

        Args:
            first_stage: width, blocks and channels of the autoencoder; not read on pixels.
        """
        shared = {f.name: getattr(self, f.name) for f in fields(Shape) if hasattr(self, f.name)}
        shared["autoencoder"] = first_stage if self.space == "latents" else ()
        clamps = {name: getattr(self, name) or None for name in ("output_clamp", "conv_clamp")}
        return Shape(**shared | clamps | {"classes": classes if self.conditional else 0})

    def length(self, tiles: int, classes: int) -> int:
        """Training steps in all.

        Args:
            tiles: in the set.
            classes: that have tiles.
        """
        if self.kimg is not None:
            return max(1, round(self.kimg * 1000 / self.batch))
        return self.steps if self.epochs is None else self.epochs * self.epoch(tiles, classes)

    def epoch(self, tiles: int, classes: int) -> int:
        """Steps of one epoch; what is left over for less than a batch is dropped."""
        count = tiles if self.samples_per_class is None else self.samples_per_class * classes
        return max(1, count // self.batch)

    def parents(self) -> list[str]:
        """What the weights started from, by name."""
        if self.init == "none":
            return []
        return ["gan-base-64.safetensors" if self.init == "base" else Path(self.init).name]

    def command(self) -> str:
        """The command that repeats this training, but for the tiles."""
        import shlex

        words = ["histosynth train gan TILES RUN"]
        # what auto stands for need not be said
        given: dict[str, Any] = {"size": self.size, "init": self.init}
        implied = {
            "space": GanConfig(**given, architecture=self.architecture).space,
            "architecture": GanConfig(**given, space=self.space).architecture,
        }
        plain = GanConfig(**given, space=self.space, architecture=self.architecture)
        for field in fields(self):
            value = getattr(self, field.name)
            if value == (field.default if field.name in given else implied.get(field.name, getattr(plain, field.name))):
                continue
            flag = field.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                text = Path(value).name if field.name in ("init", "autoencoder") else str(value)
                words.append(f"--{flag} {shlex.quote(text)}")
        return " ".join(words)
