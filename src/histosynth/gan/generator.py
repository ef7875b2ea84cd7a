"""The generator: mapping network z, class -> w, and a synthesis network w -> image with skip connections.

Compact on purpose (see `Shape`): at 64 px the defaults make a network that trains on a laptop's CPU. With
`architecture` "lite" it is a plainer style-based generator, made of the same parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from histosynth.autoencoder.network import Autoencoder, AutoencoderShape
from histosynth.core.seeds import torch_generator
from histosynth.gan.layers import GAIN, EqualConv, EqualLinear, ModulatedConv, activate, clamped, up_2x
from histosynth.gan.mapping import Centre, Mapping
from histosynth.gan.residual import ImageHead, ResidualSynthesis, StyledUnit
from histosynth.gan.shape import Shape

__all__ = ["Generator", "Mapping", "Shape", "SynthesisBlock", "SynthesisLayer"]


class SynthesisLayer(nn.Module):
    """Modulated 3x3 convolution, noise with a learned strength, bias, rectifier."""

    noise_const: Tensor

    def __init__(self, inputs: int, outputs: int, resolution: int, shape: Shape, up: bool = False) -> None:
        super().__init__()
        lite = shape.architecture == "lite"
        self.resolution, self.clamp = resolution, shape.conv_clamp
        self.conv = ModulatedConv(inputs, outputs, 3, shape.w_dim, up=up, repeat=lite, equalised=not lite)
        self.noisy = shape.noise and not (lite and up)
        if self.noisy:
            self.noise_strength = nn.Parameter(torch.zeros(()))
            if shape.noise_const:
                self.register_buffer("noise_const", torch.randn(1, 1, resolution, resolution))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """[N, inputs, H, W], [N, w_dim], noise [N or 1, 1, H', W'] or none -> [N, outputs, H', W']."""
        y = self.conv(x, w, GAIN, self.bias * GAIN)
        if noise is not None:
            y += (noise * (self.noise_strength * GAIN)).to(y.dtype)
        return activate(y, self.clamp)


class SynthesisBlock(nn.Module):
    """All layers of one resolution; the first block starts from a learned constant, and from w where asked to."""

    def __init__(self, inputs: int, outputs: int, resolution: int, shape: Shape) -> None:
        super().__init__()
        lite = shape.architecture == "lite"
        code = shape.start == "code" and not inputs
        # half as large beside the map of w, which is to decide
        self.const = None if inputs else nn.Parameter(torch.randn(1, outputs, 4, 4) * (0.5 if code else 1.0))
        self.start = EqualLinear(shape.w_dim, outputs * 16) if code else None
        if inputs:
            self.conv0 = SynthesisLayer(inputs, outputs, resolution, shape, up=True)
        if inputs or not lite:
            self.conv1 = SynthesisLayer(outputs, outputs, resolution, shape)
        self.clamp, self.to_rgb, self.rgb_bias = shape.conv_clamp, None, None
        if not lite:
            self.to_rgb = ModulatedConv(outputs, shape.colours, 1, shape.w_dim, demodulate=False)
            self.rgb_bias = nn.Parameter(torch.zeros(shape.colours))
        elif resolution == shape.canvas:
            self.to_rgb = EqualConv(outputs, shape.colours, 1, active=False, bias=True, equalised=False)

    @property
    def convs(self) -> list[SynthesisLayer]:
        """The 3x3 layers, in order."""
        return [part for part in self.children() if isinstance(part, SynthesisLayer)]

    def forward(
        self,
        x: Tensor | None,
        image: Tensor | None,
        w: Sequence[Tensor],
        noise: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """Features, and the image so far in float32; `w` has a code a 3x3 layer and that of the image head."""
        if self.const is not None:
            x = self.const.expand(len(w[0]), -1, -1, -1)
            x = x if self.start is None else x + self.start(w[0]).view_as(x)
            x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        assert x is not None
        for layer, code, plane in zip(self.convs, w, noise, strict=False):
            x = layer(x, code, plane)
        if isinstance(self.to_rgb, EqualConv):
            return x, self.to_rgb(x).float()
        if self.to_rgb is None or self.rgb_bias is None:
            return x, image
        rgb = clamped(self.to_rgb(x, w[-1]).float() + self.rgb_bias[:, None, None], self.clamp)
        return x, rgb if image is None else up_2x(image) + rgb


class Generator(nn.Module):
    """z, class -> image. `forward` is for training; see `histosynth.gan.sample` for making tiles.

    On latents (`Shape.autoencoder`), `forward` gives latents, which the discriminator judges, and `synthesise` their
    images; the frozen autoencoder is a part of this network.

    Noise is a list with a plane a noisy layer (`draw_noise`, `seeded_noise`, `const_noise`), or none.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        lite = shape.architecture == "lite"
        self.mapping = Mapping(
            shape.z_dim,
            shape.classes,
            shape.w_dim,
            shape.mapping_depth,
            shape.mapping_lr,
            add=shape.class_embedding == "add",
            equalised=not lite,
        )
        self.blocks = nn.ModuleDict()
        inputs = 0
        residual = shape.architecture == "residual"
        kind = ResidualSynthesis if residual else SynthesisBlock
        for resolution in shape.resolutions:
            self.blocks[f"b{resolution}"] = kind(inputs, shape.channels(resolution), resolution, shape)
            inputs = shape.channels(resolution)
        self.head = ImageHead(inputs, shape) if residual else None
        self.autoencoder: Autoencoder | None = None
        if shape.autoencoder:
            self.autoencoder = Autoencoder(AutoencoderShape(*shape.autoencoder)).eval().requires_grad_(False)

    @property
    def convs(self) -> list[SynthesisLayer | StyledUnit]:
        """All that takes a code and noise, in order: 3x3 layers, or residual units."""
        return [layer for block in self.blocks.values() for layer in block.convs]

    @property
    def layers(self) -> int:
        """Codes w that one image takes: one a 3x3 layer or unit; an image head shares the next layer's."""
        return len(self.convs) + (self.shape.architecture == "stylegan2")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.mapping.w_mean.device

    def noise_shapes(self) -> list[int]:
        """Edge length of the noise of every layer that takes some, in order."""
        return [layer.resolution for layer in self.convs if layer.noisy]

    def draw_noise(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Fresh noise [count, 1, r, r] for every noisy layer."""
        total = sum(r * r for r in self.noise_shapes())
        return self.shape_noise(torch.randn(count, total, generator=generator, device=generator.device))

    def seeded_noise(self, seeds: Sequence[int]) -> list[Tensor]:
        """Noise of every tile from its own seed: a tile's noise does not depend on its neighbours."""
        total = sum(r * r for r in self.noise_shapes())
        flat = torch.stack([torch.randn(total, generator=torch_generator(int(s), "noise")) for s in seeds])
        return self.shape_noise(flat)

    def const_noise(self) -> list[Tensor]:
        """The same noise [1, 1, r, r] for every tile: the stored planes (`Shape.noise_const`), else those of seed 0."""
        if self.shape.noise_const:
            return [layer.noise_const for layer in self.convs if layer.noisy]
        return self.seeded_noise([0])

    def shape_noise(self, flat: Tensor) -> list[Tensor]:
        """[N, sum of r*r] -> a list of [N, 1, r, r] on the network's device."""
        edges = self.noise_shapes()
        parts = flat.to(self.device).split([r * r for r in edges], dim=1)
        return [part.reshape(len(flat), 1, r, r) for part, r in zip(parts, edges, strict=True)]

    def codes(
        self,
        z: Tensor,
        labels: Tensor | None,
        truncation: float = 1.0,
        cutoff: int | None = None,
        centre: Centre = "class",
    ) -> Tensor:
        """w [N, layers, w_dim], one code a layer, the first `cutoff` (none: all) pulled towards the mean.

        Args:
            z: float32 [N, z_dim].
            labels: int64 [N]; not read by an unconditional network.
            truncation: psi of 1812.04948, appendix B; 1 changes nothing, 0 gives the mean.
            cutoff: layers that truncation changes, from the coarsest.
            centre: the mean of the class, or of all classes ("global", as StyleGAN2-ADA).
        """
        w = self.mapping(z, labels)[:, None].expand(-1, self.layers, -1)
        if truncation == 1.0:
            return w
        pulled = self.mapping.mean(labels, centre)[:, None].lerp(w, truncation)
        early = torch.arange(self.layers, device=w.device) < (self.layers if cutoff is None else cutoff)
        return torch.where(early[:, None], pulled, w)

    def synthesise(self, w: Tensor, noise: Sequence[Tensor] | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """w [N, w_dim] or [N, layers, w_dim] -> float32 [N, 3, size, size], about [-1, 1].

        Not clamped but where `Shape.output_clamp` says so. The layers compute in `dtype`.
        """
        return self.images(self.paint(w, noise, dtype))

    def images(self, canvas: Tensor) -> Tensor:
        """What `paint` gave -> images, which it is already but for latents."""
        return canvas if self.autoencoder is None else self.autoencoder.decode(canvas)

    def paint(self, w: Tensor, noise: Sequence[Tensor] | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `synthesise`, but latents [N, channels, size / 4, size / 4] where the networks work on them."""
        codes = list(w.unbind(dim=1)) if w.ndim == 3 else [w] * self.layers
        given = iter(noise or ())
        x = image = None
        position = 0
        for block in self.blocks.values():
            convs = block.convs
            planes = [next(given) if noise and layer.noisy else None for layer in convs]
            used = codes[position : position + len(convs) + 1] or codes[:1]
            x, image = block(x, image, used, planes, dtype)
            position += len(convs)
        if self.head is not None:
            assert x is not None
            image = self.head(x)
        assert image is not None
        if self.shape.architecture == "lite" and self.shape.output_clamp is not None:
            image = image.tanh()
        return clamped(image, self.shape.output_clamp)

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None,
        noise: Sequence[Tensor] | None,
        z2: Tensor | None = None,
        crossover: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Images or latents from z [N, z_dim]; with `z2` and `crossover` int64 [N], later layers use z2."""
        w = self.mapping(z, labels)
        if z2 is not None and crossover is not None:
            # style mixing inside the class (1812.04948, section 3.1)
            late = torch.arange(self.layers, device=w.device)[None, :] >= crossover[:, None]
            w = torch.where(late[:, :, None], self.mapping(z2, labels)[:, None], w[:, None])
        return self.paint(w, noise, dtype)
