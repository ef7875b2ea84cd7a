"""Training: resuming after a kill, starting from other weights, odd data sets, divergence."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from histosynth import encoders
from histosynth.core.checkpoint import load_checkpoint, load_state, read_card
from histosynth.core.errors import CheckpointError, DataError, RunError, SettingError
from histosynth.gan import feed, record
from histosynth.gan import step as stepping
from histosynth.gan.config import GanConfig
from histosynth.gan.crew import Crew
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator
from histosynth.gan.guards import CollapseMonitor
from histosynth.gan.players import Players
from histosynth.gan.sample import GanGenerator, load_discriminator
from histosynth.gan.steering import Steering
from histosynth.gan.train import train_gan
from histosynth.gan.transfer import export_base, start_from
from histosynth.tiles.batches import TileArray
from tests.gan.helpers import LITE, RICH, Brightness, tiles, tiny_config, tiny_shape


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTOSYNTH_QUIET", "1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    os.environ["HISTOSYNTH_QUIET"] = "1"
    return train_gan(tiles(), tiny_config(), tmp_path_factory.mktemp("gan") / "run", device="cpu")


def same(a: Path, b: Path) -> None:
    first, second = load_checkpoint(a)[0], load_checkpoint(b)[0]
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def rows(checkpoint: Path) -> list[dict[str, str]]:
    with open(checkpoint.parents[1] / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def stop_after(monkeypatch: pytest.MonkeyPatch, saves: int) -> None:
    """Die right after the given number of saved states, as a kill would: nothing else runs."""
    real, done = record.save_state, []

    def saving(path: Path, tree: dict) -> None:
        real(path, tree)
        done.append(1)
        if len(done) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(record, "save_state", saving)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_equals_uninterrupted(
    tmp_path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    config = tiny_config(precision=precision)
    whole = trained if precision == "fp32" else train_gan(tiles(), config, tmp_path / "whole", device="cpu")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train_gan(tiles(), config, tmp_path / "parts", device="cpu")
    assert load_state(tmp_path / "parts" / "state" / "state.safetensors")["step"] == 3
    parts = train_gan(tiles(), config, tmp_path / "parts", device="cpu")
    same(whole, parts)
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(parts)]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in rows(whole)]


@pytest.mark.parametrize(
    "options", [RICH, LITE, RICH | {"architecture": "residual", "start": "code"}], ids=["rich", "lite", "residual"]
)
def test_every_option_stopped_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    config = tiny_config(**options)

    def train(folder: str) -> Path:
        held_out = tiles(per_class=3, name="v")
        return train_gan(tiles(), config, tmp_path / folder, validation=held_out, score=Brightness(), device="cpu")

    whole = train("whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            train("parts")
    parts = train("parts")
    same(whole, parts)
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(parts)]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in rows(whole)]
    assert {name.split(".")[0] for name in load_checkpoint(whole)[0]} == {"G_ema", "D", "H"}
    left, right = (load_state(p.parents[1] / "state" / "state.safetensors") for p in (whole, parts))
    assert left["steering"] == right["steering"] and left["choice"]["best"] == right["choice"]["best"]
    if options is LITE:  # the options must have been at work, or the comparison is worth nothing
        assert float(strip[-1]["alpha"]) > 0 and float(strip[-1]["ada_p"]) > 0
    else:
        assert left["path"]["mean"] > 0
        assert left["steering"]["saturation"]["trips"] > 0 or options is not RICH


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(int(sys.argv[3]));"
        "from tests.gan.helpers import *; from histosynth.gan.train import train_gan;"
        "train_gan(tiles(), tiny_config(steps=12, save_every=1, head='tissue-tiny'), sys.argv[2], device='cpu')"
    )
    root, killed = str(Path(__file__).parents[2]), tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, root, str(killed), str(torch.get_num_threads())])
    state = killed / "state" / "state.safetensors"
    end = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < load_state(state)["step"] < 12
    config = tiny_config(steps=12, save_every=1, head="tissue-tiny")
    resumed = train_gan(tiles(), config, killed, device="cpu")
    same(resumed, train_gan(tiles(), config, tmp_path / "whole", device="cpu"))


def test_the_run_folder_and_the_card(trained: Path) -> None:
    table = rows(trained)
    assert [row["step"] for row in table] == ["2", "4", "6"]
    wanted = {"kimg", "g_loss", "d_loss", "r1", "ada_p", "r_t", "real_logit", "fake_logit", "seconds"}
    assert wanted < table[0].keys()
    assert (trained.parents[1] / "samples" / "step-000006.png").is_file()
    card = read_card(trained)
    assert card["kind"] == "gan" and card["classes"] == ["ADI", "LYM", "TUM"] and card["steps"] == 6
    assert card["size"] == 32 and card["stopped_by_clock"] is False and card["parents"] == []
    assert card["trained_on"] == {"tiles": 18, "classes": {"ADI": 6, "LYM": 6, "TUM": 6}}
    assert card["command"].startswith("histosynth train gan TILES RUN --size 32 --steps 6")
    assert card["parameters"] == sum(p.numel() for p in Generator(tiny_shape()).parameters())
    prefixes = {name.split(".")[0] for name in load_checkpoint(trained)[0]}
    assert prefixes == {"G_ema", "D"}


def test_a_finished_run_returns_at_once_and_other_settings_are_refused(trained: Path) -> None:
    before = trained.stat().st_mtime_ns
    assert train_gan(tiles(), tiny_config(), trained.parents[1], device="cpu") == trained
    assert trained.stat().st_mtime_ns == before
    with pytest.raises(RunError, match="steps"):
        train_gan(tiles(), tiny_config(steps=7), trained.parents[1], device="cpu")


def test_the_clock_stops_the_training(tmp_path: Path) -> None:
    config = tiny_config(steps=10_000, seconds=0.5)
    path = train_gan(tiles(), config, tmp_path / "run", device="cpu")
    card = read_card(path)
    assert card["stopped_by_clock"] is True and 0 < card["steps"] < 10_000
    assert len(list((path.parents[1] / "samples").iterdir())) == 1


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (tiles(per_class=5, classes=("TUM",)), {}),
        (tiles(per_class=1), {"batch": 8}),
        (tiles(per_class=1), {"sampling": "natural", "batch": 1}),
        (tiles(per_class=2).subset([0, 1]), {"freeze_d": 2, "r1_gamma": 0.0}),
    ],
    ids=["one class", "three tiles", "batch of one", "empty classes"],
)
def test_small_sets(tmp_path: Path, data: object, changes: dict) -> None:
    path = train_gan(data, tiny_config(steps=3, **changes), tmp_path / "run", device="cpu")
    tensors, card = load_checkpoint(path)
    assert card["steps"] == 3 and all(torch.isfinite(v).all() for v in tensors.values())


def test_wrong_data_and_settings_name_the_remedy(tmp_path: Path) -> None:
    wide = TileArray(np.zeros((2, 3, 32, 64), np.uint8), np.zeros(2, np.int64), ["a", "b"], ("A",))
    with pytest.raises(DataError, match="32 x 64 px, not square"):
        train_gan(wide, tiny_config(), tmp_path / "d", device="cpu")
    some = replace(tiles(), labels=np.where(np.arange(18) < 4, -1, tiles().labels))
    with pytest.raises(DataError, match="4 of 18 tiles have no class.*conditional=no"):
        train_gan(some, tiny_config(), tmp_path / "e", device="cpu")
    with pytest.raises(DataError, match="18 validation tiles are training tiles"):
        train_gan(tiles(), tiny_config(), tmp_path / "f", validation=tiles(), score=Brightness(), device="cpu")
    with pytest.raises(DataError, match="4 of 18 validation tiles have no class"):
        named = replace(some, ids=[f"v{k}" for k in range(18)])
        train_gan(tiles(), tiny_config(), tmp_path / "h", validation=named, score=Brightness(), device="cpu")
    with pytest.raises(DataError, match="validation tiles have the classes"):
        train_gan(tiles(), tiny_config(), tmp_path / "g", validation=tiles(classes=("A",), name="v"), device="cpu")
    with pytest.raises(SettingError, match="tisue-tiny.*tissue-tiny"):
        train_gan(tiles(), tiny_config(head="tisue-tiny"), tmp_path / "h", device="cpu")
    with pytest.raises(DataError, match="32 x 32 px, but size is 64"):
        train_gan(tiles(), tiny_config(size=64, start="code"), tmp_path / "a", device="cpu")
    with pytest.raises(DataError, match="no tile"):
        train_gan(tiles().subset([]), tiny_config(), tmp_path / "b", device="cpu")
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        train_gan(tiles(), tiny_config(init=str(tmp_path / "nothing.safetensors")), tmp_path / "c", device="cpu")


def test_divergence_stops_with_the_step_and_keeps_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def exploding(logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return logits.sum() * (float("nan") if len(calls) == 5 else 0.0)

    monkeypatch.setattr(stepping, "generator_loss", exploding)
    with pytest.raises(RunError, match=r"g_adv is nan at step 4.*precision=fp32.*gan-last-good"):
        train_gan(tiles(), tiny_config(), tmp_path / "run", device="cpu")
    rescued = tmp_path / "run" / "checkpoints" / "gan-last-good.safetensors"
    assert read_card(rescued)["steps"] == 3
    assert next(GanGenerator.from_checkpoint(rescued, "cpu").sample([0], [0])).shape == (1, 3, 32, 32)


def test_same_class_names_keep_their_rows_and_new_ones_are_as_unlike_the_others(trained: Path) -> None:
    old, _ = load_checkpoint(trained)
    classes = ("TUM", "NEW", "ADI")
    generator, discriminator = Generator(tiny_shape()), Discriminator(tiny_shape())
    start_from(str(trained), generator, discriminator, classes, seed=0)
    pairs = (
        (old["G_ema.mapping.embedding"], generator.mapping.embedding),
        (old["D.embedding"], discriminator.embedding),
    )
    for before, after in pairs:
        assert torch.equal(after[0], before[2]) and torch.equal(after[2], before[0])
        apart = torch.pdist(before).mean()
        new = torch.cdist(after[1:2], before).mean()
        assert 0.5 * apart < new < 2 * apart
    assert torch.equal(generator.mapping.w_mean[1], old["G_ema.mapping.w_mean"].mean(dim=0))
    for name, value in generator.state_dict().items():
        if name not in ("mapping.embedding", "mapping.w_mean"):
            assert torch.equal(value, old[f"G_ema.{name}"])
    again = Generator(tiny_shape())
    start_from(str(trained), again, Discriminator(tiny_shape()), classes, seed=0)
    assert torch.equal(again.mapping.embedding, generator.mapping.embedding)


def test_a_larger_network_starts_as_the_smaller_one_enlarged(trained: Path) -> None:
    shape = tiny_shape(size=64)
    generator = Generator(shape)
    start_from(str(trained), generator, Discriminator(shape), ("ADI", "LYM", "TUM"), seed=0)
    small = GanGenerator.from_checkpoint(trained, "cpu").network
    w = torch.randn(2, shape.w_dim)
    enlarged = torch.nn.functional.interpolate(small.synthesise(w, None), scale_factor=2, mode="bilinear")
    inside = (..., slice(2, -2), slice(2, -2))  # at the edges StyleGAN2's filter sees zeros outside
    torch.testing.assert_close(generator.synthesise(w, None)[inside], enlarged[inside], rtol=1e-4, atol=1e-5)
    smaller = Generator(tiny_shape(size=16))
    start_from(str(trained), smaller, Discriminator(tiny_shape(size=16)), ("ADI", "LYM", "TUM"), seed=0)
    assert torch.equal(smaller.blocks["b16"].conv1.conv.weight, small.blocks["b16"].conv1.conv.weight)


def test_fine_tuning_records_its_parent(tmp_path: Path, trained: Path) -> None:
    config = tiny_config(steps=2, init=str(trained))
    path = train_gan(tiles(classes=("TUM", "POLYP")), config, tmp_path / "run", device="cpu")
    card = read_card(path)
    assert card["parents"] == ["gan.safetensors"] and "--init gan.safetensors" in card["command"]
    assert str(trained.parent) not in card["command"]
    assert card["learned_before"] == [{"data": read_card(trained)["data"], "size": 32}]
    assert read_card(trained)["learned_before"] == []


def test_export_base_is_half_the_size_and_nearly_the_same(tmp_path: Path, trained: Path) -> None:
    from_run = export_base(trained.parents[1], tmp_path / "base.safetensors")
    from_checkpoint = export_base(trained, tmp_path / "again.safetensors")
    same(from_run, from_checkpoint)
    assert from_run.stat().st_size < 0.7 * trained.stat().st_size
    full, half = (next(GanGenerator.from_checkpoint(p, "cpu").sample([0, 1], [5, 6])) for p in (trained, from_run))
    assert (full.float() - half.float()).abs().max() <= 2
    judge = load_discriminator(from_run, "cpu")
    assert judge(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])).shape == (2,)


def test_it_learns_the_colour_of_each_class(tmp_path: Path) -> None:
    data = tiles(per_class=8, classes=("A", "B"), size=16)
    config = tiny_config(size=16, steps=150, batch=4, log_every=50, save_every=150, r1_every=8, ada_target=0.0)
    maker = GanGenerator.from_checkpoint(train_gan(data, config, tmp_path / "run", device="cpu"), "cpu")
    labels = [0] * 8 + [1] * 8
    made = torch.cat(list(maker.sample(labels, range(16)))).float().mean(dim=(2, 3))
    real = [torch.from_numpy(data.images[data.labels == k]).float().mean(dim=(0, 2, 3)) for k in (0, 1)]
    for k in (0, 1):
        mean = made[8 * k : 8 * k + 8].mean(dim=0)
        assert (mean - real[k]).norm() < (mean - real[1 - k]).norm(), (mean, real)
    assert np.isfinite(made.numpy()).all()


def test_weights_that_are_not_finite_never_replace_a_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Players.update_average

    def poisoning(players: Players, step: int) -> None:
        real(players, step)
        if step == 5:  # the last step before the second state: its losses were still finite
            next(players.average.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(Players, "update_average", poisoning)
    with pytest.raises(RunError, match=r"weights is .* at step 5"):
        train_gan(tiles(), tiny_config(), tmp_path / "run", device="cpu")
    state = load_state(tmp_path / "run" / "state" / "state.safetensors")
    assert state["step"] == 3 and all(torch.isfinite(v).all() for v in state["average"].values())


def test_a_folder_of_other_tiles_or_settings_is_refused(trained: Path) -> None:
    folder = trained.parents[1]
    assert train_gan(tiles(), tiny_config(), folder, device="cpu") == trained
    with pytest.raises(RunError, match="data: "):
        train_gan(tiles(per_class=2), tiny_config(), folder, device="cpu")


# a term of a loss, with a setting that makes it felt, and its column in the log
TERMS = {
    "g_head": {"head": "tissue-tiny"},
    "g_stats": {"channel_stats": 100.0},
    "g_perceptual": {"perceptual": 10.0},
    "g_saturation": {"saturation": 100.0, "saturation_above": 0.0, "saturation_relative": False},
    "g_features": {"feature_matching": 100.0},
    "g_diversity": {"diversity": 100.0, "diversity_below": 1.0},
    "g_path": {"path_length": 2.0},
    "d_drift": {"drift": 10.0},
    "r1": {"r1_gamma": 10.0},
}


@pytest.mark.parametrize("term", TERMS)
def test_every_term_is_logged_and_moves_what_it_should(tmp_path: Path, term: str) -> None:
    plain = {"steps": 1, "log_every": 1, "r1_gamma": 0.0, "freeze_d": 0}
    states = []
    for changes in ({}, TERMS[term]):
        path = train_gan(tiles(), tiny_config(**(plain | changes)), tmp_path / str(len(changes)), device="cpu")
        states.append(load_state(path.parents[1] / "state" / "state.safetensors"))
        logged = rows(path)[0]
        assert (term in logged) == bool(changes)
    assert float(logged[term]) > 0
    moved = {
        name: any(not torch.equal(v, states[1][name][k]) for k, v in states[0][name].items())
        for name in ("generator", "discriminator")
    }
    # both learn on tiles that were drawn before either moved
    assert moved == {"generator": term[0] == "g", "discriminator": term[0] != "g"}


@pytest.mark.parametrize(
    ("changes", "gamma"),
    [
        ({}, 0.2),
        ({"architecture": "stylegan2"}, 0.01),
        ({"architecture": "stylegan2", "loss": "logistic"}, 0.3),
        ({"r1_gamma": 2.0}, 2.0),
        ({"space": "pixels", "head": "", "batch": 16}, 0.0002 * 64 * 64 / 16),
    ],
)
def test_the_gradient_penalty_weighs_what_suits_loss_and_space(changes: dict[str, Any], gamma: float) -> None:
    config = GanConfig(size=64, init="none", **changes)
    assert Players(config, ("A", "B"), Crew.join("cpu")).gamma == pytest.approx(gamma)


def test_a_relativistic_step_sets_real_against_fake_and_penalises_both(tmp_path: Path) -> None:
    plain = {"steps": 1, "batch": 1, "log_every": 1, "ada_target": 0.0, "r1_gamma": 1.0, "r1_lazy": False}
    logged = {}
    for loss in ("logistic", "relativistic"):
        path = train_gan(tiles(), tiny_config(**plain, r1_every=1, loss=loss), tmp_path / loss, device="cpu")
        logged[loss] = {name: float(value) for name, value in rows(path)[0].items() if value}
    row = logged["relativistic"]
    # one pair, and neither network has moved when the other is asked
    ahead = row["real_logit"] - row["fake_logit"]
    assert row["d_adv"] == pytest.approx(np.log1p(np.exp(-ahead)), rel=1e-4)
    assert row["g_adv"] == pytest.approx(np.log1p(np.exp(ahead)), rel=1e-4)
    assert row["acc"] == float(ahead > 0)
    assert row["r1"] > 1.01 * logged["logistic"]["r1"] > 0


def test_the_weights_are_those_of_the_best_score_and_not_the_last(tmp_path: Path) -> None:
    class Falling(Brightness):
        """Best at the second look."""

        def __call__(self, real: torch.Tensor, fake: torch.Tensor) -> float:
            super().__call__(real, fake)
            assert real.shape == (6, 3, 32, 32) and fake.shape == (18, 3, 32, 32)
            assert real.dtype == fake.dtype == torch.uint8
            return [3.0, 1.0, 2.0][self.calls - 1]

    config = tiny_config(validate_every=2, validate_per_class=2, validate_draws=3, lr_schedule="constant")
    held_out = tiles(per_class=3, name="v")
    chosen = train_gan(tiles(), config, tmp_path / "a", validation=held_out, score=Falling(), device="cpu")
    shorter = tiny_config(steps=4, lr_schedule="constant")
    same(chosen, train_gan(tiles(), shorter, tmp_path / "b", device="cpu"))
    card = read_card(chosen)
    assert card["chosen_on"] == "val" and card["chosen_by"] == "brightness" and card["chosen_step"] == 4
    assert card["validation"] == [[2, 3.0], [4, 1.0], [6, 2.0]] and card["steps"] == 6
    assert [row["kid"] for row in rows(chosen)] == ["3", "1", "2"]
    patient = replace(config, patience=1, steps=8)
    stopped = train_gan(tiles(), patient, tmp_path / "c", validation=held_out, score=Falling(), device="cpu")
    assert read_card(stopped)["stopped_by"] == "patience" and read_card(stopped)["steps"] == 6


def test_without_validation_tiles_the_card_says_last_step(trained: Path) -> None:
    card = read_card(trained)
    assert card["chosen_on"] == "last step" and card["chosen_step"] == 6 and "validation" not in card


@pytest.mark.parametrize("how", ["setting", "no labels"])
def test_training_without_classes(tmp_path: Path, how: str) -> None:
    data, config = tiles(), tiny_config(steps=2, conditional=how != "setting", head="tissue-tiny")
    if how == "no labels":
        data = replace(data, labels=np.full(len(data), -1), classes=())
    maker = GanGenerator.from_checkpoint(train_gan(data, config, tmp_path / "run", device="cpu"), "cpu")
    assert maker.classes == ("tissue",) and maker.network.mapping.embedding is None
    assert next(maker.sample([0, 0], [1, 2])).shape == (2, 3, 32, 32)


def test_threads_that_read_ahead_change_nothing(tmp_path: Path, trained: Path) -> None:
    same(trained, train_gan(tiles(), tiny_config(workers=3), tmp_path / "run", device="cpu"))


def test_parts_of_a_batch_add_up(tmp_path: Path) -> None:
    # without what looks at a whole part, two halves are the batch; only rounding differs
    settings: dict[str, Any] = {
        "style_mixing": 0.0, "noise": False, "ada_target": 0.0, "mbstd_group": 1, "r1_gamma": 1.0, "r1_lazy": False,
    }  # fmt: skip
    learner = [
        stepping.TrainingStep(tiny_config(accumulate=n, **settings), ("A", "B", "C"), Crew.join("cpu"), 1)
        for n in (1, 2)
    ]
    images, labels = torch.from_numpy(tiles().images[:4]), torch.tensor([0, 1, 2, 0])
    codes = torch.randn(4, 8)
    for one in learner:
        taken = iter(codes.split(4 // one.config.accumulate))
        one._codes = lambda part, y, taken=taken: {"z": next(taken), "labels": y, "noise": None}  # type: ignore[method-assign]
        one(0, images, labels)
    for name in ("generator", "discriminator"):
        whole, parts = (one.players.optimisers[name].param_groups[0]["params"] for one in learner)
        for a, b in zip(whole, parts, strict=True):
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-2 * float(a.grad.abs().max()))


def test_guards_end_a_training_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(record, "say", said.append)
    strong = tiny_config(steps=50, d_stop_steps=3, d_stop_ema=0.0, ada="fixed")
    card = read_card(train_gan(tiles(), strong, tmp_path / "strong", device="cpu"))
    assert card["stopped_by"] == "discriminator" and card["steps"] == 4 and not card["stopped_by_clock"]
    assert any("discriminator has won" in line for line in said)
    alike = tiny_config(steps=50, collapse=1.0, collapse_stop=2, log_every=1)
    monkeypatch.setattr(CollapseMonitor, "update", lambda self, *_: setattr(self, "bad", self.bad + 1) or "alike")
    card = read_card(train_gan(tiles(), alike, tmp_path / "alike", device="cpu"))
    assert card["stopped_by"] == "collapse" and card["steps"] == 2 and "Step 1: alike" in said


def test_a_gate_that_never_opens_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(record, "say", said.append)
    shut = LITE | {"alpha_freeze": 100, "steps": 2}
    path = train_gan(tiles(), tiny_config(**shut), tmp_path / "run", device="cpu")
    assert read_card(path)["alpha_seen"] == 0 and any("gate never opened" in line for line in said)


def test_snapshots_pictures_and_a_film(tmp_path: Path) -> None:
    path = train_gan(tiles(), tiny_config(snapshots=True, sample_every=3), tmp_path / "run", device="cpu")
    kept = sorted(p.name for p in path.parent.iterdir())
    assert kept == ["gan-step-000003.safetensors", "gan-step-000006.safetensors", "gan.safetensors"]
    assert read_card(path.parent / kept[0])["steps"] == 3
    same(path, path.parent / kept[1])
    with Image.open(tmp_path / "run" / "samples" / "training.gif") as film:
        assert film.n_frames == 2


def test_weights_trained_through_an_encoder_carry_its_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = encoders.load

    def bound(name: str, *arguments: object, **settings: object) -> object:
        encoder = real(name, *arguments, **settings)
        encoder.card = replace(encoder.card, licence="CC BY-NC 4.0", commercial=False)
        return encoder

    monkeypatch.setattr(encoders, "load", bound)
    path = train_gan(tiles(), tiny_config(steps=1, head="tissue-tiny"), tmp_path / "run", device="cpu")
    card = read_card(path)
    assert "CC BY-NC 4.0" in card["licence"] and card["encoders"]["head"]["name"] == "tissue-tiny"
    monkeypatch.undo()
    child = train_gan(tiles(), tiny_config(steps=1, init=str(path)), tmp_path / "child", device="cpu")
    assert "CC BY-NC 4.0" in read_card(child)["licence"]


def test_the_cosine_can_follow_the_clock(tmp_path: Path) -> None:
    seen: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HISTOSYNTH_QUIET", "1")
        patch.setattr(Players, "set_rates", lambda self, progress: seen.append(progress))
        config = tiny_config(steps=10_000, seconds=1.0, schedule="clock", lr_schedule="cosine")
        train_gan(tiles(), config, tmp_path / "run", device="cpu")
    assert seen == sorted(seen) and seen[0] < 0.5 < seen[-1] <= 1.5


def test_classes_without_a_training_tile_choose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(feed, "say", said.append)
    data = tiles().subset(np.flatnonzero(tiles().labels < 2))
    config = tiny_config(steps=2, validate_every=2, validate_per_class=3)
    path = train_gan(
        data, config, tmp_path / "run", validation=tiles(name="v"), score=Brightness(), device="cpu"
    )  # fmt: skip
    card = read_card(path)
    assert card["validation_tiles"] == 6 and card["trained_on"]["classes"]["TUM"] == 0
    assert said == ["No training tile is TUM, so the GAN will not know what they look like."]


def test_a_batch_that_the_processes_cannot_share_is_refused_at_once(tmp_path: Path) -> None:
    class Third:
        process_index, num_processes = 0, 3

    crew = Crew(torch.device("cpu"), Third())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Crew, "join", lambda device: crew)
        with pytest.raises(SettingError, match="batch is 8, for 3 process.*multiple of 3"):
            train_gan(tiles(), tiny_config(batch=8), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_the_penalty_is_that_of_the_tiles_before_their_augmentation() -> None:
    """R1 of StyleGAN2-ADA: the gradient passes through the augmentation."""
    config = tiny_config(ada="fixed", ada_p=1.0, ada_pipe="bgc", loss="relativistic")
    step = stepping.TrainingStep(config, ("A", "B"), Crew.join("cpu"), 1)
    real, fake = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.tensor([0, 1, 0, 1])
    found = step._gradient_penalty(stepping.Part(torch.Generator().manual_seed(5), real, labels, fake))
    draw, expected = torch.Generator().manual_seed(5), 0.0
    for images in (real, fake):
        x = images.clone().requires_grad_(True)
        logits = step.players.discriminator(stepping.augment(x, 1.0, draw, "bgc"), labels)
        expected += float(torch.autograd.grad(logits.sum(), x)[0].square().sum() / len(x))
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)
    # what it was of the tiles as the discriminator sees them
    draw, after = torch.Generator().manual_seed(5), 0.0
    for images in (real, fake):
        x = stepping.augment(images, 1.0, draw, "bgc").requires_grad_(True)
        after += float(torch.autograd.grad(step.players.discriminator(x, labels).sum(), x)[0].square().sum() / len(x))
    assert abs(after - expected) > 0.1 * expected


@pytest.mark.parametrize("ada", ["sign", "accuracy", "fixed"])
def test_without_a_target_nothing_adapts_and_the_guard_acts_at_once(ada: str) -> None:
    config = tiny_config(ada=ada, ada_target=0.0, ada_p=0.25, ada_gain=1.0, d_stop_steps=5)
    steering, images = Steering(config), torch.zeros(4, 3, 8, 8)
    for step in range(5):
        assert steering.stopped_by == ""
        steering.update(step, torch.ones(4), images, images)
    assert steering.p == 0.25 and steering.accuracy.ema == 1.0 and steering.stopped_by == "discriminator"


def in_two_processes(settings: str, folder: Path, before: str = "", after: str = "") -> Path:
    """Train with these settings in two processes; the run folder."""
    script = folder / "train.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1)\n"
        "from tests.gan.helpers import *; from histosynth.gan.players import Players\n"
        f"from histosynth.gan.train import train_gan\n{before}\n"
        f"train_gan(tiles(), tiny_config(batch=8, {settings}), sys.argv[2], device='cpu')\n{after}\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    subprocess.run([*words, str(script), str(Path(__file__).parents[2]), str(folder / "two")], check=True)
    return folder / "two"


@pytest.mark.slow
def test_processes_follow_one_clock(tmp_path: Path) -> None:
    run = in_two_processes(
        "steps=10_000, seconds=2.0, schedule='clock', lr_schedule='cosine'", tmp_path,
        "seen = []; Players.set_rates = lambda self, progress: seen.append(progress)",
        "open(sys.argv[2] + os.environ['RANK'], 'w').write(repr(seen))",
    )  # fmt: skip
    first, second = (run.with_name(f"two{rank}").read_text() for rank in (0, 1))
    assert first == second and first.count(",") > 1


@pytest.mark.slow
def test_two_processes_learn_as_one_with_two_parts(tmp_path: Path) -> None:
    run = in_two_processes("steps=4, sample_every=2, class_groups=True, loss='relativistic'", tmp_path)
    # without a head: its spectral norms are estimated once a part
    alone = tiny_config(steps=4, batch=8, sample_every=2, class_groups=True, loss="relativistic", accumulate=2)
    one = train_gan(tiles(), alone, tmp_path / "one", device="cpu")
    same(one, run / "checkpoints" / "gan.safetensors")
