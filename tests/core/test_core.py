"""core: seeds, atomic files, checkpoints, run folders, registry, device, start-up."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from histosynth.core.checkpoint import (
    learned_before,
    load_checkpoint,
    load_state,
    read_card,
    save_checkpoint,
    save_state,
)
from histosynth.core.device import pick_device
from histosynth.core.errors import CheckpointError, PluginError, RunError, SettingError
from histosynth.core.files import atomic_path, ensure_folder, read_json, write_json
from histosynth.core.progress import duration
from histosynth.core.registry import Registry
from histosynth.core.run import Run, is_finished
from histosynth.core.seeds import derive, numpy_rng, torch_generator
from histosynth.core.training import moments_of, restore_moments


def test_seeds_are_stable_and_distinct():
    assert derive(7, "tile", 3) == 4813024480166449677, "seeds in published reports must keep their meaning"
    seen = {derive(s, name, k) for s in range(20) for name in ("a", "b") for k in range(50)}
    assert len(seen) == 20 * 2 * 50
    assert derive(1, 2) != derive(1, "2"), "a number and its text are different keys"
    assert torch.equal(
        torch.rand(4, generator=torch_generator(3, "x")), torch.rand(4, generator=torch_generator(3, "x"))
    )
    assert numpy_rng(3, "x").random() == numpy_rng(3, "x").random()


def test_atomic_path_leaves_nothing_behind_on_failure(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(ValueError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_a_full_disk_is_explained(tmp_path):
    with pytest.raises(RunError, match="No space left.*Free some space"), atomic_path(tmp_path / "x.json"):
        raise OSError(28, "No space left on device")


def test_a_folder_below_a_file_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="Cannot write to the folder"):
        ensure_folder(tmp_path / "file" / "below")


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_checkpoint_round_trip_and_card(tmp_path):
    shared = torch.randn(3, 4)
    path = save_checkpoint(
        tmp_path / "m.safetensors", {"a": shared, "b": shared, "n": torch.arange(3)}, {"kind": "gan"}
    )
    tensors, card = load_checkpoint(path)
    assert card == {"kind": "gan"} == read_card(path)
    assert torch.equal(tensors["a"], shared) and torch.equal(tensors["b"], shared)
    assert tensors["n"].dtype == torch.int64
    half, _ = load_checkpoint(save_checkpoint(tmp_path / "h.safetensors", {"a": shared}, {}, half=True))
    assert half["a"].dtype == torch.float32
    assert torch.allclose(half["a"], shared, atol=1e-2)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64, b"\x80\x04\x95pickle"])
def test_damaged_checkpoints_are_named(tmp_path, content):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="bad.safetensors"):
        load_checkpoint(path)


def test_checkpoint_without_card_and_missing_file(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(tmp_path / "foreign.safetensors"))
    with pytest.raises(CheckpointError, match="no histosynth card"):
        load_checkpoint(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_state_round_trip(tmp_path):
    network = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    tree = {"step": 3, "optimiser": optimiser.state_dict(), "pair": (1, [2.5, None, "x", True])}
    save_state(tmp_path / "s.safetensors", tree)
    back = load_state(tmp_path / "s.safetensors")
    assert back["step"] == 3 and back["pair"] == (1, [2.5, None, "x", True])
    other = torch.optim.Adam(network.parameters())
    other.load_state_dict(back["optimiser"])
    for old, new in zip(optimiser.state.values(), other.state.values(), strict=True):
        assert torch.equal(old["exp_avg"], new["exp_avg"])


@dataclass(frozen=True)
class Settings:
    steps: int = 3
    device: str = "cpu"


def test_run_records_settings_logs_and_status(tmp_path):
    folder = tmp_path / "run"
    with Run.open(folder, "train gan", Settings()) as run:
        run.log(1, loss=0.5)
        run.log(2, loss=0.25)
        run.finish(score=1.5)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "finished" and manifest["results"] == {"score": 1.5}
    assert manifest["settings"] == {"steps": 3, "device": "cpu"}
    assert (folder / "metrics.csv").read_text().splitlines() == ["step,loss", "1,0.5", "2,0.25"]
    assert is_finished(folder) and not (folder / ".lock").exists()


def test_run_resumes_and_truncates_its_log(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), Run.open(folder, "v", Settings()) as run:
        for step in range(5):
            run.log(step, loss=step)
        raise KeyboardInterrupt
    assert read_json(folder / "manifest.json")["status"] == "interrupted"
    with open(folder / "metrics.csv", "a") as stream:
        stream.write("5")  # a kill in the middle of a line
    with Run.open(folder, "v", Settings(device="cuda")) as run:
        assert run.resumed
        run.truncate_log(2)
        run.log(3, loss=9)
    assert (folder / "metrics.csv").read_text().splitlines()[-2:] == ["2,2", "3,9"]


def test_run_refuses_other_settings_foreign_folders_and_a_living_writer(tmp_path):
    folder = tmp_path / "run"
    with Run.open(folder, "v", Settings()):
        pass
    with pytest.raises(RunError, match="steps: 3 then, 4 now"):
        Run.open(folder, "v", Settings(steps=4))
    with pytest.raises(RunError, match="holds a run of 'v'"):
        Run.open(folder, "w", Settings())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(RunError, match="not empty and holds no run"):
        Run.open(tmp_path / "photos", "v", Settings())
    (folder / ".lock").write_text(str(os.getppid()))
    with pytest.raises(RunError, match=r"Process \d+ is writing"):
        Run.open(folder, "v", Settings())
    (folder / ".lock").write_text("999999999")
    with Run.open(folder, "v", Settings()) as run:
        assert run.resumed, "the lock of a dead process does not block"


def test_a_run_that_made_nothing_does_not_stand_in_the_way_of_the_mended_command(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ValueError), Run.open(folder, "v", Settings()):
        raise ValueError("a wrong setting")
    with pytest.raises(ValueError), Run.open(folder, "v", Settings(steps=4)) as run:
        assert not run.resumed
        run.log(1, loss=0.5)
        raise ValueError("later")
    assert read_json(folder / "manifest.json")["settings"]["steps"] == 4
    with pytest.raises(RunError, match="steps: 4 then, 5 now"):
        Run.open(folder, "v", Settings(steps=5))


def test_registry_is_lazy_and_suggests_near_names():
    registry = Registry("shape", {"circle": "math:pi", "broken": "no.such.module:x", "square": "math:tau"})
    assert registry.names() == ["broken", "circle", "square"]
    assert registry.load("circle") == pytest.approx(3.14159, abs=1e-4)
    with pytest.raises(SettingError, match="Did you mean 'circle'"):
        registry.load("cirle")
    with pytest.raises(PluginError, match=r"broken.*cannot be loaded"):
        registry.load("broken")


def test_device_names():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(SettingError, match="device is 'gpu'"):
        pick_device("gpu")
    with pytest.raises(SettingError, match="does not have"):
        pick_device("cuda:63")


def test_durations_read_well():
    assert [duration(s) for s in (0.4, 59, 185, 7800)] == ["0 s", "59 s", "3 min 05 s", "2 h 10 min"]


@pytest.mark.parametrize("code", ["import histosynth", "import histosynth.cli; histosynth.cli.build_app()"])
def test_importing_the_package_and_listing_verbs_is_light(code):
    heavy = ["torch", "torchvision", "diffusers", "peft", "pandas", "matplotlib", "sklearn", "scipy"]
    check = f"{code}; import sys; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_torchvision_imports_in_a_fresh_process():
    code = "import histosynth; from torchvision.models import mobilenet_v2; import torch; mobilenet_v2()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_checkpoint_tells_what_it_and_its_ancestors_learned_from(tmp_path):
    weights = {"w": torch.zeros(1)}
    first = save_checkpoint(tmp_path / "first.safetensors", weights, {"data": "abc", "size": 64})
    card = {"data": "def", "size": 32, "learned_before": learned_before(str(first))}
    second = save_checkpoint(tmp_path / "second.safetensors", weights, card)
    assert learned_before(str(second)) == [{"data": "def", "size": 32}, {"data": "abc", "size": 64}]
    converted = save_checkpoint(tmp_path / "converted.safetensors", weights, {"kind": "gan"})
    assert learned_before(str(converted)) == [{"data": "", "size": 0}]
    assert learned_before(str(tmp_path / "gone.safetensors")) == [{"data": "unknown", "size": 0}]
    assert all(learned_before(init) == [] for init in ("base", "none", "owner/name"))


@pytest.mark.parametrize("fused", [False, True])
def test_moments_come_back_in_the_layout_of_their_weights(tmp_path, fused):
    def step(layer, adam, seed):
        adam.zero_grad()
        layer(torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        adam.step()

    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    adam = torch.optim.Adam(layer.parameters(), 1e-2, fused=fused)
    step(layer, adam, 1)
    save_state(tmp_path / "state.safetensors", {"moments": moments_of(adam), "weights": dict(layer.state_dict())})
    step(layer, adam, 2)

    state = load_state(tmp_path / "state.safetensors")
    again = torch.nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    again.load_state_dict(state["weights"])
    other = torch.optim.Adam(again.parameters(), 1e-2, fused=fused)
    restore_moments(other, state["moments"])
    assert other.state[again.weight]["exp_avg"].stride() == again.weight.stride() != (36, 9, 3, 1)
    step(again, other, 2)
    assert torch.equal(again.weight, layer.weight) and torch.equal(again.bias, layer.bias)
