"""`histosynth doctor` and `histosynth encoders`: readable, without errors, whatever is missing."""

import subprocess
import sys

import pytest

from histosynth import cli
from histosynth.study.verbs import doctor


@pytest.fixture
def nothing_here(monkeypatch, tmp_path):
    import torch

    for name in ("HISTOSYNTH_WEIGHTS", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path


def run(capsys, *arguments):
    cli.main(list(arguments))
    return capsys.readouterr().out


def test_what_is_missing_comes_with_its_remedy(nothing_here, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in ("lpips", "openslide") else object())
    monkeypatch.setenv("HISTOSYNTH_WEIGHTS_UNI", "/somewhere/uni.bin")
    out = run(capsys, "doctor")
    assert "pip install lpips" in out and "pip install openslide-bin" in out
    assert "histosynth encoders --fetch inception-v3" in out
    whole = f"hf download MahmoodLab/UNI2-h pytorch_model.bin --local-dir {nothing_here}/histosynth_weights/uni2-h"
    assert whole in out, "a command must not be broken into lines"
    assert "/somewhere/uni.bin" in "".join(out.replace("│", "").split())
    for word in ("Python", "torch", "device", "threads", "memory", "weights folder", "tissue-tiny"):
        assert word in out


def test_weights_that_are_there_are_named(nothing_here, capsys):
    path = nothing_here / "histosynth_weights" / "pathoduet" / "checkpoint_HE.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    states = {f.what: f for f in doctor._weights()}
    assert states["weights: pathoduet"].state == "ok" and states["weights: pathoduet"].detail == str(path)
    assert states["weights: uni"].state == "absent"
    lines = run(capsys, "encoders").splitlines()
    duet = next(i for i, line in enumerate(lines) if "pathoduet" in line)
    # a long path is folded in its column, and whole
    folded = "".join(line.split("│")[-2].strip() for line in lines[duet : duet + 12] if line.count("│") > 2)
    assert str(path) in folded and any("tissue-tiny" in line and "shipped" in line for line in lines)


def test_a_broken_torch_does_not_stop_it():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from histosynth.study.verbs import doctor\n"
        "print([f.state for f in doctor._devices()])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "missing" in done.stdout


def test_a_gated_fetch_ends_with_the_remedy(nothing_here, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["encoders", "--fetch", "uni2-h", "--fetch", "unii"])
    error = capsys.readouterr().err
    assert (
        end.value.code == 2 and "Accept the licence" in error and "Did you mean" in error and "Traceback" not in error
    )
