"""Class tables: known ones, own ones, and any other class."""

import re

import pytest

from histosynth.core.errors import DataError, SettingError
from histosynth.tiles import phantom
from histosynth.tiles.classes import CLASS_TABLES, class_entry, load_class_table
from histosynth.tiles.sources.source import ImportConfig, import_tiles
from histosynth.tiles.tileset import class_entry as of_tileset


def test_the_known_tables_are_whole():
    assert {k: len(t) for k, t in CLASS_TABLES.items()} == {
        "nct-crc": 9, "ham10000": 7, "isic-naevus-melanoma": 2, "ebhi-seg": 6,
    }  # fmt: skip
    for table in CLASS_TABLES.values():
        assert all(re.fullmatch("#[0-9A-F]{6}", info.colour) and info.name for info in table.values())
        assert len({info.colour for info in table.values()}) == len(table), "one colour a class"
        assert all(label == info.label for label, info in table.items())
    assert list(CLASS_TABLES["nct-crc"]) == sorted(CLASS_TABLES["nct-crc"])
    assert CLASS_TABLES["nct-crc"]["STR"].colour == "#762A83"
    assert set(CLASS_TABLES["ham10000"]) == {"akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"}


def test_the_simulator_takes_its_classes_from_the_table():
    assert {c: (phantom.CLASS_NAMES[c], phantom.CLASS_COLOURS[c]) for c in phantom.CLASSES} == {
        c: (info.name, info.colour) for c, info in CLASS_TABLES["nct-crc"].items()
    }


def test_entries_of_known_labels_other_spellings_and_unknown_labels():
    assert of_tileset is class_entry
    assert class_entry("TUM", 3, 4) == {
        "label": "TUM",
        "name": "colorectal adenocarcinoma epithelium",
        "colour": "#000000",
    }
    assert class_entry("High-grade IN", 0, 2)["name"] == "high-grade intraepithelial neoplasia"
    own = [class_entry(f"my class {k}", k, 5) for k in range(5)]
    assert len({e["colour"] for e in own}) == 5 and own[2]["name"] == "my class 2"
    only = load_class_table("ham10000")
    assert class_entry("TUM", 0, 2, only)["name"] == "TUM", "a chosen table is the only one"


def test_an_own_table_names_and_colours_an_import(folders, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("A: {name: first kind, colour: '#a1b2c3'}\nB: second kind\nNO: {name: not a boolean}\n")
    assert load_class_table(str(path))["NO"].name == "not a boolean"
    tileset = import_tiles(folders, tmp_path / "out", ImportConfig(class_table=str(path)))
    found = {e["label"]: e for e in tileset.meta["classes"]}
    assert found["A"] == {"label": "A", "name": "first kind", "colour": "#A1B2C3"}
    assert found["B"]["name"] == "second kind" and found["C c"]["name"] == "C c"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- A\n- B\n", "no table of classes"),
        ("", "no table of classes"),
        ("A: {name: a, color: '#000000'}", "key 'color'.*'colour'"),
        ("A: {name: a, colour: red}", "colour 'red'"),
        ("A: [a]\n", "class 'A' has"),
        ("A: {also: b}", "list of spellings"),
        ("A: {also: [B]}\nB: {name: b}", "'B' twice"),
        ("A: {name: [", "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)
def test_mistakes_in_an_own_table_are_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_class_table(str(path))


def test_an_unknown_table_is_refused_before_anything_is_made(folders, tmp_path):
    with pytest.raises(SettingError, match="'nct-crk'.*Did you mean 'nct-crc'"):
        import_tiles(folders, tmp_path / "out", ImportConfig(class_table="nct-crk"))
    assert not (tmp_path / "out").exists()
