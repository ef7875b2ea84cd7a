"""Losses: each a small function of float32 tensors that gives a scalar, weighted by the caller.

Logits are [N], or [N, k] where several discriminators judge a tile; the mean over all of them is the mean over the
discriminators. None of these reads a setting or changes anything but its own state (`PathLength`,
`ChannelStatistics`), which belongs into the resume state.

A fake tile and a real tile of a batch share a class and nothing else. What compares them therefore compares
*statistics of the batch*; the distance between tile k and tile k (`paired`) also punishes every difference between two
tiles that ought to differ, and draws the fakes to the mean of their class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from histosynth.core.errors import SettingError

if TYPE_CHECKING:
    from histosynth.core.types import Encoder


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-log sigmoid(D(fake)), the non-saturating loss (1406.2661), mean over all logits."""
    return F.softplus(-fake_logits).mean()


def discriminator_loss(
    real_logits: Tensor, fake_logits: Tensor, real_label: float = 1.0, fake_label: float = 0.0
) -> Tensor:
    """Binary cross-entropy of sigmoid(D) with the two labels, mean over the logits of each side, summed.

    With the labels 1 and 0 this is the logistic loss -log sigmoid(D(real)) - log(1 - sigmoid(D(fake))) (1406.2661);
    with 0.9 for real tiles, one-sided label smoothing (1606.03498, section 3.4).
    """
    real = F.softplus(-real_logits) + (1 - real_label) * real_logits
    fake = F.softplus(fake_logits) - fake_label * fake_logits
    return real.mean() + fake.mean()


def relativistic_loss(ahead: Tensor, behind: Tensor) -> Tensor:
    """-log sigmoid(ahead - behind): each logit against that of its rival (1807.00734; 2501.05441, equation 2).

    The discriminator wants its real tile ahead of the fake one, the generator the fake one ahead of the real. A fake
    that is judged real once is not done: it has to keep up with every real tile of its class, so that leaving some of
    them out costs.

    Args:
        ahead, behind: logits of one shape; pair k is a real and a fake tile of one class.
    """
    return F.softplus(behind - ahead).mean()


def r1_penalty(real_logits: Tensor, real_images: Tensor) -> Tensor:
    """Mean squared norm of the gradient of D on real images, differentiable (1801.04406, equation 9); on fake ones,
    R2 of the same paper.

    The caller weighs it by gamma / 2, and by the interval too where it is lazy (1912.04958, appendix B).

    Args:
        real_logits: [N], of `real_images`, which need grad.
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real_images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def default_r1_gamma(size: int, batch: int) -> float:
    """0.0002 size^2 / batch, the rule of thumb of ADA (2006.06676, appendix C)."""
    return 0.0002 * size * size / batch


def latent_r1_gamma(architecture: str, loss: str) -> float:
    """Weight of R1 on latents of unit deviation, chosen in short trainings on real tissue."""
    if architecture == "residual":
        return 0.2
    return 0.01 if loss == "relativistic" else 0.3


def drift_penalty(real_logits: Tensor) -> Tensor:
    """Mean square of the real logits, which keeps them near zero (1710.10196, appendix A.1; weight 0.001)."""
    return real_logits.square().mean()


class PathLength:
    """Path length regularisation (1912.04958, equation 4): a step in w changes the image by a constant amount.

    Lazy: called every k steps, with the penalty times k.

    Attributes:
        mean: the running mean a of the path lengths; 0 before the first call.
    """

    def __init__(self, decay: float = 0.01, weight: float = 2.0) -> None:
        self.decay, self.weight = decay, weight
        self.mean = 0.0

    def penalty(self, generator_outputs: Tensor, w: Tensor, generator: torch.Generator) -> Tensor:
        """weight * E[(|J_w^T y| - a)^2] with y ~ N(0, I) / sqrt(pixels); moves `mean`.

        Args:
            generator_outputs: images [N, 3, H, W] that were computed from `w`, in float32 all the way.
            w: [N, w_dim], or [N, layers, w_dim], whose squared lengths are averaged over the layers; needs grad.
            generator: draws y, on the device of the images.
        """
        images = generator_outputs
        noise = torch.randn(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        noise = noise / math.sqrt(images.shape[2] * images.shape[3])
        (gradient,) = torch.autograd.grad((images * noise).sum(), w, create_graph=True)
        lengths = gradient.square().sum(dim=-1)
        lengths = (lengths.mean(dim=1) if lengths.ndim == 2 else lengths).sqrt()
        self.mean += self.decay * (float(lengths.detach().mean()) - self.mean)
        return self.weight * (lengths - self.mean).square().mean()

    def state(self) -> dict[str, float]:
        """What a resumed training needs."""
        return {"mean": self.mean}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from `state`."""
        self.mean = state["mean"]


class ChannelStatistics:
    """Running mean and deviation of each channel of the real tiles, and how far the fakes are from them.

    Intensities count from 0 to 1. The fakes get gradients, the running numbers do not.
    """

    def __init__(self, decay: float = 0.995) -> None:
        self.decay = decay
        self._mean: list[float] = []
        self._deviation: list[float] = []

    def update(self, real: Tensor) -> None:
        """Take in real tiles, float [N, C, H, W] in [-1, 1]; the first ones set the numbers."""
        with torch.no_grad():
            mean, deviation = torch.stack(_moments(real)).tolist()
        if not self._mean:
            self._mean, self._deviation = mean, deviation
        keep = self.decay
        self._mean = [keep * a + (1 - keep) * b for a, b in zip(self._mean, mean, strict=True)]
        self._deviation = [keep * a + (1 - keep) * b for a, b in zip(self._deviation, deviation, strict=True)]

    def penalty(self, fake: Tensor) -> Tensor:
        """Squared difference of mean and of deviation, each averaged over the channels; 0 before `update`."""
        mean, deviation = _moments(fake)
        if not self._mean:
            return fake.new_zeros(())
        apart = (mean - mean.new_tensor(self._mean)).square() + (deviation - mean.new_tensor(self._deviation)).square()
        return apart.mean()

    def state(self) -> dict[str, float]:
        """What a resumed training needs."""
        means = {f"mean_{i}": v for i, v in enumerate(self._mean)}
        return means | {f"deviation_{i}": v for i, v in enumerate(self._deviation)}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from `state`."""
        channels = len(state) // 2
        self._mean = [state[f"mean_{i}"] for i in range(channels)]
        self._deviation = [state[f"deviation_{i}"] for i in range(channels)]


def perceptual_loss(encoder: Encoder, fake: Tensor, real: Tensor, paired: bool = False) -> Tensor:
    """Distance of fake from real tiles in the features of a frozen encoder; its gradient reaches the fakes.

    Args:
        fake, real: float [N, 3, H, W] in [-1, 1].
        paired: mean squared difference of tile k and tile k, instead of that of the batches' means plus that of their
            deviations (see the head of this file).

    Raises:
        SettingError: the encoder lets no gradient through, so that the loss would be a constant.
    """
    with torch.no_grad():
        wanted = encoder.differentiable(real).float()
    found = encoder.differentiable(fake.float().clamp(-4, 4)).float()  # a young generator may go far beyond [-1, 1]
    if fake.requires_grad and not found.requires_grad:
        raise SettingError(
            f"The encoder {encoder.card.name!r} lets no gradient through to the tiles.",
            "A generator cannot learn from it: take another one, or mend its differentiable().",
        )
    return _apart(found, wanted, paired)


def feature_matching(fake_features: Tensor, real_features: Tensor, paired: bool = False) -> Tensor:
    """Mean squared difference of the batches' mean features (1606.03498, section 3.1).

    Args:
        fake_features, real_features: [N, ...], of the discriminator; the real ones get no gradient.
        paired: of tile k and tile k instead.
    """
    real_features = real_features.detach().float()
    fake_features = fake_features.float()
    if paired:
        return F.mse_loss(fake_features, real_features)
    return F.mse_loss(fake_features.mean(0), real_features.mean(0))


def saturation_penalty(fake: Tensor, limit: float = 0.6, real: Tensor | None = None) -> Tensor:
    """max(0, mean |pixel| - limit)^2 over the whole batch, pixels in [-1, 1].

    Args:
        real: real tiles of the same classes; where they are brighter or darker than `limit`, as fat and background
            are, their own mean is the limit.
    """
    bound = real.detach().float().abs().mean().clamp_min(limit) if real is not None else limit
    return (fake.float().abs().mean() - bound).clamp_min(0).square()


def diversity_penalty(fake: Tensor, floor: float = 0.1) -> Tensor:
    """max(0, floor - variance)^2: the variance of every pixel over the batch, averaged over the pixels, in [-1, 1].

    The variance inside a tile does not count: a generator that repeats one rich tile has none.
    """
    return (floor - fake.float().var(dim=0, correction=0).mean()).clamp_min(0).square()


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over tiles and pixels, intensities from 0 to 1."""
    unit = (images.float() + 1) / 2
    return unit.mean(dim=(0, 2, 3)), (unit.var(dim=(0, 2, 3), correction=0) + 1e-8).sqrt()


def _apart(fake: Tensor, real: Tensor, paired: bool) -> Tensor:
    if paired:
        return F.mse_loss(fake, real)
    spread = [(x.var(dim=0, correction=0) + 1e-8).sqrt() for x in (fake, real)]
    return F.mse_loss(fake.mean(0), real.mean(0)) + F.mse_loss(*spread)


def spread_penalty(fake: Sequence[Tensor], real: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
    """How much less fake tiles of a class differ from one another than real ones.

    The mean of relu(1 - s_fake / s_real)^2, where s is the pooled standard deviation within classes at each place of a
    feature map, averaged over places and channels: of the maps as they are, and of the maps less their mean over
    places, because tiles that share one layout and differ in colour have much of the former and little of the latter.
    A judge that looks at one tile at a time cannot see that; that a ratio tells a generator so is the idea of mode
    seeking (1903.05628).

    Args:
        fake, real: feature maps [N, C, h, w] of as many tiles of the same classes. Where no class has two tiles there
            is no spread, and 0 is returned.
        labels: int64 [N]; none: all of one class.
    """
    count = len(fake[0])
    labels = torch.zeros(count, dtype=torch.long, device=fake[0].device) if labels is None else labels
    _, member, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    freedom = count - len(sizes)
    if not freedom:
        return fake[0].sum() * 0.0
    # [classes, N]: the mean of each class is one matrix product
    share = F.one_hot(member, len(sizes)).float().T / sizes[:, None]
    lacks = []
    for made, true in zip(fake, real, strict=True):
        for layout in (False, True) if made.shape[-1] > 1 else (False,):
            own, wanted = (_within(x.float(), share, member, freedom, layout) for x in (made, true))
            lacks.append(torch.relu(1 - own / wanted.detach()).square())
    return torch.stack(lacks).mean()


def _within(x: Tensor, share: Tensor, member: Tensor, freedom: int, layout: bool) -> Tensor:
    """The pooled deviation within classes of maps [N, C, h, w], averaged over places and channels."""
    x = x - x.mean(dim=(2, 3), keepdim=True) if layout else x
    means = torch.einsum("kn,nchw->kchw", share, x)
    variance = (x - means[member]).square().sum(dim=0) / freedom
    # the constant keeps the gradient of the root finite where all tiles are equal
    return (variance + 1e-6).sqrt().mean()
