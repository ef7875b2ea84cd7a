"""The CSV of predictions: read back as it was written, and refused when anything in it cannot be true."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from histosynth.classify.calibration import softmax
from histosynth.classify.predictions import Predictions, read_predictions, write_predictions
from histosynth.core.errors import DataError, SettingError

CLASSES = ("ADI", "MUC", "TUM")


def _predictions(patients=True, n=30):
    rng = np.random.default_rng(0)
    return Predictions(
        np.array(["val", "test"])[np.arange(n) % 2],
        np.array([f'images/TUM/tile {i}, "a".png' for i in range(n)]),
        rng.integers(0, 3, n),
        rng.normal(size=(n, 3)).astype(np.float32),
        CLASSES,
        np.array([f"p{i // 4}" for i in range(n)]) if patients else None,
    )


@pytest.mark.parametrize("patients", [True, False])
def test_a_file_gives_back_what_was_written(patients, tmp_path):
    first = _predictions(patients)
    write_predictions(tmp_path / "a.csv", first, temperature=2.0)
    again = read_predictions(tmp_path / "a.csv")
    assert again.classes == CLASSES and again.notes == ()
    for name in ("split", "paths", "y", "logits", "patients"):
        assert np.array_equal(getattr(again, name), getattr(first, name)), name
    assert (again.patients is None) is not patients
    assert again.splits == ("val", "test") and len(again.of("test")) == 15
    with pytest.raises(DataError, match="'external'.*val, test"):
        again.of("external")


def test_columns_are_those_of_the_prototype(tmp_path):
    first = _predictions()
    write_predictions(tmp_path / "a.csv", first, temperature=2.0)
    rows = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    assert list(rows[0]) == [
        "split", "image_path", "y_true", "y_pred", "top1_conf", "logits_json", "top1_conf_cal", "patient",
    ]  # fmt: skip
    for row, logits in zip(rows, first.logits, strict=True):
        assert json.loads(row["logits_json"]) == logits.tolist() and int(row["y_pred"]) == logits.argmax()
        assert float(row["top1_conf"]) == pytest.approx(softmax(logits[None]).max(), abs=1e-6)
        assert float(row["top1_conf_cal"]) == pytest.approx(softmax(logits[None], 2.0).max(), abs=1e-6)
    write_predictions(tmp_path / "b.csv", _predictions(patients=False))
    assert (tmp_path / "b.csv").read_text().splitlines()[0] == "split,image_path,y_true,y_pred,top1_conf,logits_json"


def test_a_file_of_the_prototype_needs_no_names(tmp_path):
    path = tmp_path / "old.csv"
    path.write_text(
        "\ufeffsplit,image_path,y_true,y_pred,top1_conf,logits_json,top1_conf_cal\r\n"
        'val,a.png,1,1,0.7311,"[0, 1.0]",0.6\r\n'
        'val,b.png,0,1,0.5,"[2.5, 2.5]",0.5\r\n'
    )
    found = read_predictions(path)
    assert found.classes == ("0", "1") and "called by number" in found.notes[0] and found.patients is None
    assert found.y.tolist() == [1, 0] and found.logits.tolist() == [[0, 1], [2.5, 2.5]]
    assert read_predictions(path, ["no", "yes"]).classes == ("no", "yes")
    with pytest.raises(DataError, match="2 logits a tile for 3 classes"):
        read_predictions(path, CLASSES)
    (tmp_path / "old.classes.json").write_text('{"classes": 3}')
    with pytest.raises(DataError, match="old.classes.json"):
        read_predictions(path)


HEADER = "split,image_path,y_true,y_pred,top1_conf,logits_json"
GOOD = 'val,a.png,0,0,0.7311,"[1.0, 0.0]"'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (HEADER, "no tile"),
        ("split,image_path,y_true,y_pred,top1_conf\nval,a.png,0,0,0.5", "lacks the columns logits_json"),
        (f"{HEADER},split\n{GOOD},val", "a column twice"),
        (f'{HEADER}\n{GOOD}\nval,b.png,0,0,0.7311,"[1.0, 0.0"', "line 3: logits_json is no JSON"),
        (f'{HEADER}\nval,a.png,0,0,0.7311,"{{}}"', "logits_json is '{}'"),
        (f'{HEADER}\nval,a.png,0,0,1,"[1.0]"', "two numbers or more"),
        (f'{HEADER}\nval,a.png,0,0,0.7311,"[1.0, true]"', "two numbers or more"),
        (f'{HEADER}\nval,a.png,0,0,0.7311,"[1.0, ""0""]"', "two numbers or more"),
        (f'{HEADER}\n{GOOD}\nval,b.png,0,0,0.7,"[1.0, 0.0, 0.0]"', "line 3: there are 3 logits, and 2"),
        (f'{HEADER}\nval,a.png,0,0,0.7311,"[1.0, NaN]"', "not finite"),
        (f'{HEADER}\nval,a.png,0,0,0.7311,"[1.0, -Infinity]"', "not finite"),
        (f'{HEADER}\nval,a.png,0,0,0.7311,"[1.0, 1e999]"', "not finite"),
        (f'{HEADER}\nval,a.png,2,0,0.7311,"[1.0, 0.0]"', "y_true is 2 for 2 classes"),
        (f'{HEADER}\nval,a.png,-1,0,0.7311,"[1.0, 0.0]"', "y_true is -1"),
        (f'{HEADER}\nval,a.png,TUM,0,0.7311,"[1.0, 0.0]"', "y_true is 'TUM'"),
        (f'{HEADER}\nval,a.png,0,5,0.7311,"[1.0, 0.0]"', "y_pred is 5"),
        (f'{HEADER}\nval,a.png,0,1,0.7311,"[1.0, 0.0]"', "y_pred is 1 and the largest logit is that of 0"),
        (f'{HEADER}\nval,a.png,0,0,0.99,"[1.0, 0.0]"', "top1_conf is 0.99 and the logits give 0.7311"),
        (f'{HEADER}\nval,a.png,0,0,nan,"[1.0, 0.0]"', "top1_conf is nan"),
        (f'{HEADER}\nval,a.png,0,0,high,"[1.0, 0.0]"', "top1_conf is 'high'"),
        (f"{HEADER}\n{GOOD}\n{GOOD}", "line 3: a.png stands in line 2 already"),
        (f"{HEADER}\n{GOOD}\n{GOOD.replace('val', 'test')}", "a.png stands in line 2 already"),
        (f"{HEADER}\n{GOOD.replace('a.png', '')}", "image_path is empty"),
        (f"{HEADER}\n{GOOD.replace('val', ' ')}", "split is empty"),
        (f"{HEADER}\n{GOOD},more", "number of fields"),
        (f"{HEADER}\nval,a.png,0,0", "number of fields"),
        (f'{HEADER},patient\n{GOOD},p1\nval,b.png,0,0,0.7311,"[1.0, 0.0]",', "line 3: patient is empty"),
        (f'{HEADER}\nval,a.png,0,0,0.7311,"[1.0, 0.0]', "cannot be read as a CSV"),
    ],
)
def test_bad_files_are_refused(text, said, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(text + "\n" if text else "")
    with pytest.raises(DataError) as error:
        read_predictions(path)
    assert said in str(error.value) and "bad.csv" in error.value.message and error.value.remedy


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "bad.csv").write_bytes(b"\xff\xfe\x00\x01" * 10)
    with pytest.raises(DataError, match="cannot be read"):
        read_predictions(tmp_path / "bad.csv")
    with pytest.raises(DataError, match="does not exist"):
        read_predictions(tmp_path / "none.csv")


def test_arrays_that_cannot_be_are_refused(tmp_path):
    good = _predictions()
    parts = {name: getattr(good, name) for name in ("split", "paths", "y", "logits", "classes", "patients")}
    for change, said in (
        ({"y": good.y + 2}, "classes"),
        ({"y": good.y.astype(float)}, "integers"),
        ({"logits": np.where(good.logits > 1, np.nan, good.logits)}, "not finite"),
        ({"logits": good.logits[:, :2]}, "Give N of each"),
        ({"paths": np.repeat(good.paths[:15], 2)}, "more than once"),
        ({"classes": ("ADI", "ADI", "TUM")}, "named twice"),
        ({"patients": good.patients[1:]}, "Give N of each"),
    ):
        with pytest.raises(DataError, match=said):
            Predictions(**{**parts, **change})
    for temperature in (0, -1.0, np.inf, np.nan):
        with pytest.raises(SettingError, match="temperature"):
            write_predictions(tmp_path / "a.csv", good, temperature=temperature)
    with pytest.raises(DataError, match=".csv"):
        write_predictions(tmp_path / "a.txt", good)
    assert list(tmp_path.iterdir()) == []
