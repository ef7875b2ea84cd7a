"""From an image back to its code: optimisation of w or w+ and of the noise (1912.04958, appendix D; 1904.03189).

On a CPU every tile is projected alone, so that its result does not depend on the tiles beside it, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from histosynth.core.errors import DataError, SettingError
from histosynth.core.progress import Tick, bar
from histosynth.core.seeds import derive, torch_generator
from histosynth.core.settings import check_settings
from histosynth.gan.latents import layered
from histosynth.gan.likeness import Likeness, load_likeness
from histosynth.gan.sample import GanGenerator

MEASURES = ("rmse", "psnr", "perceptual", "typicality")
_TOGETHER = {"cpu": 1, "cuda": 16, "mps": 8}


@dataclass(frozen=True)
class ProjectSettings:
    """How images are projected. The defaults take a few seconds a tile of 64 px on one CPU core."""

    space: Literal["w", "w+"] = "w+"
    """w: one code a tile; w+: one a layer, which follows the image more closely, also away from tissue."""
    steps: int = 150
    """Optimisation steps."""
    encoder: str = "auto"
    """Of the perceptual term: an encoder, lpips-alex, none; auto: LPIPS where its weights are, else tissue-tiny."""
    perceptual: float = 1.0
    """Weight of the perceptual distance."""
    pixel: float = 4.0
    """Weight of the mean squared difference of pixels in [-1, 1]."""
    noise: Literal["fit", "constant"] = "fit"
    """fit: the per-pixel noise is optimised too, which follows nearly any image; constant: the codes alone must explain
    it, as scores of anomalies need."""
    noise_weight: float = 1.0
    """Weight of what keeps fitted noise free of structure. (The 100 000 of the paper is for a thousand steps: in fewer,
    its stiff gradients hold the noise where it was.)"""
    rate: float = 0.1
    """Learning rate at its highest."""
    ramp_up: float = 0.05
    """Share of the steps in which the learning rate rises."""
    ramp_down: float = 0.25
    """Share of the steps in which it falls, along a cosine."""
    search: float = 0.01
    """Noise on the code at the start, in spreads of w; it fades over the first three quarters of the steps."""
    start: Literal["best", "mean"] = "best"
    """best: the most alike of the mean codes and `candidates` others; mean: the mean code, of the class where labels
    are given."""
    candidates: int = 256
    """Codes tried for the start; the same for every image."""
    seed: int = 0
    """Seed of the candidates and of the noise."""

    def __post_init__(self) -> None:
        check_settings(
            self,
            positive=("steps", "candidates", "rate"),
            not_negative=("perceptual", "pixel", "noise_weight", "search", "seed"),
            shares=("ramp_up", "ramp_down"),
        )
        if not self.pixel and not (self.perceptual and self.encoder != "none"):
            raise SettingError("pixel is 0 and there is no perceptual term.", "Give one of them a weight.")


@dataclass(frozen=True)
class Projection:
    """Codes of images, and how well they explain them."""

    latents: Tensor
    """float32 [N, w_dim] or [N, layers, w_dim]."""
    noise: Tensor
    """float32 [N, sum of r*r over the layers]; `decode(latents, noise=noise)` gives the images."""
    images: Tensor
    """uint8 [N, 3, S, S], the reconstructions."""
    distances: dict[str, Tensor]
    """float32 [N] each: rmse (grey levels), psnr (dB), perceptual (where there is an encoder), and typicality, the
    root mean square distance of the code from the mean code in spreads of w (about 1 for what the generator makes)."""
    trace: Tensor
    """float32 [N, steps], the loss on the way."""

    def __len__(self) -> int:
        return len(self.latents)


def project(
    generator: GanGenerator,
    images: Tensor,
    settings: ProjectSettings = ProjectSettings(),
    labels: Sequence[int] | None = None,
    likeness: Likeness | None = None,
    tick: Tick | None = None,
) -> Projection:
    """Find the codes from which the generator makes these images.

    Args:
        images: uint8 [N, 3, S, S], S the size of the generator.
        labels: class of every image; start="mean" then starts from the mean of its class.
        likeness: a perceptual distance that is already loaded, instead of the one that `settings` names.
        tick: called with the number of tiles after every step, instead of a progress bar.

    Raises:
        DataError: images of another type or size.
        SettingError: a label is not a class, or labels do not go with the images.
        CheckpointError: the encoder's weights are missing.
    """
    _check(generator, images, labels)
    device = generator.device
    if likeness is None and settings.perceptual:
        likeness = load_likeness(settings.encoder, str(device))
    search = _Search(generator, settings, likeness)
    count = _TOGETHER.get(device.type, 1)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with nullcontext(tick) if tick else bar("Project tiles", len(images) * settings.steps) as tick:
        for begin in range(0, len(images), count):
            part = images[begin : begin + count].to(device)
            known = None if labels is None else [int(k) for k in labels[begin : begin + count]]
            parts.append(search.run(part, known, tick))
    empty = search.empty()
    latents, noise, trace = (torch.cat([p[k] for p in parts]) if parts else empty[k] for k in range(3))
    made = generator.decode(latents, noise=noise)
    return Projection(latents, noise, made, search.distances(images, made, latents), trace)


class _Search:
    """What all images share: the candidates, the mean and spread of w, the settings."""

    def __init__(self, generator: GanGenerator, settings: ProjectSettings, likeness: Likeness | None) -> None:
        self.generator, self.settings, self.likeness = generator, settings, likeness
        self.network, self.device = generator.network, generator.device
        count, classes = max(settings.candidates, 2), len(generator.classes)
        seeds = [derive(settings.seed, "projection candidate", k) for k in range(count)]
        codes = generator.latents([k % classes for k in range(count)], seeds)
        self.mean, self.spread = codes.mean(dim=0), codes.std(dim=0).clamp_min(1e-6)
        # the spread in all directions together, as in the paper
        self.radius = float((codes - self.mean).square().sum(dim=1).mean().sqrt())
        # the means are often nearer, pixel by pixel, than any tile
        mapping = self.network.mapping
        codes = torch.cat([mapping.w_avg[None].cpu(), mapping.w_mean[:count].cpu(), codes])
        self.candidates = codes.to(self.device)
        self.shown = _pixels(generator.decode(codes), self.device) if settings.start == "best" else None
        self.flat = torch.cat([plane.flatten(1) for plane in self.network.const_noise()] or [torch.empty(1, 0)], dim=1)

    def run(self, images: Tensor, labels: list[int] | None, tick) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [n, 3, S, S] -> codes, noise and the losses on the way, on the CPU."""
        settings = self.settings
        target = _pixels(images, self.device)
        seen = self.likeness.prepare(target) if self.likeness else []
        start = self._start(target, seen, labels)
        codes = start.clone().requires_grad_(True)
        noise = self.flat.to(self.device).repeat(len(images), 1)
        fitted = settings.noise == "fit" and noise.shape[1] > 0
        noise.requires_grad_(fitted)
        adam = torch.optim.Adam([codes, *([noise] if fitted else [])], betas=(0.9, 0.999))
        trace = []
        for step in range(settings.steps):
            done = step / settings.steps
            for group in adam.param_groups:
                group["lr"] = self._rate(done)
            wander = settings.search * self.radius * max(0.0, 1 - done / 0.75) ** 2
            draw = torch.randn(start.shape[1:], generator=torch_generator(settings.seed, "projection step", step))
            planes = self.network.shape_noise(noise)
            made = self.network.synthesise(codes + wander * draw.to(self.device), planes)
            # every image has its own sum: no gradient goes from one to another
            loss = self._loss(made, target, seen)
            total = loss + settings.noise_weight * structure(planes) if fitted else loss
            adam.zero_grad()
            total.sum().backward()
            adam.step()
            if fitted:
                with torch.no_grad():
                    noise.copy_(_standardised(noise, self.network.noise_shapes()))
            trace.append(loss.detach().cpu())
            tick(len(images), f"loss {float(trace[-1].mean()):.3f}")
        return codes.detach().cpu(), noise.detach().cpu(), torch.stack(trace, dim=1)

    def distances(self, images: Tensor, made: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """How far the reconstructions are from the images."""
        error = (images.float() - made.float()).square().flatten(1).mean(dim=1)
        found = {"rmse": error.sqrt(), "psnr": 10 * torch.log10(255**2 / error.clamp_min(1e-3))}
        if self.likeness is not None:
            seen = [torch.empty(0)]
            for one, two in zip(images.split(1), made.split(1), strict=True):
                prepared = self.likeness.prepare(_pixels(one, self.device))
                with torch.no_grad():
                    seen.append(self.likeness(_pixels(two, self.device), prepared).cpu())
            found["perceptual"] = torch.cat(seen)
        away = (latents - self.mean) / self.spread
        found["typicality"] = away.square().flatten(1).mean(dim=1).sqrt()
        return found

    def empty(self) -> tuple[Tensor, Tensor, Tensor]:
        """What no image gives."""
        shape = self.network.shape
        codes = torch.empty(0, shape.w_dim)
        codes = codes if self.settings.space == "w" else layered(codes, self.generator.layers)
        return codes, torch.empty(0, self.flat.shape[1]), torch.empty(0, self.settings.steps)

    def _start(self, target: Tensor, seen: list[Tensor], labels: list[int] | None) -> Tensor:
        if self.shown is not None:
            picked = [self._most_alike(target[k : k + 1], [s[k : k + 1] for s in seen]) for k in range(len(target))]
            codes = self.candidates[picked]
        elif labels is not None:
            codes = self.network.mapping.mean(torch.tensor(labels, device=self.device)).expand(len(labels), -1)
        else:
            codes = self.network.mapping.mean(None, "global").expand(len(target), -1)
        return codes if self.settings.space == "w" else layered(codes, self.generator.layers)

    @torch.no_grad()
    def _most_alike(self, target: Tensor, seen: list[Tensor]) -> int:
        assert self.shown is not None
        found = [self._loss(part, target, seen) for part in self.shown.split(32)]
        return int(torch.cat(found).argmin())

    def _loss(self, made: Tensor, target: Tensor, seen: list[Tensor]) -> Tensor:
        error = made - target
        # a white or black pixel says nothing of how far beyond the range the network was
        error = torch.where(target >= 1, error.clamp(max=0), torch.where(target <= -1, error.clamp(min=0), error))
        loss = self.settings.pixel * error.square().flatten(1).mean(dim=1)
        if self.likeness is not None:
            loss = loss + self.settings.perceptual * self.likeness(made.clamp(-1, 1), seen)
        return loss

    def _rate(self, done: float) -> float:
        settings = self.settings
        up = min(1.0, (done + 1 / settings.steps) / settings.ramp_up) if settings.ramp_up else 1.0
        left = min(1.0, (1 - done) / settings.ramp_down) if settings.ramp_down else 1.0
        return settings.rate * up * 0.5 * (1 - math.cos(math.pi * left))


def structure(planes: Sequence[Tensor]) -> Tensor:
    """How far noise [N, 1, r, r] is from white, [N]: the squared mean products of neighbours, at every scale down to
    8 px (1912.04958, appendix D)."""
    by_edge: dict[int, list[Tensor]] = {}
    for plane in planes:
        by_edge.setdefault(plane.shape[-1], []).append(plane)
    total = torch.zeros(len(planes[0]), device=planes[0].device) if planes else torch.zeros(())
    while by_edge:
        edge = max(by_edge)
        # planes of one size together: a few large operations instead of many small ones
        level = torch.cat(by_edge.pop(edge), dim=1)
        for axis in (2, 3):
            total = total + (level * level.roll(1, dims=axis)).mean(dim=(2, 3)).square().sum(dim=1)
        if edge > 8:
            by_edge.setdefault(edge // 2, []).append(2 * F.avg_pool2d(level, 2))
    return total


def _standardised(flat: Tensor, edges: Sequence[int]) -> Tensor:
    """Every plane of noise with mean 0 and variance 1."""
    parts = flat.split([r * r for r in edges], dim=1)
    done = [(p - p.mean(1, keepdim=True)) / p.std(1, correction=0, keepdim=True).clamp_min(1e-6) for p in parts]
    return torch.cat(done, dim=1)


def _pixels(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device).float() / 127.5 - 1


def _check(generator: GanGenerator, images: Tensor, labels: Sequence[int] | None) -> None:
    size = generator.size
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise DataError(
            f"The images have the shape {tuple(images.shape)} and the type {images.dtype}.",
            f"Give uint8 [N, 3, {size}, {size}], RGB.",
        )
    if images.shape[2:] != (size, size):
        raise DataError(
            f"The images are {images.shape[2]} x {images.shape[3]} px, the generator makes {size} x {size}.",
            "Resize or crop them to that size.",
        )
    if labels is not None:
        if len(labels) != len(images):
            raise SettingError(f"{len(labels)} labels came with {len(images)} images.", "Give one an image.")
        if wrong := [k for k in labels if not 0 <= int(k) < len(generator.classes)]:
            raise SettingError(
                f"Label {wrong[0]} is not a class of this generator.", f"Use 0 to {len(generator.classes) - 1}."
            )
