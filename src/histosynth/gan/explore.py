"""Pictures that show what a generator has learnt: its classes, truncation, style mixing, ways between tiles, films."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image

from histosynth.core.errors import DataError, SettingError, did_you_mean
from histosynth.core.files import ensure_folder
from histosynth.core.progress import bar, say
from histosynth.gan.sample import GanGenerator
from histosynth.tiles.classes import class_entry
from histosynth.tiles.film import FilmFormat, film, film_suffix, training_frames
from histosynth.tiles.pictures import Row, save, sheet, zoom_for

What = Literal["classes", "truncation", "mixing", "interpolation", "film"]
_MOST_CLASSES = 20
_PSI = (0.0, 0.25, 0.5, 0.75, 1.0)
_LEGS = 3  # of the round trip in the film of interpolations
_FILM_COLUMNS = 5
_FILM_HEIGHT = 900


@dataclass(frozen=True)
class ExploreSettings:
    """What to show of a generator."""

    what: tuple[What, ...] = ()
    """classes: the same seeds in every class; truncation: from the mean of the class to the learned variety; mixing:
    coarse, middle or fine layers from another tile; interpolation: ways between classes and seeds, also as a film;
    film: the training, from its samples/ folder. By default all that there is."""
    classes: tuple[str, ...] = ()
    """Only these classes."""
    columns: int = 8
    """Tiles side by side."""
    seed: int = 0
    """The first seed; a tile in column k has seed + k."""
    truncation: float = 1.0
    """1 for the learned variety; less pulls tiles towards the mean of their class."""
    steps: int = 9
    """Tiles on the way from one class to the next."""
    frames: int = 12
    """Frames of the film from one seed to the next."""
    format: FilmFormat = "auto"
    """Of films: gif, mp4 (needs ffmpeg), or auto: mp4 where it can be written."""
    samples: Path | None = None
    """The samples/ folder of the training; the one beside the checkpoint by default."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        for name, least in (("columns", 1), ("frames", 1), ("steps", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"{name} is {getattr(self, name)}.", f"Use {least} or more.")
        for name in self.what:
            if name not in get_args(What):
                raise SettingError(f"what is {name!r}.", did_you_mean(name, get_args(What)))

    def wants(self, what: What) -> bool:
        """Whether this picture was asked for."""
        return not self.what or what in self.what


def explore(checkpoint: Path | str, out: Path | str, settings: ExploreSettings = ExploreSettings()) -> list[Path]:
    """Write the pictures into the folder `out`; gives their paths.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or no GAN.
        SettingError: a class that the generator does not know, or a setting out of range.
        DataError: the film was asked for, but there are no samples of a training.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    suffix = film_suffix(settings.format)
    shown = Shown(GanGenerator.from_checkpoint(checkpoint, settings.device), settings)
    samples = settings.samples or checkpoint.resolve().parent.parent / "samples"
    training = training_frames(samples) if settings.wants("film") else []
    if len(training) < 2 and "film" in settings.what:
        raise DataError(
            f"{samples} holds {len(training)} grids of training steps, too few for a film.",
            "Give --samples RUN/samples of a training with sample_every above 0.",
        )
    pages: dict[str, Callable[[], Image.Image]] = {}
    if settings.wants("classes"):
        pages["classes.png"] = shown.classes
    if settings.wants("truncation"):
        pages["truncation.png"] = shown.truncation
    if settings.wants("mixing"):
        pages["mixing-coarse.png"] = lambda: shown.mixing("coarse")
        pages["mixing-middle.png"] = lambda: shown.mixing("middle")
        pages["mixing-fine.png"] = lambda: shown.mixing("fine")
    if settings.wants("interpolation"):
        pages["interpolation.png"] = shown.ways
    films: dict[str, Callable[[], list[Image.Image]]] = {}
    if settings.wants("interpolation"):
        films[f"interpolation{suffix}"] = lambda: list(shown.journey())
    if len(training) > 1:
        films[f"training{suffix}"] = lambda: training
    ensure_folder(out)
    with bar("Pictures", len(pages) + len(films)) as tick:
        for name, draw in pages.items():
            save(out / name, draw())
            tick(1, name)
        for name, frames in films.items():
            # a way has no end to stop at; a training has
            loops = name.startswith("interpolation")
            film(out / name, frames(), 0.1 if loops else 0.3, 0.1 if loops else 2.0)
            tick(1, name)
    return [out / name for name in (*pages, *films)]


class Shown:
    """The pictures of one generator."""

    def __init__(self, generator: GanGenerator, settings: ExploreSettings) -> None:
        """Raises:
        SettingError: a class that the generator does not know.
        """
        self.generator, self.settings = generator, settings
        known = generator.classes
        if unknown := [c for c in settings.classes if c not in known]:
            raise SettingError(
                f"The generator does not know the class {unknown[0]!r}.", did_you_mean(unknown[0], known)
            )
        names = settings.classes or known
        if len(names) > _MOST_CLASSES:
            say(f"The pictures show the first {_MOST_CLASSES} of {len(names)} classes.")
        self.names = names[:_MOST_CLASSES]
        self.labels = [known.index(name) for name in self.names]
        self.seeds = list(range(settings.seed, settings.seed + settings.columns))
        self.zoom = zoom_for(generator.size)

    def classes(self) -> Image.Image:
        """A row a class, the same seeds in every row."""
        count = len(self.seeds)
        labels = [label for label in self.labels for _ in self.seeds]
        made = self.generator.sample(labels, self.seeds * len(self.labels), truncation=self.settings.truncation)
        rows = torch.cat(list(made)).split(count)
        return sheet([self._row(k, tiles) for k, tiles in enumerate(rows)], zoom=self.zoom)

    def truncation(self) -> Image.Image:
        """A row a class, two seeds from the mean of the class (psi 0) to the learned variety (psi 1)."""
        seeds = self.seeds[:2]
        labels = [label for label in self.labels for _ in seeds]
        codes = [self.generator.latents(labels, seeds * len(self.labels), psi) for psi in _PSI]
        tiles = self.generator.decode(torch.stack(codes, dim=1).flatten(0, 1)).split(len(seeds) * len(_PSI))
        rows = [self._row(k, line) for k, line in enumerate(tiles)]
        heads = [f"ψ {psi:g}, seed {seed}" for seed in seeds for psi in _PSI]
        return sheet(rows, heads, zoom=self.zoom)

    def mixing(self, which: str) -> Image.Image:
        """Tiles of some classes with the coarse, middle or fine layers of others."""
        picked = range(min(len(self.labels), max(2, self.settings.columns)))
        first = [(self.labels[k], self.settings.seed) for k in picked]
        if len(first) == 1:
            first = [(self.labels[0], seed) for seed in self.seeds]
        second = [(label, seed + self.settings.columns) for label, seed in first]
        truncation = self.settings.truncation
        grid = self.generator.mix(first, second, which, truncation)
        left, top = (self.generator.decode(self.generator.latents(*zip(*s, strict=True), truncation))
                     for s in (first, second))  # fmt: skip
        names = [self.generator.classes[label] for label, _ in first]
        corner = torch.full_like(top[:1], 255)
        rows = [Row("", torch.cat([corner, top]))]
        rows += [Row(name, torch.cat([left[k : k + 1], grid[k]])) for k, name in enumerate(names)]
        title = f"Rows, with the {which} layers of the columns"
        return sheet(rows, ["", *names], zoom=self.zoom, title=title)

    def ways(self) -> Image.Image:
        """From class to class with one seed, through the class embeddings; from seed to seed where there is one."""
        seed, steps, truncation = self.settings.seed, self.settings.steps, self.settings.truncation
        if len(self.labels) == 1:
            ends = [((self.labels[0],) * 2, (s, s + 1)) for s in self.seeds]
            names = [f"seed {s} → {s + 1}" for s in self.seeds]
        else:
            pairs = list(zip(self.labels, self.labels[1:] + self.labels[:1], strict=True))[: max(1, len(self.labels))]
            ends = [(pair, (seed, seed)) for pair in pairs]
            names = [f"{self.generator.classes[a]} → {self.generator.classes[b]}" for a, b in pairs]
        rows = [
            Row(name, self.generator.interpolate(labels, seeds, steps, "z", truncation))
            for name, (labels, seeds) in zip(names, ends, strict=True)
        ]
        return sheet(rows, zoom=self.zoom)

    def journey(self) -> Iterator[Image.Image]:
        """A round trip through seeds in every class: frames of a film that repeats."""
        columns, frames = min(_FILM_COLUMNS, len(self.seeds)), self.settings.frames
        codes = []
        for label in self.labels:
            for seed in self.seeds[:columns]:
                stops = [seed + 1000 * leg for leg in range(_LEGS)] + [seed]
                legs = [
                    self.generator.way((label, label), (a, b), frames + 1, "z", self.settings.truncation)[:-1]
                    for a, b in pairwise(stops)
                ]
                codes.append(torch.cat(legs))
        path = torch.stack(codes, dim=1)  # [frames, classes * columns, w_dim]
        rows = len(self.labels)
        zoom = max(1, min(self.zoom, _FILM_HEIGHT // (rows * self.generator.size)))
        for step in self.generator.decode(path.flatten(0, 1)).split(path.shape[1]):
            tiles = step.split(columns)
            yield sheet([self._row(k, line) for k, line in enumerate(tiles)], zoom=zoom)

    def _row(self, k: int, tiles: torch.Tensor) -> Row:
        name = self.names[k]
        long = class_entry(name, k, len(self.names))["name"]
        return Row(name, tiles, long if long != name else "")
