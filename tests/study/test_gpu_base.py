"""The script that trains the shipped generators on a GPU runs, in small, where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from histosynth.study.generators import load
from histosynth.tiles.phantom import CLASSES


@pytest.mark.slow
def test_it_trains_all_three_in_small_on_a_cpu(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "gpu" / "base.py"
    places = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs"), "--workers", "1"]
    subprocess.run([sys.executable, str(script), *places, "--tiny", "--device", "cpu"], check=True)
    report = json.loads((tmp_path / "out" / "base.json").read_text())
    assert report.keys() == {"device", "autoencoder", "diffusion", "gan"} and report["gan"]["steps"] == 3
    for name in ("diffusion-base-64", "gan-base-64"):
        generator = load(tmp_path / "out" / f"{name}.safetensors", "cpu")
        (tiles,) = generator.sample([0, 8], [1, 2])
        assert generator.classes == CLASSES and tiles.shape == (2, 3, 64, 64)
