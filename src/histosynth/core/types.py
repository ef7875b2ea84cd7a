"""What flows between rooms. Pixels are uint8 [N, 3, H, W] RGB everywhere between rooms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """Tiles that travel together.

    Attributes:
        images: uint8 [N, 3, H, W], RGB.
        labels: int64 [N], index into the classes of the set that the batch comes from.
        ids: N tile ids.
    """

    images: torch.Tensor
    labels: torch.Tensor
    ids: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class EncoderCard:
    """What a user must know of an encoder before using it."""

    name: str
    dim: int
    input_size: int
    licence: str
    gated: bool = False
    commercial: bool = True
    source: str = ""
    citation: str = ""
    url: str = ""
    """Where the weights are offered."""
    weights: str = ""
    """Name of the weight file, "shipped", or nothing for an encoder without weights."""
    files: tuple[str, ...] = ()
    """Every file name that it can be loaded from, the usual one first."""
    how: str = ""
    """What to do when the weights are missing: which licence, which command, which file where."""
    optional: bool = False
    """Whether the user has to provide the weights."""
    repository: str = ""
    """Its repository at Hugging Face."""
    download: str = ""
    """Address of the file, where its licence lets anybody have it."""
    sha256: str = ""
    """How the checksum of that file begins."""
    shared_with: str = ""
    """The encoder that uses the same file."""
    bfloat16: bool = False
    """Whether it keeps its features in bfloat16 (cosine to float32 above 0.999)."""


@runtime_checkable
class Encoder(Protocol):
    """A frozen network: tiles in, features out."""

    card: EncoderCard

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, dim], without gradients."""
        ...

    def differentiable(self, images: torch.Tensor) -> torch.Tensor:
        """float [N, 3, H, W] in [-1, 1] -> float32 [N, dim], with gradients to the images."""
        ...


@runtime_checkable
class Generator(Protocol):
    """Makes tiles of a class. The same (label, seed) gives the same tile at any batch size.

    A generator whose `sample` takes more keyword arguments names them, with their defaults, in a dict `options`.
    """

    classes: tuple[str, ...]
    size: int
    card: dict[str, Any]

    def sample(self, labels: Sequence[int], seeds: Sequence[int], batch_size: int = 16) -> Iterator[torch.Tensor]:
        """Yield uint8 [n, 3, size, size] batches in the order of `labels` and `seeds`."""
        ...


@runtime_checkable
class LatentGenerator(Generator, Protocol):
    """A generator whose latent codes can be had and decoded."""

    def latents(self, labels: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """The latent codes of the tiles that `sample` would make."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latent codes -> uint8 [N, 3, size, size]."""
        ...


class Score(Protocol):
    """How far tiles are from real ones; a training chooses its weights by it. `name` says which score it is."""

    name: str

    def __call__(self, real: torch.Tensor, fake: torch.Tensor) -> float:
        """uint8 [N, 3, S, S] and [M, 3, S, S] -> the smaller, the more alike."""
        ...


@dataclass(frozen=True)
class GeneratorFamily:
    """A way to learn and make tiles, as experiments see it: one line in the table of families.

    Attributes:
        name: short name, used in folders and tables.
        title: name for people.
        train: `train(data, folder, *, size, steps, seconds, seed, init, device, validation=None, score=None) ->
            checkpoint path`; resumes by itself, `seconds` caps the wall-clock (None: no cap). `validation` is an
            array of tiles that, with `score`, may choose among the weights of the training; none: there is none.
        load: `load(checkpoint path, device) -> Generator`.
        steps_per_second: training steps at 64 px on two CPU cores, to turn minutes into steps. A fixed
            number and not a measurement, so that the same budget gives the same steps everywhere.
        tiles_per_second: likewise, tiles made.
    """

    name: str
    title: str
    train: Callable[..., Path]
    load: Callable[[Path, str], Generator]
    steps_per_second: float
    tiles_per_second: float
