"""Sheets, films and the verb that draws them."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from histosynth.cli import main
from histosynth.core.checkpoint import save_checkpoint
from histosynth.core.errors import DataError, RunError, SettingError
from histosynth.gan.explore import ExploreSettings, Shown, explore
from histosynth.gan.generator import Shape
from histosynth.gan.sample import GanGenerator, write_grid
from histosynth.tiles import film as films
from histosynth.tiles.film import evenly, film, film_suffix, training_frames
from histosynth.tiles.pictures import Row, heat, sheet
from tests.gan.helpers import TINY
from tests.gan.test_sample import CARD, trained

SMALL = ExploreSettings(columns=2, steps=3, frames=2, format="gif", device="cpu")


def tiles(count: int, size: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def find(page: Image.Image, tile: torch.Tensor, zoom: int = 1) -> list[tuple[int, int]]:
    """Where a tile is in a picture, pixel by pixel: (top, left)."""
    pixels, wanted = np.asarray(page), np.repeat(np.repeat(tile.permute(1, 2, 0).numpy(), zoom, 0), zoom, 1)
    edge = len(wanted)
    starts = np.argwhere((pixels[: 1 - edge, : 1 - edge] == wanted[0, 0]).all(axis=2))
    return [(y, x) for y, x in starts.tolist() if np.array_equal(pixels[y : y + edge, x : x + edge], wanted)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(size=16, classes=3, **TINY)
    folder = tmp_path_factory.mktemp("run")
    network = trained(shape)
    for step in (0, 20, 5):
        write_grid(network, folder / "samples" / f"step-{step:06d}.png", 2, CARD["classes"])
    tensors = {f"G_ema.{k}": v for k, v in network.state_dict().items()}
    return save_checkpoint(
        folder / "checkpoints" / "gan.safetensors", tensors, CARD | {"kind": "gan", "shape": asdict(shape)}
    )


def test_without_words_a_sheet_is_the_tiles_alone() -> None:
    rows = tiles(6).view(2, 3, 3, 16, 16)
    made = np.asarray(sheet([Row("", row) for row in rows], gap=0))
    assert made.shape == (32, 48, 3)
    assert np.array_equal(made[16:, 16:32].transpose(2, 0, 1), rows[1, 1].numpy())


def test_names_stand_beside_the_tiles_and_pixels_are_enlarged_whole() -> None:
    rows = tiles(4).view(2, 2, 3, 16, 16)
    named = sheet([Row("ADI", rows[0], "adipose tissue"), Row("Épithélium", rows[1])], ["a", "b"], zoom=4, title="T")
    made = np.asarray(named)
    (at,) = find(named, rows[0, 0], 4)
    assert find(named, rows[1, 1], 4) == [(at[0] + 66, at[1] + 66)]
    beside = made[at[0] : at[0] + 64, : at[1]]
    assert (beside < 100).any() and (beside == 255).mean() > 0.8
    assert (made[: at[0]] < 150).any()


def test_long_names_are_shortened() -> None:
    one = tiles(1)
    wide = sheet([Row("A" * 500, one, "b " * 500)], zoom=4)
    assert wide.width < 300 and wide.height < 100


def test_sheets_that_cannot_be() -> None:
    with pytest.raises(DataError, match="0 shapes"):
        sheet([])
    with pytest.raises(DataError, match="2 shapes"):
        sheet([Row("", tiles(1)), Row("", tiles(1, 32))])


def test_heat() -> None:
    colours = heat(torch.tensor([[0.0, 50.0], [100.0, 900.0]]), 100.0)
    assert colours.shape == (3, 2, 2) and colours.dtype == torch.uint8
    brightness = colours.float().mean(dim=0).flatten().tolist()
    assert brightness[0] < brightness[1] < brightness[2] == brightness[3]


def test_evenly() -> None:
    assert evenly(3, 5) == [0, 1, 2] and evenly(0, 5) == []
    chosen = evenly(1000, 7)
    assert len(chosen) == 7 and chosen[0] == 0 and chosen[-1] == 999
    assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1


def test_a_film_has_its_frames_times_and_colours(tmp_path: Path) -> None:
    colours = [(200, 30, 90), (10, 160, 40), (255, 255, 255)]
    frames = [Image.new("RGB", (40, 30), colour) for colour in colours]
    path = film(tmp_path / "a.gif", frames, seconds=0.2, hold=1.0)
    with Image.open(path) as found:
        assert found.n_frames == 3 and found.size == (40, 30) and found.info["loop"] == 0
        for k, colour in enumerate(colours):
            found.seek(k)
            assert found.info["duration"] == (1000 if k == 2 else 200)
            assert np.abs(np.asarray(found.convert("RGB")).astype(int) - colour).max() <= 2


def test_a_film_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(films, "MAX_FRAMES", 10)
    frames = [Image.new("RGB", (2000, 100), (k, k, k)) for k in range(25)]
    with Image.open(film(tmp_path / "a.gif", frames)) as found:
        assert found.n_frames == films.MAX_FRAMES and found.size == (films.MAX_EDGE, 48)


def test_films_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="0 frames"):
        film(tmp_path / "a.gif", [])
    with pytest.raises(DataError, match="2 sizes"):
        film(tmp_path / "a.gif", [Image.new("RGB", (4, 4)), Image.new("RGB", (5, 4))])
    with pytest.raises(SettingError, match="avi"):
        film_suffix("avi")  # type: ignore[arg-type]


def program(folder: Path, code: str) -> None:
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)


def test_mp4_through_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert film_suffix("auto") == ".gif"
    with pytest.raises(SettingError, match="no ffmpeg"):
        film_suffix("mp4")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    program(tmp_path, f'for last; do :; done; echo "$@" > {tmp_path}/words; cat > "$last"')
    assert film_suffix("auto") == film_suffix("mp4") == ".mp4"
    frames = [Image.new("RGB", (6, 4), (k, 2 * k, 3 * k)) for k in range(3)]
    path = film(tmp_path / "a.mp4", frames, seconds=0.5, hold=1.0)
    pixels = np.frombuffer(path.read_bytes(), np.uint8).reshape(-1, 4, 6, 3)
    assert len(pixels) == 5  # the last one is held for two more
    assert np.array_equal(pixels[1], np.asarray(frames[1])) and np.array_equal(pixels[4], np.asarray(frames[2]))
    words = (tmp_path / "words").read_text()
    assert "-s 6x4" in words and "-r 2 " in words
    program(tmp_path, "cat > /dev/null; echo no such codec >&2; exit 1")
    with pytest.raises(RunError, match="no such codec"):
        film(tmp_path / "b.mp4", frames)
    assert not (tmp_path / "b.mp4").exists()


def test_training_frames_are_in_order_and_named(checkpoint: Path, tmp_path: Path) -> None:
    samples = checkpoint.parent.parent / "samples"
    frames = training_frames(samples)
    assert len(frames) == 3 and len({f.size for f in frames}) == 1
    with Image.open(samples / "step-000005.png") as grid:
        same = np.asarray(frames[1])[: grid.height]
        assert np.array_equal(same, np.asarray(grid.convert("RGB")))
    done = [(np.asarray(f)[-2] != 255).any(axis=1).sum() for f in frames]  # the bar under the picture
    assert done[0] <= 1 < done[1] < done[2] == frames[2].width
    assert training_frames(tmp_path) == [] and training_frames(tmp_path / "gone") == []
    (tmp_path / "step-000001.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match="step-000001"):
        training_frames(tmp_path)


def test_explore_writes_everything(checkpoint: Path, tmp_path: Path) -> None:
    words = ["explore", str(checkpoint), str(tmp_path / "out"), "--columns", "2", "--steps", "3", "--frames", "2"]
    main([*words, "--format", "gif", "--device", "cpu"])
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "classes.png", "truncation.png", "mixing-coarse.png", "mixing-middle.png", "mixing-fine.png",
        "interpolation.png", "interpolation.gif", "training.gif",
    }  # fmt: skip
    with Image.open(tmp_path / "out" / "interpolation.gif") as found:
        assert found.n_frames == 6
    only = explore(checkpoint, tmp_path / "one", ExploreSettings(what=("classes",), classes=("TUM",), device="cpu"))
    assert [p.name for p in only] == ["classes.png"] == [p.name for p in (tmp_path / "one").iterdir()]


def test_the_pictures_show_what_the_generator_makes(checkpoint: Path) -> None:
    generator = GanGenerator.from_checkpoint(checkpoint, "cpu")
    shown = Shown(generator, SMALL)
    zoom = shown.zoom
    assert find(shown.classes(), next(generator.sample([2], [1]))[0], zoom)
    assert find(shown.truncation(), generator.decode(generator.latents([2], [1], 0.75))[0], zoom)
    mixed = shown.mixing("fine")
    assert find(mixed, generator.mix([(1, 0)], [(0, 2)], "fine")[0, 0], zoom)
    assert find(mixed, generator.decode(generator.latents([1], [2]))[0], zoom)
    assert find(shown.ways(), generator.interpolate((2, 0), (0, 0), 3, "z")[1], zoom)
    assert not find(shown.ways(), generator.interpolate((2, 0), (7, 7), 3, "z")[1], zoom)
    first, *_ = shown.journey()
    assert first.size == list(shown.journey())[-1].size


def test_an_unlabelled_generator_has_pictures_too() -> None:
    maker = GanGenerator(trained(Shape(size=16, classes=0, **TINY)), CARD, torch.device("cpu"))
    shown = Shown(maker, SMALL)
    for picture in (shown.classes(), shown.truncation(), shown.mixing("coarse"), shown.ways(), *shown.journey()):
        assert picture.width > 32


def test_wrong_wishes(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="TUM"):
        explore(checkpoint, tmp_path, ExploreSettings(classes=("TUMOR",), device="cpu"))
    with pytest.raises(DataError, match="0 grids"):
        explore(checkpoint, tmp_path, ExploreSettings(what=("film",), samples=tmp_path, device="cpu"))
    for wrong in ({"columns": 0}, {"steps": 1}, {"frames": 0}, {"seed": -1}, {"what": ("classs",)}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            ExploreSettings(**wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
