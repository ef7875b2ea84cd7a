"""The verb `pixcell`: training tiles in, a synthetic tile set out, on a tiny PixCell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histosynth.cli import build_app
from histosynth.core.errors import CheckpointError, DataError, RunError, SettingError
from histosynth.evaluate import guards
from histosynth.study.pixcell import PixCellConfig, draw_zero_shot
from histosynth.study.references import open_references
from histosynth.tiles.images import read_rgb, write_png
from histosynth.tiles.split.leaks import check_synthetic
from histosynth.tiles.tileset import TileSet
from tests.diffusion.pixcell_folder import ColourEncoder, write_folder

SPLITS = ["train"] * 4 + ["val", "test"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pixcell"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> TileSet:
    """Six tiles of 40 px of two classes each, of which four are for training, and a class for the test alone."""
    folder, rng, rows = tmp_path_factory.mktemp("real"), np.random.default_rng(0), []
    for label, splits in (("TUM", SPLITS), ("STR", SPLITS), ("RARE", ["test"])):
        for k, split in enumerate(splits):
            path = f"images/{label}/{k}.png"
            write_png(folder / path, rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            rows.append({"id": f"{label}-{k}", "path": path, "label": label, "split": split, "sha256": f"{label}{k}",
                         "width": 40, "height": 40, "kept": True})  # fmt: skip
    return TileSet.create(folder, pd.DataFrame(rows), ["TUM", "STR", "RARE"], made_by="test")


@pytest.fixture
def config(weights: Path) -> PixCellConfig:
    return PixCellConfig(weights=str(weights), per_class=5, steps=2, device="cpu")


def draw(real: TileSet | Path, out: Path, config: PixCellConfig) -> TileSet:
    return draw_zero_shot(real.folder if isinstance(real, TileSet) else real, out, config, encoder=ColourEncoder())


def bytes_of(made: TileSet) -> dict[str, str]:
    return dict(zip(made.kept.id, made.kept.sha256, strict=True))


def test_every_tile_names_the_training_tile_it_was_shown(real: TileSet, tmp_path: Path, config: PixCellConfig) -> None:
    made = draw(real, tmp_path / "out", config)
    assert made.classes == ("TUM", "STR") and len(made.kept) == 10
    assert (made.folder / "images" / "TUM" / "gen_0000.png").is_file()
    assert read_rgb(made.folder / "images" / "STR" / "gen_0004.png")[0].shape == (32, 32, 3)
    train = set(real.rows("train").id)
    assert set(made.kept.reference) == train  # all eight are shown, the fifth tile goes round again
    assert (made.kept.reference.str[:3] == made.kept.label).all()
    assert made.kept.seed.nunique() == 10 and made.kept.sha256.nunique() == 10
    check_synthetic(real.table, made.table)
    assert made.meta["synthetic"] and made.meta["generator"] == "pixcell-256"
    assert made.meta["licence"] == "CC BY-NC-ND 4.0" and made.meta["sampling"]["solver"] == "dpm++"
    facts = guards.Facts(size=32, classes=real.classes, n=1)
    assert [f.guard for f in guards.conditioning(real.table, made.kept, facts)] == ["conditioned on train"]


def test_an_interrupted_call_goes_on_to_the_same_tiles(
    real: TileSet, tmp_path: Path, config: PixCellConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = draw(real, tmp_path / "whole", config)
    from histosynth.study import pixcell

    kept, calls = pixcell.write_png, []

    def stops(path: Path, image: np.ndarray) -> None:
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(path)
        kept(path, image)

    monkeypatch.setattr(pixcell, "write_png", stops)
    with pytest.raises(KeyboardInterrupt):
        draw(real, tmp_path / "out", config)
    assert not TileSet.is_tileset(tmp_path / "out")
    monkeypatch.setattr(pixcell, "write_png", kept)
    before = {p: p.stat().st_mtime_ns for p in calls}
    again = draw(real, tmp_path / "out", config)
    assert bytes_of(again) == bytes_of(whole)
    assert {p: p.stat().st_mtime_ns for p in calls} == before
    with pytest.raises(RunError, match="another checkpoint, seed or setting"):
        draw(real, tmp_path / "out", replace(config, guidance=1.0))


def test_more_tiles_begin_with_the_same(real: TileSet, tmp_path: Path, config: PixCellConfig) -> None:
    few = draw(real, tmp_path / "few", replace(config, per_class=2, classes=("STR",)))
    many = draw(real, tmp_path / "many", config)
    assert bytes_of(few).items() <= bytes_of(many).items()


def test_the_four_conditions(real: TileSet, tmp_path: Path, config: PixCellConfig) -> None:
    made = {
        condition: draw(real, tmp_path / condition, replace(config, per_class=2, condition=condition))  # type: ignore[arg-type]
        for condition in ("reference", "prototype", "between")
    }
    nothing = replace(config, per_class=2, condition="nothing", classes=("TUM", "STR"))
    made["nothing"] = draw(real, tmp_path / "nothing", nothing)
    assert len({tuple(bytes_of(m).values()) for m in made.values()}) == 4
    assert (made["prototype"].kept.reference == "").all()
    assert made["prototype"].meta["conditioned_on"] == "the mean embedding of each class, over 8 training tiles"
    between = made["between"].kept
    assert (between.reference != between.second_reference).all() and (between.second_reference != "").all()
    assert made["nothing"].meta["conditioned_on"] == "" and (made["nothing"].kept.condition == "nothing").all()
    at_one_end = draw(real, tmp_path / "end", replace(config, per_class=2, condition="between", share=0.0))
    assert not set(bytes_of(at_one_end).values()) & set(bytes_of(made["between"]).values())


def test_tiles_of_val_and_test_are_never_shown(real: TileSet, tmp_path: Path, config: PixCellConfig) -> None:
    for name, split in (("TUM-4", "val"), ("STR-5", "test")):
        with pytest.raises(DataError, match=f"'{name}' .* is of the {split} split"):
            draw(real, tmp_path / "out", replace(config, only=("TUM-0", name)))
    one = draw(real, tmp_path / "one", replace(config, only=("TUM-1",)))
    assert set(one.kept.reference) == {"TUM-1"} and one.classes == ("TUM",)
    with pytest.raises(DataError, match="no tile 'TUM-9'"):
        draw(real, tmp_path / "out", replace(config, only=("TUM-9",)))
    assert not (tmp_path / "out").exists()


def test_a_class_without_training_tiles_is_drawn_from_nothing(
    real: TileSet, tmp_path: Path, config: PixCellConfig
) -> None:
    made = draw(real, tmp_path / "out", replace(config, per_class=1, classes=("RARE", "TUM"))).kept.set_index("label")
    assert made.condition.to_dict() == {"RARE": "nothing", "TUM": "reference"}
    assert made.reference["RARE"] == ""
    with pytest.raises(DataError, match="no class 'TUMM'.*'TUM'"):
        draw(real, tmp_path / "other", replace(config, classes=("TUMM",)))


def test_tile_sets_that_cannot_be_shown(real: TileSet, tmp_path: Path, config: PixCellConfig) -> None:
    bare = TileSet.create(tmp_path / "bare", real.table.assign(split=""), real.classes)
    with pytest.raises(DataError, match="has no split.*histosynth tiles prepare"):
        draw(bare, tmp_path / "out", config)
    made = TileSet.create(tmp_path / "made", real.table.assign(generator="gan"), real.classes, synthetic=True)
    with pytest.raises(DataError, match="holds synthetic tiles"):
        draw(made, tmp_path / "out", config)
    tested = TileSet.create(tmp_path / "tested", real.table.assign(split="test"), real.classes)
    with pytest.raises(DataError, match="no training tile"):
        draw(tested, tmp_path / "out", config)


def test_plain_folders_can_be_shown(real: TileSet, tmp_path: Path, config: PixCellConfig) -> None:
    made = draw(real.folder / "images", tmp_path / "classes", replace(config, per_class=1))
    assert set(made.classes) == {"TUM", "STR", "RARE"}
    assert made.kept.reference.str.match(r"(TUM|STR|RARE)/\d\.png").all()
    flat = draw(real.folder / "images" / "TUM", tmp_path / "flat", replace(config, per_class=2))
    assert flat.classes == ("TUM",) and set(flat.kept.reference) <= {f"{k}.png" for k in range(6)}
    listed = tmp_path / "listed.csv"
    rows = [f"{real.folder}/{p},{label},{split}" for p, label, split in zip(real.kept.path, real.kept.label,
                                                                            real.kept.split, strict=True)]  # fmt: skip
    listed.write_text("path,label,split\n" + "\n".join(r for r in rows if r.endswith(("train", "val"))) + "\n")
    shown = open_references(listed)
    assert len(shown.table) == 8
    with pytest.raises(DataError, match="is of the val split"):
        open_references(listed, only=(next(r for r in rows if r.endswith("val")).split(",")[0],))


def test_tiles_of_mixed_sizes_keep_their_own(real: TileSet, tmp_path: Path, config: PixCellConfig) -> None:
    """What a tile is told does not depend on the tiles beside it."""
    folder = tmp_path / "mixed" / "TUM"
    folder.mkdir(parents=True)
    for k in range(3):
        image, _ = read_rgb(real.folder / f"images/TUM/{k}.png")
        Image.fromarray(image).resize((40 + 8 * k, 40 + 8 * k)).save(folder / f"{k}.png")
    mixed = draw(folder.parent, tmp_path / "a", replace(config, per_class=3))
    index = mixed.kept.set_index("reference")
    alone = draw(folder.parent, tmp_path / "b", replace(config, only=("TUM/1.png",), per_class=3)).kept
    twin = alone[alone.seed == index.seed["TUM/1.png"]]
    assert twin.sha256.tolist() == [index.sha256["TUM/1.png"]]


def test_several_tokens_see_the_parts_of_a_tile(real: TileSet, tmp_path: Path, config: PixCellConfig) -> None:
    weights = write_folder(tmp_path / "four", tokens=4)
    made = draw(real, tmp_path / "out", replace(config, weights=str(weights), per_class=1))
    assert made.kept.width.tolist() == [64, 64]


def test_settings_out_of_range_are_refused_before_anything_is_written(
    real: TileSet, tmp_path: Path, config: PixCellConfig
) -> None:
    for words, changes in (
        ("per_class is 0", {"per_class": 0}),
        ("pool is 0", {"pool": 0}),
        ("share is 2", {"share": 2}),
        ("condition is 'x'", {"condition": "x"}),
    ):
        with pytest.raises(SettingError, match=words):
            draw(real, tmp_path / "out", replace(config, **changes))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="colour-quarters gives 24"):
        draw_zero_shot(real.folder, tmp_path / "out", config, encoder=ColourEncoder(dim=24))
    for words, changes in (("steps is 0", {"steps": 0}), ("guidance is -1", {"guidance": -1.0})):
        with pytest.raises(SettingError, match=words):
            draw(real, tmp_path / "out", replace(config, **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_verb_says_how_to_get_gated_weights(
    real: TileSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    monkeypatch.setenv("HISTOSYNTH_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    words = ["pixcell", str(real.folder), str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(CheckpointError, match="pixcell-256.*CC BY-NC-ND 4.0.*hf download"):
        build_app()(words, exit_on_error=False)
    with pytest.raises(CheckpointError, match="uni2-h.*CC BY-NC-ND 4.0.*hf download MahmoodLab/UNI2-h"):
        build_app()([*words, "--weights", str(weights)], exit_on_error=False)
    build_app()([*words, "--weights", str(weights), "--condition", "nothing", "--classes", "TUM", "--per-class", "1",
                 "--steps", "1"], exit_on_error=False)  # fmt: skip
    assert len(TileSet.open(tmp_path / "out").kept) == 1
