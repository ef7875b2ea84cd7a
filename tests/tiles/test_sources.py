"""Import: formats, damage, CSV mistakes, splits and leaks."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histosynth.core.errors import DataError, RunError, SettingError
from histosynth.tiles.images import read_rgb, square
from histosynth.tiles.sources import ImportConfig, import_tiles
from histosynth.tiles.split import SplitConfig, near_duplicate_groups, split_by_group
from histosynth.tiles.tileset import TileSet, safe_name
from tests.tiles.conftest import texture


def test_class_folders_become_a_tile_set(folders, tmp_path):
    tileset = import_tiles(folders, tmp_path / "out")
    assert tileset.classes == ("A", "B", "C c")
    assert set(tileset.kept.split) == {"train", "val", "test"} and len(tileset.kept) == 24
    assert "no patients were given" in tileset.meta["split_protocol"]
    row = tileset.kept.iloc[0]
    stored, kind = read_rgb(tileset.folder / row.path)
    original, _ = read_rgb(folders / row.source)
    assert kind == "PNG" and np.array_equal(stored, original)
    again = TileSet.open(tmp_path / "out")
    pd.testing.assert_frame_equal(again.table, tileset.table)
    assert import_tiles(folders, tmp_path / "twice").digest == tileset.digest


def test_decoded_pixels_are_cached_and_a_damaged_cache_is_remade(folders, tmp_path):
    tileset = import_tiles(folders, tmp_path / "out")
    first = tileset.array("train", size=32)
    assert first.images.shape[1:] == (3, 32, 32) and first.images.dtype == np.uint8
    (cache,) = (tmp_path / "out" / "cache").glob("*.npy")
    cache.write_bytes(cache.read_bytes()[:200])
    assert np.array_equal(tileset.array("train", size=32).images, first.images)
    path = tileset.folder / tileset.rows("train").path[0]
    assert np.array_equal(first.images[0], square(read_rgb(path)[0], 32).transpose(2, 0, 1))


def test_damage_is_set_aside_and_never_stops_the_import(folders, tmp_path):
    good = (folders / "A" / "0.png").read_bytes()
    (folders / "A" / "text.png").write_text("not an image")
    (folders / "A" / "half.png").write_bytes(good[: len(good) // 2])
    (folders / "A" / "empty.png").write_bytes(b"")
    (folders / "A" / "copy.png").write_bytes(good)
    (folders / "A" / "folder.png").mkdir()
    (folders / "B" / "two-labels.png").write_bytes((folders / "A" / "1.png").read_bytes())
    (folders / "Empty").mkdir()
    (folders / "Broken").mkdir()
    (folders / "Broken" / "x.jpg").write_text("x")
    Image.new("RGB", (5, 5)).save(folders / "A" / "tiny.png")
    tileset = import_tiles(folders, tmp_path / "out")
    reasons = tileset.table[~tileset.table.kept].set_index("id").reason
    assert reasons["text"].startswith("unreadable") and reasons["half"].startswith("unreadable")
    assert reasons["empty"].startswith("unreadable") and reasons["tiny"].startswith("too small")
    assert reasons.str.startswith("copy").sum() == 1
    assert reasons.str.startswith("two labels").sum() == 2, "nobody knows which label is right: both go"
    assert tileset.classes == ("A", "B", "C c")
    assert tileset.meta["empty_classes"] == ["Broken", "Empty"]
    assert not list((tmp_path / "out").rglob("*.tmp*"))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "LA", "1"])
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_every_usual_kind_of_image_is_read_as_rgb(tmp_path, mode, suffix):
    rgb = Image.fromarray(texture(1, 64))
    grey = np.asarray(rgb.convert("L"))
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else rgb.convert(mode)
    path = tmp_path / f"x.{suffix}"
    try:
        image.save(path)
    except (OSError, KeyError):
        pytest.skip(f"{suffix} cannot hold {mode}")
    found, _ = read_rgb(path)
    assert found.shape == (64, 64, 3) and found.dtype == np.uint8
    expected = np.asarray(rgb) if mode in ("RGBA", "CMYK", "P") else np.repeat(grey[..., None], 3, 2)
    if mode != "1":
        assert np.abs(found.astype(int) - expected).mean() < (25 if mode == "P" else 6)


def test_transparency_is_laid_on_white_and_exif_turns_are_applied(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_rgb(tmp_path / "clear.png")[0] == 255).all()
    image = Image.fromarray(texture(2, 40)).crop((0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    assert read_rgb(tmp_path / "turned.png")[0].shape == (40, 20, 3)


def test_a_decompression_bomb_is_refused(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match="too many pixels for a tile"):
        read_rgb(tmp_path / "bomb.png")


def test_square_takes_the_centre_and_antialiases():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 200
    assert (square(image, 20) == 200).all()
    checks = ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert square(checks, 16).std() < 30, "a fine chequerboard becomes grey, not an alias"


def write_csv(folders, columns=("path", "label", "patient"), **changes):
    rows = [
        {"path": str(p.relative_to(folders)), "label": p.parent.name, "patient": f"{p.stem}"}
        for p in sorted(folders.rglob("*.png"))
    ]
    frame = pd.DataFrame(rows).assign(**changes)[[*columns, *(c for c in changes if c not in columns)]]
    frame.to_csv(folders / "tiles.csv", index=False)
    return folders


def test_csv_with_patients_never_splits_a_patient(folders, tmp_path):
    tileset = import_tiles(write_csv(folders), tmp_path / "out")
    assert tileset.kept.groupby("patient").split.nunique().max() == 1
    assert tileset.meta["split_protocol"] == "by patient"
    other = import_tiles(folders, tmp_path / "seed1", ImportConfig(split=SplitConfig(seed=1)))
    assert other.kept.split.tolist() != tileset.kept.split.tolist()


def test_csv_mistakes_are_named(folders, tmp_path):
    write_csv(folders, columns=("path", "patient"), lable="A")
    with pytest.raises(DataError, match="no column 'label'.*Did you mean 'lable'"):
        import_tiles(folders, tmp_path / "a")
    write_csv(folders)
    frame = pd.read_csv(folders / "tiles.csv", dtype=str)
    frame.loc[3, "patient"] = ""
    frame.to_csv(folders / "tiles.csv", index=False)
    with pytest.raises(DataError, match="1 row.s. without a patient"):
        import_tiles(folders, tmp_path / "b")
    (folders / "tiles.csv").write_text("path,label\n")
    with pytest.raises(DataError, match="has no row"):
        import_tiles(folders, tmp_path / "c")
    write_csv(folders, split="trian")
    with pytest.raises(DataError, match="'trian'.*Did you mean 'train'"):
        import_tiles(folders, tmp_path / "d")
    (folders / "other.csv").write_text("path,label\n")
    (folders / "tiles.csv").rename(folders / "third.csv")
    with pytest.raises(DataError, match="several CSV files"):
        import_tiles(folders, tmp_path / "e")
    assert not (tmp_path / "a" / "tileset.json").exists()


def test_a_patient_planted_in_two_splits_is_refused(folders, tmp_path):
    write_csv(folders)
    frame = pd.read_csv(folders / "tiles.csv", dtype=str)
    frame["split"] = ["train" if int(p) < 4 else "val" if int(p) < 6 else "test" for p in frame.patient]
    frame.to_csv(folders / "tiles.csv", index=False)
    assert import_tiles(folders, tmp_path / "ok").meta["split_protocol"] == "as given, checked by patient"
    frame.loc[(frame.patient == "0") & (frame.label == "B"), "split"] = "test"
    frame.to_csv(folders / "tiles.csv", index=False)
    with pytest.raises(DataError, match="more than one split: 0"):
        import_tiles(folders, tmp_path / "leak")


def test_missing_files_are_set_aside_and_nothing_at_all_is_refused(folders, tmp_path):
    write_csv(folders)
    (folders / "A" / "0.png").unlink()
    tileset = import_tiles(folders, tmp_path / "out")
    assert (~tileset.table.kept).sum() == 1
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        import_tiles(tmp_path / "void", tmp_path / "o2")
    with pytest.raises(DataError, match="does not exist"):
        import_tiles(tmp_path / "nowhere", tmp_path / "o3")
    with pytest.raises(RunError, match="Cannot write"):
        import_tiles(folders, folders / "tiles.csv" / "out")


def test_a_used_folder_is_not_overwritten(folders, tmp_path):
    import_tiles(folders, tmp_path / "out")
    with pytest.raises(RunError, match="already holds a tile set"):
        import_tiles(folders, tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(RunError, match="other files .chapter1.tex"):
        import_tiles(folders, tmp_path / "thesis")
    (tmp_path / "out" / "tileset.json").unlink()
    assert len(import_tiles(folders, tmp_path / "out").kept) == 24, "a half-finished import is taken up again"


def test_files_of_one_name_keep_their_own_tiles(folders, tmp_path):
    tileset = import_tiles(folders, tmp_path / "out")
    assert tileset.table.id.is_unique and tileset.table.path.is_unique


def test_a_repeated_import_never_keeps_old_pixels(folders, tmp_path):
    write_csv(folders, patient="everyone")
    with pytest.raises(DataError, match="At least three"):
        import_tiles(folders, tmp_path / "out")
    Image.fromarray(texture(999)).save(folders / "A" / "0.png")
    tileset = import_tiles(write_csv(folders), tmp_path / "out")
    row = tileset.kept[tileset.kept.source == "A/0.png"].iloc[0]
    assert np.array_equal(read_rgb(tileset.folder / row.path)[0], texture(999))


def test_no_usable_file_and_folders_of_splits_are_named(folders, tmp_path):
    write_csv(folders, path="elsewhere/x.png")
    with pytest.raises(DataError, match="None of the 24 files"):
        import_tiles(folders, tmp_path / "out")
    for old, new in (("A", "train"), ("B", "Test"), ("C c", "val")):
        (folders / old).rename(folders / new)
    (folders / "tiles.csv").unlink()
    with pytest.raises(DataError, match="like splits and not like classes"):
        import_tiles(folders, tmp_path / "out2")


def test_a_given_split_without_patients_is_kept(folders, tmp_path):
    write_csv(folders, columns=("path", "label"))
    frame = pd.read_csv(folders / "tiles.csv", dtype=str)
    frame["split"] = [("train", "train", "val", "test")[i % 4] for i in range(len(frame))]
    frame.to_csv(folders / "tiles.csv", index=False)
    slightly = np.clip(texture(0).astype(int) + 1, 0, 255).astype(np.uint8)
    Image.fromarray(slightly).save(folders / "A" / "3.png")  # looks like a training tile, and is in the test
    tileset = import_tiles(folders, tmp_path / "out")
    assert tileset.kept.sort_values("source").split.tolist() == frame.sort_values("path").split.tolist()


def test_safe_names_do_not_collide():
    names = [safe_name(t) for t in ("a b", "a_b", "a/b", "a:b", "../x", "ü", "", "x" * 200)]
    assert len(set(names)) == len(names)
    assert all("/" not in n and ".." not in n and n and len(n) <= 80 for n in names)


def test_split_is_stratified_and_gives_rare_classes_to_every_side():
    rng = np.random.default_rng(0)
    groups, labels = [], []
    for patient in range(60):
        label = "rare" if patient < 3 else "common" if patient < 40 else "middle"
        count = int(rng.integers(1, 12))
        groups += [f"p{patient}"] * count
        labels += [label] * count
    sides = np.array(split_by_group(groups, labels, SplitConfig()))
    table = pd.crosstab(pd.Series(labels), pd.Series(sides))
    assert (table.loc["rare"] > 0).all()
    shares = table.loc["common"] / table.loc["common"].sum()
    assert shares["train"] == pytest.approx(0.6, abs=0.06) and shares["test"] == pytest.approx(0.25, abs=0.06)
    assert all(len(set(sides[np.array(groups) == g])) == 1 for g in set(groups))
    few = split_by_group(["a", "b", "c", "d"], ["w", "x", "y", "z"], SplitConfig())
    assert set(few) == {"train", "val", "test"}, "no side stays empty"
    with pytest.raises(DataError, match="At least three"):
        split_by_group(["a", "b"], ["x", "y"], SplitConfig())
    with pytest.raises(SettingError, match="val=0.6"):
        split_by_group(groups, labels, SplitConfig(val=0.6, test=0.6))


def test_near_duplicates_are_grouped_and_strangers_are_not():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (60, 12, 12), dtype=np.uint8)
    tiles = [np.asarray(Image.fromarray(c).resize((32, 32), Image.Resampling.BICUBIC)) for c in coarse]
    noisy = [np.clip(t.astype(int) + rng.integers(-2, 3, t.shape), 0, 255) for t in tiles[:5]]
    groups = near_duplicate_groups(np.array([*tiles, *noisy]).astype(np.uint8))
    assert groups[:5] == groups[60:]
    assert len(set(groups)) == 60
