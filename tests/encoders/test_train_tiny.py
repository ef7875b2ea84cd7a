"""The encoder's recipe on a handful of tiles: views, losses, and a resumed run that ends the same."""

import numpy as np
import pytest
import torch

from histosynth.core.checkpoint import load_checkpoint
from histosynth.encoders import train_tiny
from histosynth.encoders.train_tiny import TinyConfig, indices_at, simulate_tissue, train_tissue_tiny, vicreg
from histosynth.encoders.views import _cosines, compress, restain, view

SMALL = TinyConfig(sources=9, probe_sources=9, hospitals=3, steps=4, batch=8, save_every=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Simulated once for all runs of this file."""
    folder = tmp_path_factory.mktemp("cache")
    for side in ("training", "held-out"):
        simulate_tissue(SMALL, folder, side)
    return folder


@pytest.fixture
def cached(cache, monkeypatch):
    monkeypatch.setattr(train_tiny, "simulate_tissue", lambda config, _, side: simulate_tissue(SMALL, cache, side))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_views():
    images = torch.randint(0, 256, (6, 3, 72, 72), dtype=torch.uint8, generator=generator())
    one, same, two = (view(images, 64, generator(s)) for s in (1, 1, 2))
    assert one.shape == (6, 3, 64, 64) and one.abs().max() <= 1
    assert torch.equal(one, same) and not torch.allclose(one, two)


def test_restaining_moves_colour_and_keeps_white():
    white = torch.full((4, 3, 8, 8), 255.0)
    assert torch.allclose(restain(white, generator(), 1.0), white, atol=0.01)
    purple = torch.tensor([130.0, 80.0, 150.0])[None, :, None, None].expand(4, 3, 8, 8)
    moved = restain(purple, generator(), 1.0)
    assert (moved - purple).abs().mean() > 5
    assert torch.allclose(restain(purple, generator(), 0.0), purple, atol=0.01)


def test_compression_is_the_cosine_transform():
    basis = _cosines()
    assert torch.allclose(basis @ basis.T, torch.eye(8), atol=1e-6)
    flat = torch.full((2, 3, 16, 24), 100.0)
    assert torch.allclose(compress(flat, generator(), 0.0), flat, atol=0.1)
    board = (torch.arange(16)[:, None] + torch.arange(24)) % 2
    fine = (100 + 4.0 * board).expand(2, 3, -1, -1)
    assert compress(fine, generator(), 10.0).std() < 0.1 * fine.std()


def test_vicreg_terms():
    rng = generator()
    unit = torch.randn(4000, 4, generator=rng)
    same, spread, apart = vicreg(unit, unit)
    assert same == 0 and spread < 0.02 and apart < 0.02
    collapsed = torch.ones(50, 4)
    assert vicreg(collapsed, collapsed)[1] == pytest.approx(0.99, abs=0.01)
    repeated = unit[:, :1].expand(-1, 4)
    assert vicreg(repeated, repeated)[2] == pytest.approx(2 * 12 / 4, rel=0.1)


def test_every_pass_sees_every_tile_once():
    config = TinyConfig(batch=10)
    seen = np.concatenate([indices_at(25, step, config) for step in range(5)])
    assert (np.bincount(seen[:25], minlength=25) == 1).all()
    assert (np.bincount(seen[25:], minlength=25) == 1).all()


def test_simulated_tissue(cache):
    tissue = simulate_tissue(SMALL, cache, "training")
    assert tissue.images.shape == (27, 3, 72, 72) and tissue.images.dtype == np.uint8
    assert np.bincount(tissue.labels).tolist() == [3] * 9
    density, area, glands = tissue.truths[:, 0], tissue.truths[:, 1], tissue.truths[:, 2]
    by_class = [density[tissue.labels == k].mean() for k in range(9)]
    assert np.argmax(by_class) in (3, 8) and area.max() < 1  # lymphocytes or tumour hold the most nuclei
    assert glands[tissue.labels == 6].mean() > 0.2 and glands[tissue.labels == 0].max() == 0
    other = simulate_tissue(SMALL, cache, "held-out")
    assert not any(np.array_equal(a, b) for a in tissue.images for b in other.images)


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, monkeypatch, cached):
    straight, card = load_checkpoint(train_tissue_tiny(SMALL, tmp_path / "straight", device="cpu"))
    assert card["steps"] == 4 and not card["stopped_by_clock"]

    calls = 0

    def interrupted(one, two):
        nonlocal calls
        calls += 1
        if calls == 4:  # in step 4, after the state of step 2 was saved
            raise KeyboardInterrupt
        return vicreg(one, two)

    monkeypatch.setattr(train_tiny, "vicreg", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_tissue_tiny(SMALL, tmp_path / "broken", device="cpu")
    resumed, _ = load_checkpoint(train_tissue_tiny(SMALL, tmp_path / "broken", device="cpu"))
    assert calls == 6
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    steps = [r.split(",")[0] for r in (tmp_path / "broken" / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "4"]


def test_the_clock_can_stop_it(tmp_path, cached):
    path = train_tissue_tiny(TinyConfig(minutes=0.0), tmp_path / "run", device="cpu")
    assert load_checkpoint(path)[1]["stopped_by_clock"]
