"""Pictures of how a diffusion model makes tiles: a timeline and a film."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histosynth.core.errors import SettingError, did_you_mean
from histosynth.core.files import ensure_folder
from histosynth.core.progress import say
from histosynth.tiles.film import FilmFormat, film, film_suffix

_MOST = 6


@dataclass(frozen=True)
class DenoisingConfig:
    """Which tiles to watch."""

    classes: tuple[str, ...] = ()
    """Only these classes; all by default, at most six."""
    seed: int = 0
    """Seed of the tiles."""
    guidance: float = 2.0
    """How much more a tile is made to look like what it is told; 1 is no guidance."""
    steps: int = 20
    """Steps of the solver."""
    solver: str = "dpm++"
    """dpm++, ddim, euler-a or ddpm."""
    format: FilmFormat = "gif"
    """Of the film: gif, mp4 (needs ffmpeg), or auto: mp4 where it can be written."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def draw_denoising(checkpoint: Path | str, out: Path | str, config: DenoisingConfig = DenoisingConfig()) -> list[Path]:
    """Write timeline.png and the film into the folder `out`; gives their paths.

    Raises:
        CheckpointError: the checkpoint is no diffusion model, or cannot be used.
        SettingError: a class that it does not know, or a setting out of range.
    """
    from histosynth.diffusion.panels import denoising_frames, timeline
    from histosynth.diffusion.sample import DiffusionGenerator

    suffix = film_suffix(config.format)
    generator = DiffusionGenerator.from_checkpoint(checkpoint, config.device)
    for name in config.classes:
        if name not in generator.classes:
            raise SettingError(
                f"The checkpoint does not know the class {name!r}.", did_you_mean(name, generator.classes)
            )
    names = config.classes or generator.classes
    if len(names) > _MOST:
        say(f"The pictures show the first {_MOST} of {len(names)} classes.")
    names = names[:_MOST]
    settings: dict[str, Any] = {"guidance": config.guidance, "steps": config.steps, "solver": config.solver}
    labels = [generator.classes.index(name) for name in names]
    steps = generator.watch(labels, [config.seed] * len(labels), **settings)
    out = ensure_folder(out)
    frames = list(denoising_frames(names, steps))
    return [timeline(out / "timeline.png", names, steps), film(out / f"denoising{suffix}", frames, 0.25, 2.5)]
