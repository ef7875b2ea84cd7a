"""The dataset_tool zip: what StyleGAN's reader expects, and the way back."""

import io
import json
import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histosynth.cli import main
from histosynth.core.errors import DataError, SettingError
from histosynth.tiles.images import read_rgb, square
from histosynth.tiles.sources.dataset_tool import write_dataset_zip
from histosynth.tiles.sources.source import ImportConfig, import_tiles, open_source
from histosynth.tiles.tileset import TileSet
from tests.tiles.conftest import texture


@pytest.fixture
def tileset(folders, tmp_path):
    rows = [
        {"path": p.relative_to(folders).as_posix(), "label": p.parent.name, "patient": f"p{p.stem}"}
        for p in sorted(folders.rglob("*.png"))
    ]
    pd.DataFrame(rows).to_csv(folders / "tiles.csv", index=False)
    return import_tiles(folders, tmp_path / "set")


def test_the_zip_is_what_the_training_code_reads(tileset, tmp_path):
    path = write_dataset_zip(tileset, tmp_path / "out.zip", size=32)
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        assert all(i.compress_type == zipfile.ZIP_STORED for i in infos)
        images = [i.filename for i in infos if i.filename != "dataset.json"]
        assert images[0] == "00000/img00000000.png" and images == sorted(images) and len(images) == 24
        content = json.loads(archive.read("dataset.json"))
        labels = dict(content["labels"])
        assert list(labels) == images and sorted(set(labels.values())) == [0, 1, 2]
        for name, row in zip(images, tileset.kept.itertuples(), strict=True):
            with Image.open(io.BytesIO(archive.read(name))) as image:
                assert image.mode == "RGB" and image.size == (32, 32)
                stored = square(read_rgb(tileset.folder / row.path)[0], 32)
                assert np.array_equal(np.asarray(image), stored)
            assert tileset.classes[labels[name]] == row.label
    again = write_dataset_zip(tileset, tmp_path / "again.zip", size=32)
    assert again.read_bytes() == path.read_bytes(), "the same tiles give the same file"


def test_the_way_back_keeps_pixels_labels_patients_and_split(tileset, tmp_path):
    path = write_dataset_zip(tileset, tmp_path / "out.zip")
    back = import_tiles(path, tmp_path / "back")
    assert back.classes == tileset.classes and back.meta["split_protocol"] == "as given, checked by patient"
    for column in ("sha256", "label", "patient", "split"):
        assert back.kept[column].tolist() == tileset.kept[column].tolist(), column
    only = write_dataset_zip(tileset, tmp_path / "test.zip", split="test")
    assert len(open_source(only).table) == len(tileset.rows("test"))


def test_zips_and_folders_of_the_original_tool_are_read(tmp_path):
    folder = tmp_path / "data"
    (folder / "00000").mkdir(parents=True)
    names = [f"00000/img{k:08d}.png" for k in range(30)]
    for k, name in enumerate(names):
        Image.fromarray(texture(k)).save(folder / name)
    (folder / "dataset.json").write_text(json.dumps({"labels": [[n, k % 2] for k, n in enumerate(names)]}))
    shutil.make_archive(str(tmp_path / "data"), "zip", folder)
    for source in (folder, tmp_path / "data.zip"):
        found = open_source(source)
        assert found.table.path.tolist() == names and set(found.table.label) == {"class-0", "class-1"}
        assert np.array_equal(found.rgb(names[3])[0], texture(3))
    config = ImportConfig(class_names=("healthy", "ill"))
    assert import_tiles(tmp_path / "data.zip", tmp_path / "out", config).classes == ("healthy", "ill")
    with pytest.raises(DataError, match="class index 1, but 1 class name"):
        open_source(folder, class_names=["healthy"])
    for labels, message in ((None, "no labels"), ([["x.png", 0.5]], "other than"), ([["x.png", True]], "other than")):
        (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises(DataError, match=message):
            open_source(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="dataset.json cannot be read"):
        open_source(folder)
    (folder / "dataset.json").write_text('{"title": "another file of that name"}')
    assert set(open_source(folder).table.label) == {"00000"}


def test_mistakes_are_named_and_leave_nothing(tileset, tmp_path):
    with pytest.raises(SettingError, match="ends in .zip"):
        write_dataset_zip(tileset, tmp_path / "out.tar")
    with pytest.raises(SettingError, match="size is 8"):
        write_dataset_zip(tileset, tmp_path / "out.zip", size=8)
    with pytest.raises(DataError, match="no split 'trian'.*'train'"):
        write_dataset_zip(tileset, tmp_path / "out.zip", split="trian")
    tileset.table.loc[tileset.table.index[0], "width"] = 48
    odd = TileSet(tileset.folder, tileset.table, tileset.meta)
    with pytest.raises(DataError, match="40 x 40, 48 x 40 pixels.*--size"):
        write_dataset_zip(odd, tmp_path / "out.zip")
    first = tileset.folder / tileset.kept.path[5]
    first.write_bytes(b"damaged since")
    with pytest.raises(DataError, match="not an image"):
        write_dataset_zip(tileset, tmp_path / "out.zip", size=32)
    assert not [p for p in tmp_path.iterdir() if "zip" in p.name]


def test_the_verb(tileset, tmp_path):
    out = tmp_path / "out.zip"
    main(["tiles", "export", str(tileset.folder), str(out), "--size", "32", "--split", "train"])
    assert len(open_source(out).table) == len(tileset.rows("train"))
    with pytest.raises(SystemExit):
        main(["tiles", "export", str(tileset.folder), str(out)])
