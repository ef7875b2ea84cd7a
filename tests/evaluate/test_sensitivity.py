"""Monotone on truth: what must see a fault of simulated tissue worsens with it, grade by grade.

The full set of faults and measures, with a figure: `python benchmarks/sensitivity.py`.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "sensitivity.py"

MUST_SEE = {
    "blur": ("frechet", "kid", "nuclei_distance", "precision"),
    "stain shift": ("frechet", "kid", "frechet colour", "colour_distance", "patients_shift"),
    "JPEG": ("frechet",),
    "noise": ("frechet", "kid"),
    "wrong classes": ("label_consistency", "kid in class"),
    "missing classes": ("frechet", "recall", "coverage", "vendi_ratio"),
    "repeats": ("vendi_ratio", "recall", "coverage", "ms-ssim diversity"),
    "training copies": ("pixel_alarms", "nn_below_5pct"),
}
IMAGES = ("nuclei_distance", "colour_distance", "patients_shift", "ms-ssim diversity", "pixel_alarms", "nn_below_5pct")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("sensitivity", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sensitivity"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sensitivity"]


@pytest.fixture(scope="module")
def small(benchmark):
    """Four classes, 80 tiles a set, and the untouched values."""
    world = benchmark.World(80, patients=5, classes=("LYM", "MUC", "STR", "TUM"))
    return world, benchmark.measure(world, world.pool.pick(world.draw(0)))


@pytest.mark.parametrize("corruption", MUST_SEE)
def test_worsens_with_the_fault(benchmark, small, corruption):
    world, untouched = small
    spoil, grades = benchmark.CORRUPTIONS[corruption]
    grades = grades[1::2]
    if corruption == "missing classes":
        grades = (0.25, 0.5)  # whole classes of four
    images = any(name in IMAGES for name in MUST_SEE[corruption])
    found = [untouched, *(benchmark.measure(world, spoil(world, grade), images) for grade in grades)]
    for name in MUST_SEE[corruption]:
        badness = benchmark.WORSE[name] * np.array([f[name] for f in found])
        assert (np.diff(badness) > 0).all(), f"{name}: {badness}"


def test_what_a_pooled_score_cannot_see(benchmark, small):
    """Wrong labels and copies leave pooled feature scores as good as before: hence the other measures."""
    world, untouched = small
    shuffled = benchmark.measure(world, benchmark.mislabelled(world, 0.9), images=False)
    for name in ("frechet", "kid", "precision", "recall", "density", "coverage", "vendi_ratio"):
        assert shuffled[name] == pytest.approx(untouched[name])
    copied = benchmark.measure(world, benchmark.copied(world, 0.8), images=False)
    assert copied["precision"] > untouched["precision"] - 0.15


def test_seen_needs_the_right_direction(benchmark):
    rising = benchmark.seen((0, 1, 2), (1.0, 2.0, 3.0), 1, 0.1)
    assert rising["sees"] and rising["rho"] == 1 and rising["steps"] == pytest.approx([0, 10, 20])
    falling = benchmark.seen((0, 1, 2), (1.0, 2.0, 3.0), -1, 0.1)
    assert not falling["sees"] and falling["z"] == pytest.approx(-20)
    assert not benchmark.seen((0, 1, 2), (1.0, 3.0, 2.0), 1, 0.1)["sees"], "not one way"
    assert not benchmark.seen((0, 1, 2), (1.0, 1.1, 1.2), 1, 0.1)["sees"], "within the floor"
    assert benchmark.seen((0, 1), (0.0, 0.5), 1, 0.0)["z"] == pytest.approx(1000)


@pytest.mark.slow
def test_every_fault_is_seen_by_what_should_see_it(benchmark, tmp_path):
    report = benchmark.run(400, 8)  # the size of the published figure
    for corruption, names in MUST_SEE.items():
        for name in names:
            assert report["cells"][corruption][name]["sees"], (corruption, name)
    benchmark.figure(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 50_000
    assert len(benchmark.table(report).splitlines()) == len(benchmark.WORSE) + 1
