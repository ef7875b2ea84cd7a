"""What the denoiser is told: an encoder's embedding of a tissue, and a class, as context tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from histosynth.core.seeds import torch_generator

Join = Literal["auto", "token", "add", "none"]
CLASS_WISE = ("class_tokens.weight", "head.weight", "head.bias")
"""Weights of a conditioner with a row a class."""
CLAMP = 6.0
"""Standardised embeddings are clamped to this many deviations."""


@dataclass(frozen=True)
class ContextShape:
    """What fixes the names and shapes of a conditioner's weights."""

    dim: int
    """Width of the encoder's embeddings."""
    classes: int
    """Number of classes."""
    width: int
    """Channels of a context token."""
    tokens: int
    """Tokens made of one embedding."""
    join: Literal["token", "add", "none"] = "token"
    """How the class joins: a token of its own, added to every token, or not at all."""
    identity: bool = False
    """The adapter adds to the embedding itself, from zero: for a denoiser that knows these embeddings."""


class Adapter(nn.Module):
    """Encoder embeddings [N, 1, D] -> context tokens [N, tokens, width]; always in float32.

    With `identity` (D = width) the result is the raw embedding plus what the layers add, which is nothing at first.
    """

    def __init__(self, dim: int, width: int, tokens: int, identity: bool = False) -> None:
        super().__init__()
        self.tokens, self.width, self.identity = tokens, width, identity
        self.layers = nn.Sequential(nn.Linear(dim, 2 * width), nn.GELU(), nn.Linear(2 * width, tokens * width))
        if identity:
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)
        else:
            self.norm = nn.LayerNorm(width)

    def forward(self, embeddings: Tensor, raw: Tensor | None = None) -> Tensor:
        """`raw` [N, 1 or tokens, width] is what `embeddings` are the standardised values of."""
        with torch.autocast(embeddings.device.type, enabled=False):
            flat = self.layers(embeddings.float().squeeze(1))
            made = flat.view(len(flat), self.tokens, self.width)
            if self.identity and raw is not None:
                return raw.float() + made
            return self.norm(made)


class Conditioner(nn.Module):
    """The adapter, a token a class, what stands for "not told", and a head that reads the class back.

    The head's cross-entropy keeps classes apart in the adapter's tokens; without it the tokens keep only
    what lowers the denoising error, and rare classes drift towards the common ones.

    Args:
        dim, classes, width, tokens, join, identity: see `ContextShape`.
        unconditional: float [tokens, width], what the denoiser was pretrained to hear as "told nothing". With
            `identity` it passes through the adapter, as embeddings do; otherwise the learnt tokens start there.

    Attributes:
        mean, deviation: float [dim]; embeddings are standardised with them.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        dim: int,
        classes: int,
        width: int,
        tokens: int,
        join: Literal["token", "add", "none"] = "token",
        identity: bool = False,
        unconditional: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.shape = ContextShape(dim, classes, width, tokens, join, identity)
        self.adapter = Adapter(dim, width, tokens, identity)
        self.class_tokens = nn.Embedding(classes, width)
        self.no_embedding = nn.Parameter(torch.randn(tokens, width))
        self.no_class = nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, classes)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))
        with torch.no_grad():
            if join == "add":  # a pretrained denoiser hears at first what it was trained to hear
                self.class_tokens.weight.zero_()
                self.no_class.zero_()
            if unconditional is not None:
                self.no_embedding.copy_(unconditional.expand(tokens, width))
        if identity:
            self.no_embedding.requires_grad_(False)

    @torch.no_grad()
    def measure(self, embeddings: Tensor) -> None:
        """Take mean and deviation from raw embeddings [N, dim] of the training tiles."""
        self.mean.copy_(embeddings.mean(dim=0))
        spread = embeddings.std(dim=0, unbiased=False)
        # a feature that hardly varies (one tile, a dead unit) must not be blown up to noise
        floor = spread.mean().clamp_min(1e-6) * 0.1
        self.deviation.copy_(spread.clamp_min(floor))

    def standardise(self, embeddings: Tensor) -> Tensor:
        """Raw encoder embeddings -> what `forward` takes (and what banks hold), clamped to 6 deviations."""
        return ((embeddings.float() - self.mean) / self.deviation).clamp(-CLAMP, CLAMP)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        told_embedding: Tensor | None = None,
        told_class: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Context and class logits.

        Args:
            embeddings: float [N, dim], standardised.
            labels: int64 [N].
            told_embedding, told_class: bool [N]; where false what stands for "not told" stands instead.
                Both default to all true.

        Returns:
            context float [N, T, width] (T = tokens, and one more with join="token") and logits float
            [N, classes] (of the embedding alone, so that the class token cannot answer for it).
        """
        tokens = self.adapter(embeddings[:, None], self._raw(embeddings))
        pooled = tokens.mean(dim=1)
        # a pretrained denoiser's embeddings have any scale; the norm of our own adapter has unit scale
        logits = self.head(F.layer_norm(pooled, pooled.shape[1:]) if self.shape.identity else pooled)
        if told_embedding is not None:
            tokens = torch.where(told_embedding[:, None, None], tokens, self._nothing())
        return self._join(tokens, self.class_tokens(labels), told_class), logits

    def untold(self, n: int) -> Tensor:
        """The context of "told nothing", for classifier-free guidance: float [n, T, width]."""
        tokens = self._nothing()[None]
        return self._join(tokens, self.no_class[None], None).expand(n, -1, -1)

    def _raw(self, embeddings: Tensor) -> Tensor | None:
        return (embeddings * self.deviation + self.mean)[:, None] if self.shape.identity else None

    def _nothing(self) -> Tensor:
        if not self.shape.identity:
            return self.no_embedding
        # the adapter translates "told nothing" as it translates embeddings
        raw = self.no_embedding
        return self.adapter(self.standardise(raw).mean(dim=0)[None, None], raw[None])[0]

    def _join(self, tokens: Tensor, named: Tensor, told_class: Tensor | None) -> Tensor:
        if self.shape.join == "none":
            return tokens
        if told_class is not None:
            named = torch.where(told_class[:, None], named, self.no_class)
        if self.shape.join == "add":
            return tokens + named[:, None]
        return torch.cat([tokens, named[:, None]], dim=1)


@torch.no_grad()
def carry_over(tensors: dict[str, Tensor], old: Sequence[str], new: Sequence[str], seed: int) -> dict[str, Tensor]:
    """A conditioner's weights for another list of classes.

    Classes of the same name keep their token and their row of the head; new ones start at the mean of the
    old ones with a little noise, so that no two start equal.

    Args:
        tensors: a conditioner's state, for the classes `old`.
        seed: of the noise, which also depends on the class's name.
    """
    carried = dict(tensors)
    for name in CLASS_WISE:
        rows, values = tensors[name], []
        for label in new:
            if label in old:
                values.append(rows[list(old).index(label)])
                continue
            spread = rows.std() if rows.numel() > 1 else rows.abs().mean()
            noise = torch.randn(rows.shape[1:], generator=torch_generator(seed, "new class", name, label))
            values.append(rows.mean(dim=0) + 0.1 * spread * noise)
        carried[name] = torch.stack(values)
    return carried
