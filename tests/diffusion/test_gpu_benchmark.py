"""The benchmark for GPUs runs, in small, where there is none."""

import importlib.util
from pathlib import Path

import pytest


def test_it_runs_in_small_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "gpu" / "diffusion.py"
    spec = importlib.util.spec_from_file_location("gpu_diffusion", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main(["--tiny", "--device", "cpu", "--steps", "1"])
    rows = {row["row"]: row for row in found["rows"]}
    assert rows.keys() == module.ROWS.keys() and all(row["seconds"] > 0 for row in rows.values())
    assert all(row["peak"] is None for row in rows.values())
    assert rows["4 tiles at once"]["calculated_of_torch"] > rows["the preset"]["calculated_of_torch"]
    assert rows["weights in float32"]["calculated"] > rows["the preset"]["calculated"]
    assert "the preset" in capsys.readouterr().out
