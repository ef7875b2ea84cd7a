"""Thresholds: learned from training tiles only, read from YAML with every key checked, and what they reject."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from histosynth.cli import main
from histosynth.core.errors import DataError, SettingError
from histosynth.tiles.images import read_rgb, write_png
from histosynth.tiles.quality.degrade import degrade
from histosynth.tiles.quality.metrics import METRICS
from histosynth.tiles.quality.thresholds import (
    RULES,
    Limits,
    QualityConfig,
    Thresholds,
    heavy_losses,
    learn,
    learn_from,
)
from histosynth.tiles.simulate import PhantomConfig, simulate
from histosynth.tiles.tileset import TileSet

TYPICAL = {
    "lap_var": 400, "entropy": 7, "tenengrad": 9000, "white_ratio": 0.05, "sat_ratio": 0.01, "tissue_fraction": 0.95,
    "block_spatial": 0.1, "block_dct": 0.985, "focus_tissue": 3, "noise": 2, "jpeg_quality": 100, "ink_ratio": 0.5,
    "fold_ratio": 0.4, "bubble_ratio": 0.6,
}  # fmt: skip


def table(n, seed=0, **changed):
    """Plausible metrics of n sound tiles, some columns replaced."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({m: v * np.exp(0.1 * rng.normal(size=n)) for m, v in TYPICAL.items()})
    frame["jpeg_quality"] = 100.0
    frame[["tissue_fraction", "block_dct"]] = frame[["tissue_fraction", "block_dct"]].clip(upper=1)
    return frame.assign(**changed)


def rules(tmp_path, content):
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_learned_limits_reject_the_odd_tile_with_metric_value_and_limit():
    limits = learn(table(200), ["TUM"] * 200)
    tiles = table(4, seed=1, lap_var=[400, 20, 400, 400.0], ink_ratio=[0.5, 0.5, 6, 0.5])
    verdicts = limits.verdicts(tiles, ["TUM"] * 4, warn=False)
    assert verdicts[0] == verdicts[3] == ""
    assert verdicts[1].startswith("quality: lap_var 20 below ") and verdicts[1].endswith("(TUM)")
    assert verdicts[2].startswith("quality: ink_ratio 6 above ")
    assert (limits.score(tiles, ["TUM"] * 4) > 0).tolist() == [False, True, True, False]


def test_limits_are_each_classes_own():
    both = pd.concat([table(100), table(100, seed=1, lap_var=40.0 * np.exp(0.1 * np.linspace(-2, 2, 100)))])
    limits = learn(both, ["TUM"] * 100 + ["MUC"] * 100)
    blurred = table(1, lap_var=[40.0])
    assert limits.verdicts(blurred, ["MUC"], warn=False) == [""]
    assert "lap_var" in limits.verdicts(blurred, ["TUM"], warn=False)[0]


def test_few_tiles_take_the_pooled_limits_and_say_so(monkeypatch):
    said = []
    monkeypatch.setattr("histosynth.tiles.quality.thresholds.say", said.append)
    limits = learn(table(120), ["TUM"] * 100 + ["RARE"] * 20)
    assert limits.pooled == ("RARE",) and limits.of("RARE").rules == limits.default.rules
    assert any("RARE has fewer than 30" in line for line in said)
    assert limits.of("NEVER SEEN").rules == limits.default.rules


@pytest.mark.parametrize("share", [0.2, 0.35])
def test_common_damage_does_not_hide_itself(share):
    n = 200
    bad = int(share * n)
    tiles = table(n)
    tiles.loc[: bad - 1, "lap_var"] = 10.0
    tiles.loc[: bad - 1, "ink_ratio"] = 4.0
    tiles.loc[: bad - 1, "jpeg_quality"] = 15.0
    verdicts = np.array(learn(tiles, ["TUM"] * n).verdicts(tiles, ["TUM"] * n, warn=False))
    assert (verdicts[:bad] != "").all() and (verdicts[bad:] != "").mean() <= 0.05


def test_alike_tiles_are_not_rejected_for_a_hair():
    tiles = pd.concat([table(1)] * 50, ignore_index=True)
    limits = learn(tiles, ["A"] * 50)
    nearly = tiles.head(1).assign(ink_ratio=0.9, noise=3.5, jpeg_quality=90, fold_ratio=0.65)
    assert limits.verdicts(nearly, ["A"], warn=False) == [""]


def test_back_is_always_and_adi_nearly_always_accepted():
    limits = learn(table(100), ["TUM"] * 100)
    awful = table(2, lap_var=[0.0, 0.0], ink_ratio=[9, np.nan])
    assert limits.verdicts(awful, ["BACK", "BACK"], warn=False) == ["", ""]
    assert limits.verdicts(awful, ["ADI", "ADI"], warn=False) == ["", "quality: ink_ratio is not a number (ADI)"]
    assert all(limits.verdicts(awful, ["TUM", "TUM"], warn=False))
    assert limits.score(awful, ["BACK", "BACK"]).tolist() == [-1, -1]
    assert limits.score(awful, ["ADI", "ADI"]).tolist() == [-1, np.inf]


def test_a_class_that_would_be_emptied_is_warned_about(monkeypatch):
    said = []
    monkeypatch.setattr("histosynth.tiles.quality.thresholds.say", said.append)
    tiles = table(10, lap_var=[400.0] * 4 + [1.0] * 6)
    labels = ["TUM"] * 10
    limits = learn(table(100), ["TUM"] * 100)
    limits.verdicts(tiles, labels)
    assert len(said) == 1 and "6 of the 10 tiles of class 'TUM' (60%), most often for lap_var" in said[0]
    assert heavy_losses(labels, limits.verdicts(tiles, labels, warn=False), 0.7) == []


def test_limits_come_from_the_train_split_alone(tmp_path):
    tileset = simulate(tmp_path / "a", PhantomConfig(per_class=12, patients=3, size=32))
    before = learn_from(tileset)
    for row in tileset.rows("test").itertuples():  # ruin every test tile
        path = tileset.folder / row.path
        image = read_rgb(path)[0].transpose(2, 0, 1)[None]
        write_png(path, degrade("defocus", image, 1, [1])[0].transpose(1, 2, 0))
    for cached in (tileset.folder / "cache").glob("quality-*"):
        cached.unlink()
    assert learn_from(tileset) == before
    row = tileset.rows("train").iloc[0]
    changed = [tileset.folder / r for r in tileset.rows("train").path]
    for path in changed:
        write_png(path, np.full((32, 32, 3), 128, np.uint8))
    for cached in (tileset.folder / "cache").glob("quality-*"):
        cached.unlink()
    assert learn_from(tileset) != before, row.id


def test_test_tiles_are_refused():
    tiles = table(40).assign(split=["train"] * 30 + ["test"] * 10)
    with pytest.raises(DataError, match="10 of the 40 tiles .* are test tiles"):
        learn(tiles, ["TUM"] * 40)
    learn(tiles[tiles.split == "train"], ["TUM"] * 30)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"classes": {"TUM": {"tissue_frac_min": 0.8}}}, "'tissue_frac_min', .*Did you mean 'tissue_fraction_min'"),
        ({"default": {"lap_var": 50}}, "'lap_var', .*lap_var_m"),
        ({"TUM": {"lap_var_min": 50}}, "Classes belong under"),
        ({"default": {"lap_var_min": "fifty"}}, "'fifty'"),
        ({"default": {"lap_var_min": float("nan")}}, "nan|NaN"),
        ({"default": {"lap_var_min": True}}, "True"),
        ({"learn": {"sharpness_min": {}}}, "sharpness_min"),
        ({"learn": {"lap_var_min": {"tolerate": 1}}}, "Did you mean 'tolerated'"),
        ({"classes": {"ADI": {"accept": "sometimes"}}}, "sometimes"),
        ({"default": {"calibration": {"block_dct": [1]}}}, "calibration of block_dct"),
        ({"default": {"calibration": {"entropy": [1, 2]}}}, "entropy"),
        ({"classes": ["TUM"]}, "under classes"),
        ([1, 2], "hold no table"),
        ("text", "hold no table"),
    ],
)
@pytest.mark.parametrize("write", [yaml.safe_dump, json.dumps], ids=["yaml", "json"])
def test_a_key_or_value_that_means_nothing_is_an_error(tmp_path, content, message, write):
    path = tmp_path / "seuils.json"
    path.write_text(write(content))
    with pytest.raises(SettingError, match=message) as caught:
        Thresholds.load(path)
    assert "seuils.json" in str(caught.value) or "hold" in str(caught.value)


def test_unreadable_rules_are_errors(tmp_path):
    with pytest.raises(SettingError, match="no file and no preset.*'nct-default'"):
        Thresholds.load("nct-defalt")
    broken = tmp_path / "broken.yaml"
    broken.write_text("default: [")
    with pytest.raises(SettingError, match="are not YAML"):
        Thresholds.load(broken)


def test_limits_survive_a_file(tmp_path):
    limits = learn(table(120), ["TUM"] * 60 + ["STR"] * 50 + ["RARE"] * 10)
    path = tmp_path / "thresholds.yaml"
    limits.save(path)
    again = Thresholds.load(path)
    assert again == limits
    assert learn(table(50, seed=5), ["TUM"] * 50, QualityConfig(rules=str(path))) == limits  # fixed limits stay
    recipe = Thresholds.load("learned")
    recipe.save(path)
    assert Thresholds.load(path) == recipe


@settings(max_examples=30, deadline=None)
@given(
    limits=st.dictionaries(st.sampled_from(RULES), st.floats(-1e6, 1e6), max_size=6),
    label=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8),
    accept=st.sampled_from(["", "always", "finite"]),
)
def test_any_limits_survive_a_file(tmp_path_factory, limits, label, accept):
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    given_ = Thresholds(classes={label: Limits(limits, accept)}, name="x")
    given_.save(path)
    assert Thresholds.load(path) == given_


def test_limits_that_are_yet_to_be_learned_do_not_judge():
    with pytest.raises(SettingError, match="yet to be learned"):
        Thresholds.load("learned").verdicts(table(2), ["A", "A"])


def test_default_rules_accept_sound_tiles_without_a_combined_score():
    limits = learn(table(50), ["MUC"] * 50, QualityConfig(rules="nct-default"))
    tiles = table(50, seed=3, block_dct=np.linspace(0.98, 1.0, 50))  # where sound tiles lie
    assert limits.verdicts(tiles, ["MUC"] * 50) == [""] * 50
    assert "block_dct" in limits.verdicts(table(1, block_dct=[0.3]), ["MUC"], warn=False)[0]
    assert "tissue_fraction 0.05 below 0.1" in limits.verdicts(table(1, tissue_fraction=[0.05]), ["MUC"], warn=False)[0]


def test_the_prototypes_table_applies_its_tissue_limits_and_combined_score():
    limits = learn(table(5), ["TUM"] * 5, QualityConfig(rules="nct-prototype"))
    assert limits.of("TUM").rules["tissue_fraction_min"] == 0.7864
    assert limits.of("DEB").rules["lap_var_min"] == 389.875 and limits.of("UNKNOWN").rules["lap_var_min"] == 50
    good = {"lap_var": [500.0], "tenengrad": [30000.0], "entropy": [7.3], "block_spatial": [0.0], "block_dct": [0.98]}
    assert limits.verdicts(table(1, **good), ["TUM"], warn=False) == [""]
    assert "tissue_fraction" in limits.verdicts(table(1, **good | {"tissue_fraction": [0.7]}), ["TUM"], warn=False)[0]
    blocky = limits.verdicts(table(1, **good | {"block_spatial": [0.5]}), ["TUM"], warn=False)
    z = ((0.5 - 0.09) / 0.14 + (0.98 - 0.98) / 0.01) / 2
    assert blocky == [f"quality: jpeg_blockiness {z:.4g} above 0.0434 (TUM)"]


def test_the_combined_score_is_calibrated_when_a_file_lacks_it(tmp_path):
    path = rules(tmp_path, {"default": {"jpeg_blockiness_max": 4}})
    with pytest.raises(SettingError, match="needs the calibration of block_spatial"):
        Thresholds.load(path).verdicts(table(1), ["TUM"])
    tiles = table(100)
    limits = learn(tiles, ["TUM"] * 60 + ["STR"] * 40, QualityConfig(rules=str(path)))
    mean, spread = limits.of("TUM").calibration["block_spatial"]
    own = tiles.block_spatial[:60].clip(*tiles.block_spatial[:60].quantile([0.01, 0.99]))
    assert mean == pytest.approx(own.mean()) and spread == pytest.approx(own.std(ddof=0).clip(0.02))
    assert limits.verdicts(tiles, ["TUM"] * 60 + ["STR"] * 40) == [""] * 100
    assert "jpeg_blockiness" in limits.verdicts(table(1, block_spatial=[3.0]), ["TUM"], warn=False)[0]


def test_none_rejects_nothing():
    limits = learn(table(3), ["A"] * 3, QualityConfig(rules="none"))
    assert limits.verdicts(table(2, lap_var=[0.0, 0.0]), ["A", "B"]) == ["", ""]
    assert limits.score(table(2), ["A", "B"]).tolist() == [-1, -1]


def test_a_verdict_and_its_score_agree_with_the_limit_itself():
    limits = Thresholds(Limits({"lap_var_min": 50.0, "sat_ratio_max": 0.2}))
    edge = table(4, lap_var=[50, 49.999, 60, 60.0], sat_ratio=[0.1, 0.1, 0.2, 0.2001])
    labels = ["A"] * 4
    assert [bool(v) for v in limits.verdicts(edge, labels, warn=False)] == [False, True, False, True]
    assert (limits.score(edge, labels) > 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantile": 0}, "quantile is 0"),
        ({"quantile": 0.5}, "quantile is 0.5"),
        ({"min_tiles": 0}, "min_tiles is 0"),
        ({"warn_share": 1.5}, "warn_share is 1.5"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(SettingError, match=message):
        QualityConfig(**change)


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="lacks 'entropy'"):
        learn(table(5).drop(columns="entropy"), ["A"] * 5)
    with pytest.raises(DataError, match="5 rows of metrics came with 4 labels"):
        learn(table(5), ["A"] * 4)
    with pytest.raises(DataError, match="no tile to learn"):
        learn(pd.DataFrame(np.nan, range(3), list(METRICS)), ["A"] * 3)


def test_the_verb_writes_the_table_and_limits_that_can_be_read_back(tmp_path, capfd):
    tiles, out = tmp_path / "tiles", tmp_path / "out"
    simulate(tiles, PhantomConfig(per_class=10, patients=3, size=32))
    main(["tiles", "quality", str(tiles), "--out", str(out), "--workers", "1"])
    shown = capfd.readouterr().out
    assert "would reject" in shown and "TUM" in shown
    written = pd.read_csv(out / "quality.csv")
    assert set(METRICS) <= set(written.columns) and len(written) == len(TileSet.open(tiles).kept)
    main(["tiles", "quality", str(tiles), "--rules", str(out / "thresholds.yaml"), "--workers", "1"])
    assert capfd.readouterr().out == shown
    with pytest.raises(SystemExit) as stop:
        main(["tiles", "quality", str(tiles), "--rules", "nonsense"])
    assert stop.value.code == 2
