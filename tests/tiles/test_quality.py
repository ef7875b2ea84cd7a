"""Quality metrics against scipy and scikit-image, invariances, odd tiles, and the table of a tile set."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import fft, ndimage
from skimage import color

from histosynth.core.errors import DataError
from histosynth.tiles.images import write_png
from histosynth.tiles.phantom import make_hospital, make_patient, render
from histosynth.tiles.quality.metrics import METRICS, measure, quality_table
from histosynth.tiles.simulate import PhantomConfig, simulate
from histosynth.tiles.tileset import TileSet


def tissue(label="TUM", seed=0, size=224):
    """A simulated tile, uint8 [3, size, size]."""
    patient = make_patient(seed, make_hospital(seed % 3))
    return render(label, patient=patient, seed=seed, size=size).image.transpose(2, 0, 1)


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def white(shape):
    image = np.full(shape, 250, np.uint8)
    image[2, : shape[1] // 2] = 20  # saturated yellow above, near-white glass below
    return image


def luminance(image):
    return image.transpose(1, 2, 0).astype(float) @ np.array([0.2126, 0.7152, 0.0722])


def lap_var(image):
    return ndimage.convolve(luminance(image), [[0, 1, 0], [1, -4, 1], [0, 1, 0]], mode="reflect").var()


def entropy(image):
    share = np.histogram(luminance(image), bins=256, range=(0, 255))[0] / image[0].size
    return -(share[share > 0] * np.log2(share[share > 0])).sum()


def tenengrad(image):
    grey = luminance(image)
    return (ndimage.sobel(grey, 0) ** 2 + ndimage.sobel(grey, 1) ** 2).mean()


def _hsv(image):
    return np.moveaxis(color.rgb2hsv(image.transpose(1, 2, 0)), -1, 0)


def white_ratio(image):
    _, saturation, value = _hsv(image)
    return ((value > 0.95) & (saturation < 0.10)).mean()


def sat_ratio(image):
    return (_hsv(image)[1] > 0.90).mean()


def tissue_fraction(image):
    _, saturation, value = _hsv(image)
    return ((value < 0.98) | (saturation > 0.20)).mean()


def block_spatial(image):
    grey, edges, inner = luminance(image), [], []
    for plane in (grey, grey.T):
        for k in range(1, plane.shape[1]):
            (edges if k % 8 == 0 else inner).extend(np.abs(plane[:, k] - plane[:, k - 1]))
    return max(0, np.mean(edges) - np.mean(inner)) if edges else 0


def block_dct(image):
    grey, shares = luminance(image), []
    for y in range(0, grey.shape[0] - 7, 8):
        for x in range(0, grey.shape[1] - 7, 8):
            energy = fft.dctn(grey[y : y + 8, x : x + 8], norm="ortho") ** 2
            shares.append(energy[:2, :2].sum() / energy.sum())
    return np.mean(shares)


ORACLES = [lap_var, entropy, tenengrad, white_ratio, sat_ratio, tissue_fraction, block_spatial, block_dct]
IMAGES = {
    "tissue": tissue(),
    "fat": tissue("ADI", 3),
    "smooth muscle, 100 px": tissue("MUS", 1, 100),
    "noise": noise((3, 64, 64)),
    "no multiple of 8": noise((3, 37, 53), 1),
    "one block": noise((3, 8, 8), 2),
    "white and yellow": white((3, 40, 48)),
}


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda f: f.__name__)
def test_formulas_agree_with_scipy_and_scikit_image(oracle):
    for name, image in IMAGES.items():
        found, wanted = measure(image[None])[oracle.__name__][0], oracle(image)
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6), name


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(8, 60),
    width=st.integers(8, 60),
    kind=st.sampled_from(["noise", "one colour", "black", "white", "two colours", "dark noise"]),
    seed=st.integers(0, 99),
)
def test_odd_tiles_have_finite_metrics_in_range(height, width, kind, seed):
    image = noise((1, 3, height, width), seed)
    if kind == "dark noise":
        image //= 60
    elif kind == "two colours":
        image = np.where(image[:, :1] > 128, image[:, :, :1, :1], image[:, :, -1:, -1:])
    elif kind != "noise":
        image[:] = {"one colour": image[:, :, :1, :1], "black": 0, "white": 255}[kind]
    found = measure(np.ascontiguousarray(image))
    for name, values in found.items():
        assert values.dtype == np.float64 and values.shape == (1,) and np.isfinite(values).all(), name
        if name.endswith(("_fraction", "white_ratio", "sat_ratio", "block_dct")):
            assert 0 <= values[0] <= 1
        assert values[0] >= 0
    assert found["entropy"][0] <= 8
    if kind in ("one colour", "black", "white"):
        for name in ("lap_var", "entropy", "tenengrad", "block_spatial", "noise", "focus_tissue", "fold_ratio"):
            assert found[name][0] == pytest.approx(0, abs=1e-3), name
        assert found["bubble_ratio"][0] < 0.2 and found["jpeg_quality"][0] == 100


@pytest.mark.parametrize("size", [41, 96, 224])
def test_a_tile_is_measured_alike_in_any_batch(size):
    images = np.stack([tissue(c, i, size) for i, c in enumerate(("TUM", "STR", "ADI", "LYM", "MUC", "BACK", "NORM"))])
    whole = measure(images)
    for position in range(len(images)):
        for batch in (images[position : position + 1], np.roll(images, -position, axis=0)):
            part = measure(batch)
            for name in METRICS:
                assert part[name][0] == whole[name][position], name


def test_no_tiles_give_no_values():
    assert all(v.shape == (0,) for v in measure(np.zeros((0, 3, 32, 32), np.uint8)).values())


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 3, 32, 32)),
        np.zeros((3, 32, 32), np.uint8),
        np.zeros((1, 1, 32, 32), np.uint8),
        noise((1, 3, 7, 9)),
    ],
)
def test_wrong_tiles_are_refused(images):
    with pytest.raises(DataError, match="must be uint8"):
        measure(images)


def compressed(image, quality, subsampling=2):
    stream = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(stream, format="JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(stream)).transpose(2, 0, 1)


@pytest.mark.parametrize("quality", [15, 40, 60, 75, 85, 90])
@pytest.mark.parametrize("crop", [(0, 0), (5, 3)])
def test_jpeg_quality_is_found_again_at_any_grid(quality, crop):
    images = [compressed(tissue(c, 4), quality, s)[:, crop[0] :, crop[1] :] for c in ("TUM", "STR") for s in (0, 2)]
    assert np.abs(measure(np.stack(images))["jpeg_quality"] - quality).max() <= 2


def test_tiles_that_were_never_compressed_score_100():
    images = np.stack([tissue(c, i) for i, c in enumerate(("TUM", "STR", "ADI", "LYM", "MUC", "BACK", "DEB"))])
    assert (measure(images)["jpeg_quality"] == 100).all()


@pytest.mark.parametrize("sigma", [3, 8, 20])
def test_noise_is_measured_in_grey_levels(sigma, rng):
    image = tissue("STR", 2).astype(float)
    before = measure(image[None].astype(np.uint8))["noise"][0]
    found = measure(np.clip(image + rng.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)[None])["noise"][0]
    assert found == pytest.approx(np.hypot(sigma, before), rel=0.15)


def test_focus_looks_at_tissue_only():
    full = tissue("TUM", 1)
    cover = np.clip((np.arange(224) - 100) / 60, 0, 1)[:, None] ** 2  # glass from below, without an edge
    half = np.rint(full * (1 - cover) + 255 * cover).astype(np.uint8)
    glass, whole = measure(half[None]), measure(full[None])
    assert glass["lap_var"][0] < 0.65 * whole["lap_var"][0]
    assert glass["focus_tissue"][0] == pytest.approx(whole["focus_tissue"][0], rel=0.2)


def test_ink_is_not_seen_in_strong_stain_or_melanin(rng):
    image = tissue("STR", 5)
    light = image.astype(float) / 255
    inked, pigmented = light.copy(), light.copy()
    inked[:, :, 90:130] *= np.exp(-0.7 * np.array([1.2, 0.4, 1.0]))[:, None, None]
    nests = ndimage.gaussian_filter(rng.normal(size=image.shape[1:]), 9)
    pigmented *= np.exp(-np.array([0.45, 0.7, 1.0])[:, None, None] * (nests > nests.std()))
    strong, flooded = light**1.6, light * np.exp(-np.array([1.0, 1.0, 1.0]))[:, None, None]
    tiles = [light, strong, pigmented, inked, flooded]
    ink = measure(np.stack([np.rint(255 * t) for t in tiles]).astype(np.uint8))["ink_ratio"]
    assert ink[:3].max() < 1.5 < ink[3:].min()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A tile set with tiles of three sizes."""
    out = tmp_path_factory.mktemp("quality") / "tiles"
    tileset = simulate(out, PhantomConfig(per_class=8, patients=3, size=32))
    for position, size in ((1, 48), (5, 64), (9, 48)):
        write_png(out / tileset.kept.path[position], tissue("TUM", position, size).transpose(1, 2, 0))
    return tileset


def test_table_measures_native_tiles_and_does_not_depend_on_workers(mixed, tmp_path):
    one = quality_table(mixed, workers=1)
    assert list(one.columns) == list(METRICS) and one.index.tolist() == mixed.kept.id.tolist()
    image = np.asarray(Image.open(mixed.folder / mixed.kept.path[5])).transpose(2, 0, 1)
    assert image.shape == (3, 64, 64)
    assert one.iloc[5].to_dict() == {k: v[0] for k, v in measure(image[None]).items()}
    for cached in (mixed.folder / "cache").glob("quality-*"):
        cached.unlink()
    assert quality_table(mixed, workers=3).equals(one)


def test_table_is_read_from_the_cache_and_damage_to_it_is_mended(mixed, monkeypatch):
    first = quality_table(mixed)
    monkeypatch.setattr("histosynth.tiles.quality.metrics.read_rgb", lambda path: pytest.fail("read again"))
    assert quality_table(TileSet.open(mixed.folder)).equals(first)
    monkeypatch.undo()
    (path,) = (mixed.folder / "cache").glob("quality-*")
    path.write_bytes(b"not a table")
    assert quality_table(mixed).equals(first)


def test_a_damaged_tile_is_a_row_without_numbers(tmp_path):
    tileset = simulate(tmp_path / "tiles", PhantomConfig(per_class=4, patients=3, size=32))
    for position, content in ((0, b""), (3, b"\x89PNG broken")):
        (tileset.folder / tileset.kept.path[position]).write_bytes(content)
    write_png(tileset.folder / tileset.kept.path[4], np.zeros((6, 6, 3), np.uint8))
    table = quality_table(tileset)
    broken = table.isna().all(axis=1).to_numpy()
    assert np.flatnonzero(broken).tolist() == [0, 3, 4] and np.isfinite(table[~broken]).all(axis=None)
    assert not list((tileset.folder / "cache").glob("quality-*"))  # the files may be mended
