"""Slides: readers against the pixels that were written, the grid, resuming, damage, and the real slide."""

import json
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from histosynth.core.errors import DataError, RunError, SettingError
from histosynth.tiles.images import read_rgb
from histosynth.tiles.slides import cutting as slides_module
from histosynth.tiles.slides.cutting import cut, list_slides
from histosynth.tiles.slides.plan import CutConfig, grid
from histosynth.tiles.slides.reader import OpenSlideReader, PlainReader, microns, open_slide, overview, read_field
from histosynth.tiles.slides.tiff import TiffReader
from histosynth.tiles.split.assign import SplitConfig
from histosynth.tiles.tileset import TileSet

EVERYTHING = {"min_tissue": 0.0, "mpp": 0.5}


def coordinates(height: int, width: int, red: int = 0) -> np.ndarray:
    """Every pixel says where it is: green and blue grow along x and y."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = red or (np.arange(width) // 256 + 16 * (np.arange(height) // 256)[:, None])
    image[..., 1] = np.arange(width) % 256
    image[..., 2] = (np.arange(height) % 256)[:, None]
    return image


def ramp(height: int, width: int) -> np.ndarray:
    """Smooth, so that other resolutions are known: red grows along x, green along y."""
    x = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    return np.stack([x * 255, y * 255, np.full_like(x, 90)], 2).round().astype(np.uint8)


def halved(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
    means = image[:height, :width].reshape(height // 2, 2, width // 2, 2, -1).mean((1, 3))
    return means.round().astype(image.dtype)


def pyramid(path, image, levels=3, mpp=0.5, tile=(256, 256), **options):
    options = {"compression": "zlib", "photometric": "rgb"} | options
    resolution = (1e4 / mpp, 1e4 / mpp) if mpp else None
    with tifffile.TiffWriter(path) as writer:
        for k in range(levels):
            scaled = tuple(r / 2**k for r in resolution) if resolution else None
            writer.write(
                image, tile=tile, subfiletype=int(k > 0), metadata=None, resolution=scaled,
                resolutionunit="CENTIMETER" if scaled else None, **options,
            )  # fmt: skip
            image = halved(image)
    return path


def tissue(seed: int, height=520, width=700) -> np.ndarray:
    """Stained everywhere, and different for every seed."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 60, (height // 4, width // 4, 3))
    image = np.array([200, 110, 170]) - noise
    return np.array(Image.fromarray(image.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def image():
    return coordinates(700, 1100)


VARIANTS = {
    "tiled": {"tile": (256, 256)},
    "tiled jpeg size": {"tile": (128, 240)},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "one strip, raw": {},
    "strips, predictor": {"rowsperstrip": 50, "compression": "zlib", "predictor": True},
    "planes": {"planarconfig": "separate", "tile": (128, 128)},
    "planes in strips": {"planarconfig": "separate", "rowsperstrip": 33, "compression": "lzma"},
    "big endian": {"tile": (64, 64), "byteorder": ">"},
    "big tiff": {"tile": (64, 64), "bigtiff": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tifffile_reads_any_region_exactly(tmp_path, image, variant):
    options = dict(VARIANTS[variant])
    writer = {k: options.pop(k) for k in ("byteorder", "bigtiff") if k in options}
    with tifffile.TiffWriter(tmp_path / "a.tif", **writer) as file:
        data = image.transpose(2, 0, 1) if options.get("planarconfig") == "separate" else image
        file.write(np.ascontiguousarray(data), photometric="rgb", metadata=None, **options)
    reader = TiffReader(tmp_path / "a.tif")
    assert [(level.width, level.height) for level in reader.levels] == [(1100, 700)]
    padded = np.full((700 + 200, 1100 + 200, 3), 255, np.uint8)
    padded[100:-100, 100:-100] = image
    for left, top, width, height in [
        (0, 0, 1100, 700),
        (250, 130, 300, 9),
        (-60, -90, 200, 200),
        (1000, 650, 180, 140),
    ]:
        expected = padded[top + 100 : top + 100 + height, left + 100 : left + 100 + width]
        assert np.array_equal(reader.read(0, left, top, width, height), expected)
    assert (reader.read(0, 5000, 5000, 4, 4) == 255).all()
    reader.close()


def test_codecs_that_tifffile_lacks_go_to_pillow(tmp_path, image):
    smooth = ramp(300, 260)
    for name, codec in (("lzw", "tiff_lzw"), ("jpeg", "jpeg"), ("packbits", "packbits")):
        path = tmp_path / f"{name}.tif"
        options = {"quality": 95} if name == "jpeg" else {}
        Image.fromarray(smooth).save(path, compression=codec, tiffinfo={278: 64}, **options)
        found = TiffReader(path).read(0, 10, 20, 200, 250)
        assert np.abs(found.astype(int) - smooth[20:270, 10:210]).max() <= (6 if name == "jpeg" else 0)


def test_sixteen_bits_alpha_palette_grey_and_inverted(tmp_path):
    deep = (ramp(64, 80).astype(np.uint16) * 257) + 3
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb", tile=(32, 32), compression="zlib", predictor=True)
    assert np.abs(TiffReader(tmp_path / "deep.tif").read(0, 0, 0, 80, 64).astype(int) - ramp(64, 80)).max() <= 1
    alpha = np.dstack([ramp(64, 80), np.where(np.arange(80) < 40, 255, 0)[None].repeat(64, 0).astype(np.uint8)])
    tifffile.imwrite(tmp_path / "alpha.tif", alpha, photometric="rgb", extrasamples=["unassalpha"], tile=(32, 32))
    found = TiffReader(tmp_path / "alpha.tif").read(0, 0, 0, 80, 64)
    assert np.array_equal(found[:, :40], ramp(64, 80)[:, :40]) and (found[:, 40:] == 255).all()
    grey = ramp(64, 80)[..., 0]
    tifffile.imwrite(tmp_path / "white0.tif", 255 - grey, photometric="miniswhite")
    assert np.array_equal(TiffReader(tmp_path / "white0.tif").read(0, 0, 0, 80, 64), np.dstack([grey] * 3))
    Image.fromarray(ramp(64, 80)).quantize(16).save(tmp_path / "palette.tif")
    expected = np.asarray(Image.open(tmp_path / "palette.tif").convert("RGB"))
    assert np.array_equal(TiffReader(tmp_path / "palette.tif").read(0, 0, 0, 80, 64), expected)


@pytest.mark.parametrize("layout", ["interleaved", "channels", "pyramid"])
def test_ome_tiff(tmp_path, image, layout):
    path = tmp_path / "a.ome.tif"
    data, axes = (image.transpose(2, 0, 1), "CYX") if layout == "channels" else (image, "YXS")
    metadata = {"axes": axes, "PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5}
    with tifffile.TiffWriter(path, ome=True) as writer:
        options = {"tile": (128, 128), "photometric": "minisblack" if layout == "channels" else "rgb"}
        writer.write(data, metadata=metadata, subifds=2 if layout == "pyramid" else 0, **options)
        small = image
        for _ in range(2 if layout == "pyramid" else 0):
            small = halved(small)
            writer.write(small, subfiletype=1, **options)
    reader = open_slide(path)
    assert isinstance(reader, TiffReader) and reader.mpp == (0.25, 0.5)
    assert len(reader.levels) == (3 if layout == "pyramid" else 1)
    assert np.array_equal(reader.read(0, 100, 200, 300, 250), image[200:450, 100:400])
    if layout == "pyramid":
        assert reader.levels[2].down_x == 4
        assert np.array_equal(reader.read(2, 10, 20, 30, 40), small[20:60, 10:40])


def test_slides_that_are_no_brightfield_image_are_refused(tmp_path):
    stack = np.zeros((7, 64, 64), np.uint16)
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, metadata={"axes": "CYX"}, photometric="minisblack")
    with pytest.raises(DataError, match="a.ome.tif has 7 channels"):
        open_slide(tmp_path / "a.ome.tif")
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((64, 64), np.complex64))
    with pytest.raises(DataError, match="complex64"):
        open_slide(tmp_path / "b.tif")


def test_absurd_sizes_are_refused_before_openslide_sees_them(tmp_path, image):
    for tag, value in (("TileWidth", 1 << 20), ("ImageWidth", 1 << 30)):
        for name in ("a.svs", "a.tif"):
            path = pyramid(tmp_path / name, image, levels=1)
            with tifffile.TiffFile(path, mode="r+") as file:
                file.pages[0].tags[tag].overwrite(value, dtype="I")
            with pytest.raises(DataError, match=f"{name}.*claims"):
                open_slide(path)


def test_a_size_that_the_tiles_do_not_fill_is_refused(tmp_path, image):
    path = pyramid(tmp_path / "a.tif", image, levels=1)
    with tifffile.TiffFile(path) as file:
        assert file.byteorder == "<"
        places = [file.pages[0].tags[code].offset for code in (256, 257)]
    data = bytearray(path.read_bytes())
    for place in places:
        data[place + 2 : place + 4] = struct.pack("<H", 4)
        data[place + 8 : place + 12] = struct.pack("<I", 66_000)  # a thousand million pixels to look through
    path.write_bytes(data)
    with pytest.raises(DataError, match="claims 66000 x 66000 pixels but has"):
        open_slide(path)


def test_openslide_and_tifffile_agree_and_levels_are_chosen(tmp_path):
    image = ramp(1024, 2048)
    path = pyramid(tmp_path / "a.tif", image)
    chosen, own = open_slide(path), TiffReader(path)
    assert isinstance(chosen, OpenSlideReader) and chosen.mpp == pytest.approx((0.5, 0.5))
    assert own.mpp == pytest.approx((0.5, 0.5)) and [v.down_x for v in own.levels] == [1, 2, 4]
    for reader in (chosen, own):
        assert np.array_equal(read_field(reader, 512, 256, 224, 224, 224), image[256:480, 512:736])
        for down in (1.5, 2, 2.6, 4, 7):
            extent = 64 * down
            found = read_field(reader, 500, 300, extent, extent, 64).astype(float)
            centre = (np.arange(64) + 0.5) * down
            assert np.abs(found[..., 0] - (500 + centre)[None] / 2048 * 255).max() < 2
            assert np.abs(found[..., 1] - (300 + centre)[:, None] / 1024 * 255).max() < 2
        small, pixel = overview(reader, 30)
        assert pixel == (28, 28) and small.shape == (37, 74, 3)
        assert np.abs(small[:36, :73, 0] - (np.arange(73) + 0.5) * 28 / 2048 * 255).max() < 2


def test_pixels_that_are_not_square_become_square(tmp_path):
    image = ramp(800, 400)
    tifffile.imwrite(
        tmp_path / "a.tif", image, photometric="rgb", tile=(256, 256), resolution=(1e4, 2e4), resolutionunit=3
    )
    tileset = cut([tmp_path / "a.tif"], tmp_path / "out", CutConfig(size=100, mpp=2.0, min_tissue=0), workers=1)
    assert sorted(zip(tileset.table.x, tileset.table.y, strict=True)) == [
        (x, y) for x in (0, 200) for y in (0, 400)
    ]  # fmt: skip
    row = tileset.table.set_index(["x", "y"]).loc[(200, 400)]
    tile = read_rgb(tileset.folder / row.path)[0]
    assert abs(int(tile[50, 50, 0]) - 255 * 0.75) < 3 and abs(int(tile[50, 50, 1]) - 255 * 0.75) < 3


def test_microns_per_pixel_from_each_place_and_the_remedy(tmp_path, image):
    def opened(name, **options):
        tifffile.imwrite(tmp_path / name, image[:64, :64], photometric="rgb", **options)
        return TiffReader(tmp_path / name)

    assert opened("inch.tif", resolution=(50800, 50800), resolutionunit="INCH").mpp == pytest.approx((0.5, 0.5))
    aperio = opened("aperio.tif", description="Aperio Image Library|AppMag = 20|MPP = 0.4990", metadata=None)
    assert aperio.mpp == (0.499, 0.499)
    imagej = opened("imagej.tif", imagej=True, resolution=(4, 4), metadata={"unit": "micron", "axes": "YXS"})
    assert imagej.mpp == pytest.approx((0.25, 0.25))
    silent = opened("silent.tif")
    with pytest.raises(DataError, match="silent.tif are unknown.*--slide-mpp"):
        microns(silent, "silent.tif", None)
    assert microns(silent, "silent.tif", 0.3) == (0.3, 0.3) and microns(aperio, "", 0.3) == (0.499, 0.499)
    screen = opened("screen.tif", resolution=(72, 72), resolutionunit="INCH")
    with pytest.raises(DataError, match="says 352.8, which cannot be right"):
        microns(screen, "screen.tif", None)


def test_plain_pictures_are_the_last_resort(tmp_path, image):
    Image.fromarray(image).save(tmp_path / "a.png", dpi=(50800, 50800))
    reader = open_slide(tmp_path / "a.png")
    assert isinstance(reader, PlainReader) and reader.mpp == pytest.approx((0.5, 0.5), rel=1e-3)
    assert np.array_equal(reader.read(0, 10, 20, 30, 40), image[20:60, 10:40])
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    with pytest.raises(DataError, match=r"b\.jpg"):
        open_slide(tmp_path / "b.jpg")


def test_tiles_are_the_pixels_of_the_slide_and_the_table_says_where(tmp_path):
    image = coordinates(700, 1100)
    path = pyramid(tmp_path / "a.tif", image)
    tileset = cut([path], tmp_path / "out", CutConfig(size=128, **EVERYTHING), workers=1)
    assert len(tileset.kept) == 8 * 5 and tileset.classes == ("tissue",)
    for row in tileset.kept.itertuples():
        tile, kind = read_rgb(tileset.folder / row.path)
        assert kind == "PNG" and np.array_equal(tile, image[row.y : row.y + 128, row.x : row.x + 128])
    row = tileset.kept.iloc[0]
    assert row.slide == row.patient == "a" and row.mpp == 0.5 and row.split == ""
    assert tileset.meta["microns_per_pixel"] == 0.5 and tileset.meta["split_protocol"].startswith("none")
    picture, _ = read_rgb(tmp_path / "out" / "slides" / "a.png")
    assert picture.shape[0] > 700
    assert not (tmp_path / "out" / "cutting").exists()
    assert TileSet.open(tmp_path / "out").digest == tileset.digest


@pytest.mark.parametrize("overlap, step", [(0.0, 100), (0.5, 50), (25, 75), (0.333, 66.7)])
def test_the_grid_overlaps_as_asked_and_never_drifts(tmp_path, overlap, step):
    reader = open_slide(pyramid(tmp_path / "a.tif", coordinates(300, 1000), levels=1))
    x, y = grid(reader, 100, 100, CutConfig(size=100, overlap=overlap))
    columns = np.unique(x)
    assert np.array_equal(columns, np.round(np.arange(len(columns)) * step))
    assert columns.max() + 100 <= 1001 and columns.max() + 100 + step > 1000 and y.max() + 100 <= 301
    x, _ = grid(reader, 300, 300, CutConfig(size=100, border="pad"))
    assert np.unique(x).tolist() == [0, 300, 600, 900]
    assert len(grid(reader, 2000, 2000, CutConfig())[0]) == 0
    assert len(grid(reader, 2000, 2000, CutConfig(border="pad"))[0]) == 1


def test_tiles_at_the_border_are_padded_with_white_when_wanted(tmp_path):
    path = pyramid(tmp_path / "a.tif", tissue(0, 150, 150), levels=1)
    tileset = cut([path], tmp_path / "out", CutConfig(size=100, border="pad", min_tissue=0), workers=1)
    corner = read_rgb(tileset.folder / tileset.kept.set_index(["x", "y"]).path[100, 100])[0]
    assert (corner[50:] == 255).all() and (corner[:, 50:] == 255).all() and (corner[:50, :50] < 255).all()


def test_glass_is_left_out(tmp_path):
    image = np.full((600, 800, 3), 244, np.uint8)
    image[:, :400] = tissue(0, 600, 400)
    path = pyramid(tmp_path / "a.tif", image)
    tileset = cut([path], tmp_path / "out", CutConfig(size=100), workers=1)
    assert set(tileset.kept.x) == {0, 100, 200, 300} and tileset.kept.tissue.min() > 0.9
    report = pd.read_csv(tmp_path / "out" / "slides.csv").iloc[0]
    assert report.grid == 48 and report.too_little_tissue == 24 and report.tiles == 24 and report.status == "cut"


def annotate(path, areas):
    """Write SLIDE.geojson with rectangles: (label, x0, y0, x1, y1)."""
    features = [
        {
            "type": "Feature", "properties": {"classification": {"name": label, "color": [10, 200, 30]}},
            "geometry": {"type": "Polygon", "coordinates": [[[a, b], [c, b], [c, d], [a, d], [a, b]]]},
        }
        for label, a, b, c, d in areas
    ]  # fmt: skip
    path.with_suffix(".geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def test_annotations_label_the_tiles(tmp_path):
    image = tissue(0, 400, 800)
    image[:, 600:] = np.random.default_rng(0).integers(240, 248, (400, 200, 3))
    path = pyramid(tmp_path / "a.tif", image)
    # the tile at 100 is half of each, the one at 300 is covered by both, 400 on has no class, glass is annotated
    annotate(path, [("TUM", 0, 0, 150, 400), ("STR", 150, 0, 400, 400), ("TUM", 300, 0, 400, 400),
                    ("BACK", 600, 0, 800, 400), ("MUC", 500, 0, 530, 400)])  # fmt: skip
    tileset = cut([path], tmp_path / "out", CutConfig(size=100), workers=1)
    found = tileset.kept.groupby("label").x.unique().apply(sorted).to_dict()
    assert found == {"TUM": [0], "STR": [200], "BACK": [600, 700]}
    assert tileset.colours["TUM"] == "#0AC81E"
    report = pd.read_csv(tmp_path / "out" / "slides.csv").iloc[0]
    assert report.unlabelled == 12 and report.two_classes == 4 and report.tiles == 16
    lower = cut([path], tmp_path / "lower", CutConfig(size=100, min_cover=0.3), workers=1)
    half = cut([path], tmp_path / "half", CutConfig(size=100, min_cover=0.5), workers=1)
    assert 100 not in set(half.kept.x) and 100 not in set(lower.kept.x)  # a tie has no class
    assert set(lower.kept.x[lower.kept.label == "MUC"]) == {500}


def test_a_draw_is_seeded_and_even_over_the_classes(tmp_path):
    path = pyramid(tmp_path / "a.tif", tissue(0, 800, 800), levels=1)
    annotate(path, [("A", 0, 0, 800, 700), ("B", 0, 700, 300, 800)])
    config = CutConfig(size=100, max_tiles=20)
    one = cut([path], tmp_path / "one", config, workers=1)
    assert one.kept.label.value_counts().to_dict() == {"A": 17, "B": 3}
    assert cut([path], tmp_path / "two", config, workers=1).digest == one.digest
    other = cut([path], tmp_path / "three", CutConfig(size=100, max_tiles=20, seed=1), workers=1)
    assert len(other.kept) == 20 and other.digest != one.digest


@pytest.fixture
def hospital(tmp_path):
    """Four slides of four patients with 20 tiles of 100 px each (the default chunk is larger)."""
    (tmp_path / "in").mkdir()
    for k in range(4):
        pyramid(tmp_path / "in" / f"s{k}.tif", tissue(k, 400, 500), levels=1)
    return tmp_path / "in"


CONFIG = CutConfig(size=100)


def same(a: TileSet, b: TileSet) -> bool:
    pd.testing.assert_frame_equal(a.table, b.table)
    return all((a.folder / p).read_bytes() == (b.folder / p).read_bytes() for p in a.kept.path)


def test_patients_are_split_and_workers_change_nothing(tmp_path, hospital):
    one = cut([hospital], tmp_path / "one", CONFIG, workers=1)
    assert len(one.kept) == 80 and set(one.kept.split) == {"train", "val", "test"}
    assert one.kept.groupby("patient").split.nunique().max() == 1
    assert one.meta["split_protocol"].startswith("by slide")
    assert same(one, cut([hospital], tmp_path / "two", CONFIG, workers=2))


def test_a_csv_gives_patients_labels_annotations_and_resolutions(tmp_path, hospital):
    pyramid(hospital / "s0.tif", tissue(0, 400, 500), levels=1, mpp=None)
    annotate(hospital / "outlines.x", [("TUM", 0, 0, 500, 400)])
    (tmp_path / "list.csv").write_text(
        "Slide, patient,label,annotations,mpp\n"
        "in/s0.tif,p1,NORM,,0.5\nin/s1.tif,p1,,in/outlines.geojson,\nin/s2.tif,p2,,,\n"
    )
    tileset = cut([tmp_path / "list.csv"], tmp_path / "out", CONFIG, workers=1)
    found = tileset.kept.groupby("slide")[["patient", "label"]].first()
    assert found.patient.tolist() == ["p1", "p1", "p2"] and found.label.tolist() == ["NORM", "TUM", "tissue"]
    assert set(tileset.kept.split) == {""}
    for text, message in [
        ("file,patient\na,b\n", "no column 'slide'"),
        ("slide,patient\nin/s0.tif,\n", "Line 2 .* has no patient"),
        ("slide,mpp\nin/s0.tif,half\n", "mpp 'half'"),
    ]:
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            list_slides([tmp_path / "bad.csv"])


def test_names_differ_and_a_slide_counts_once(tmp_path, hospital):
    (tmp_path / "in" / "deep").mkdir()
    pyramid(hospital / "deep" / "s1.tif", tissue(9, 64, 64), levels=1)
    (hospital / "picture.png").write_bytes(b"a preview")
    found = list_slides([hospital, hospital / "s0.tif"])
    assert [s.name for s in found] == ["s0", "in-s1", "s2", "s3", "deep-s1"]
    with pytest.raises(DataError, match="does not exist"):
        list_slides([tmp_path / "nothing.svs"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no slides"):
        list_slides([tmp_path / "empty"])


def test_bad_slides_are_set_aside_and_the_others_are_cut(tmp_path, hospital):
    data = (hospital / "s0.tif").read_bytes()
    (hospital / "cut.tif").write_bytes(data[: len(data) // 2])
    (hospital / "empty.svs").write_bytes(b"")
    (hospital / "text.tif").write_text("no image")
    hole = bytearray(data)
    hole[len(data) // 3 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 3)
    (hospital / "hole.tif").write_bytes(bytes(hole))
    pyramid(hospital / "silent.tif", tissue(7, 200, 200), levels=1, mpp=None)
    pyramid(hospital / "coarse.tif", tissue(8, 200, 200), levels=1, mpp=2.0)
    pyramid(hospital / "drawn.tif", tissue(9, 200, 200), levels=1)
    (hospital / "drawn.geojson").write_text('{"type": "FeatureCollection", "features": [{')
    pyramid(hospital / "glass.tif", np.full((300, 300, 3), 244, np.uint8), levels=1)
    tileset = cut([hospital], tmp_path / "out", CONFIG, workers=1)
    assert set(tileset.kept.slide) == {"s0", "s1", "s2", "s3"}
    report = pd.read_csv(tmp_path / "out" / "slides.csv", keep_default_na=False).set_index("slide")
    assert report.status.value_counts().to_dict() == {"set aside": 7, "cut": 4, "no tiles": 1}
    assert "--slide-mpp" in report.reason["silent"] and "coarser" in report.reason["coarse"]
    assert "drawn.geojson is not GeoJSON" in report.reason["drawn"] and report.status["glass"] == "no tiles"
    aside = tileset.table[~tileset.table.kept]
    assert sorted(aside.id) == ["coarse", "cut", "drawn", "empty", "hole", "silent", "text"]
    assert aside.reason.str.startswith("unreadable slide: ").all()
    assert len(list((tmp_path / "out" / "images").rglob("*.png"))) == len(tileset.kept)


def test_only_bad_slides_is_an_error_and_settings_are_checked(tmp_path, hospital):
    (tmp_path / "bad.svs").write_bytes(b"II*\0 nothing")
    with pytest.raises(DataError, match="None of the 1 slide.*bad.svs"):
        cut([tmp_path / "bad.svs"], tmp_path / "out", CONFIG, workers=1)
    for wrong, name in [
        ({"size": 4}, "size is 4"), ({"mpp": 0}, "mpp is 0"), ({"overlap": 224}, "overlap is 224"),
        ({"min_tissue": 2}, "min_tissue"), ({"min_cover": 0}, "min_cover is 0"), ({"max_tiles": 0}, "max_tiles is 0"),
        ({"border": "wrap"}, "border"), ({"split": SplitConfig(protocol="nct-crc")}, "split.protocol is 'nct-crc'"),
    ]:  # fmt: skip
        with pytest.raises(SettingError, match=name):
            cut([hospital], tmp_path / "no", CutConfig(**wrong), workers=1)
    assert not (tmp_path / "no").exists()
    with pytest.raises(SettingError, match="workers is 0"):
        cut([hospital], tmp_path / "no", CONFIG, workers=0)


def test_one_slide_under_two_names_does_not_leak(tmp_path, hospital):
    (hospital / "again.tif").write_bytes((hospital / "s0.tif").read_bytes())
    tileset = cut([hospital], tmp_path / "out", CONFIG, workers=1)
    assert len(tileset.kept) == 80 and tileset.table.reason.str.startswith("copy: ").sum() == 20


def test_an_interrupted_cut_goes_on_where_it_stopped(tmp_path, hospital, monkeypatch):
    monkeypatch.setattr(slides_module, "_CHUNK", 8)
    whole = cut([hospital], tmp_path / "whole", CONFIG, workers=1)
    written = []
    real = slides_module.write_png

    def interrupted(path, image):
        if "images" in path.parts:
            written.append(path.name)
            if len(written) == 30:
                raise KeyboardInterrupt
        real(path, image)

    monkeypatch.setattr(slides_module, "write_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut([hospital], tmp_path / "out", CONFIG, workers=1)
    (tmp_path / "out" / "images" / "tissue" / ".half.123.tmp.png").write_bytes(b"half")
    assert not TileSet.is_tileset(tmp_path / "out")
    with pytest.raises(RunError, match="other settings"):
        cut([hospital], tmp_path / "out", CutConfig(size=96), workers=1)
    finished = cut([hospital], tmp_path / "out", CONFIG, workers=1)
    # 29 tiles were written: 3 chunks of slide 0 (20 tiles), one of slide 1 (8), and one tile that is made again
    assert len(written) == 30 + 80 - 28 and same(whole, finished)
    assert len(list((tmp_path / "out" / "images").rglob("*"))) == 81
    with pytest.raises(RunError, match="already holds a tile set"):
        cut([hospital], tmp_path / "out", CONFIG, workers=1)


def test_a_killed_cut_leaves_no_process_and_goes_on(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(8):  # one chunk each
        pyramid(folder / f"s{k:02d}.tif", tissue(k, 512, 512), levels=1)
    command = [sys.executable, "-m", "histosynth", "tiles", "cut", str(folder), str(tmp_path / "out")]
    command += ["--size", "64", "--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "out").glob("cutting/*/chunk-*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("cutting/*/chunk-*.json")}
    assert done and not TileSet.is_tileset(tmp_path / "out")
    deadline = time.monotonic() + 30
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(process.pid)
    tiles = {p: p.stat().st_mtime_ns for chunk in done for p in _tiles_of(tmp_path / "out", chunk)}
    config = CutConfig(size=64)
    resumed = cut([folder], tmp_path / "out", config, workers=1)
    assert all(p.stat().st_mtime_ns == before for p, before in tiles.items())
    assert same(cut([folder], tmp_path / "whole", config, workers=1), resumed)


def _tiles_of(out, chunk):
    number = int(chunk.stem.split("-")[1])
    rows = pd.read_parquet(chunk.parent / "tiles.parquet").iloc[number * 64 : (number + 1) * 64]
    return [out / f"images/{r.label}/{chunk.parent.name}-x{r.x:06d}-y{r.y:06d}.png" for r in rows.itertuples()]


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_large_level_is_never_decoded_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, coordinates(3000, 4000, red=200), photometric="rgb", tile=(256, 256), compression="zlib",
        resolution=(2e4, 2e4), resolutionunit=3,
    )  # fmt: skip
    reader = TiffReader(path)
    seen = []
    real = TiffReader._segment
    monkeypatch.setattr(TiffReader, "_segment", lambda self, *place: seen.append(place) or real(self, *place))
    read_field(reader, 1000, 1000, 448, 448, 224)
    assert len(seen) <= 9
    monkeypatch.setattr("histosynth.tiles.slides.tiff._CACHE_BYTES", 2_000_000)
    overview(reader, 16)
    assert reader._cached <= 2_000_000 and len(reader._cache) <= 10


def test_the_real_slide(real_data, tmp_path):
    path = real_data / "wsi" / "CMU-1-Small-Region.svs"
    reader = open_slide(path)
    assert reader.mpp == (0.499, 0.499) and (reader.levels[0].width, reader.levels[0].height) == (2220, 2967)
    # tifffile's pages, decoded by Pillow, against OpenSlide: JPEG decoders differ by a few grey levels
    difference = TiffReader(path).read(0, 900, 900, 700, 600).astype(int) - reader.read(0, 900, 900, 700, 600)
    assert np.abs(difference).mean() < 1
    tileset = cut([path], tmp_path / "out", CutConfig(), workers=1)
    assert 30 <= len(tileset.kept) <= 55
    row = tileset.kept.iloc[5]
    assert np.array_equal(read_rgb(tileset.folder / row.path)[0], reader.read(0, row.x, row.y, 224, 224))
    report = pd.read_csv(tmp_path / "out" / "slides.csv").iloc[0]
    assert report.reader == "openslide aperio" and report.tiles == len(tileset.kept)
