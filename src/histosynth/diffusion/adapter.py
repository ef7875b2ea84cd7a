"""What the transformer is told: an encoder's embedding of a tissue, and a class, as context tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from histosynth.core.seeds import torch_generator


class Adapter(nn.Module):
    """Encoder embeddings [N, 1, D] -> context tokens [N, tokens, width]; always in float32."""

    def __init__(self, dim: int, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens, self.width = tokens, width
        self.layers = nn.Sequential(nn.Linear(dim, 2 * width), nn.GELU(), nn.Linear(2 * width, tokens * width))
        self.norm = nn.LayerNorm(width)

    def forward(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            flat = self.layers(embeddings.float().squeeze(1))
            return self.norm(flat.view(len(flat), self.tokens, self.width))


class Conditioner(nn.Module):
    """The adapter, a token a class, what stands for "not told", and a head that reads the class back.

    The head's cross-entropy keeps classes apart in the adapter's tokens; without it the tokens keep only
    what lowers the denoising error, and rare classes drift towards the common ones.

    Args:
        dim: width of the encoder's embeddings.
        classes: number of classes.
        width: channels of a context token.
        tokens: tokens made of one embedding.

    Attributes:
        mean, deviation: float [dim]; embeddings are standardised with them.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int, classes: int, width: int, tokens: int) -> None:
        super().__init__()
        self.adapter = Adapter(dim, width, tokens)
        self.class_tokens = nn.Embedding(classes, width)
        self.no_embedding = nn.Parameter(torch.randn(tokens, width))
        self.no_class = nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, classes)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

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
        return ((embeddings.float() - self.mean) / self.deviation).clamp(-6, 6)

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
            told_embedding, told_class: bool [N]; where false the learnt "not told" token stands instead.
                Both default to all true.

        Returns:
            context float [N, tokens + 1, width] and logits float [N, classes] (of the embedding alone,
            so that the class token cannot answer for it).
        """
        tokens = self.adapter(embeddings[:, None])
        logits = self.head(tokens.mean(dim=1))
        named = self.class_tokens(labels)
        if told_embedding is not None:
            tokens = torch.where(told_embedding[:, None, None], tokens, self.no_embedding)
        if told_class is not None:
            named = torch.where(told_class[:, None], named, self.no_class)
        return torch.cat([tokens, named[:, None]], dim=1), logits

    def untold(self, n: int) -> Tensor:
        """The context of "told nothing", for classifier-free guidance: float [n, tokens + 1, width]."""
        return torch.cat([self.no_embedding, self.no_class[None]])[None].expand(n, -1, -1)


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
    for name in ("class_tokens.weight", "head.weight", "head.bias"):
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
