"""The benchmarks of the GAN run: a trial of the GPU's on a CPU, and a clear word where there is none."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2] / "benchmarks"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gan.py", "--tiny", "--folder", str(tmp_path)])
    load(ROOT / "gpu" / "gan.py").main()
    found = json.loads((tmp_path / "gan-cpu-tiny.json").read_text())
    rows = found["recipes"]["16 px, tiny"]
    assert set(rows) == {"batch", "float32", "bfloat16", "bfloat16, compiled"}
    assert all(rows[way]["images_per_second"] > 0 for way in rows if way != "batch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gan.py"])
    with pytest.raises(SystemExit) as error:
        load(ROOT / "gpu" / "gan.py").main()
    assert error.value.code == 2 and "no CUDA GPU" in capsys.readouterr().err


def test_the_comparison_asks_for_the_right_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--nvidia"):
        load(ROOT / "gan.py").import_nvidia(tmp_path)
