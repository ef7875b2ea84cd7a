"""`histosynth evaluate` on small simulated sets: what it reports, what it refuses, and what it puts up with."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from histosynth import encoders
from histosynth.cli import main
from histosynth.core.checkpoint import save_checkpoint
from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.core.files import sha256_file, write_json
from histosynth.core.types import EncoderCard
from histosynth.evaluate.settings import Protocol
from histosynth.study.evaluation import run as evaluation
from histosynth.study.evaluation.measures import blurred
from histosynth.study.evaluation.run import EvaluateConfig, evaluate_sets
from histosynth.study.evaluation.verdict import _copied as verdict_of_copies
from histosynth.study.evaluation.verdict import _nuclei as verdict_of_nuclei
from histosynth.study.evaluation.verdict import verdict
from histosynth.tiles.images import read_rgb, write_png
from histosynth.tiles.phantom import make_hospital, make_patient, render
from histosynth.tiles.tileset import TileSet

CLASSES = ("ADI", "LYM", "TUM")
SIZE = 32
FEW = ("kid", "coverage", "diversity")


def tissue(label: str, patient: int, seed: int, hospital: int = 7) -> np.ndarray:
    """A simulated tile, uint8 [32, 32, 3], of one of the patients of a hospital."""
    who = make_patient(patient, make_hospital(hospital, shift=1.0))
    return render(label, patient=who, seed=seed, size=SIZE, field_um=64).image


def write_set(folder, tiles, **meta) -> TileSet:
    """A tile set of (row, image uint8 [H, W, 3]) pairs."""
    rows = []
    for row, image in tiles:
        path = f"images/{row['label']}/{row['id']}.png"
        write_png(folder / path, image)
        rows.append(
            {"path": path, "sha256": sha256_file(folder / path), "format": "PNG", "width": image.shape[1],
             "height": image.shape[0]} | row
        )  # fmt: skip
    labels = dict.fromkeys(row["label"] for row, _ in tiles)
    return TileSet.create(folder, pd.DataFrame(rows), tuple(c for c in CLASSES if c in labels) or CLASSES, **meta)


def real_tiles(patients, split, each=2, start=0):
    for patient in patients:
        for label in CLASSES:
            for k in range(each):
                name = f"{label}-{patient}-{k + start}"
                row = {"id": name, "label": label, "patient": f"p{patient}", "split": split}
                yield row, tissue(label, patient, 1000 * patient + 10 * CLASSES.index(label) + k + start)


def made_tiles(count, labels=CLASSES, draw=None, **more):
    for label in labels:
        for k in range(count):
            row = {"id": f"made-{label}-{k}", "label": label, "generator": "gan", "seed": k} | more
            draw_one = draw or (lambda label, k: tissue(label, 90 + k % 6, 50_000 + k, hospital=3))
            yield row, draw_one(label, k)


def synthetic_set(folder, tiles, **meta):
    return write_set(folder, list(tiles), synthetic=True, generator="gan", **meta)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    tiles = [*real_tiles(range(10), "train"), *real_tiles(range(10, 20), "test"), *real_tiles([20, 21, 22], "val")]
    return write_set(tmp_path_factory.mktemp("real") / "tiles", tiles, source="hospital 7")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    def half_blurred(label, k):
        tile = tissue(label, 90 + k % 6, 50_000 + k).transpose(2, 0, 1)
        return (tile * 0.4 + blurred(tile[None])[0] * 0.6).round().astype(np.uint8).transpose(1, 2, 0)

    return synthetic_set(tmp_path_factory.mktemp("made") / "tiles", made_tiles(20, draw=half_blurred))


def quick(patch, page=True):
    """Rough intervals, no map and, if wanted, no page."""
    patch.setattr(evaluation, "Protocol", partial(Protocol, replicates=4, kid_subsets=10))
    patch.setattr(evaluation.fidelity, "embedding_map", lambda *a: {})
    if not page:
        write = lambda out, report, shown: write_json(out / "report.json", report)  # noqa: E731
        patch.setattr(evaluation, "write_evaluation", write)


def judged(real, synthetic, out, page=True, **settings):
    """The report and the page, quickly made."""
    config = EvaluateConfig(**({"out": out, "encoder": ("colour",), "metrics": FEW, "variety": ()} | settings))
    with pytest.MonkeyPatch.context() as patch:
        quick(patch, page)
        evaluate_sets(real, synthetic, config, "histosynth evaluate")
    text = (out / "report.html").read_text() if page else ""
    return json.loads((out / "report.json").read_text()), text


def guards(report):
    return {g["guard"]: g["severity"] for g in report["guards"]}


@pytest.fixture(scope="module")
def whole(real, made, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    missing = f"pathoduet={out / 'missing.pth'}"
    settings = {
        "encoder": ("colour", missing), "classifier": "train", "classifier_steps": 40,
        "variety": ("ms-ssim", "lpips-vgg"), "weights": (f"lpips-vgg={out / 'missing.pth'}",),
    }  # fmt: skip
    config = EvaluateConfig(out=out, metrics=FEW, **settings)
    page = evaluate_sets(real, made, config, "histosynth evaluate")
    return out, config, json.loads((out / "report.json").read_text()), page.read_text()


def test_every_score_stands_between_real_and_hopeless(whole):
    _, _, report, _ = whole
    scores = report["encoders"]["colour"]["all"]["scores"]
    assert report["n"] == 60 and set(scores) == {
        "kid", "precision", "recall", "density", "coverage", "vendi_ratio", "spread_ratio",
    }  # fmt: skip
    for score in scores.values():
        assert {"value", "low", "high", "floor", "floor_low", "floor_high", "ceiling", "position", "n"} <= set(score)
    kid = scores["kid"]
    assert kid["floor"] < kid["value"] < kid["ceiling"] and 0 < kid["position"] < 1
    assert kid["position"] == pytest.approx((kid["value"] - kid["floor"]) / (kid["ceiling"] - kid["floor"]))
    per_class = report["encoders"]["colour"]["per_class"]["TUM"]["scores"]
    assert per_class["coverage"]["ceiling"] is not None
    assert report["planted"]["found"] >= 0.9
    nuclei = {side: report["nuclei"][side]["nuclei_distance"] for side in ("real", "synthetic", "hopeless")}
    assert nuclei["real"] < nuclei["hopeless"] and nuclei["synthetic"] < nuclei["hopeless"]
    assert report["labels"]["real"]["label_consistency"] > report["labels"]["hopeless"]["label_consistency"] + 0.2
    assert np.sum(report["labels"]["confusion"]) == 60


def test_an_encoder_without_weights_is_left_out_with_the_reason(whole, real, made, tmp_path):
    _, _, report, page = whole
    skipped = {s["what"]: s["reason"] for s in report["skipped"]}
    assert "missing.pth" in skipped["encoder pathoduet"]
    assert list(report["variety"]) == ["ms-ssim"] and "missing.pth" in skipped["variety by lpips-vgg"]
    ours, theirs = (report["variety"]["ms-ssim"][side]["diversity"] for side in ("synthetic", "real"))
    assert 0 < ours < theirs, "half blurred tiles are more alike"
    assert "Left out: encoder pathoduet" in page
    with pytest.raises(CheckpointError):
        judged(real, made, tmp_path / "run", encoder=(f"pathoduet={tmp_path / 'missing.pth'}",))


def test_the_page_is_whole_and_needs_no_other_file(whole):
    out, _, report, page = whole
    for word in (report["verdict"], "Way from real", "Farthest from any real tile", "Card of the synthetic tiles"):
        assert word in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    for section in ("verdict", "scores", "labels", "pictures", "copies", "tissue", "card", "protocol"):
        assert f'href="#{section}"' in page and f'id="{section}"' in page
    assert (out / "card.md").is_file() and json.loads((out / "card.json").read_text())["generator"] == "gan"
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) > 20 and all('alt="' in image for image in images)


def test_the_verdict_is_made_of_the_numbers(whole):
    _, _, report, _ = whole
    text = report["verdict"]
    assert "Against 60 real test tiles of 10 patients, the GAN tiles are apart from real in" in text
    assert f"{100 * report['labels']['synthetic']['label_consistency']:.0f} %" in text
    assert "planted copies" in text and report["verdicts"][0]["sentence"] == text


def test_the_same_command_gives_the_same_numbers(whole, real, made, monkeypatch):
    out, config, before, _ = whole
    quick(monkeypatch, page=False)
    monkeypatch.setattr(evaluation, "Protocol", Protocol)
    monkeypatch.setattr(evaluation, "train_classifier", None)  # the one of the first run is on the disk
    evaluate_sets(real, made, config, "histosynth evaluate")
    after = json.loads((out / "report.json").read_text())
    assert {k: v for k, v in after.items() if k != "created"} == {k: v for k, v in before.items() if k != "created"}


def test_blurred_tiles_are_hopeless(real, tmp_path):
    def draw(label, k):
        image = tissue(label, 90 + k % 6, 50_000 + k)
        return blurred(image.transpose(2, 0, 1)[None])[0].transpose(1, 2, 0)

    report, _ = judged(real, synthetic_set(tmp_path / "made", made_tiles(20, draw=draw)), tmp_path / "run", page=False)
    scores = report["encoders"]["colour"]["all"]["scores"]
    assert scores["coverage"]["position"] > 0.8 and scores["precision"]["position"] > 0.8
    assert report["nuclei"]["synthetic"]["nuclei_count_shift"] < -0.7


def test_copies_are_named(real, tmp_path):
    rows = real.rows("train")

    def draw(label, k):
        image, _ = read_rgb(real.folder / rows[rows.label == label].path.iloc[k])
        return np.ascontiguousarray(image[:, ::-1])

    made = synthetic_set(tmp_path / "made", made_tiles(15, draw=draw))
    report, page = judged(real, made, tmp_path / "run", metrics=("kid",))
    assert "45 of 45 tiles are exact copies of training tiles" in report["verdict"]
    assert page.count("flagged") >= 8


def test_two_halves_of_real_patients_are_alike(real, tmp_path):
    second = write_set(tmp_path / "second", [*real_tiles(range(30, 40), "train", start=5)], source="the other half")
    report, page = judged(real, second, tmp_path / "run", metrics=("kid",))
    kid = report["encoders"]["colour"]["all"]["scores"]["kid"]
    assert kid["low"] <= kid["floor_high"], "real tiles of other patients are as real"
    assert report["synthetic_is_real"] and "Are two sets of real tiles alike?" in page and "real against real" in page
    assert "training set" not in guards(report)


def test_a_class_missing_and_almost_no_tiles(real, tmp_path):
    tiles = [*made_tiles(1, labels=("TUM",)), *made_tiles(1, labels=("LYM",))]
    report, page = judged(real, synthetic_set(tmp_path / "made", tiles), tmp_path / "run")
    assert guards(report)["missing classes"] == "warning" and "There is no synthetic tile of ADI" in page
    assert report["n"] == 2 and report["encoders"]["colour"]["all"]["scores"] == {}
    assert "too few GAN tiles for scores" in report["verdict"]


def test_tiles_of_another_size_and_extra_classes(real, tmp_path):
    def draw(label, k):
        return np.repeat(np.repeat(tissue("TUM", 90, k), 2, 0), 2, 1)[:48, :48]

    tiles = [*made_tiles(6, labels=("TUM",), draw=draw), *made_tiles(6, labels=("STR",), draw=draw)]
    made = write_set(tmp_path / "made", tiles[:6], synthetic=True, generator="x")
    report, _ = judged(real, made, tmp_path / "run", page=False, size=40)
    assert report["data"]["size"] == 40 and guards(report)["enlarged tiles"] == "strong"
    report, _ = judged(real, made, tmp_path / "other", page=False)
    assert report["data"]["size"] == SIZE, "the smaller tiles decide"


@pytest.mark.parametrize(("split", "refused"), [("test", True), ("train", False)])
def test_conditioned_tiles(real, split, refused, tmp_path):
    parents = real.rows(split)

    def tiles():
        for row, image in made_tiles(5):
            own = parents[parents.label == row["label"]]
            yield row | {"reference": own.id.iloc[row["seed"]]}, image

    made = synthetic_set(tmp_path / "made", tiles())
    if refused:
        with pytest.raises(DataError, match="15 of 15 synthetic tiles were conditioned on real test tiles"):
            judged(real, made, tmp_path / "run")
        return
    report, page = judged(real, made, tmp_path / "run", metrics=("kid",))
    assert guards(report)["conditioned on train"] == "warning"
    assert report["references"]["n"] == 15 and -1 <= report["references"]["cosine"]["reference_cosine"] <= 1
    assert "Tiles conditioned on real tiles" in page


def test_groups_of_alike_tiles_are_not_called_patients():
    report = {
        "data": {"split_protocol": "groups of near-duplicates (no patients were given)", "patients": {"test": 9},
                 "counts": {"test": {"TUM": 30}}},
        "encoders": {}, "n": 8, "source": "gan", "synthetic_is_real": False,
        "staining": {"synthetic": {"patients_shift": 0.5}},
    }  # fmt: skip
    score = {"value": 1.0, "low": 0.5, "high": 1.5, "floor": 1.0, "floor_low": 0.5, "floor_high": 1.5}
    report["encoders"]["colour"] = {"all": {"scores": {"kid": score | {"better": "lower", "position": 0.0}}}}
    text = verdict(report)
    assert "Against 8 of 30 real test tiles of 9 groups of alike tiles, the GAN tiles" in text
    assert "within the spread between real groups" in text and "patient" not in text


def test_refusals(real, made, tmp_path):
    with pytest.raises(DataError, match="also in the other real set, bit for bit"):
        judged(real, real, tmp_path / "same")
    unsplit = write_set(tmp_path / "unsplit", [*real_tiles([1, 2, 3], "")])
    with pytest.raises(DataError, match="has no train tiles"):
        judged(unsplit, made, tmp_path / "a")
    with pytest.raises(DataError, match="lossy files"):
        jpeg = synthetic_set(tmp_path / "jpeg", made_tiles(5, format="JPEG"))
        judged(real, jpeg, tmp_path / "b", strict=True)
    with pytest.raises(DataError, match="same class names"):
        other = TileSet(made.folder, made.table, made.meta | {"classes": [{"label": "X", "colour": "#000000"}]})
        judged(real, other, tmp_path / "c")
    for bad in ({"encoder": ()}, {"weights": ("virchow2=x",)}, {"classifier_steps": 0}, {"size": 4}):
        with pytest.raises(SettingError):
            EvaluateConfig(**bad)


def test_weights_find_their_encoder():
    assert EvaluateConfig(encoder=("uni",), weights=("a.pth",)).with_weights("uni") == ("uni", Path("a.pth"))
    both = EvaluateConfig(encoder=("uni", "clip"), weights=("clip=b.pth", "lpips-alex=c.pth"))
    assert [both.with_weights(name)[1] for name in ("uni", "clip", "clip=d", "lpips-alex")] == [
        None, Path("b.pth"), Path("d"), Path("c.pth"),
    ]  # fmt: skip
    for wrong in ("a.pth", "lpips-vgg=a.pth", "uni2-h=a.pth"):
        with pytest.raises(SettingError, match="--weights"):
            EvaluateConfig(encoder=("uni", "clip"), weights=(wrong,))


@pytest.mark.parametrize(
    ("equal", "alarms", "said"),
    [
        (0.05, 0.12, "10 of 200 tiles are exact copies of training tiles, and 14 more resemble one too closely (the"),
        (0.05, 0.05, "10 of 200 tiles are exact copies of training tiles (the"),
        (0.0, 0.12, "24 of 200 tiles resemble a training tile too closely (2 expected"),
        (0.0, 0.01, "No copies of training tiles were found (the"),
    ],
)
def test_near_copies_are_counted_beside_exact_ones(equal, alarms, said):
    copies = {"n_synthetic": 200, "pixel_equal": equal, "pixel_alarms": alarms}
    report = {"encoders": {"colour": {"copies": copies}}, "planted": {"n": 40, "found": 1.0}}
    assert verdict_of_copies(report).startswith(said)


@pytest.mark.parametrize(
    ("made", "real", "n", "said"),
    [
        (-0.1, 0.0, 400, "as many nuclei"),
        (-0.9, 0.0, 400, "fewer nuclei than real tiles (by 0.9"),
        (0.9, -0.9, 400, "more nuclei than real tiles (by 0.9"),
        (-0.4, -0.35, 400, "no more than other real patients"),
        (-0.9, -0.35, 400, "fewer nuclei than real tiles (by 0.9"),
        (-7.1, 0.0, 2, ""),
    ],
)
def test_nuclei_are_read_beside_other_real_patients(made, real, n, said):
    sides = {"synthetic": {"nuclei_count_shift": made}, "real": {"nuclei_count_shift": real}}
    sentence = verdict_of_nuclei({"nuclei": {"n": n, **sides}})
    assert said in sentence and bool(said) == bool(sentence)


class Broken:
    """An encoder whose features of the eleventh tile are not numbers."""

    card = EncoderCard("broken", 4, 0, "none")
    weights_hash = "x"

    def encode(self, images):
        values = images.float().mean((2, 3)).repeat(1, 2)[:, :4].clone()
        if len(values) > 10:
            values[10] = float("nan")
        return values

    def differentiable(self, images):
        return images


def test_features_that_are_not_numbers(real, made, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders, "load", lambda *a, **k: Broken())
    with pytest.raises(DataError, match="not finite for tile 10"):
        judged(real, made, tmp_path / "run", encoder=("broken",))


def test_the_checkpoint_tells_what_the_generator_was_trained_on(real, tmp_path):
    card = {"kind": "gan", "classes": list(CLASSES), "size": SIZE, "parents": ["base"], "command": "train"}
    counts = dict.fromkeys(CLASSES, 20)
    right = save_checkpoint(tmp_path / "right.safetensors", {"a": torch.zeros(1)},
                            card | {"trained_on": {"classes": counts},
                                    "data": real.array("train", size=SIZE).digest()})  # fmt: skip
    wrong = save_checkpoint(tmp_path / "wrong.safetensors", {"a": torch.ones(1)},
                            card | {"trained_on": {"classes": counts}, "data": "another set"})  # fmt: skip
    for k, (path, severity) in enumerate(((right, None), (wrong, "strong"))):
        made = synthetic_set(tmp_path / f"made {k}", made_tiles(4), parents=[sha256_file(path)])
        report, _ = judged(real, made, tmp_path / f"run {k}", checkpoint=path, page=False, metrics=("kid",))
        assert guards(report).get("training set") == severity
        assert report["generator"]["parents"] == ["base"]
    with pytest.raises(CheckpointError, match="not the checkpoint that made"):
        judged(real, made, tmp_path / "run", checkpoint=right)


def test_a_card_of_shipped_weights_has_words_in_place_of_numbers(real, tmp_path):
    card = {"kind": "gan", "classes": list(CLASSES), "size": SIZE, "trained_on": "27000 simulated tiles"}
    path = save_checkpoint(tmp_path / "base.safetensors", {"a": torch.zeros(1)}, card)
    made = synthetic_set(tmp_path / "made", made_tiles(4), parents=[sha256_file(path)])
    report, _ = judged(real, made, tmp_path / "run", checkpoint=path, page=False, metrics=("kid",))
    assert report["generator"]["trained_on"] == {"tiles": "27000 simulated tiles"}


def test_the_verb(real, made, tmp_path, capfd, monkeypatch):
    out = tmp_path / "run"
    quick(monkeypatch, page=False)
    main(["evaluate", str(real.folder), str(made.folder), "--encoder", "colour", "--metrics", "kid", "--out", str(out)])
    report = json.loads((out / "report.json").read_text())
    assert report["command"].startswith("histosynth evaluate ") and "--encoder colour" in report["command"]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(real.folder), str(made.folder), "--encoder", "colours", "--out", str(tmp_path / "x")])
    assert stop.value.code == 2 and "'colours'" in capfd.readouterr().err
