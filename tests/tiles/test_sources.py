"""Sources and import: folders, tables, archives, damage, mistakes, splits and leaks."""

import json
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histosynth.core.errors import DataError, HistosynthError, RunError, SettingError
from histosynth.tiles.images import read_rgb, square
from histosynth.tiles.sources.source import ImportConfig, import_tiles, list_tiles, open_source, unique_ids
from histosynth.tiles.split.assign import SplitConfig, near_duplicate_groups, split_by_group
from histosynth.tiles.tileset import SPLITS, TileSet, safe_name
from tests.tiles.conftest import mutated, texture


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
    first = np.array(tileset.array("train", size=32).images)
    assert first.shape[1:] == (3, 32, 32) and first.dtype == np.uint8
    (cache,) = (tmp_path / "out" / "cache").glob("*.npy")
    cache.write_bytes(cache.read_bytes()[:200])
    assert np.array_equal(tileset.array("train", size=32).images, first)
    path = tileset.folder / tileset.rows("train").path[0]
    assert np.array_equal(first[0], square(read_rgb(path)[0], 32).transpose(2, 0, 1))


def test_a_split_is_a_part_of_the_memory_map(folders, tmp_path):
    tileset = import_tiles(folders, tmp_path / "out")
    whole, seen = tileset.array(size=32), []
    assert sorted(whole.ids) == sorted(tileset.kept.id)
    for split in SPLITS:
        part, rows = tileset.array(split, size=32), tileset.rows(split)
        assert isinstance(part.images, np.memmap) and len(rows)
        assert part.ids == rows.id.tolist() and part.groups == rows.patient.tolist()
        assert [part.classes[k] for k in part.labels] == rows.label.tolist()
        pixels = [square(read_rgb(tileset.folder / p)[0], 32).transpose(2, 0, 1) for p in rows.path]
        assert np.array_equal(part.images, pixels)
        seen += part.ids
    assert whole.ids == seen
    assert np.array_equal(whole.images[-1], pixels[-1])
    with pytest.raises(DataError, match="no split 'tset'"):
        tileset.array("tset", size=16)
    assert not list((tmp_path / "out" / "cache").glob("pixels-16-*"))  # refused before anything is decoded


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


def test_a_folder_below_a_single_folder_imports_as_an_unpacked_archive_would(folders, tmp_path):
    expected = import_tiles(folders, tmp_path / "out")
    for name in ("tables", "images"):
        shutil.copytree(folders, tmp_path / name / "NCT-CRC-HE-100K")
    write_csv(tmp_path / "tables" / "NCT-CRC-HE-100K")
    found = import_tiles(tmp_path / "images", tmp_path / "again")
    assert found.digest == expected.digest and found.meta["source"] == "NCT-CRC-HE-100K"
    assert (list_tiles(tmp_path / "tables").patient != "").all()
    single = tmp_path / "one" / "TUM"  # a class, not a collection
    shutil.copytree(folders, single)
    assert set(list_tiles(tmp_path / "one").label) == {"TUM"}


@pytest.mark.parametrize("names", [("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"), ("train", "test", "extra")])
def test_folders_of_collections_are_not_taken_for_classes(folders, tmp_path, names):
    for old, new in (("A", "ADI"), ("B", "TUM"), ("C c", "NORM")):
        (folders / old).rename(folders / new)
    for name in names:
        shutil.copytree(folders, tmp_path / "both" / name)
    with pytest.raises(DataError, match=r"no classes: they hold folders of classes \(ADI, NORM, TUM\).*prepare"):
        list_tiles(tmp_path / "both")
    (tmp_path / "both" / names[0] / "TUM").rename(tmp_path / "both" / names[0] / "patient 1")
    assert set(list_tiles(tmp_path / "both").label) == set(names)


def test_a_published_split_is_refused_before_anything_is_copied(folders, tmp_path):
    for protocol, message in (("nct-crc", "one source is imported.*tiles prepare"), ("nct", "Did you mean 'nct-crc'")):
        with pytest.raises(SettingError, match=message):
            import_tiles(folders, tmp_path / "out", ImportConfig(split=SplitConfig(protocol=protocol)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["[]", "{}", "null", "[" * 100_000, '{"classes": [{"label": "A"}], "digest": "x"}', '{"classes": 3}']
)
def test_a_tile_set_without_its_description_is_refused(folders, tmp_path, text):
    import_tiles(folders, tmp_path / "out")
    (tmp_path / "out" / "tileset.json").write_text(text)
    with pytest.raises(DataError, match="tileset.json"):
        TileSet.open(tmp_path / "out")


def test_a_damaged_table_of_a_tile_set_is_refused(folders, tmp_path):
    path = import_tiles(folders, tmp_path / "out").folder / "tiles.parquet"
    table, data = pd.read_parquet(path), path.read_bytes()
    for changed in (table.drop(columns="label"), table.assign(width="a"), table.assign(label="Z")):
        changed.to_parquet(path, index=False)
        with pytest.raises(DataError, match="no column 'label'|cannot be read|class 'Z'"):
            TileSet.open(tmp_path / "out")
    refused = 0
    for number in range(60):
        path.write_bytes(mutated(data, number))
        try:
            TileSet.open(tmp_path / "out")
        except DataError:
            refused += 1
    assert refused


def test_a_given_split_is_kept_but_for_training_copies_of_test_tiles(folders, tmp_path):
    write_csv(folders, columns=("path", "label"))
    frame = pd.read_csv(folders / "tiles.csv", dtype=str)
    frame["split"] = [("train", "train", "val", "test")[i % 4] for i in range(len(frame))]
    frame.to_csv(folders / "tiles.csv", index=False)
    slightly = np.clip(texture(0).astype(int) + 1, 0, 255).astype(np.uint8)
    Image.fromarray(slightly).save(folders / "A" / "3.png")  # looks like a training tile, and is in the test
    table = import_tiles(folders, tmp_path / "out").table.set_index("source")
    aside = table.index[~table.kept].tolist()
    assert aside == [frame.path[0]] and table.reason[aside[0]].startswith("near-duplicate")
    rest = frame.set_index("path").split.drop(aside)
    assert table.split[rest.index].tolist() == rest.tolist()


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


def packed(folder, out, kind, top=""):
    """An archive of a folder, below the folder `top` if it is given."""
    root = folder
    if top:
        root = out.parent / "packing"
        shutil.copytree(folder, root / top)
    made = shutil.make_archive(str(out), kind, root)
    if top:
        shutil.rmtree(root)
    return made


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "xztar"])
@pytest.mark.parametrize("top", ["", "NCT-CRC-HE-100K"])
def test_an_archive_imports_as_its_folder_does(folders, tmp_path, kind, top):
    (folders / "Empty").mkdir()
    expected = import_tiles(folders, tmp_path / "folder")
    found = import_tiles(packed(folders, tmp_path / "x", kind, top), tmp_path / "out")
    assert found.digest == expected.digest and found.meta["empty_classes"] == ["Empty"]
    assert found.table.source.tolist() == expected.table.source.tolist()
    with_table = packed(write_csv(folders), tmp_path / "y", kind, top)
    assert import_tiles(with_table, tmp_path / "out2").meta["split_protocol"] == "by patient"


def test_one_class_of_a_known_name_is_not_taken_for_a_wrapping_folder(folders, tmp_path):
    shutil.rmtree(folders / "B"), shutil.rmtree(folders / "C c")
    (folders / "A").rename(folders / "TUM")
    assert set(open_source(packed(folders, tmp_path / "x", "zip")).table.label) == {"TUM"}
    assert set(open_source(packed(folders, tmp_path / "y", "zip", "data")).table.label) == {"TUM"}


def digest_of(source, path):
    return int(source.rgb(path)[0].sum())


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "gztar", "parquet"])
def test_a_source_can_be_read_in_other_processes(folders, tmp_path, kind):
    if kind == "folder":
        source = open_source(folders)
    elif kind == "parquet":
        source = open_source(embedded(folders, tmp_path / "x.parquet"))
    else:
        source = open_source(packed(folders, tmp_path / "x", kind))
    paths = source.table.path.tolist()
    assert len(paths) == 24
    expected = [digest_of(source, p) for p in paths]
    assert digest_of(pickle.loads(pickle.dumps(source)), paths[-1]) == expected[-1]
    if kind in ("zip", "gztar"):
        with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
            assert list(pool.map(digest_of, [source] * 24, paths)) == expected
    with pytest.raises(DataError):
        source.rgb("A/none.png")


def test_tables_as_parquet(folders, tmp_path):
    write_csv(folders)
    frame = pd.read_csv(folders / "tiles.csv")  # patients are numbers here
    assert frame.patient.dtype.kind == "i"
    frame.to_parquet(folders / "tiles.parquet")
    with_csv = list_tiles(folders)
    (folders / "tiles.csv").unlink()
    pd.testing.assert_frame_equal(list_tiles(folders), with_csv)
    pd.testing.assert_frame_equal(list_tiles(folders / "tiles.parquet"), with_csv)
    frame.assign(patient=frame.patient.astype(float), kept=frame.index != 0).to_parquet(folders / "tiles.parquet")
    pd.testing.assert_frame_equal(list_tiles(folders), with_csv[1:].reset_index(drop=True))
    (folders / "tiles.parquet").write_bytes((folders / "tiles.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="tiles.parquet cannot be read"):
        open_source(folders)
    frame.drop(columns="label").to_parquet(folders / "tiles.parquet")
    with pytest.raises(DataError, match="no column 'label'"):
        open_source(folders)


def embedded(folders, path, names=True, rows=slice(None), **columns):
    """The tiles of class folders inside a parquet file, as HuggingFace keeps images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(folders.rglob("*.png"))[rows]
    labels = sorted({p.parent.name for p in sorted(folders.rglob("*.png"))})
    images = [{"bytes": p.read_bytes(), "path": f"{p.parent.name}-{p.name}"} for p in files]
    table = pa.table({"image": images, "label": [labels.index(p.parent.name) for p in files], **columns})
    if names:
        feature = {"names": labels, "_type": "ClassLabel"}
        content = json.dumps({"info": {"features": {"label": feature, "image": {"_type": "Image"}}}})
        table = table.replace_schema_metadata({"huggingface": content})
    pq.write_table(table, path, row_group_size=5)
    return path


def test_parquet_with_the_images_inside(folders, tmp_path):
    path = embedded(folders, tmp_path / "x.parquet")
    source = open_source(path)
    assert source.table.path[0] == "A-0.png" and set(source.table.label) == {"A", "B", "C c"}
    backwards = [source.rgb(p)[0] for p in source.table.path[::-1]][::-1]
    for found, original in zip(backwards, sorted(folders.rglob("*.png")), strict=True):
        assert np.array_equal(found, read_rgb(original)[0])
    expected, found = import_tiles(folders, tmp_path / "a").kept, import_tiles(path, tmp_path / "b").kept
    assert sorted(found.sha256) == sorted(expected.sha256)
    assert set(open_source(embedded(folders, path, names=False)).table.label) == {"class-0", "class-1", "class-2"}
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="cannot be read"):
        open_source(path)


def test_parquet_shards_give_the_split(folders, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    embedded(folders, shards / "train-00000-of-00002.parquet", rows=slice(0, None, 3))
    embedded(folders, shards / "train-00001-of-00002.parquet", rows=slice(1, None, 3))
    assert set(open_source(shards).table.split) == {""}, "train alone is no split"
    embedded(folders, shards / "test-00000-of-00001.parquet", rows=slice(2, None, 3))
    source = open_source(shards)
    assert source.table.split.value_counts().to_dict() == {"train": 16, "test": 8}
    tileset = import_tiles(shards, tmp_path / "out")
    assert len(tileset.kept) == 24 and set(tileset.kept.split) == {"train", "val", "test"}


def test_a_tile_set_can_be_imported_again(folders, tmp_path):
    first = import_tiles(write_csv(folders), tmp_path / "one")
    again = import_tiles(tmp_path / "one", tmp_path / "two")
    assert sorted(again.kept.sha256) == sorted(first.kept.sha256)
    assert again.kept.set_index("sha256").split.to_dict() == first.kept.set_index("sha256").split.to_dict()


def test_damaged_members_are_set_aside_and_unsafe_archives_refused(folders, tmp_path):
    (folders / "A" / "text.png").write_text("not an image")
    tileset = import_tiles(packed(folders, tmp_path / "x", "tar"), tmp_path / "out")
    assert tileset.table.set_index("id").reason["text"].startswith("unreadable: A/text.png in")
    import zipfile

    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../A/x.png", b"x")
    with pytest.raises(DataError, match="leaves the folder"):
        import_tiles(tmp_path / "evil.zip", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()
    (tmp_path / "notes.txt").write_text("x" * 600)
    with pytest.raises(DataError, match="notes.txt is a file"):
        open_source(tmp_path / "notes.txt")


@pytest.mark.skipif(os.name == "nt", reason="needs names that are no text, and pipes")
def test_odd_files_in_a_folder_are_set_aside(folders, tmp_path):
    good = (folders / "A" / "0.png").read_bytes()
    with open(os.fsencode(folders / "A") + b"/\xff.png", "wb") as stream:
        stream.write(good)
    os.mkfifo(folders / "A" / "pipe.png")
    (folders / "A" / "dead.png").symlink_to(tmp_path / "nowhere")
    tileset = import_tiles(folders, tmp_path / "out")
    assert len(tileset.kept) == 24
    assert tileset.table[~tileset.table.kept].reason.str.startswith("unreadable").sum() == 3


def test_ids_are_unique_also_where_case_does_not_count():
    paths = pd.Series(["A/1.png", "B/1.png", "A/x.png", "A/X.png", "A/x-2.png", "", "", "..", "A/.png", "a\\b.png"])
    ids = unique_ids(paths)
    assert len({i.casefold() for i in ids}) == len(paths)
    assert unique_ids(pd.Series(["A/1.png", "B/2.tif"])) == ["1", "2"]


def test_tables_from_windows_and_odd_paths(folders, tmp_path):
    write_csv(folders)
    frame = pd.read_csv(folders / "tiles.csv", dtype=str)
    frame["path"] = frame.path.str.replace("/", "\\")
    frame.loc[0, "path"] = "A\0x.png"
    frame.to_csv(folders / "tiles.csv", index=False)
    tileset = import_tiles(folders, tmp_path / "out")
    assert len(tileset.kept) == 23 and tileset.table.reason.str.contains("cannot be read|not exist").sum() == 1
    (folders / "tiles.csv").write_text("path,label,Label\nA/1.png,A,B\n")
    with pytest.raises(DataError, match="two columns 'label'"):
        open_source(folders)


def survive_tables(folders, tmp_path, count, first=0):
    """Open mutated tables and read what they list: a source or a HistosynthError."""
    write_csv(folders)
    frame = pd.read_csv(folders / "tiles.csv", dtype=str)
    frame.to_parquet(tmp_path / "t.parquet")
    embedded(folders, tmp_path / "e.parquet")
    labels = {"labels": [[p, k % 2] for k, p in enumerate(frame.path)], "class_names": ["a", "b"]}
    seeds = {
        "t.csv": (folders / "tiles.csv").read_bytes(),
        "t.parquet": (tmp_path / "t.parquet").read_bytes(),
        "e.parquet": (tmp_path / "e.parquet").read_bytes(),
        "dataset.json": json.dumps(labels).encode(),
    }
    (folders / "tiles.csv").unlink()
    read = refused = 0
    for k in range(first, first + count):
        name = list(seeds)[k % len(seeds)]
        path = folders / name
        path.write_bytes(mutated(seeds[name], k))
        try:
            source = open_source(folders if name == "dataset.json" else path)
            assert list(source.table.columns) == ["path", "label", "patient", "split"]
            for tile in source.table.path[:4]:
                source.rgb(tile)
                read += 1
        except HistosynthError as error:
            assert error.remedy
            refused += 1
        path.unlink()
    return read, refused


def test_mutated_tables_are_read_or_refused(folders, tmp_path):
    read, refused = survive_tables(folders, tmp_path, 320)
    assert read > 50 and refused > 50


@pytest.mark.slow
def test_many_mutated_tables_are_read_or_refused(folders, tmp_path):
    read, refused = survive_tables(folders, tmp_path, 8000, first=1000)
    assert read > 1000 and refused > 1000


def test_rows_longer_than_the_head_are_named(folders):
    write_csv(folders)
    (folders / "tiles.csv").write_text("path,label\nA/1.png,A,p1,extra\nB/1.png,B,p2,extra\n")
    with pytest.raises(DataError, match="more fields in its rows"):
        open_source(folders)


def test_of_two_copies_the_one_on_the_test_side_stays(folders, tmp_path):
    """A training copy that pushed out a test tile would make the test smaller, and another one than published."""
    shutil.copy(folders / "A" / "0.png", folders / "A" / "a copy.png")
    files = sorted(folders.rglob("*.png"))
    rows = [(f.relative_to(folders), f.parent.name, f"P{i}", "val" if i % 3 else "train") for i, f in enumerate(files)]
    table = pd.DataFrame(rows, columns=["path", "label", "patient", "split"]).astype(str)
    table.loc[table.path.isin(["A/1.png", "B/1.png", "C c/1.png", "A/a copy.png"]), "split"] = "test"
    table.loc[table.path == "A/0.png", "split"] = "train"
    table.sort_values("path").to_csv(folders / "tiles.csv", index=False)
    tiles = import_tiles(folders, tmp_path / "out").table.set_index("source")
    assert tiles.kept["A/a copy.png"] and not tiles.kept["A/0.png"]
    assert tiles.reason["A/0.png"].startswith("copy")
