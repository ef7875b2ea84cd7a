"""What fixes the networks: sizes, widths, and the options in which StyleGAN2, StyleGAN2-ADA and the lite one differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from histosynth.autoencoder.network import FACTOR
from histosynth.core.errors import SettingError
from histosynth.core.settings import check_settings

Architecture = Literal["stylegan2", "lite", "residual"]
LabelConditioning = Literal["projection", "mapping", "none"]
ClassEmbedding = Literal["concat", "add"]
Trunk = Literal["resnet", "skip", "orig"]
Start = Literal["constant", "code"]

_POSITIVE = ("channel_base", "channel_max", "channel_min", "z_dim", "w_dim", "mapping_depth", "mapping_lr",
             "conv_clamp", "output_clamp")  # fmt: skip
_NOT_NEGATIVE = ("classes", "d_channel_base", "d_channel_max", "d_mapping_depth", "cmap_dim", "mbstd_group",
                 "mbstd_channels")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Everything that fixes the function space of both networks; the defaults suit 64 px tiles and a CPU.

    Channels at r pixels are channel_base / r, at least channel_min, at most channel_max.

    Raises:
        SettingError: a value is out of range, or two do not go together.
    """

    size: int = 64
    """Edge length of the images in pixels, a power of two from 16 to 1024."""
    classes: int = 9
    """Classes of the labels; 0: unconditional, labels are ignored."""
    channel_base: int = 4096
    """Feature channels at r pixels are channel_base / r."""
    channel_max: int = 128
    """Most feature channels anywhere."""
    z_dim: int = 256
    """Length of the random code z."""
    w_dim: int = 256
    """Length of the style code w."""
    mapping_depth: int = 2
    """Layers of the mapping network of the generator."""
    architecture: Architecture = "stylegan2"
    """stylegan2: 1912.04958. lite: resampling by repetition, no convolution at 4 px, noise once a block,
    one image head at the end, no equalised learning rate, spectral norm in the discriminator. residual: see
    `histosynth.gan.residual`; it always starts from a linear map of w."""
    class_embedding: ClassEmbedding = "concat"
    """How the class enters the mapping network: normalised and beside z, or added to z."""
    start: Start = "constant"
    """What the generator begins with at 4 px. constant: the same for all tiles (1812.04948); code: that plus a linear
    map of w, so that the layout varies from tile to tile early in a training instead of late."""
    channel_min: int = 1
    """Fewest feature channels anywhere."""
    mapping_lr: float = 0.01
    """Learning rate of the mapping networks relative to the rest."""
    noise: bool = True
    """Layers of the generator add per-pixel noise."""
    noise_const: bool = False
    """The planes of constant noise are stored with the weights (StyleGAN2-ADA); else they follow from a seed."""
    conv_clamp: float | None = None
    """Largest magnitude of what a convolution hands on (256 in StyleGAN2-ADA)."""
    d_conv_clamp: float = -1.0
    """conv_clamp of the discriminator; -1: as the generator, 0: none."""
    output_clamp: float | None = None
    """Largest magnitude of a pixel of the generator; in lite, after a hyperbolic tangent."""
    label_conditioning: LabelConditioning = "projection"
    """How the discriminator sees the class. projection: a logit plus <features, embedding> (1802.05637);
    mapping: <features, mapping network of the class> alone (StyleGAN2-ADA); none: not at all."""
    discriminator: Trunk = "resnet"
    """Trunk of the discriminator: resnet, skip (an image head a resolution) or orig (plain); 1912.04958, figure 7."""
    d_channel_base: int = 0
    """channel_base of the discriminator; 0: as the generator."""
    d_channel_max: int = 0
    """channel_max of the discriminator; 0: as the generator."""
    d_mapping_depth: int = 8
    """Layers of the mapping network of the discriminator."""
    cmap_dim: int = 0
    """Length of the mapped class in the discriminator; 0: its channels at 4 px."""
    mbstd_group: int = 4
    """Samples that the minibatch standard deviation compares; 0: the whole batch."""
    mbstd_channels: int = 1
    """Channels of minibatch standard deviation; 0: none."""
    autoencoder: tuple[int, ...] = ()
    """Width, blocks and channels of the autoencoder (`AutoencoderShape`) whose latents both networks work on, a
    quarter as wide as the images; empty: they work on pixels."""

    def __post_init__(self) -> None:
        if self.size not in (16, 32, 64, 128, 256, 512, 1024):
            raise SettingError(f"size is {self.size}.", "Use a power of two from 16 to 1024.")
        check_settings(self, positive=_POSITIVE, not_negative=_NOT_NEGATIVE)
        object.__setattr__(self, "autoencoder", tuple(self.autoencoder))  # JSON knows lists only
        if self.autoencoder and (len(self.autoencoder) != 3 or min(self.autoencoder) < 1):
            raise SettingError(f"autoencoder is {self.autoencoder}.", "Give width, blocks and channels, or nothing.")
        if self.autoencoder and self.canvas < 8:
            raise SettingError(f"size is {self.size} on latents.", "Use 32 or more, or space=pixels.")
        if self.architecture == "residual" and (self.conv_clamp or self.d_clamp):
            raise SettingError(
                f"conv_clamp is {self.conv_clamp or self.d_clamp} with architecture=residual, which limits no feature.",
                "Leave it out, or use architecture=stylegan2 with init=none.",
            )
        if self.mbstd_channels and self.d_channels(4) % self.mbstd_channels:
            raise SettingError(
                f"mbstd_channels is {self.mbstd_channels}, but there are {self.d_channels(4)} channels at 4 px.",
                "Use a divisor of the channels.",
            )

    def channels(self, resolution: int) -> int:
        """Feature channels of the generator at a resolution."""
        return max(self.channel_min, min(self.channel_base // resolution, self.channel_max))

    def d_channels(self, resolution: int) -> int:
        """Feature channels of the discriminator at a resolution."""
        base, most = self.d_channel_base or self.channel_base, self.d_channel_max or self.channel_max
        return max(self.channel_min, min(base // resolution, most))

    @property
    def d_clamp(self) -> float | None:
        """`conv_clamp` of the discriminator."""
        return self.conv_clamp if self.d_conv_clamp < 0 else self.d_conv_clamp or None

    @property
    def resolutions(self) -> tuple[int, ...]:
        """4, 8, ..., the edge of what the networks make."""
        return tuple(2**k for k in range(2, self.canvas.bit_length()))

    @property
    def canvas(self) -> int:
        """Edge length of what the networks make and judge, in pixels or latents."""
        return self.size // FACTOR if self.autoencoder else self.size

    @property
    def colours(self) -> int:
        """Channels of that: red, green and blue, or those of a latent."""
        return self.autoencoder[2] if self.autoencoder else 3

    @property
    def conditioning(self) -> LabelConditioning:
        """`label_conditioning`, none where there is no class."""
        return self.label_conditioning if self.classes else "none"
