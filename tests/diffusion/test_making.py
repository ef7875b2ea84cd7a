"""Tile sets made with a diffusion checkpoint: by class, from training tiles, and from real tiles stained anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from histosynth import encoders
from histosynth.core.errors import CheckpointError, DataError, HistosynthError, RunError, SettingError
from histosynth.core.progress import bar
from histosynth.diffusion.panels import control_panel, denoising_frames, timeline
from histosynth.diffusion.sample import DiffusionGenerator, Sampling
from histosynth.evaluate.guards import Facts, conditioning
from histosynth.study import generators, restain
from histosynth.study.denoising import DenoisingConfig, draw_denoising
from histosynth.study.generators import GenerateConfig, make_tiles
from histosynth.study.restain import RestainConfig
from histosynth.tiles.batches import TileArray
from histosynth.tiles.images import read_rgb, write_png
from histosynth.tiles.split.leaks import check_synthetic
from histosynth.tiles.tileset import TileSet
from tests.diffusion.helpers import CLASSES, ColourMeans

QUICK = RestainConfig(steps=4, strength=0.5, precision="fp32", device="cpu")
FEW = GenerateConfig(per_class=3, steps=2, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def real(tiles: TileArray, tmp_path_factory: pytest.TempPathFactory) -> TileSet:
    """The training tiles of the checkpoint as a tile set, and three more of each class in val and test."""
    import pandas as pd

    folder = tmp_path_factory.mktemp("real") / "tiles"
    rng = np.random.default_rng(1)
    rows = []
    for image, label, name in zip(tiles.images, tiles.labels, tiles.ids, strict=True):
        rows.append((name, CLASSES[label], "train", image.transpose(1, 2, 0)))
    for split in ("val", "test"):
        rows += [(f"{split}-{c}-{k}", c, split, rng.integers(60, 220, (24, 24, 3), dtype=np.uint8))
                 for c in CLASSES for k in range(3)]  # fmt: skip
    for name, label, _, pixels in rows:
        write_png(folder / "images" / label / f"{name}.png", np.ascontiguousarray(pixels))
    table = pd.DataFrame({
        "id": [r[0] for r in rows], "path": [f"images/{r[1]}/{r[0]}.png" for r in rows], "label": [r[1] for r in rows],
        "split": [r[2] for r in rows], "width": [r[3].shape[1] for r in rows], "height": [r[3].shape[0] for r in rows],
        "sha256": [f"{i}" for i in range(len(rows))],
    })  # fmt: skip
    return TileSet.create(folder, table, CLASSES)


def pixels(tileset: TileSet) -> dict[str, np.ndarray]:
    return {row.id: read_rgb(tileset.folder / row.path)[0] for row in tileset.table.itertuples()}


def test_the_command_lines_defaults_are_those_of_the_generator() -> None:
    """So that a setting that was not given is not taken for one that was."""
    own = GenerateConfig()
    assert {n: getattr(own, n) for n in DiffusionGenerator.options} == Sampling().__dict__


def test_a_tile_set_of_each_class_with_one_bar_a_class(
    tuned_path: Path, real: TileSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[tuple[str, float, float]] = []
    monkeypatch.setattr(generators, "bar", lambda *a: bars.append(a) or bar(*a))
    config = replace(FEW, condition="tile")
    made = make_tiles(tuned_path, tmp_path / "out", config)
    assert bars == [(f"Make {label} (diffusion)", 3, 0) for label in ("STR", "TUM", "LYM")]
    assert sorted(p.name for p in (made.folder / "images" / "TUM").iterdir()) == [f"gen_000{k}.png" for k in range(3)]
    # every tile names the training tile that it was shown, of its own class
    labels = dict(zip(real.table.id, real.table.label, strict=True))
    assert [labels[r] for r in made.table.reference] == made.table.label.tolist()
    check_synthetic(real.table, made.table)
    assert (made.table.condition == "tile").all() and (made.table.solver == "dpm++").all()
    # each can be made again from its row
    row = made.table.iloc[4]
    one = DiffusionGenerator.from_checkpoint(tuned_path, "cpu", "fp32")
    settings = {"steps": 2, "condition": "tile", "like": row.reference}
    again = next(one.sample([one.classes.index(row.label)], [row.seed], **settings))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(again, pixels(made)[row.id])


def test_generation_goes_on_where_it_stopped(tuned_path: Path, tmp_path: Path) -> None:
    whole = pixels(make_tiles(tuned_path, tmp_path / "whole", FEW))
    part = make_tiles(tuned_path, tmp_path / "part", FEW).folder
    (part / "tileset.json").unlink()
    for path in sorted(part.rglob("gen_*.png"))[1:4]:
        path.unlink()
    again = pixels(make_tiles(tuned_path, part, replace(FEW, batch_size=1)))
    assert all(np.array_equal(again[name], whole[name]) for name in whole) and len(again) == 9
    (part / "tileset.json").unlink()
    with pytest.raises(RunError, match="another checkpoint, seed or setting"):
        make_tiles(tuned_path, part, replace(FEW, solver="ddim"))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"solver": "euler"}, "no solver 'euler'"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"condition": "tile", "like": "nobody"}, "like is 'nobody'"),
        ({"truncation": 0.5}, "truncation is 0.5, but a generator of kind 'diffusion' takes none"),
    ],
)
def test_a_wrong_wish_leaves_no_folder(tuned_path: Path, tmp_path: Path, changes: dict[str, Any], error: str) -> None:
    with pytest.raises(SettingError, match=error):
        make_tiles(tuned_path, tmp_path / "out", replace(FEW, **changes))
    assert not (tmp_path / "out").exists()


def test_restained_tiles_name_their_real_tile(tuned_path: Path, real: TileSet, tmp_path: Path) -> None:
    config = replace(QUICK, per_class=3, copies=2)
    made = restain.restain(tuned_path, real.folder, tmp_path / "a", config)
    split = dict(zip(real.table.id, real.table.split, strict=True))
    assert len(made.table) == 18 and made.meta["synthetic"] and made.table.seed.nunique() == 18
    assert {split[r] for r in made.table.reference} == {"train"} and (made.table.reference_split == "train").all()
    assert {split[r] for r in made.table.second_reference} == {"train"}
    check_synthetic(real.table, made.table)
    assert 0 < made.meta["layout"]["layout_nuclei"] <= 1 and "colour_gap" in made.meta["layout"]
    sheet = Image.open(made.folder / "restained.png")
    assert sheet.width > 3 * sheet.height // 4
    # goes on where it stopped, at any batch size
    before = pixels(made)
    (made.folder / "tileset.json").unlink()
    (made.folder / "restained.png").unlink()
    for path in sorted(made.folder.rglob("gen_*.png"))[::3]:
        path.unlink()
    after = pixels(restain.restain(tuned_path, real.folder, made.folder, replace(config, batch_size=1)))
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_the_colours_of_the_tile_told_are_put_on(tuned_path: Path, real: TileSet, tmp_path: Path) -> None:
    target = "t12"
    rows = real.table[real.table.split == "train"]
    towards = read_rgb(real.folder / rows[rows.id == target].path.iloc[0])[0].reshape(-1, 3).mean(0)
    gaps = {}
    for colours in ("reinhard", "none"):
        config = replace(QUICK, strength=0.25, per_class=4, like=target, colours=colours, guidance=1.0)
        made = restain.restain(tuned_path, real.folder, tmp_path / colours, config)
        assert set(made.table.second_reference) == {target}
        gaps[colours] = np.mean([np.abs(p.reshape(-1, 3).mean(0) - towards).mean() for p in pixels(made).values()])
    assert gaps["reinhard"] < gaps["none"]


@pytest.mark.parametrize("condition", ["bank", "prototype", "own"])
def test_other_conditions(
    condition: str, tuned_path: Path, real: TileSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(encoders, "load", lambda name, device: asked.append(name) or ColourMeans())
    made = restain.restain(tuned_path, real.folder, tmp_path / "a", replace(QUICK, condition=condition, per_class=2))
    assert len(made.table) == 6 and asked == (["colour-means"] if condition == "own" else [])


def test_test_tiles_are_refused_unless_asked_for_and_then_found(
    tuned_path: Path, real: TileSet, tmp_path: Path
) -> None:
    made = restain.restain(tuned_path, real.folder, tmp_path / "a", replace(QUICK, split="test", per_class=1))
    assert (made.table.reference_split == "test").all() and "real test tiles" in made.meta["conditioned_on"]
    with pytest.raises(DataError, match="outside train"):
        check_synthetic(real.table, made.table)
    found = conditioning(real.table, made.table, Facts(size=16, classes=CLASSES))
    assert found[0].severity == "refused"
    by_default = restain.restain(tuned_path, real.folder, tmp_path / "b", replace(QUICK, per_class=1))
    found = conditioning(real.table, by_default.table, Facts(size=16, classes=CLASSES))
    assert found[0].severity == "warning"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"strength": 0.0}, SettingError("strength is 0.0")),
        ({"copies": 0}, SettingError("copies is 0")),
        ({"per_class": -1}, SettingError("per_class is -1")),
        ({"colours": "reinhart"}, SettingError("colours is 'reinhart'.*Did you mean 'reinhard'")),
        ({"solver": "dpm"}, SettingError("no solver 'dpm'")),
        ({"classes": ("TUMOR",)}, DataError("no class 'TUMOR'.*Did you mean 'TUM'")),
        ({"split": "tests"}, DataError("no split 'tests'.*Did you mean 'test'")),
    ],
)
def test_wishes_that_cannot_be_met(
    tuned_path: Path, real: TileSet, tmp_path: Path, changes: dict[str, Any], error: HistosynthError
) -> None:
    with pytest.raises(type(error), match=str(error)):
        restain.restain(tuned_path, real.folder, tmp_path / "out", replace(QUICK, **changes))
    assert not (tmp_path / "out").exists()


def test_tile_sets_that_cannot_be_stained_anew(tuned_path: Path, real: TileSet, tmp_path: Path) -> None:
    def like(name: str, **changes: Any) -> TileSet:
        table = real.table.assign(**changes)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "images").symlink_to(real.folder / "images")
        return TileSet.create(folder, table, tuple(dict.fromkeys(table.label)))

    for tileset, message in (
        (like("small", width=12), "has 12 x 16 px, but the checkpoint takes 16 px"),
        (like("splitless", split=""), "has no split"),
        (like("made", generator="gan"), "holds synthetic tiles"),
        (like("stranger", label="MUC"), "does not know the class 'MUC'"),
        (like("moved", id=["x" + i for i in real.table.id]), "training tile .* is not in"),
    ):
        with pytest.raises(DataError, match=message):
            restain.restain(tuned_path, tileset.folder, tmp_path / "out", QUICK)
    # a training tile of the checkpoint that is a test tile here: its look would leak
    swapped = like("swapped", split=real.table.split.map({"train": "test", "test": "train", "val": "val"}))
    with pytest.raises(DataError, match="outside train"):
        restain.restain(tuned_path, swapped.folder, tmp_path / "out", QUICK)
    with pytest.raises(CheckpointError, match="does not exist"):
        restain.restain(tmp_path / "no.safetensors", real.folder, tmp_path / "out", QUICK)


def test_timeline_and_film(tuned_path: Path, tmp_path: Path) -> None:
    config = DenoisingConfig(classes=("TUM", "LYM"), steps=4, device="cpu")
    sheet, film = draw_denoising(tuned_path, tmp_path / "out", config)
    assert sheet.name == "timeline.png" and film.name == "denoising.gif"
    with Image.open(film) as frames:
        assert frames.n_frames == 5
    with pytest.raises(SettingError, match="does not know the class 'TUMOR'.*Did you mean 'TUM'"):
        draw_denoising(tuned_path, tmp_path / "x", DenoisingConfig(classes=("TUMOR",)))


def test_panels_put_tiles_together(tmp_path: Path) -> None:
    """Colour k of side s stands where it should: a sheet is read back."""

    def flat(value: int) -> torch.Tensor:
        return torch.full((3, 112, 112), value, dtype=torch.uint8)

    sides = {"real": [torch.stack([flat(10), flat(20)]), flat(30)[None]],
             "synthetic": [torch.stack([flat(110), flat(120)]), flat(130)[None]]}  # fmt: skip
    page = np.array(Image.open(control_panel(tmp_path / "p.png", ["TUM", "STR"], sides)))
    grey = page[:, :, 0]
    rows = [np.flatnonzero((grey == v).sum(1) > 100) for v in (10, 30)]
    assert rows[0].max() < rows[1].min()
    order = [np.flatnonzero((grey == v).sum(0) > 100).mean() for v in (10, 110, 20, 120)]
    assert order == sorted(order) and order[2] - order[1] > order[1] - order[0]  # a pair stands closer
    with pytest.raises(DataError, match="A panel of 2 classes"):
        control_panel(tmp_path / "q.png", ["TUM", "STR"], {**sides, "other": [flat(1)[None]]})
    steps = [(level, flat(level // 4)[None], flat(200)[None]) for level in (900, 500, 0)]
    frames = list(denoising_frames(["TUM"], steps))
    assert len({f.size for f in frames}) == 1 and len(frames) == 3
    line = np.array(Image.open(timeline(tmp_path / "t.png", ["TUM"], steps, columns=2)))[:, :, 0]
    assert (line == 225).sum() > 10_000 and (line == 125).sum() < 100  # first and last step of three
