"""Training: resuming after a kill, starting from other weights, odd data sets, divergence."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from histosynth.core.checkpoint import load_checkpoint, load_state, read_card
from histosynth.core.errors import CheckpointError, DataError, RunError, SettingError
from histosynth.gan import train as module
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator
from histosynth.gan.sample import GanGenerator, load_discriminator
from histosynth.gan.train import GanConfig, train_gan
from histosynth.gan.transfer import export_base, start_from
from tests.gan.helpers import tiles, tiny_config, tiny_shape


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
    real, done = module.save_state, []

    def saving(path: Path, tree: dict) -> None:
        real(path, tree)
        done.append(1)
        if len(done) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_state", saving)


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


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(int(sys.argv[3]));"
        "from tests.gan.helpers import *; from histosynth.gan.train import train_gan;"
        "train_gan(tiles(), tiny_config(steps=30, save_every=2), sys.argv[2], device='cpu')"
    )
    root, killed = str(Path(__file__).parents[2]), tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, root, str(killed), str(torch.get_num_threads())])
    state = killed / "state" / "state.safetensors"
    end = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < load_state(state)["step"] < 30
    config = tiny_config(steps=30, save_every=2)
    resumed = train_gan(tiles(), config, killed, device="cpu")
    same(resumed, train_gan(tiles(), config, tmp_path / "whole", device="cpu"))


def test_the_run_folder_and_the_card(trained: Path) -> None:
    table = rows(trained)
    assert [row["step"] for row in table] == ["2", "4", "6"]
    wanted = {"kimg", "loss_g", "loss_d", "r1", "ada_p", "r_t", "real_logit", "fake_logit", "seconds"}
    assert wanted < table[0].keys()
    assert (trained.parents[1] / "samples" / "step-000006.png").is_file()
    card = read_card(trained)
    assert card["kind"] == "gan" and card["classes"] == ["ADI", "LYM", "TUM"] and card["steps"] == 6
    assert card["size"] == 32 and card["stopped_by_clock"] is False and card["parents"] == []
    assert card["trained_on"] == {"tiles": 18, "classes": {"ADI": 6, "LYM": 6, "TUM": 6}}
    assert card["command"].startswith("histosynth train gan TILES --size 32 --steps 6")
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
    with pytest.raises(DataError, match="32 x 32 px, but size is 64"):
        train_gan(tiles(), tiny_config(size=64), tmp_path / "a", device="cpu")
    with pytest.raises(DataError, match="no tile"):
        train_gan(tiles().subset([]), tiny_config(), tmp_path / "b", device="cpu")
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors"):
        train_gan(tiles(), tiny_config(init=str(tmp_path / "nothing.safetensors")), tmp_path / "c", device="cpu")
    for name, value in {
        "batch": 0,
        "ada_target": 2.0,
        "sampling": "odd",
        "precision": "fp8",
        "size": 33,
    }.items():
        with pytest.raises(SettingError, match=name):
            GanConfig(**{name: value})


def test_divergence_stops_with_the_step_and_keeps_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def exploding(logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return logits.sum() * (float("nan") if len(calls) == 5 else 0.0)

    monkeypatch.setattr(module, "generator_loss", exploding)
    with pytest.raises(RunError, match=r"loss_g is nan at step 4.*precision=fp32.*gan-last-good"):
        train_gan(tiles(), tiny_config(), tmp_path / "run", device="cpu")
    rescued = tmp_path / "run" / "checkpoints" / "gan-last-good.safetensors"
    assert read_card(rescued)["steps"] == 3
    assert next(GanGenerator.from_checkpoint(rescued, "cpu").sample([0], [0])).shape == (1, 3, 32, 32)


def test_same_class_names_keep_their_rows_and_new_ones_get_the_mean(trained: Path) -> None:
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
        off = (after[1] - before.mean(dim=0)).abs().mean()
        assert 0 < off < 0.3 * before.std()
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
    torch.testing.assert_close(generator.synthesise(w, None), enlarged, rtol=1e-4, atol=1e-5)
    smaller = Generator(tiny_shape(size=16))
    start_from(str(trained), smaller, Discriminator(tiny_shape(size=16)), ("ADI", "LYM", "TUM"), seed=0)
    assert torch.equal(smaller.blocks["b16"].conv1.conv.weight, small.blocks["b16"].conv1.conv.weight)


def test_fine_tuning_records_its_parent(tmp_path: Path, trained: Path) -> None:
    config = tiny_config(steps=2, init=str(trained))
    path = train_gan(tiles(classes=("TUM", "POLYP")), config, tmp_path / "run", device="cpu")
    card = read_card(path)
    assert card["parents"] == ["gan.safetensors"] and "--init gan.safetensors" in card["command"]
    assert str(trained.parent) not in card["command"]


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
    real = module._update_average

    def poisoning(average: Generator, generator: Generator, config: GanConfig, step: int) -> None:
        real(average, generator, config, step)
        if step == 5:  # the last step before the second state: its losses were still finite
            next(average.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(module, "_update_average", poisoning)
    with pytest.raises(RunError, match=r"weights is .* at step 5"):
        train_gan(tiles(), tiny_config(), tmp_path / "run", device="cpu")
    state = load_state(tmp_path / "run" / "state" / "state.safetensors")
    assert state["step"] == 3 and all(torch.isfinite(v).all() for v in state["average"].values())


def test_a_folder_of_other_tiles_or_settings_is_refused(trained: Path) -> None:
    folder = trained.parents[1]
    assert train_gan(tiles(), tiny_config(), folder, device="cpu") == trained
    with pytest.raises(RunError, match="data: "):
        train_gan(tiles(per_class=2), tiny_config(), folder, device="cpu")
