"""The main job from tiles to report, at toy size, and what it must withstand."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from histosynth.cli import main
from histosynth.core.errors import DataError, RunError, SettingError
from histosynth.study import compare as compare_module
from histosynth.study.compare import CompareConfig, compare
from histosynth.study.plan import make_plan
from histosynth.tiles.tileset import TileSet

TOY = {
    "size": 32,
    "init": "none",
    "encoder": "colour",
    "classifier_seeds": 2,
    "classifier_steps": 3,
    "synthetic_per_class": 6,
    "generator_steps": {"gan": 2, "diffusion": 2},
    "workers": 1,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Tiles of another kind than ours: other class names, 50 px, JPEG, TIFF and PNG, a CSV with patients."""
    root = tmp_path_factory.mktemp("tiles")
    rng = np.random.default_rng(0)
    rows = []
    for label, base in (("Adenoma & co", 90), ("normal", 160), ("rare", 220)):
        for patient in range(9):
            for k in range(1 if label == "rare" else 3):
                noise = rng.integers(0, 60, (10, 10, 3))
                tile = np.clip(noise + base + 4 * patient, 0, 255).astype(np.uint8)
                name = f"{label[:3]}-{patient}-{k}.{('png', 'jpg', 'tif')[patient % 3]}"
                Image.fromarray(tile).resize((50, 50), Image.Resampling.BICUBIC).save(root / name)
                rows.append({"path": name, "label": label, "patient": f"p{patient}"})
    (root / "broken.png").write_text("not an image")
    rows.append({"path": "broken.png", "label": "normal", "patient": "p0"})
    pd.DataFrame(rows).to_csv(root / "tiles.csv", index=False)
    return root


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "run"
    return out, compare(source, config=CompareConfig(out=out, **TOY))


def figures(path):
    """report.json without what the clock and the place decide."""
    report = json.loads(path.read_text())
    for key in ("created", "costs", "command"):
        report.pop(key)
    for arm in report["utility"]["arms"]:
        arm.pop("seconds")
    for one in report["generators"].values():
        one.pop("checkpoint")  # its card names the run's folder
    return report


def test_report_is_whole(finished, source):
    out, page = finished
    report = json.loads((out / "report.json").read_text())
    assert page.read_text().startswith("<!doctype html>") or page.read_text().lower().startswith("<!doctype")
    assert set(report["generators"]) == {"gan", "diffusion"}
    assert [v["generator"] for v in report["verdicts"]] == ["gan", "diffusion"]
    for spoken in report["verdicts"]:
        none = {"no evidence", "no relevant difference"}
        assert spoken["word"] in ({"helps"} if spoken["low"] > 0 else {"hurts"} if spoken["high"] < 0 else none)
    arms = {a["name"]: a for a in report["utility"]["arms"]}
    assert list(arms) == ["real", "real_classical", "real_gan", "real_diffusion", "gan_only", "diffusion_only"]
    test_tiles = sum(report["data"]["counts"]["test"].values())
    assert all(np.sum(a["confusion"]) == 2 * test_tiles for a in arms.values()), "every arm, every seed, every tile"
    train = report["data"]["counts"]["train"]
    assert arms["real_gan"]["train_tiles"] == {c: n + 6 for c, n in train.items()}
    assert arms["gan_only"]["train_tiles"] == dict.fromkeys(train, 6)
    assert report["data"]["set_aside"] == {"unreadable": 1}
    assert any("JPEG" in w for w in report["warnings"])
    tileset = TileSet.open(out / "synthetic" / "gan")
    assert set(tileset.kept.generator) == {"gan"} and tileset.kept.seed.is_unique


def test_the_same_seed_gives_the_same_figures_and_a_finished_run_is_not_repeated(finished, source, tmp_path):
    out, page = finished
    before = page.stat().st_mtime_ns
    assert compare(source, config=CompareConfig(out=out, **TOY)) == page
    assert page.stat().st_mtime_ns == before
    compare(source, config=CompareConfig(out=tmp_path / "again", **TOY))
    assert figures(tmp_path / "again" / "report.json") == figures(out / "report.json")


def test_a_killed_run_goes_on_to_the_same_figures(finished, source, tmp_path):
    out = tmp_path / "killed"
    words = [sys.executable, "-m", "histosynth", "compare", str(source), "--out", str(out)]
    for name, value in TOY.items():
        flag = "--" + name.replace("_", "-")
        pairs = value.items() if isinstance(value, dict) else [("", value)]
        words += [w for k, v in pairs for w in (f"{flag}.{k}" if k else flag, str(v))]
    process = subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (out / "synthetic" / "gan" / "tileset.json").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "report.html").exists()
    compare(source, config=CompareConfig(out=out, **TOY))
    assert figures(out / "report.json") == figures(finished[0] / "report.json")
    assert not list(out.rglob("*.tmp*")) or all(p.stat().st_size >= 0 for p in out.rglob("*.tmp*"))


def test_what_cannot_be_compared_is_refused(source, tmp_path):
    with pytest.raises(SettingError, match="'gann'.*Did you mean 'gan'"):
        compare(source, config=CompareConfig(out=tmp_path / "a", generators=("gann",)))
    with pytest.raises(SettingError, match="size is 50"):
        compare(source, config=CompareConfig(out=tmp_path / "b", size=50))
    for wrong in ({"encoder": "colur"}, {"synthetic_per_class": 0}, {"generator_steps": {"gann": 5}}, {"val": 1.0}):
        with pytest.raises(SettingError, match=next(iter(wrong)).split("_")[0]):
            compare(source, config=CompareConfig(out=tmp_path / "d", **(TOY | wrong)))
    assert not (tmp_path / "d").exists(), "a wrong setting must not claim the folder"
    table = pd.read_csv(source / "tiles.csv")
    table[table.label == "normal"].assign(path=[str(source / p) for p in table.path[table.label == "normal"]]).to_csv(
        tmp_path / "one.csv", index=False
    )
    with pytest.raises(DataError, match="one class only"):
        compare(tmp_path / "one.csv", config=CompareConfig(out=tmp_path / "c", **TOY))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.docx").touch()
    with pytest.raises(RunError, match="not empty"):
        compare(source, config=CompareConfig(out=tmp_path / "full", **TOY))


def test_other_settings_in_a_used_folder_are_refused(finished, source):
    with pytest.raises(RunError, match="seed: 0 then, 1 now"):
        compare(source, config=CompareConfig(out=finished[0], **(TOY | {"seed": 1})))


def test_a_run_never_mixes_two_sets_of_tiles(finished, source, tmp_path):
    import shutil

    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / "report.html").unlink()
    digest = out / "data.json"
    digest.write_text('{"digest": "another"}')
    with pytest.raises(RunError, match="not those that the run"):
        compare(source, config=CompareConfig(out=out, **TOY))


def test_synthetic_tiles_made_from_test_tiles_are_refused(finished, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    tileset, made = TileSet.open(out / "tiles"), TileSet.open(out / "synthetic" / "gan")
    for split in ("train", "test"):
        made.table["reference"] = tileset.rows(split).id[0]
        made.table.to_parquet(made.folder / "tiles.parquet")
        if split == "train":
            assert len(compare_module._synthetic_array(out, "gan", CompareConfig(**TOY), tileset)) == len(made.kept)
    with pytest.raises(DataError, match="outside train"):
        compare_module._synthetic_array(out, "gan", CompareConfig(**TOY), tileset)


def test_minutes_become_steps_by_fixed_rates():
    from histosynth.study.generators import family

    families = [family("gan"), family("diffusion")]
    settings = {"size": 64, "classes": 6, "seeds": 3, "classifier_steps": None, "synthetic_per_class": None}
    short = make_plan(5, families, generator_steps={}, **settings)
    long = make_plan(50, families, generator_steps={"gan": 7}, **settings)
    assert long.generator_steps["gan"] == 7
    assert long.generator_steps["diffusion"] == pytest.approx(10 * short.generator_steps["diffusion"], rel=0.05)
    assert long.classifier_steps >= short.classifier_steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "nowhere", "--sede", "1"], "--seed"),
        (["compare", "nowhere", "--out", "OUT"], "does not exist"),
        (["compar"], "compare"),
        (["compare", "nowhere", "--minutes", "soon"], "minutes"),
        (["compare", "nowhere", "--config", "no/such"], "neither a file nor a preset"),
        (["compare", "nowhere", "--config", "YAML"], "sead"),
    ],
)
def test_mistakes_on_the_command_line_end_with_2_and_a_remedy(words, message, tmp_path, capfd):
    (tmp_path / "c.yaml").write_text("sead: 3\n")
    replace = {"OUT": str(tmp_path / "out"), "YAML": str(tmp_path / "c.yaml")}
    with pytest.raises(SystemExit) as stop:
        main([replace.get(w, w) for w in words])
    captured = capfd.readouterr()
    assert stop.value.code == 2
    assert message in captured.err + captured.out
    assert "Traceback" not in captured.err


def test_config_file_gives_defaults_and_flags_win(tmp_path, monkeypatch):
    from histosynth import cli

    (tmp_path / "c.yaml").write_text("seed: 3\nminutes: 7\n")
    seen = {}
    monkeypatch.setattr(
        "histosynth.study.compare.run_comparison",
        lambda tiles, out, config, **_: seen.update(seed=config.seed, minutes=config.minutes),
    )
    cli.main(["compare", "x", "--config", str(tmp_path / "c.yaml"), "--minutes", "9"])
    assert seen == {"seed": 3, "minutes": 9}
