"""Making tiles from a GAN checkpoint: one seed a tile, the same tile at any batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import torch
from torch import Tensor, nn

from histosynth.core.checkpoint import load_checkpoint, require_kind
from histosynth.core.device import pick_device
from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.latents import Space, between, checked_labels, crossed, layered, space_of, span
from histosynth.gan.layers import place
from histosynth.gan.mapping import Centre
from histosynth.gan.render import (
    DTYPES,
    Noise,
    Precision,
    Pull,
    codes_of,
    decode_codes,
    draw_z,
    map_codes,
    render,
    rows_of,
)

__all__ = ["GanGenerator", "fill", "load_discriminator", "render", "shape_of", "write_grid"]

UNLABELLED = "tissue"
"""The one class of a generator that knows none."""


class GanGenerator:
    """A trained generator. `classes`, `size` and `card` say what it makes; an unlabelled one has one class."""

    options: ClassVar[dict[str, Any]] = {
        "truncation": 1.0, "truncation_cutoff": None, "truncation_centre": "class", "noise": "random",
        "precision": "fp32",
    }  # fmt: skip
    """What `sample` takes beside labels and seeds, with the defaults."""

    def __init__(self, network: Generator, card: dict[str, Any], device: torch.device) -> None:
        self.network = place(network, device).eval().requires_grad_(False)
        if self.network.autoencoder is not None:
            self.network.autoencoder.name = str(card.get("latent_space", ""))
        self.card = card
        named = tuple(card["classes"])
        # an unlabelled network cannot be asked for the classes of the tiles that it learnt from
        self.classes: tuple[str, ...] = named if len(named) == rows_of(network) else (UNLABELLED,)
        self.size = network.shape.size
        self.device = device

    @classmethod
    def from_checkpoint(cls, path: Path | str, device: str = "auto") -> Self:
        """Read a checkpoint that `train gan` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of another kind.
        """
        tensors, card = _read(path)
        network = Generator(shape_of(card, path))
        fill(network, tensors, "G_ema.", path)
        return cls(network, card, pick_device(device))

    @property
    def layers(self) -> int:
        """Codes of a tile in w+."""
        return self.network.layers

    def sample(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        batch_size: int = 16,
        truncation: float = 1.0,
        truncation_cutoff: int | None = None,
        truncation_centre: Centre = "class",
        noise: Noise = "random",
        precision: Precision = "fp32",
    ) -> Iterator[Tensor]:
        """Yield uint8 [n, 3, size, size] on the CPU, n = batch_size but for the last batch.

        A tile depends on its label, its seed and the settings after batch_size only, bit for bit.

        Args:
            labels: class indices.
            seeds: one a tile, 0 or more.
            truncation: 1 for the learned variety; less pulls tiles towards a mean, 0 leaves only the noise.
            truncation_cutoff: how many layers, from the coarsest, are pulled; all by default.
            truncation_centre: the mean of the class, or of all classes (global).
            noise: random: from the seed of the tile; constant: the same for all tiles; none.
            precision: fp32, or bf16: half as fast again on processors that have it, and slightly other pixels.

        Raises:
            SettingError: lengths differ, a label is not a class, or a setting is out of range.
        """
        known, drawn = checked_labels(labels, seeds, self.classes)
        if batch_size < 1:
            raise SettingError(f"batch_size is {batch_size}.", "Use a positive number.")
        pull = self._pull(truncation, truncation_cutoff, truncation_centre)
        decode = self._decoder(noise, precision)
        # checked above and not in a generator function, so that a wrong request is refused when it is made
        parts = (slice(start, start + batch_size) for start in range(0, len(drawn), batch_size))
        return (decode(codes_of(self.network, known[p], drawn[p], pull), drawn[p]) for p in parts)

    def latents(
        self,
        labels: Sequence[int],
        seeds: Sequence[int],
        truncation: float = 1.0,
        space: Space = "w",
        truncation_cutoff: int | None = None,
        truncation_centre: Centre = "class",
    ) -> Tensor:
        """Codes of the tiles that `sample` makes, float32 on the CPU: z [N, z_dim], w [N, w_dim] or
        w+ [N, layers, w_dim]. z is never truncated.

        Raises:
            SettingError: as `sample`, an unknown space, or a cutoff in w, which has one code for all layers.
        """
        known, drawn = checked_labels(labels, seeds, self.classes)
        pull = self._pull(truncation, truncation_cutoff, truncation_centre)
        if space not in ("z", "w", "w+"):
            raise SettingError(f"space is {space!r}.", "Use z, w or w+.")
        if space == "z":
            return draw_z(self.network, drawn)
        if space == "w" and truncation_cutoff is not None:
            raise SettingError(f"truncation_cutoff is {truncation_cutoff} in w.", "Take the latents in w+.")
        codes = codes_of(self.network, known, drawn, pull).cpu()
        return layered(codes, self.layers) if space == "w+" and codes.ndim == 2 else codes

    def decode(
        self,
        latents: Tensor,
        seeds: Sequence[int] | None = None,
        *,
        space: Space | None = None,
        labels: Sequence[int] | None = None,
        noise: Noise | Tensor | None = None,
        precision: Precision = "fp32",
    ) -> Tensor:
        """Codes -> uint8 [N, 3, size, size] on the CPU.

        Args:
            latents: w [N, w_dim], w+ [N, layers, w_dim], or z [N, z_dim] with labels.
            seeds: of the random noise; with the seeds of `latents`, the tiles equal those of `sample`.
            space: z, w or w+; from the shape by default (two dimensions are z if labels are given, else w).
            labels: class of every z; an unlabelled generator needs none if `space` says z.
            noise: random (needs seeds), constant, none, or the noise itself [N, sum of r*r over the layers].
                By default random with seeds, else constant, so that tiles differ by their codes alone.

        Raises:
            DataError: the latents or the noise have another shape or type, or are not finite.
            SettingError: labels, seeds or noise that do not go together.
        """
        if space == "z" and labels is None and len(self.classes) == 1:
            labels = [0] * len(latents)
        shape = self.network.shape
        found = space_of(latents, shape.z_dim, shape.w_dim, self.layers, labels is not None)
        if space not in (None, found):
            raise DataError(
                f"space is {space!r}, but the latents {tuple(latents.shape)} look like {found}.",
                "Give z with labels, and w or w+ without.",
            )
        if found == "z":
            known, _ = checked_labels(labels or (), [0] * len(latents), self.classes)
            latents = map_codes(self.network, latents, known)
        if noise is None:
            noise = "constant" if seeds is None else "random"
        if isinstance(noise, Tensor):
            self._check_noise(noise, len(latents))
        elif noise == "random" and (seeds is None or len(seeds) != len(latents)):
            count = "no" if seeds is None else len(seeds)
            raise SettingError(f"Random noise for {len(latents)} codes came with {count} seeds.", "Give one a code.")
        return self._decoder(noise, precision)(latents, [0] * len(latents) if seeds is None else seeds)

    def synthesise(self, latents: Tensor, noise: Tensor | None = None) -> Tensor:
        """w [N, w_dim] or w+ [N, layers, w_dim] -> float32 in about [-1, 1], differentiable, on the device.

        With the constant noise of `decode`, or with `noise` [N, sum of r*r]; for encoders and inversion.
        """
        planes = self.network.const_noise() if noise is None else self.network.shape_noise(noise)
        return self.network.synthesise(latents.to(self.device), planes)

    def interpolate(
        self,
        labels: tuple[int, int],
        seeds: tuple[int, int],
        steps: int = 9,
        space: Space = "w",
        truncation: float = 1.0,
        noise: Noise = "constant",
    ) -> Tensor:
        """Tiles on the way from (labels[0], seeds[0]) to (labels[1], seeds[1]): uint8 [steps, 3, size, size].

        The same seed twice with two labels goes from class to class: in z through the class embeddings, in w
        straight from code to code. Random noise is that of the first seed all the way.

        Raises:
            SettingError: as `sample`, or fewer than two steps.
        """
        codes = self.way(labels, seeds, steps, space, truncation)
        return self._decoder(noise, "fp32")(codes, [int(seeds[0])] * steps)

    def way(
        self,
        labels: tuple[int, int],
        seeds: tuple[int, int],
        steps: int,
        space: Space = "w",
        truncation: float = 1.0,
    ) -> Tensor:
        """The codes w [steps, w_dim] of `interpolate`."""
        known, drawn = checked_labels(labels, seeds, self.classes)
        if len(known) != 2:
            raise SettingError(f"An interpolation got {len(known)} ends.", "Give two labels and two seeds.")
        if space != "z":
            return between(*self.latents(known, drawn, truncation), steps, "w")
        z = between(*draw_z(self.network, drawn), steps, "z")
        pull = self._pull(truncation)
        if self.network.mapping.embedding is None:
            return map_codes(self.network, z, [0] * steps, pull)
        # every step has a class of its own, between the two
        t = torch.linspace(0, 1, steps, device=self.device)[:, None]
        tables = {"embedding": self.network.mapping.embedding, "w_mean": self.network.mapping.w_mean}
        rows = {name: torch.lerp(table[known[0]], table[known[1]], t) for name, table in tables.items()}
        return map_codes(self.network, z, list(range(steps)), pull, rows)

    def mix(
        self,
        rows: Sequence[tuple[int, int]],
        columns: Sequence[tuple[int, int]],
        layers: str | Sequence[int] = "coarse",
        truncation: float = 1.0,
        noise: Noise = "constant",
    ) -> Tensor:
        """Style mixing: uint8 [rows, columns, 3, size, size], the given layers from the column, the rest from the row.

        Args:
            rows, columns: (label, seed) of each.
            layers: coarse, middle, fine, or layer numbers.

        Raises:
            SettingError: as `sample`; no row or column; layers that do not exist.
        """
        if not rows or not columns:
            raise SettingError(f"A grid of {len(rows)} x {len(columns)} was asked for.", "Give a row and a column.")
        a, b = (self.latents(*zip(*side, strict=True), truncation) for side in (rows, columns))
        codes = crossed(a, b, self.layers, span(self.layers, layers)).flatten(0, 1)
        seeds = [int(seed) for _, seed in rows for _ in columns]
        tiles = self._decoder(noise, "fp32")(codes, seeds)
        return tiles.view(len(rows), len(columns), 3, self.size, self.size)

    def _pull(self, truncation: float, cutoff: int | None = None, centre: Centre = "class") -> Pull:
        pull = Pull(truncation, cutoff, centre)
        pull.check(self.layers)
        return pull

    def _decoder(self, noise: Noise | Tensor, precision: Precision) -> Callable[[Tensor, Sequence[int]], Tensor]:
        if precision not in DTYPES:
            raise SettingError(f"precision is {precision!r}.", f"Use {' or '.join(DTYPES)}.")
        if isinstance(noise, str) and noise not in get_args(Noise):
            raise SettingError(f"noise is {noise!r}.", f"Use {', '.join(get_args(Noise))}.")
        return lambda codes, seeds: decode_codes(self.network, codes, seeds, noise, DTYPES[precision])

    def _check_noise(self, noise: Tensor, count: int) -> None:
        wanted = (count, sum(r * r for r in self.network.noise_shapes()))
        if tuple(noise.shape) != wanted:
            raise DataError(f"The noise has the shape {tuple(noise.shape)}.", f"Give {list(wanted)}.")


def load_discriminator(path: Path | str, device: str = "auto") -> Discriminator:
    """The discriminator of a GAN checkpoint, frozen; `features` is what anomaly scores compare.

    Raises:
        CheckpointError: as `GanGenerator.from_checkpoint`.
    """
    tensors, card = _read(path)
    network = Discriminator(shape_of(card, path))
    fill(network, tensors, "D.", path)
    return place(network, pick_device(device)).eval().requires_grad_(False)


def write_grid(network: Generator, path: Path, columns: int = 8, classes: Sequence[str] = ()) -> None:
    """A PNG with a row a class (the first 32) and the same seeds in every row; named if `classes` are given."""
    from histosynth.tiles.pictures import Row, save, sheet

    rows = min(rows_of(network), 32)
    tiles = render(network, [k for k in range(rows) for _ in range(columns)], list(range(columns)) * rows)
    names = classes if len(classes) == rows_of(network) else [""] * rows
    tiles = tiles.view(rows, columns, *tiles.shape[1:])
    save(path, sheet([Row(name, line) for name, line in zip(names[:rows], tiles, strict=True)], gap=0))


def _read(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, card = load_checkpoint(path)
    require_kind(card, "gan", path)
    return tensors, card


def shape_of(card: dict[str, Any], path: Path | str) -> Shape:
    """The shape of the networks in a checkpoint.

    Raises:
        CheckpointError: the card does not describe it, or in words of a newer version.
    """
    try:
        return Shape(**card["shape"])
    except (TypeError, KeyError, SettingError) as error:
        raise CheckpointError(
            f"The card of {path} does not describe the networks: {error}.", "Use a newer histosynth, or train anew."
        ) from error


def fill(network: nn.Module, tensors: dict[str, Tensor], prefix: str, path: Path | str) -> None:
    """Put the tensors under `prefix` into the network.

    Raises:
        CheckpointError: one is missing, unknown or of another shape.
    """
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        detail = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(
            f"The weights {prefix}* in {path} do not fit its card: {detail[0].strip()}", "Train or convert it anew."
        ) from error
