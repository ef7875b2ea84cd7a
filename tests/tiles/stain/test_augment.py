"""Stain augmentation, and the colour spaces under it."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage import color

from histosynth.core.errors import DataError, SettingError
from histosynth.tiles.stain import RandStainNA, stain_augment, stain_matrix, tissue_mask
from histosynth.tiles.stain.colour import hsv_to_rgb, lab_to_rgb, rgb_to_hsv, rgb_to_lab
from tests.tiles.stain.conftest import simulated

ALL = np.stack(np.meshgrid(*[np.arange(0, 256, 5)] * 3, indexing="ij")).reshape(3, -1).astype(np.uint8)


def test_lab_matches_skimage():
    ours = rgb_to_lab(ALL)
    assert np.abs(ours.T - color.rgb2lab(ALL.T[None] / 255.0)[0]).max() < 2e-3
    assert np.abs(lab_to_rgb(ours) - ALL).max() < 0.02


def test_lab_to_rgb_clips_what_srgb_cannot_show(rng):
    lab = np.stack([rng.uniform(-20, 130, 500), *rng.uniform(-150, 150, (2, 500))]).astype(np.float32)
    rgb = lab_to_rgb(lab)
    assert np.isfinite(rgb).all() and rgb.min() >= 0 and rgb.max() <= 255.01


def test_hsv_matches_skimage():
    ours = rgb_to_hsv(ALL)
    assert np.abs(ours.T - color.rgb2hsv(ALL.T[None] / 255.0)[0]).max() < 1e-5
    assert np.abs(hsv_to_rgb(ours) - ALL).max() < 0.01
    turned = ours + np.array([[1], [0], [0]], np.float32)
    assert np.abs(hsv_to_rgb(turned) - ALL).max() < 0.02


def augmenters(tiles):
    matrices, _ = stain_matrix(tiles)
    return {
        "published stains": stain_augment,
        "own stains": lambda x, seeds: stain_augment(x, seeds, matrices=matrices[: len(x)]),
        "templates": RandStainNA().fit(tiles),
    }


@pytest.mark.parametrize("name", ["published stains", "own stains", "templates"])
def test_augmentation(name, tiles):
    augment = augmenters(tiles)[name]
    seeds = list(range(len(tiles)))
    out = augment(tiles, seeds)
    assert out.shape == tiles.shape and out.dtype == np.uint8
    assert np.array_equal(out, augment(tiles, seeds))
    assert (out != tiles).any(axis=(1, 2, 3)).all()
    assert not np.array_equal(out, augment(tiles, [s + 100 for s in seeds]))
    glass = ~tissue_mask(tiles)
    for i in range(len(tiles)):
        assert np.array_equal(out[i][:, glass[i]], tiles[i][:, glass[i]])


def test_a_tile_follows_from_its_seed_alone(tiles):
    templates = RandStainNA().fit(tiles)
    for augment in (stain_augment, templates):
        whole = augment(tiles, list(range(len(tiles))))
        for i, tile in enumerate(tiles):
            assert np.array_equal(augment(tile[None], [i])[0], whole[i])


def test_empty_tiles_come_back(tiles):
    white = np.full_like(tiles[:2], 255)
    assert np.array_equal(stain_augment(white, [1, 2]), white)
    assert np.array_equal(RandStainNA().fit(tiles)(white, [1, 2]), white)


def test_no_strength_no_change(tiles):
    assert np.array_equal(stain_augment(tiles, range(len(tiles)), strength=0, shift=0), tiles)


def test_stronger_stain_darkens(tiles):
    """Over many seeds, brightness follows the drawn strengths in both directions."""
    tumour = tiles[7:8]
    change = [(stain_augment(tumour, [s], strength=0.4).astype(int) - tumour).mean() for s in range(20)]
    assert min(change) < -5 and max(change) > 5
    assert abs(np.mean(change)) < 10


@pytest.mark.parametrize("space", ["lab", "hsv", "od"])
def test_templates_spread_as_the_data_set_does(space):
    """The spread of colour among augmented tiles of one patient is near that among many patients."""
    many = np.concatenate([simulated(k, ("STR",), 64)[0] for k in range(20, 36)])
    one = np.repeat(simulated(50, ("STR",), 64)[0], 60, axis=0)
    out = RandStainNA(spaces=(space,)).fit(many)(one, range(60))
    mask = tissue_mask(one)[0]
    own = np.array([t[:, m].mean(axis=1) for t, m in zip(many, tissue_mask(many), strict=True)]).std(axis=0)
    got = out[:, :, mask].mean(axis=2).std(axis=0)
    assert (got > 0.4 * own).all() and (got < 2.5 * own).all()


def test_no_spread_is_plain_normalisation(tiles):
    templates = RandStainNA(spaces=("lab",), spread=0).fit(tiles)
    assert np.array_equal(templates(tiles[:1], [1]), templates(tiles[:1], [2]))


def test_statistics_round_trip(tiles, tmp_path):
    templates = RandStainNA(spread=0.7).fit(tiles)
    templates.save(tmp_path / "s.json")
    again = RandStainNA.load(tmp_path / "s.json")
    assert again.statistics == templates.statistics
    assert np.array_equal(again(tiles, range(8)), templates(tiles, range(8)))


def test_damaged_statistics_are_refused(tiles, tmp_path):
    path = tmp_path / "s.json"
    RandStainNA().fit(tiles).save(path)
    good = json.loads(path.read_text())
    broken = [[], {}, good | {"statistics": {"lab": {}}}, good | {"statistics": {"xyz": {}}}, good | {"spread": "wide"}]
    broken += [good | {"config": {"white": 3}}, good | {"statistics": None}, good | {"statistics": {}}]
    for value in broken:
        path.write_text(json.dumps(value))
        with pytest.raises(DataError):
            RandStainNA.load(path)


def test_wrong_use_is_explained(tiles):
    with pytest.raises(DataError, match="seeds"):
        stain_augment(tiles, [1])
    with pytest.raises(SettingError, match="strength"):
        stain_augment(tiles, range(8), strength=3)
    with pytest.raises(DataError, match="matrices"):
        stain_augment(tiles, range(8), matrices=np.ones((3, 3)))
    with pytest.raises(SettingError, match="lob"):
        RandStainNA(spaces=("lob",))
    with pytest.raises(SettingError, match="spread"):
        RandStainNA(spread=-1)
    with pytest.raises(SettingError, match="data set"):
        RandStainNA()(tiles, range(8))
    with pytest.raises(DataError, match="two tiles"):
        RandStainNA().fit(tiles[:1])


TEMPLATES = RandStainNA().fit(simulated(1, size=48)[0])


@settings(max_examples=30, deadline=None)
@given(
    image=hnp.arrays(np.uint8, st.tuples(st.just(1), st.just(3), st.integers(1, 20), st.integers(1, 20))),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_pixels_give_pixels(image, seed):
    with np.errstate(all="raise", under="ignore"):
        for augment in (stain_augment, TEMPLATES):
            out = augment(image, [seed])
            assert out.shape == image.shape and out.dtype == np.uint8
