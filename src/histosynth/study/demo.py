"""The main job on built-in data: a simulated hospital with rare classes and its own staining."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from histosynth.core.files import ensure_folder
from histosynth.study.compare import CompareConfig, run_comparison, spell
from histosynth.tiles.simulate import PhantomConfig, simulate
from histosynth.tiles.tileset import TileSet

RARE = {"MUC": 6, "NORM": 6, "TUM": 6}


@dataclass(frozen=True)
class DemoConfig:
    """The demonstration."""

    out: Path = Path("runs/demo")
    """Folder of the run and its report; repeat the command to go on with it."""
    minutes: float = 5.0
    """Time budget on two CPU cores."""
    seed: int = 0
    """Seed of the hospital, the trainings and the tiles."""
    size: int = 64
    """Edge length of the tiles in pixels."""
    generator_steps: dict[str, int] = field(default_factory=dict)
    """Training steps of a generator, such as --generator-steps.gan 150, instead of what the minutes allow."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""


def demo(*, config: Annotated[DemoConfig, Parameter(name="*")] = DemoConfig()) -> Path:
    """Compare a GAN and a diffusion model on simulated tissue and write the report.

    Six classes are common and three are rare (six training tiles each). The patients of the test are
    others than those of the training, and the hospital's staining is not one that the shipped weights saw.
    """
    tiles = ensure_folder(config.out.with_name(f"{config.out.name}-tiles-{config.seed}-{config.size}"))
    wanted = PhantomConfig(per_class=80, rare=RARE, patients=30, size=config.size, val=0.2, test=0.4, seed=config.seed)
    if not TileSet.is_tileset(tiles):
        simulate(tiles, wanted)
    settings = CompareConfig(
        minutes=config.minutes,
        seed=config.seed,
        size=config.size,
        generator_steps=config.generator_steps,
        device=config.device,
    )
    command = spell("demo", [], config, config.out)
    return run_comparison(tiles, config.out, settings, verb="demo", command=command)
