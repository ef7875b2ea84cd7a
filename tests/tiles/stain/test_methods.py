"""What holds for every method: one interface, profiles, invariances, and tiles that cannot be normalised."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from threadpoolctl import threadpool_limits

from histosynth.core.errors import DataError, SettingError
from histosynth.tiles.stain import STAINS, LightConfig, load_normaliser, load_profile, stain_matrix, tissue_mask
from histosynth.tiles.stain.separating import StainConfig, Vahadane
from tests.tiles.stain import oracle
from tests.tiles.stain.conftest import simulated

METHODS = ("vahadane", "macenko", "anchored", "reinhard")
SEPARATING = METHODS[:3]


def one_colour(colour, size=64):
    return np.broadcast_to(np.array(colour, np.uint8)[:, None, None], (3, size, size)).copy()


def hopeless(size=64):
    """Tiles without anything to normalise."""
    nearly = one_colour((244, 243, 245), size)
    nearly[:, 3:5, 3:8] = np.array([90, 60, 140])[:, None, None]
    grain = np.random.default_rng(0).integers(-2, 3, (3, size, size))
    return {
        "white": one_colour((255, 255, 255), size),
        "glass": one_colour((240, 242, 238), size),
        "grainy glass": (one_colour((240, 242, 238), size) + grain).astype(np.uint8),
        "black": one_colour((0, 0, 0), size),
        "pink": one_colour((220, 120, 180), size),
        "nearly empty": nearly,
    }


def test_every_registered_method_has_the_interface(reference, tiles):
    assert {*METHODS, "none"} == set(STAINS.names())
    for name in STAINS.names():
        normaliser = load_normaliser(name)
        assert normaliser.name == name
        assert normaliser.fit(reference) is normaliser
        out, unchanged = normaliser.transform(tiles)
        assert out.shape == tiles.shape and out.dtype == np.uint8
        assert unchanged.shape == (len(tiles),) and unchanged.dtype == bool
        assert unchanged.all() == (name == "none")


@pytest.mark.parametrize("method", METHODS)
def test_a_tile_gives_the_same_bytes_in_any_batch(method, reference, tiles):
    normaliser = load_normaliser(method).fit(reference)
    mixed = np.concatenate([tiles, one_colour((255, 255, 255), 96)[None]])
    whole, _ = normaliser.transform(mixed)
    back, _ = normaliser.transform(mixed[::-1])
    assert np.array_equal(whole, back[::-1])
    for i, tile in enumerate(mixed):
        assert np.array_equal(normaliser.transform(tile[None])[0][0], whole[i])


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_threads_changes_nothing(method, reference):
    tile, _ = simulated(4, ("TUM",), 256)
    results = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            results.append(load_normaliser(method).fit(reference).transform(tile)[0])
    assert np.array_equal(*results)


@pytest.mark.parametrize("method", SEPARATING)
def test_stain_matrix_in_any_batch(method, tiles):
    whole, _ = stain_matrix(tiles, method)
    assert np.array_equal(np.concatenate([stain_matrix(t[None], method)[0] for t in tiles]), whole)
    assert np.allclose(np.linalg.norm(whole, axis=2), 1)
    assert (whole[:, 0, 0] > whole[:, 1, 0]).all()  # haematoxylin takes more red


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", hopeless())
def test_hopeless_tiles_pass_through_and_are_counted(method, name, reference, tiles):
    normaliser = load_normaliser(method).fit(reference)
    tile = hopeless(96)[name]
    out, unchanged = normaliser.transform(np.stack([tile, tiles[0]]))
    assert unchanged.tolist() == [True, False]
    assert np.array_equal(out[0], tile)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 3), (8, 200)])
def test_tiny_and_narrow_tiles(method, shape, reference, tiles):
    normaliser = load_normaliser(method).fit(reference)
    tile = np.resize(tiles[7], (1, 3, *shape))
    out, unchanged = normaliser.transform(tile)
    assert out.shape == tile.shape
    assert not unchanged[0] or np.array_equal(out, tile)


@pytest.mark.parametrize("method", METHODS)
def test_no_tiles(method, reference):
    out, unchanged = load_normaliser(method).fit(reference).transform(np.empty((0, 3, 16, 16), np.uint8))
    assert out.shape == (0, 3, 16, 16) and unchanged.shape == (0,)


@pytest.mark.parametrize("method", METHODS)
def test_background_keeps_its_bytes(method, reference, tiles):
    out, unchanged = load_normaliser(method).fit(reference).transform(tiles)
    glass = ~tissue_mask(tiles)
    assert glass.any(axis=(1, 2)).sum() >= 4
    for i in range(len(tiles)):
        assert np.array_equal(out[i][:, glass[i]], tiles[i][:, glass[i]])
    assert not unchanged.any() and (out != tiles).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_seam_at_the_border_of_tissue(method, reference):
    """A smooth ramp from glass to tissue stays free of jumps."""
    images, _ = simulated(1, ("TUM",))
    white, w = np.array([238.0, 241, 236]), oracle.PUBLISHED
    ramp = np.linspace(0, 1.2, 96)
    dense = np.stack([ramp * 0.3, ramp], 1)[None].repeat(96, 0).reshape(-1, 2)
    strip = np.rint(white * np.exp(-(dense @ w))).T.reshape(1, 3, 96, 96).astype(np.uint8)
    tile = np.concatenate([strip, images], axis=3)
    out, unchanged = load_normaliser(method).fit(reference).transform(tile)
    assert not unchanged.any()
    steps = np.abs(np.diff(out[0, :, 0, :96].astype(int), axis=1))
    assert steps.max() <= 12


@pytest.mark.parametrize("method", METHODS)
def test_normalising_the_reference_to_itself_changes_little(method, reference):
    out, _ = load_normaliser(method).fit(reference).transform(reference)
    assert np.abs(out.astype(int) - reference).mean() < 2


def test_the_papers_penalty_lightens(reference):
    """Why the codes of a tile use a smaller one."""
    light, _ = Vahadane(StainConfig(sparsity=0.1)).fit(reference).transform(reference)
    plain, _ = Vahadane().fit(reference).transform(reference)
    assert (light.astype(int) - reference).mean() > 3
    assert abs((plain.astype(int) - reference).mean()) < 1.5


@pytest.mark.parametrize("method", METHODS)
def test_two_patients_come_closer(method, reference):
    """The same tissue, stained by two hospitals, looks more alike afterwards."""
    first, second = (simulated(k, ("TUM", "NORM", "STR"), shift=0.9)[0] for k in (11, 12))
    normaliser = load_normaliser(method).fit(reference)
    a, b = normaliser.transform(first)[0], normaliser.transform(second)[0]

    def distance(x, y):
        return np.linalg.norm(x.mean(axis=(2, 3)) - y.mean(axis=(2, 3)), axis=1).mean()

    assert distance(a, b) < 0.75 * distance(first, second)


@pytest.mark.parametrize("method", SEPARATING)
def test_a_set_as_reference_shrugs_off_odd_tiles(method):
    tiles, _ = simulated(3, ("TUM", "NORM", "STR", "LYM", "DEB"))
    odd = np.random.default_rng(0).integers(0, 256, (1, *tiles.shape[1:]), dtype=np.uint8)
    plain = load_normaliser(method).fit(tiles).profile
    mixed = load_normaliser(method).fit(np.concatenate([tiles, odd, odd * 0 + 255])).profile
    assert plain.tiles == 5 and mixed.tiles in (5, 6)
    assert oracle.angles(np.array(plain.stain_matrix), np.array(mixed.stain_matrix)).max() < 4


@pytest.mark.parametrize("method", SEPARATING)
def test_one_source_for_all_tiles_of_a_slide(method, reference):
    tiles, _ = simulated(3, ("TUM", "MUS"))
    normaliser = load_normaliser(method).fit(reference)
    source = load_normaliser(method).fit(tiles).profile
    out, unchanged = normaliser.transform(tiles, source)
    alone, _ = normaliser.transform(tiles)
    assert not unchanged.any() and not np.array_equal(out, alone)
    with pytest.raises(SettingError, match="source"):
        normaliser.transform(tiles, load_normaliser("reinhard").fit(tiles).profile)


@pytest.mark.parametrize("method", METHODS)
def test_profile_round_trip(method, reference, tiles, tmp_path):
    normaliser = load_normaliser(method).fit(reference)
    normaliser.save(tmp_path / "profile.json")
    again = load_normaliser(tmp_path / "profile.json")
    assert type(again) is type(normaliser) and again.profile == normaliser.profile
    assert np.array_equal(again.transform(tiles)[0], normaliser.transform(tiles)[0])
    assert json.loads((tmp_path / "profile.json").read_text())["version"]


def test_none_round_trip(tmp_path, tiles):
    load_normaliser("none").save(tmp_path / "none.json")
    out, unchanged = load_normaliser(tmp_path / "none.json").transform(tiles)
    assert unchanged.all() and np.array_equal(out, tiles) and out is not tiles


def test_settings_travel_with_the_profile(reference, tmp_path):
    config = StainConfig(white=(240.0, 240.0, 240.0), percentile=95.0)
    Vahadane(config).fit(reference).save(tmp_path / "p.json")
    assert Vahadane.load(tmp_path / "p.json").config == config


def mangled(good: dict):
    yield "text"
    yield []
    yield {}
    yield good | {"format": 99}
    yield good | {"method": "alchemy"}
    yield good | {"method": 3}
    yield good | {"settings": {"white": "blue"}}
    yield good | {"settings": {"speed": 3}}
    yield good | {"settings": {"percentile": 300}}
    yield good | {"stain_matrix": [[1, 2], [3, 4]]}
    yield good | {"stain_matrix": []}
    yield good | {"stain_matrix": [[2, 0, 0], [0, 0, 0]]}
    yield good | {"strength": ["a", "b"]}
    yield good | {"strength": [0, -1]}
    yield good | {"white": [1e9, 0, 0]}


def test_damaged_profiles_are_refused(reference, tmp_path):
    path = tmp_path / "p.json"
    load_normaliser("vahadane").fit(reference).save(path)
    for value in mangled(json.loads(path.read_text())):
        path.write_text(json.dumps(value))
        with pytest.raises(DataError):
            load_normaliser(path)
    path.write_text("{")
    with pytest.raises(DataError):
        load_profile(path)
    with pytest.raises(DataError):
        load_normaliser(tmp_path / "nowhere.json")


@pytest.mark.parametrize("method", METHODS)
def test_wrong_use_is_explained(method, tiles, tmp_path):
    normaliser = load_normaliser(method)
    with pytest.raises(SettingError, match="no reference"):
        normaliser.transform(tiles)
    with pytest.raises(SettingError, match="no reference"):
        normaliser.save(tmp_path / "p.json")
    with pytest.raises(DataError, match="stained tissue"):
        normaliser.fit(np.stack(list(hopeless().values())))
    for wrong in (tiles[0], tiles.astype(np.float32), tiles.transpose(0, 2, 3, 1)):
        with pytest.raises(DataError, match="uint8 \\[N, 3, H, W\\]"):
            normaliser.fit(wrong)


def test_unknown_names_and_settings():
    with pytest.raises(SettingError, match="vahadan"):
        load_normaliser("vahadan")
    with pytest.raises(SettingError, match="no stain vectors"):
        stain_matrix(np.zeros((1, 3, 4, 4), np.uint8), "reinhard")
    for bad in ({"white": (0, 1, 2)}, {"white": (9.0,)}, {"bright": 3}, {"share": 2}, {"samples": 3}, {"density": 0}):
        with pytest.raises(SettingError, match=next(iter(bad))):
            LightConfig(**bad)


NORMALISERS = {m: load_normaliser(m).fit(simulated(2, ("TUM",), 64)[0]) for m in METHODS}


@settings(max_examples=40, deadline=None)
@given(
    image=hnp.arrays(np.uint8, st.tuples(st.just(2), st.just(3), st.integers(1, 24), st.integers(1, 24))),
    method=st.sampled_from(METHODS),
)
def test_any_pixels_give_pixels(image, method):
    with np.errstate(all="raise", under="ignore"):
        out, unchanged = NORMALISERS[method].transform(image)
    assert out.shape == image.shape and out.dtype == np.uint8
    assert np.array_equal(out[unchanged], image[unchanged])
    if method in SEPARATING:
        matrices, _ = stain_matrix(image, method)
        assert np.isfinite(matrices).all() and np.allclose(np.linalg.norm(matrices, axis=2), 1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), colours=st.integers(1, 4), method=st.sampled_from(METHODS))
def test_few_colours(seed, colours, method):
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, (colours, 3), dtype=np.uint8)
    image = palette[rng.integers(0, colours, (32, 32))].transpose(2, 0, 1)[None]
    with np.errstate(all="raise", under="ignore"):
        out, unchanged = NORMALISERS[method].transform(image)
    if colours == 1:
        assert unchanged.all() and np.array_equal(out, image)
