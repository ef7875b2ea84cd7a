"""Image files of every usual kind against oracle arrays; damage, bombs and mutations."""

import io
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from histosynth.core.errors import DataError
from histosynth.tiles.images import MAX_PIXELS, decode, read_rgb
from tests.tiles.conftest import mutated, texture

RNG = np.random.default_rng(7)
DEEP = RNG.integers(0, 65536, (36, 44, 3)).astype(np.uint16)
DEEP_ALPHA = RNG.integers(0, 65536, (36, 44, 1)).astype(np.uint16)
SHALLOW = np.round(DEEP / 257).astype(int)
ON_WHITE = np.round(255 * (DEEP / 65535 * (DEEP_ALPHA / 65535) + 1 - DEEP_ALPHA / 65535)).astype(int)


def tiff(values, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def saved(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png16(values, colour_type, transparency=b""):
    """A 16-bit PNG written by hand from the specification."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"tRNS", transparency) if transparency else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def lzw_tiff(values):
    """A 16-bit RGB TIFF whose LZW stream holds literal codes only, with a clear code before the table grows."""
    height, width = values.shape[:2]
    data = values.astype("<u2").tobytes()
    codes = [c for k in range(0, len(data), 200) for c in (256, *data[k : k + 200])] + [257]
    bits = "".join(f"{code:09b}" for code in codes)
    bits += "0" * (-len(bits) % 8)
    strip = int(bits, 2).to_bytes(len(bits) // 8, "big")
    tags = [
        (256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 8), (259, 3, 1, 5), (262, 3, 1, 2),
        (273, 4, 1, 14), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(strip)), (284, 3, 1, 1),
    ]  # fmt: skip
    start = 14 + len(strip) + len(strip) % 2
    body = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = b"II*\0" + struct.pack("<I", start) + struct.pack("<HHH", 16, 16, 16)
    return head + strip + b"\0" * (len(strip) % 2) + struct.pack("<H", len(tags)) + body + b"\0" * 4


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "LA", "1"])
@pytest.mark.parametrize("suffix", ["png", "tif", "jpg", "bmp", "webp"])
def test_every_usual_kind_of_image_is_read_as_rgb(tmp_path, mode, suffix):
    rgb = Image.fromarray(texture(1, 64))
    grey = np.asarray(rgb.convert("L"))
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else rgb.convert(mode)
    path = tmp_path / f"x.{suffix}"
    if (mode, suffix) == ("I;16", "webp"):
        pytest.skip("Pillow writes it wrongly")
    try:
        image.save(path)
    except (OSError, KeyError):
        pytest.skip(f"{suffix} cannot hold {mode}")
    found, _ = read_rgb(path)
    assert found.shape == (64, 64, 3) and found.dtype == np.uint8
    expected = np.asarray(rgb) if mode in ("RGBA", "CMYK", "P") else np.repeat(grey[..., None], 3, 2)
    if mode == "1":
        assert suffix in ("jpg", "webp") or set(np.unique(found)) == {0, 255}
        assert abs(float(found.mean()) - float(grey.mean())) < 10, "the dither keeps the mean"
    else:
        assert np.abs(found.astype(int) - expected).mean() < (25 if mode == "P" else 6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"planarconfig": "separate"},
        {"planarconfig": "separate", "compression": "zlib", "rowsperstrip": 8},
        {"compression": "zlib", "predictor": True},
        {"tile": (16, 16)},
        {"tile": (16, 16), "compression": "zlib", "predictor": True, "byteorder": ">"},
        {"bigtiff": True, "rowsperstrip": 5},
    ],
)
def test_sixteen_bit_colour_tiffs_are_scaled_and_rounded(options):
    values = np.moveaxis(DEEP, -1, 0) if "planarconfig" in options else DEEP
    data = tiff(values, photometric="rgb", **options)
    found, kind = read_rgb(data)
    assert kind == "TIFF" and np.array_equal(found, SHALLOW)
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(DataError):
            read_rgb(data[: int(len(data) * share)])


def test_sixteen_bit_lzw_is_read_without_a_further_package():
    assert np.array_equal(read_rgb(lzw_tiff(DEEP))[0], SHALLOW)
    grey = Image.fromarray(DEEP[..., 0])
    assert np.array_equal(read_rgb(saved(grey, "TIFF", compression="tiff_lzw"))[0][..., 1], SHALLOW[..., 0])


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bit_grey_in_both_byte_orders_and_both_senses(order):
    grey = DEEP[..., 0]
    black = read_rgb(tiff(grey, photometric="minisblack", byteorder=order))[0]
    white = read_rgb(tiff(grey, photometric="miniswhite", byteorder=order))[0]
    assert np.array_equal(black[..., 2], SHALLOW[..., 0])
    assert np.array_equal(white[..., 2], np.round((65535 - grey.astype(int)) / 257))
    dark = np.full((20, 20), 200, np.uint16)
    assert (read_rgb(tiff(dark, photometric="minisblack"))[0] == 1).all(), "the scale is that of the file's bits"


def test_sixteen_bit_alpha_is_laid_on_white():
    both = np.concatenate([DEEP, DEEP_ALPHA], 2)
    assert np.array_equal(read_rgb(tiff(both, photometric="rgb", extrasamples=["unassalpha"]))[0], ON_WHITE)
    multiplied = np.round(DEEP * (DEEP_ALPHA / 65535)).astype(np.uint16)
    data = tiff(np.concatenate([multiplied, DEEP_ALPHA], 2), photometric="rgb", extrasamples=["assocalpha"])
    assert np.abs(read_rgb(data)[0].astype(int) - ON_WHITE).max() <= 1
    assert np.array_equal(read_rgb(png16(both, 6))[0], ON_WHITE)
    grey = np.concatenate([DEEP[..., :1], DEEP_ALPHA], 2)
    assert np.array_equal(read_rgb(png16(grey, 4))[0][..., 0], ON_WHITE[..., 0])
    unknown = tiff(both, photometric="rgb", extrasamples=["unspecified"])
    assert np.array_equal(read_rgb(unknown)[0], SHALLOW), "a fourth channel that is no alpha is left out"


def test_sixteen_bit_pngs_are_rounded_and_their_transparent_colour_is_white():
    assert np.array_equal(read_rgb(png16(DEEP, 2))[0], SHALLOW)
    assert np.array_equal(read_rgb(png16(DEEP[..., :1], 0))[0][..., 1], SHALLOW[..., 0])
    key = DEEP[3, 4].tolist()
    found = read_rgb(png16(DEEP, 2, struct.pack(">HHH", *key)))[0]
    assert (found[3, 4] == 255).all() and (found != SHALLOW).any(2).sum() == 1
    found = read_rgb(png16(DEEP[..., :1], 0, struct.pack(">H", key[0])))[0]
    assert (found[3, 4] == 255).all()
    assert not decode(png16(DEEP, 2), "x").plain, "it must not be stored as it is"


def test_floating_point_wide_integer_and_cmyk_tiffs():
    for scale in (1 / 65535, 1 / 257, 1.0):
        found = read_rgb(tiff((DEEP * scale).astype(np.float32), photometric="rgb"))[0]
        assert np.abs(found.astype(int) - SHALLOW).max() <= 1
    holes = (DEEP / 65535).astype(np.float64)
    holes[0, 0], holes[0, 1] = np.nan, np.inf
    found = read_rgb(tiff(holes, photometric="rgb"))[0]
    assert np.array_equal(found[1:], SHALLOW[1:]), "a few odd values do not change the scale of the others"
    assert (found[0, 0] == 0).all() and (found[0, 1] == 255).all()
    wide = tiff(DEEP.astype(np.uint32) * 65537, photometric="rgb")
    assert np.array_equal(read_rgb(wide)[0], SHALLOW)
    inks = np.concatenate([65535 - DEEP, DEEP_ALPHA], 2)
    expected = np.round(255 * (DEEP / 65535 * (1 - DEEP_ALPHA / 65535)))
    assert np.array_equal(read_rgb(tiff(inks, photometric="separated"))[0], expected)


def test_the_first_of_several_pages_is_taken():
    assert np.array_equal(read_rgb(tiff(np.stack([DEEP, DEEP[::-1]]), photometric="rgb"))[0], SHALLOW)
    pages = [Image.fromarray(texture(k)) for k in (1, 2)]
    data = saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(read_rgb(data)[0], texture(1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_are_applied(orientation):
    shown = texture(3, 40)[:28]  # as it is to be seen, [28, 40, 3]
    # how a camera held that way stores it: the inverse of each turn of the EXIF standard
    stored = {
        1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1], 5: shown.swapaxes(0, 1),
        6: np.rot90(shown), 7: np.rot90(shown, 2).swapaxes(0, 1), 8: np.rot90(shown, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        assert np.array_equal(read_rgb(saved(image, kind, exif=exif, **options))[0], shown), kind
    jpeg = read_rgb(saved(image, "JPEG", exif=exif, quality=100, subsampling=0))[0]
    assert jpeg.shape == shown.shape and np.abs(jpeg.astype(int) - shown).max() < 8
    deep = np.ascontiguousarray(stored).astype(np.uint16) * 257
    tag = [(274, 3, 1, orientation, True)]
    assert np.array_equal(read_rgb(tiff(deep, photometric="rgb", extratags=tag))[0], shown)
    lzw = saved(Image.fromarray(deep[..., 0]), "TIFF", compression="tiff_lzw", tiffinfo={274: orientation})
    assert np.array_equal(read_rgb(lzw)[0][..., 0], shown[..., 0])
    assert decode(saved(image, "PNG", exif=exif), "x").plain == (orientation == 1)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    for kind in ("PNG", "TIFF", "WEBP"):
        assert (read_rgb(saved(clear, kind))[0] == 255).all()
    half = read_rgb(saved(Image.new("LA", (20, 20), (100, 51)), "PNG"))[0]
    assert (half == round(100 * 0.2 + 255 * 0.8)).all()
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 200, 30, 30, 0, 90, 0])
    palette.paste(2, (10, 0, 20, 20))
    found = read_rgb(saved(palette, "PNG", transparency=1))[0]
    assert (found[:, :10] == 255).all() and (found[:, 10:] == (0, 90, 0)).all()
    key = saved(Image.fromarray(np.full((20, 20, 3), 40, np.uint8)), "PNG", transparency=(40, 40, 40))
    assert (read_rgb(key)[0] == 255).all() and not decode(key, "x").plain


def test_cmyk_jpegs_are_right_with_and_without_adobes_inversion():
    ink = np.zeros((32, 32, 4), np.uint8)
    ink[..., 1], ink[..., 3] = 200, 30  # magenta and a little black
    expected = [round(225 * s) for s in (1, 55 / 255, 1)]
    data = saved(Image.fromarray(ink, "CMYK"), "JPEG", quality=100)  # Pillow writes Adobe's marker, inverted
    assert b"Adobe" in data
    assert np.abs(read_rgb(data)[0].astype(int) - expected).max() <= 3
    start = data.index(b"\xff\xee")
    plain = data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]
    assert np.abs(read_rgb(plain)[0].astype(int) - expected).max() <= 3, "as viewers show a file without the marker"


def test_paths_bytes_and_open_files_give_the_same(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(saved(Image.fromarray(texture(1)), "PNG"))
    with open(path, "rb") as stream:
        found = [read_rgb(path), read_rgb(str(path)), read_rgb(path.read_bytes()), read_rgb(stream)]
    assert all(np.array_equal(f[0], texture(1)) and f[1] == "PNG" for f in found)
    with pytest.raises(DataError, match="my tile is not an image"):
        read_rgb(b"nothing", "my tile")
    for odd in (tmp_path / "none.png", tmp_path, tmp_path / "a\0b.png", path / "x.png"):
        with pytest.raises(DataError):
            read_rgb(odd)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match="not a file"):
        read_rgb(tmp_path / "x.png")


def claiming(data, width, height):
    """A PNG that claims another size, with its checksum right."""
    header = data[12:16] + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def test_decompression_bombs_are_refused_before_they_are_decoded():
    small = saved(Image.new("1", (10, 10)), "PNG")
    for edge in (8001, 20_000, 2**31 - 1):
        with pytest.raises(DataError, match="too many pixels for a tile"):
            read_rgb(claiming(small, edge, edge))
    assert MAX_PIXELS < 8001**2
    data = bytearray(tiff(DEEP, photometric="rgb"))
    tags = {t.code: t.valueoffset for t in tifffile.TiffFile(io.BytesIO(bytes(data))).pages.first.tags}
    for code in (256, 257):
        data[tags[code] : tags[code] + 2] = struct.pack("<H", 65535)
    with pytest.raises(DataError, match="too many pixels"):
        read_rgb(bytes(data))
    grey = np.zeros((64, 64), np.uint16)
    honest = tiff(grey, photometric="minisblack", compression="zlib")
    bomb = bytearray(tiff(iter([zlib.compress(bytes(1 << 24))]), shape=(64, 64), dtype="u2", compression="zlib"))
    assert (read_rgb(honest)[0] == 0).all()
    with pytest.raises(DataError, match="more than its size"):
        read_rgb(bytes(bomb))


def test_a_damaged_comment_does_not_cost_the_pixels():
    data = saved(Image.fromarray(texture(1)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\1" * 30)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # pytest has put its own filters in the place of ours
    assert read_rgb(data)[0].shape == (40, 40, 3)


def seeds_of_damage():
    rgb = Image.fromarray(texture(5))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = texture(5).astype(np.uint16) * 257
    return [
        saved(rgb, "PNG"), saved(rgb.convert("P"), "PNG", transparency=3), saved(rgb, "PNG", exif=exif),
        saved(rgb, "JPEG", exif=exif), saved(rgb.convert("CMYK"), "JPEG"), saved(rgb, "JPEG", progressive=True),
        saved(rgb, "WEBP"), saved(rgb, "WEBP", lossless=True), saved(rgb, "BMP"), saved(rgb, "TIFF"),
        saved(rgb, "TIFF", compression="tiff_lzw"), saved(rgb, "TIFF", compression="jpeg"),
        saved(rgb, "TIFF", compression="tiff_deflate"), saved(rgb.convert("1"), "TIFF", compression="group4"),
        png16(deep, 2), tiff(deep, photometric="rgb"), tiff(deep, photometric="rgb", compression="zlib"),
        tiff(np.moveaxis(deep, -1, 0), photometric="rgb", planarconfig="separate"), lzw_tiff(deep),
        tiff((deep / 65535).astype(np.float32), photometric="rgb", tile=(16, 16)),
        tiff(deep, photometric="rgb", bigtiff=True, rowsperstrip=7),
    ]  # fmt: skip


def survive(count, first=0):
    """Read mutated files: an image or a DataError, and nothing said."""
    seeds = seeds_of_damage()
    refused = 0
    for k in range(first, first + count):
        try:
            found, _ = read_rgb(mutated(seeds[k % len(seeds)], k))
            assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
        except DataError as error:
            assert error.remedy
            refused += 1
    return refused


def test_mutated_images_are_read_or_refused_in_silence(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as images.py sets it; pytest has put its own filters
        refused = survive(1200)
    assert 300 < refused < 1200
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_many_mutated_images_are_read_or_refused():
    assert survive(30_000, first=10_000) > 8000
