"""The verb that finds the latent codes of tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.core.errors import SettingError
from histosynth.core.progress import say
from histosynth.gan.projector import ProjectSettings
from histosynth.study.projection import ProjectFiles, project_tiles


def project(
    checkpoint: Path,
    *paths: Annotated[Path, Parameter(name="TILES-AND-OUT")],
    config: Annotated[ProjectSettings, Parameter(name="*")] = ProjectSettings(),
    files: Annotated[ProjectFiles, Parameter(name="*")] = ProjectFiles(),
) -> None:
    """Find the latent codes of tiles, the inverse of generation: histosynth project CHECKPOINT TILES... OUT

    Writes latents.safetensors, projection.csv with the distances, and sheet.png; repeat the command to go on.

    Args:
        checkpoint: a GAN.
        paths: tile sets, folders of images or image files, and at the end the folder to make.
    """
    if len(paths) < 2:
        raise SettingError(f"{len(paths)} path(s) were given.", "Give at least one tile and, last, the folder to make.")
    found = project_tiles(checkpoint, paths[:-1], paths[-1], config, files)
    say("Median: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    say(f"Codes: {paths[-1] / 'latents.safetensors'}")
