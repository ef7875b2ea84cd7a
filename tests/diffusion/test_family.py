"""What experiments ask of the diffusion model reaches the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from histosynth.diffusion import family
from histosynth.tiles.batches import TileArray


@pytest.mark.parametrize(("steps", "every"), [(1000, 250), (120, 100)])
def test_validation_tiles_choose_the_weights_where_there_are_any(
    tiles: TileArray, monkeypatch: pytest.MonkeyPatch, steps: int, every: int
) -> None:
    asked: list[tuple[Any, Any]] = []

    def recipe(data: TileArray, config: Any, folder: Path, *, device: str, held_out: TileArray | None) -> Path:
        asked.append((config, held_out))
        return folder

    monkeypatch.setattr(family, "train_diffusion", recipe)
    given: dict[str, Any] = {"size": 16, "steps": steps, "seconds": None, "seed": 0, "init": "base", "device": "cpu"}
    family.train(tiles, Path("run"), **given, validation=tiles)
    family.train(tiles, Path("run"), **given)
    (with_tiles, held_out), (without, nothing) = asked
    assert with_tiles.validate_every == every and held_out is tiles
    assert without.validate_every == 0 and nothing is None
