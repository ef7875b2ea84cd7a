"""Annotations of QuPath: every style of file, shares against other implementations, damage."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.draw import polygon2mask

from histosynth.core.errors import DataError
from histosynth.tiles.slides.annotations import covered, fill, read_annotations

SQUARE = [[0, 0], [100, 0], [100, 100], [0, 100], [0, 0]]


def feature(label=None, coordinates=None, kind="Polygon", **properties):
    if label is not None:
        properties["classification"] = {"name": label, "color": [200, 0, 10]}
    coordinates = [SQUARE] if coordinates is None else coordinates
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def write(tmp_path, found, name="a.geojson"):
    path = tmp_path / name
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return path


def shifted(x, y, edge=100):
    return [[x, y], [x + edge, y], [x + edge, y + edge], [x, y + edge], [x, y]]


@pytest.mark.parametrize("style", ["collection", "list", "single"])
def test_every_style_of_file_gives_the_same(tmp_path, style):
    one = feature("TUM", objectType="annotation", isLocked=True)
    found = {"collection": {"type": "FeatureCollection", "features": [one]}, "list": [one], "single": one}[style]
    read = read_annotations(write(tmp_path, found))
    assert read.labels == ("TUM",) and read.colours == {"TUM": "#C8000A"} and read.skipped == {}
    assert np.array_equal(read.outlines[0].parts[0][0], np.array(SQUARE, float))


def test_old_colours_derived_classes_and_plain_class_names(tmp_path):
    old = feature(classification={"name": "STR", "colorRGB": -3670016})
    derived = feature(classification={"names": ["Tumor", "Positive"], "color": [1, 2, 3]})
    read = read_annotations(write(tmp_path, [old, derived, feature(classification="MUC")]))
    assert read.labels == ("MUC", "STR", "Tumor: Positive")
    assert read.colours == {"STR": "#C80000", "Tumor: Positive": "#010203"}


def test_what_is_no_area_with_a_class_is_counted(tmp_path):
    nothing = {"type": "Feature", "geometry": None, "properties": {}}
    features = [
        feature("TUM"), feature(), feature("TUM", objectType="detection"), feature("TUM", objectType="cell"),
        feature("TUM", [1, 2], "Point"), feature("TUM", [[0, 0], [5, 5]], "LineString"), nothing, feature("Region*"),
    ]  # fmt: skip
    read = read_annotations(write(tmp_path, features))
    assert len(read.outlines) == 1
    assert read.skipped == {
        "areas without a class": 1, "detected objects": 2, "points and lines": 3, "regions of interest": 1,
    }  # fmt: skip
    with pytest.raises(DataError, match="None of the 2 areas.*has a class"):
        read_annotations(write(tmp_path, [feature(), feature()]))


@pytest.mark.parametrize(
    "found, message",
    [
        ("{not json", "is not GeoJSON"),
        ("[" * 100_000, "is not GeoJSON"),
        ("3", "is not GeoJSON"),
        ({"type": "FeatureCollection"}, "is not GeoJSON"),
        ([{"type": "Polygon"}], "is not GeoJSON"),
        ([feature("A", [[[0, 0], [1, 1]]])], "Feature 0 .* at least three"),
        ([feature("A"), feature("A", [[[0, 0], [1, "x"], [2, 2]]])], "Feature 1 .* no numbers"),
        ([feature("A", [[[0, 0], [1, None], [2, 2]]])], "no numbers"),
        ('[{"type":"Feature","geometry":{"type":"Polygon","coordinates":[[[0,0],[NaN,1],[2,2]]]}}]', "finite"),
        ([feature("A", [])], "no coordinates"),
        ([feature("A", {"x": 1})], "no coordinates"),
        ([feature("A", [[3]], "MultiPolygon")], "is broken"),
        ([{"type": "Feature", "geometry": [], "properties": []}], "is broken|no object"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, found, message):
    with pytest.raises(DataError, match=message) as caught:
        read_annotations(write(tmp_path, found))
    assert "a.geojson" in str(caught.value)


def test_a_file_cut_anywhere_never_crashes(tmp_path):
    text = json.dumps({"type": "FeatureCollection", "features": [feature("A"), feature("B")]})
    for end in range(0, len(text), 7):
        with pytest.raises(DataError):
            read_annotations(write(tmp_path, text[:end]))


def cover_of(tmp_path, features, x, y, width, height):
    labels, shares = covered(
        read_annotations(write(tmp_path, features)), np.array(x, float), np.array(y, float), width, height
    )
    return {label: shares[:, i].tolist() for i, label in enumerate(labels)}


def test_holes_parts_overlaps_and_excluded_areas(tmp_path):
    hole = [shifted(0, 0), shifted(0, 0, 50)]
    found = cover_of(tmp_path, [feature("A", hole)], [0, 50, 200], [0, 0, 200], 50, 50)
    assert found == {"A": [0.0, 1.0, 0.0]}
    parts = [[shifted(0, 0)], [shifted(200, 0)]]
    found = cover_of(tmp_path, [feature("A", parts, "MultiPolygon")], [0, 100, 200], [0, 0, 0], 100, 100)
    assert found == {"A": [1.0, 0.0, 1.0]}
    # two areas of one class over each other count once, an ignored class takes away
    both = [feature("A"), feature("A", [shifted(0, 0)]), feature("B", [shifted(50, 0)])]
    found = cover_of(tmp_path, both, [0, 100], [0, 0], 100, 100)
    assert found == {"A": [1.0, 0.0], "B": [0.5, 0.5]}
    found = cover_of(tmp_path, [*both, feature("Ignore*", [shifted(0, 0, 50)])], [0], [0], 100, 100)
    assert found == {"A": [0.75], "B": [0.5]}


def test_shares_agree_with_exact_areas_of_a_turned_square(tmp_path):
    diamond = [[[0, 100], [100, 0], [200, 100], [100, 200]]]  # not closed: the first point is not repeated
    found = cover_of(tmp_path, [feature("A", diamond)], [0, 100, 50, 60], [0, 0, 50, 60], 100, 100)["A"]
    assert found[:3] == pytest.approx([0.5, 0.5, 1.0], abs=0.01)
    inside = 1 - 0.5 * (20**2) / 100**2  # the corner at (160, 160) sticks out by a triangle with legs of 20
    assert found[3] == pytest.approx(inside, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), points=st.integers(3, 12))
def test_filling_agrees_with_scikit_image(seed, points):
    # a star-shaped polygon around the middle of the picture
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    radii = rng.uniform(2, 30, points)
    ring = np.stack([32 + radii * np.cos(angles), 30 + radii * np.sin(angles)], 1)
    expected = polygon2mask((60, 64), ring[:, ::-1] - 0.5)
    assert (fill([ring], 60, 64) != expected).sum() <= 1  # a centre on an edge may fall on either side
    # the same whichever way the ring runs, wherever it starts, and when its first point is repeated
    assert np.array_equal(fill([ring], 60, 64), fill([np.roll(ring, 2, axis=0)[::-1]], 60, 64))
    assert np.array_equal(fill([ring], 60, 64), fill([np.vstack([ring, ring[:1]])], 60, 64))


def test_an_area_that_reaches_far_beyond_the_slide_costs_nothing(tmp_path):
    far = feature("T", [[[100, 0], [1e9, 0], [1e9, 1e9], [100, 1e9]]])
    x = np.array([0.0, 50.0, 200.0])
    assert cover_of(tmp_path, [far], x, np.zeros(3), 100, 100)["T"] == pytest.approx([0, 0.5, 1], abs=0.02)


def test_large_areas_are_worked_through_in_bands(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ring = np.stack([5000 + 4000 * np.cos(angles), 5000 + 3000 * np.sin(angles)], 1)
    read = read_annotations(write(tmp_path, [feature("A", [ring.tolist()])]))
    x, y = rng.uniform(0, 9000, 300), rng.uniform(0, 9000, 300)
    whole = covered(read, x, y, 500, 400)[1]
    monkeypatch.setattr("histosynth.tiles.slides.annotations._BAND_CELLS", 100_000)
    assert np.allclose(covered(read, x, y, 500, 400)[1], whole, atol=0.02)
    assert covered(read, x[:0], y[:0], 500, 400)[1].shape == (0, 1)
