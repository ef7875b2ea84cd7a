"""Generation from a diffusion checkpoint: no image is needed, only classes and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from histosynth.autoencoder.network import to_uint8
from histosynth.core.device import pick_device
from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.core.precision import Precision, autocast, half_type
from histosynth.core.seeds import torch_generator
from histosynth.diffusion.conditions import Teller, Told, draw_condition
from histosynth.diffusion.convolutional import FastUNet
from histosynth.diffusion.fast import Fast, fast_network
from histosynth.diffusion.model import LatentDiffusion, load_model
from histosynth.diffusion.solve import Solving, Watch, context_of, first_step, run_solver, solve

__all__ = ["DiffusionGenerator", "Sampling", "draw_condition", "run_solver"]

MICRO = {"cpu": 2}
"""Tiles that go through the networks together, always: the last batch is padded. Matrix products may round
differently at different batch sizes, so a fixed one is what makes a tile independent of its neighbours. With two on
a CPU a single tile costs little more than unpadded."""
_MICRO = 16
WIDE = 16
"""Tiles that go through the denoiser together where that changes no bit of a tile (`FastUNet.same_in_every_batch`): on
processors that compute in bfloat16, many tiles then cost a third less than two by two."""


@dataclass(frozen=True)
class Sampling(Solving):
    """What `DiffusionGenerator.sample` takes beside labels and seeds."""

    condition: str = "bank"
    """What a tile is told beside its class: bank, tile, prototype or interpolate; see `Teller`."""
    like: str = ""
    """With tile and interpolate: the id of the training tile, instead of one drawn by the seed."""
    towards: str = ""
    """With interpolate: the class of the other tile."""
    share: float = 0.5
    """With interpolate: how far towards the other tile."""
    precision: Precision = "auto"
    """Arithmetic: fp32, bf16, fp16, or auto: what the generator was opened with."""

    @classmethod
    def of(cls, settings: dict[str, Any]) -> Sampling:
        """From keywords.

        Raises:
            SettingError: a name that is no setting.
        """
        known = [f.name for f in fields(cls)]
        if wrong := [name for name in settings if name not in known]:
            raise SettingError(f"There is no setting {wrong[0]!r}.", did_you_mean(wrong[0], known))
        return cls(**settings)


@dataclass(frozen=True)
class _Request:
    """Tiles to be made.

    Attributes:
        images: uint8 tiles to start from, or none.
    """

    labels: list[int]
    seeds: list[int]
    told: list[Told]
    how: Sampling
    images: Tensor | None = None
    strength: float = 1.0


class DiffusionGenerator:
    """A `LatentGenerator` around a diffusion model.

    A tile's starting noise follows from its seed. By default its condition is drawn, by the seed, from its class's
    bank of training embeddings: two of them mixed so that the spread of the class is kept, with a little noise. A
    tile is therefore not a variation on one training tile.

    Args:
        model: what `load_model` gave.
        micro_batch: tiles in the networks at a time; see `MICRO`. Another number changes the rounding of a tile.
        fast: false runs the backbone's own pass, where there is a faster one of the same function.

    Raises:
        SettingError: an unknown precision, or no positive micro_batch.
    """

    options: ClassVar[dict[str, Any]] = asdict(Sampling())
    """What `sample` takes beside labels and seeds, with the defaults."""

    def __init__(
        self,
        model: LatentDiffusion,
        device: torch.device,
        precision: Precision = "auto",
        micro_batch: int | None = None,
        fast: bool = True,
    ) -> None:
        half_type(device, precision)
        self.model = model.to(device)
        self.device, self.precision = device, precision
        self.classes: tuple[str, ...] = model.classes
        self.size: int = model.size
        self.card: dict[str, Any] = model.card
        self.micro_batch = MICRO.get(device.type, _MICRO) if micro_batch is None else micro_batch
        if self.micro_batch < 1:
            raise SettingError(f"micro_batch is {micro_batch}.", "Give a positive number.")
        self._fixed = micro_batch is not None
        self._wants_fast = fast
        self._fast: dict[torch.dtype | None, Fast | None] = {}
        self._same: dict[tuple[torch.dtype | None, int], bool] = {}

    @classmethod
    def from_checkpoint(cls, path: Path | str, device: str = "auto", precision: Precision = "auto") -> Self:
        """Read a checkpoint that `train_diffusion` wrote ("base" for the shipped one).

        Raises:
            CheckpointError: it cannot be read.
        """
        return cls(load_model(path), pick_device(device), precision)

    def sample(
        self, labels: Sequence[int], seeds: Sequence[int], batch_size: int = 16, **settings: Any
    ) -> Iterator[Tensor]:
        """Yield uint8 [n, 3, size, size] in the order asked for, n = `batch_size` but for the last.

        Args:
            labels: class indices.
            seeds: one a tile; the same (label, seed, settings) gives the same tile whatever stands beside it.
            batch_size: tiles a yield; what goes through the networks together is fixed.
            settings: those of `Sampling`.

        Raises:
            SettingError: labels out of range, lengths that differ, a setting out of range, or a class that has no
                training tile to be told.
        """
        return self._tiles(self._request(labels, seeds, settings), batch_size)

    def latents(self, labels: Sequence[int], seeds: Sequence[int], **settings: Any) -> Tensor:
        """The latents float32 [N, C, h, w] (on the CPU) of the tiles that `sample` would make."""
        request = self._request(labels, seeds, settings)
        return torch.cat([torch.empty(0, *self.model.backbone.latent), *self._latents(request)])

    def origins(self, labels: Sequence[int], seeds: Sequence[int], **settings: Any) -> dict[str, list[str]]:
        """The training tiles behind the tiles that `sample` would make, as columns of a tile set's table.

        Returns:
            reference: the id of the one training tile that conditions a tile, or ""; second_reference: that of the
            second, where a tile lies between two.
        """
        told = self._request(labels, seeds, settings).told
        return {"reference": [t.reference for t in told], "second_reference": [t.second_reference for t in told]}

    def edit(
        self,
        images: Tensor,
        labels: Sequence[int],
        seeds: Sequence[int],
        strength: float,
        batch_size: int = 16,
        embeddings: Tensor | None = None,
        **settings: Any,
    ) -> Iterator[Tensor]:
        """SDEdit (Meng et al. 2022): tiles get noise up to a level, and it is removed again under a condition.

        Args:
            images: uint8 [N, 3, size, size].
            labels, seeds, batch_size, settings: as in `sample`.
            strength: share of the noise steps, above 0 to 1: little keeps the tile, 1 forgets it.
            embeddings: raw embeddings float [N, dim] of the checkpoint's encoder to tell, instead of what
                `condition` draws.

        Raises:
            SettingError: as `sample`, or a strength out of range.
            DataError: tiles or embeddings of another size, type or number.
        """
        first_step(1, strength)
        request = self._request(labels, seeds, settings)
        shape = (3, self.size, self.size)
        if images.dtype != torch.uint8 or tuple(images.shape) != (len(request.told), *shape):
            raise DataError(
                f"The tiles are {images.dtype} {list(images.shape)}.",
                f"This takes uint8 {[len(request.told), *shape]}: one tile a label, of the checkpoint's size.",
            )
        told = request.told if embeddings is None else self._as_told(embeddings, len(request.told))
        return self._tiles(_Request(request.labels, request.seeds, told, request.how, images, strength), batch_size)

    def watch(self, labels: Sequence[int], seeds: Sequence[int], **settings: Any) -> list[tuple[int, Tensor, Tensor]]:
        """Every step of the making of a few tiles.

        Returns:
            For each step its noise level, and what the noisy latents and the estimate of the clean ones decode to: two
            uint8 [N, 3, size, size]. The last entry is (0, tiles, tiles).
        """
        request = self._request(labels, seeds, settings)
        seen: dict[int, tuple[int, list[Tensor], list[Tensor]]] = {}

        def note(step: int, level: int, noisy: Tensor, clean: Tensor) -> None:
            _, one, other = seen.setdefault(step, (level, [], []))
            one.append(noisy)
            other.append(clean)

        ends = list(self._latents(request, note))
        steps = []
        for level, *sides in [*seen.values(), (0, ends, ends)]:
            kept = [[part[: len(end)] for part, end in zip(side, ends, strict=True)] for side in sides]
            noisy, clean = (self._decode(torch.cat(side), request.how) for side in kept)
            steps.append((level, noisy, clean))
        return steps

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] -> uint8 [N, 3, size, size], on the CPU."""
        return self._decode(latents, Sampling())

    @torch.no_grad()
    def _decode(self, latents: Tensor, how: Sampling) -> Tensor:
        if not len(latents):
            return torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)

        def pixels(part: Tensor) -> Tensor:
            with autocast(self.device, self._precision(how)):
                return to_uint8(self.model.backbone.decode(part.to(self.device))).cpu()

        return self._in_parts(pixels, latents)

    def _tiles(self, request: _Request, batch_size: int) -> Iterator[Tensor]:
        if batch_size < 1:
            raise SettingError(f"batch_size is {batch_size}.", "Give a positive number.")

        # checked here and not within, so that a wrong request is refused when it is made
        def batches() -> Iterator[Tensor]:
            ready: list[Tensor] = []
            for latents in self._latents(request):
                ready.extend(self._decode(latents, request.how))
                while len(ready) >= batch_size:
                    yield torch.stack(ready[:batch_size])
                    del ready[:batch_size]
            if ready:
                yield torch.stack(ready)

        return batches()

    def _latents(self, request: _Request, watch: Watch | None = None) -> Iterator[Tensor]:
        count = len(request.labels)
        width = self._width(request.how, count)
        for at in range(0, count, width):
            # where every batch size gives the same bits, the last one is padded to a size that was looked at
            rows = min(_at_least(count - at), width) if width > self.micro_batch else width
            yield self._batch(request, slice(at, at + width), rows, watch)

    @torch.no_grad()
    def _batch(self, request: _Request, part: slice, rows: int, watch: Watch | None) -> Tensor:
        """Latents float32 [n, C, h, w] of a part of a request, at most `rows` tiles, padded to that number."""
        seeds, told, how = request.seeds[part], request.told[part], request.how
        noise = torch.stack([torch.randn(self.model.backbone.latent, generator=torch_generator(s)) for s in seeds])
        nothing = torch.zeros(self.model.encoder["dim"])
        context = self._in_parts(
            partial(context_of, self.model),
            torch.stack([nothing if t.embedding is None else t.embedding for t in told]),
            torch.tensor(request.labels[part]),
            torch.tensor([t.embedding is not None for t in told]),
            torch.tensor([t.other for t in told]),
            torch.tensor([t.share for t in told]),
        )
        clean = None
        if request.images is not None:
            with autocast(self.device, self._precision(how)):
                clean = self._in_parts(lambda x: self.model.backbone.encode(x.to(self.device)), request.images[part])
            clean = _padded(clean.float(), rows)
        latents = solve(
            self.model,
            _padded(noise, rows),
            _padded(context, rows),
            how,
            self._precision(how),
            generators=[torch_generator(seeds[min(i, len(seeds) - 1)], "solver") for i in range(rows)],
            clean=clean,
            strength=request.strength,
            fast=self._fast_network(how),
            watch=watch,
        )
        return latents[: len(seeds)]

    def _width(self, how: Sampling, count: int) -> int:
        """Tiles that go through the denoiser together when `count` are asked for."""
        fast = None if self._fixed else self._fast_network(how)
        if not isinstance(fast, FastUNet) or self.micro_batch >= WIDE:
            return self.micro_batch
        key = half_type(self.device, self._precision(how)), torch.get_num_threads()
        if key not in self._same:
            if count <= self.micro_batch:  # not worth a look
                return self.micro_batch
            self._same[key] = fast.same_in_every_batch(self.model.backbone.latent[1], 2 * WIDE)
        return WIDE if self._same[key] else self.micro_batch

    def _in_parts(self, make: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """`make` of rows, a micro-batch at a time, the last one padded."""
        size, made = self.micro_batch, []
        for at in range(0, len(values[0]), size):
            rows = [x[at : at + size] for x in values]
            made.append(make(*(_padded(x, size) for x in rows))[: len(rows[0])])
        return torch.cat(made)

    def _request(self, labels: Sequence[int], seeds: Sequence[int], settings: dict[str, Any]) -> _Request:
        how = Sampling.of(settings)
        how.check(self.model)
        half_type(self.device, how.precision)
        labels, seeds = [int(k) for k in labels], [int(s) for s in seeds]
        if len(labels) != len(seeds):
            raise SettingError(f"{len(labels)} labels came with {len(seeds)} seeds.", "Give one seed a tile.")
        for label in labels:
            if not 0 <= label < len(self.classes):
                raise SettingError(
                    f"A label is {label}, but the checkpoint has {len(self.classes)} classes.",
                    f"Use 0 to {len(self.classes) - 1}: {', '.join(self.classes)}.",
                )
        teller = Teller(self.model.bank, self.classes, how.condition, how.like, how.towards, how.share)
        return _Request(labels, seeds, [teller(k, s) for k, s in zip(labels, seeds, strict=True)], how)

    def _as_told(self, embeddings: Tensor, count: int) -> list[Told]:
        shape = (count, self.model.encoder["dim"])
        if tuple(embeddings.shape) != shape or not bool(embeddings.isfinite().all()):
            raise DataError(
                f"The embeddings are {embeddings.dtype} {list(embeddings.shape)}.",
                f"Give finite numbers {list(shape)}, those of the encoder {self.model.encoder['name']}.",
            )
        conditioner = self.model.conditioner
        return [Told(e) for e in conditioner.standardise(embeddings.to(conditioner.mean.device)).cpu()]

    def _precision(self, how: Sampling) -> Precision:
        return self.precision if how.precision == "auto" else how.precision

    def _fast_network(self, how: Sampling) -> Fast | None:
        kind = half_type(self.device, self._precision(how))
        if self._wants_fast and kind not in self._fast:
            self._fast[kind] = fast_network(self.model.backbone, kind)
        return self._fast.get(kind)


def _padded(values: Tensor, rows: int) -> Tensor:
    """The last row repeated until there are `rows`."""
    return values[torch.arange(rows).clamp_max(len(values) - 1)]


def _at_least(count: int) -> int:
    """The smallest power of two that is no smaller."""
    return 1 << (count - 1).bit_length()
