"""Tiles from a tiny PixCell: one tile a (condition, seed), whatever stands beside it, and every solver by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from histosynth.autoencoder.network import to_uint8
from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.core.seeds import torch_generator
from histosynth.core.types import LatentGenerator
from histosynth.diffusion.noise import SOLVERS, Process
from histosynth.diffusion.pixcell import PixCell, PixCellGenerator
from histosynth.diffusion.pixcell.conditions import embed, interpolate, prototype, prototypes, references
from tests.diffusion.pixcell_folder import ColourEncoder, write_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PixCell:
    return PixCell.load(write_folder(tmp_path_factory.mktemp("pixcell")), device="cpu")


@pytest.fixture(scope="module")
def tiles() -> torch.Tensor:
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def made(generator: PixCellGenerator, conditions: object, seeds: list[int], **options: object) -> torch.Tensor:
    return torch.cat(list(generator.sample(conditions, seeds, **{"steps": 4, **options})))  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_tile_depends_on_its_condition_and_seed_alone(model: PixCell, tiles: torch.Tensor, solver: str) -> None:
    generator = PixCellGenerator(model, ColourEncoder())
    seeds = [11, 22, 33, 44, 55]
    together = made(generator, tiles, seeds, batch_size=16, solver=solver)
    alone = torch.cat(
        [made(generator, tiles[i : i + 1], [s], batch_size=1, solver=solver) for i, s in enumerate(seeds)]
    )
    assert together.dtype == torch.uint8 and together.shape == (5, 3, 32, 32)
    assert torch.equal(together, alone)
    order = [3, 0, 4]
    assert torch.equal(made(generator, tiles[order], [seeds[i] for i in order], solver=solver), together[order])
    assert len({t.numpy().tobytes() for t in made(generator, tiles[[0, 0]], [1, 2], solver=solver)}) == 2
    wider = PixCellGenerator(model, ColourEncoder(), micro_batch=4)
    both = made(wider, tiles, seeds, batch_size=2, solver=solver)
    assert torch.equal(both[4:], made(wider, tiles[4:], seeds[4:], solver=solver))


def test_yields_have_the_size_asked_for(model: PixCell) -> None:
    generator = PixCellGenerator(model)
    assert [len(b) for b in generator.sample(None, range(5), batch_size=2, steps=1)] == [2, 2, 1]
    assert list(generator.sample(None, [])) == []
    assert isinstance(generator, LatentGenerator) and generator.size == 32


def test_latents_decode_to_the_tiles(model: PixCell, tiles: torch.Tensor) -> None:
    generator = PixCellGenerator(model, ColourEncoder(), micro_batch=2)
    latents = generator.latents(tiles[:3], [1, 2, 3], steps=3)
    assert latents.shape == (3, 16, 4, 4)
    assert torch.equal(generator.decode(latents), made(generator, tiles[:3], [1, 2, 3], steps=3))
    assert generator.decode(latents[:0]).shape == (0, 3, 32, 32)


def test_the_loop_is_dpm_solver_on_the_guided_noise(model: PixCell, tiles: torch.Tensor) -> None:
    """Once more by hand with diffusers' scheduler at its own settings, which are those PixCell was published with."""
    from diffusers import DPMSolverMultistepScheduler

    condition = embed(ColourEncoder(), tiles[:1])
    scheduler = DPMSolverMultistepScheduler()
    scheduler.set_timesteps(20)
    x = torch.randn(16, 4, 4, generator=torch_generator(9, "pixcell noise"))[None]
    with torch.no_grad():
        for level in scheduler.timesteps:
            told = model.denoise(x, level, model.context(condition))
            untold = model.denoise(x, level, model.uncond[None])
            x = scheduler.step(untold + 3.0 * (told - untold), level, x).prev_sample
        expected = to_uint8(model.require_vae().decode(x / 1.5305 + 0.0609).sample)
    ours = made(PixCellGenerator(model), condition, [9], guidance=3.0, steps=20)
    assert (ours.int() - expected.int()).abs().max() <= 1


def test_guidance_moves_away_from_not_told_in_every_channel(model: PixCell, tiles: torch.Tensor) -> None:
    generator = PixCellGenerator(model, ColourEncoder())
    one, two, three = (generator.latents(tiles[:1], [1], guidance=g, steps=1) for g in (1.0, 2.0, 3.0))
    torch.testing.assert_close(three - two, two - one, atol=2e-2, rtol=1e-2)  # one step is linear in the noise
    assert ((two - one).abs().amax(dim=(0, 2, 3)) > 0).all()
    nothing = generator.latents(None, [1], steps=1)
    untold = generator.latents(model.unconditional(1), [1], guidance=1.0, steps=1)
    assert torch.equal(nothing, untold)
    torch.testing.assert_close(generator.latents(tiles[:1], [1], guidance=0.0, steps=1), nothing, atol=2e-2, rtol=1e-2)


def test_conditions_of_every_kind_meet(model: PixCell, tiles: torch.Tensor) -> None:
    encoder = ColourEncoder()
    told = embed(encoder, tiles)
    centres = prototypes(told, [0, 0, 1, 1, 1], ["TUM", "STR", "LYM"])
    assert list(centres) == ["TUM", "STR"]
    torch.testing.assert_close(centres["STR"], told[2:].mean(0))
    generator = PixCellGenerator(model, encoder, centres)
    assert generator.classes == ("TUM", "STR")
    assert torch.equal(made(generator, tiles[:2], [1, 2]), made(generator, told[:2], [1, 2]))
    assert torch.equal(made(generator, told[:2, 0], [1, 2]), made(generator, told[:2], [1, 2]))
    assert torch.equal(made(generator, [1], [5]), made(generator, centres["STR"][None], [5]))
    assert not torch.equal(made(generator, [0], [5]), made(generator, [1], [5]))
    with pytest.raises(DataError, match="without reference tiles"):
        prototype(told[:0])


def test_between_two_embeddings(tiles: torch.Tensor) -> None:
    a, b = embed(ColourEncoder(), tiles[:2])
    assert torch.allclose(interpolate(a, b, 0), a, atol=1e-5) and torch.allclose(interpolate(a, b, 1), b, atol=1e-5)
    one, other = torch.tensor([[3.0, 0]]), torch.tensor([[0, 1.0]])
    middle = interpolate(one, other, 0.5)
    torch.testing.assert_close(middle, torch.tensor([[1.0, 1]]) * 2**0.5)  # half-way round, of length 2
    torch.testing.assert_close(interpolate(one, 2 * one, 0.5), 1.5 * one)  # no angle to turn
    assert torch.isfinite(interpolate(one, -one, 0.3)).all()
    with pytest.raises(SettingError, match="share is 1.5"):
        interpolate(a, b, 1.5)
    with pytest.raises(DataError, match="shapes"):
        interpolate(a, b[:, :3], 0.5)


def test_a_large_tile_is_told_part_by_part() -> None:
    """Row by row: the parts of a 4 x 4 grid, each of one colour."""
    colours = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(1, 3, 4, 4) * 15
    image = colours.repeat_interleave(16, 2).repeat_interleave(16, 3)
    told = embed(ColourEncoder(), image, tokens=16)
    assert told.shape == (1, 16, 12)
    torch.testing.assert_close(told[0, :, 0], torch.arange(16) * 15 / 64 - 2)
    with pytest.raises(DataError, match="64 x 64 px, which a grid of 3 x 3"):
        embed(ColourEncoder(), image, tokens=9)
    with pytest.raises(DataError, match="float32"):
        embed(ColourEncoder(), image.float())


def test_references_are_brought_to_size(tiles: torch.Tensor) -> None:
    assert references(tiles.numpy(), 32) is not None and torch.equal(references(tiles, 32), tiles)
    flat = torch.full((1, 3, 40, 40), 77, dtype=torch.uint8)
    assert torch.equal(references(flat, 64), torch.full((1, 3, 64, 64), 77, dtype=torch.uint8))


def test_what_cannot_be_sampled_is_refused(model: PixCell, tiles: torch.Tensor) -> None:
    generator = PixCellGenerator(model, ColourEncoder())
    for words, conditions, seeds, options in (
        ("5 conditions came with 1 seeds", tiles, [1], {}),
        ("steps is 0", None, [1], {"steps": 0}),
        ("steps is 1001", None, [1], {"steps": 1001}),
        ("no solver 'dpm'.*'dpm\\+\\+'", None, [1], {"solver": "dpm"}),
        ("guidance is -1", None, [1], {"guidance": -1}),
        ("guidance is nan", None, [1], {"guidance": float("nan")}),
        ("batch_size is 0", None, [1], {"batch_size": 0}),
        ("class index is 0, but there are 0", [0], [1], {}),
        (r"shape \(2, 1, 3\)", torch.zeros(2, 3), [1, 2], {}),
    ):
        with pytest.raises((SettingError, DataError), match=words):
            list(generator.sample(conditions, seeds, **options))  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="no encoder"):
        list(PixCellGenerator(model).sample(tiles, range(5)))
    with pytest.raises(SettingError, match="colour-quarters gives 24 numbers, but this PixCell takes 12"):
        PixCellGenerator(model, ColourEncoder(dim=24))
    with pytest.raises(SettingError, match="micro_batch is 0"):
        PixCellGenerator(model, micro_batch=0)


def test_a_generator_needs_the_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTOSYNTH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    alone = PixCell.load(write_folder(tmp_path / "p", vae=False), device="cpu")
    with pytest.raises(CheckpointError, match="sd35-vae"):
        PixCellGenerator(alone)


@pytest.mark.parametrize("process", [Process(), Process("linear", "epsilon")], ids=["cosine-v", "linear-epsilon"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_finds_a_gaussian(process: Process, solver: str) -> None:
    """Latents of mean 0.7 and deviation 0.4, for which the best prediction is known in closed form."""
    mean, deviation = 0.7, 0.4
    a, s = (table.flatten() for table in process.tables(torch.device("cpu")))

    def predict(noisy: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        at, st = a[int(level)], s[int(level)]
        gain = at * deviation**2 / (at**2 * deviation**2 + st**2)
        clean = mean + gain * (noisy - at * mean)
        noise = (noisy - at * clean) / st
        return noise if process.prediction == "epsilon" else at * noise - st * clean

    start = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(0))

    def error(steps: int) -> float:
        draws = [torch.Generator().manual_seed(i) for i in range(8)]
        found = process.backwards(predict, start, solver=solver, steps=steps, generators=draws)
        return float(abs(found.mean() - mean) + abs(found.std() - deviation))

    fine = error(500)
    assert fine < 0.02
    assert fine < error(10) / 2 or solver == "dpm++"  # of second order: nothing is left to gain


@pytest.mark.parametrize("process", [Process(), Process("linear", "epsilon"), Process("linear", "v")])
def test_predictions_give_back_what_was_noised(process: Process) -> None:
    levels = torch.arange(0, 1000, 111)
    clean, noise = torch.randn(len(levels), 4, 2, 2), torch.randn(len(levels), 4, 2, 2)
    noisy, target = process.add(clean, noise, levels), process.target(clean, noise, levels)
    torch.testing.assert_close(process.clean(noisy, target, levels), clean, atol=1e-4, rtol=1e-4)
    # an error d in the prediction moves x_0 by s d (v) or s d / a (noise): both weights make that min(SNR, gamma)
    a, s = (t[levels].flatten() for t in process.tables(torch.device("cpu")))
    error = s**2 if process.prediction == "v" else (s / a) ** 2
    torch.testing.assert_close(process.weight(levels, 5.0), error * (a / s).square().clamp_max(5))


def test_the_linear_schedule_is_that_of_ddpm() -> None:
    """Ho et al. 2020: the product of 1 - beta, beta from 0.0001 to 0.02."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    a, _ = Process("linear", "epsilon").tables(torch.device("cpu"))
    torch.testing.assert_close(a.flatten().double(), (1 - betas).cumprod(0).sqrt(), atol=1e-6, rtol=1e-5)


def test_a_process_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(SettingError, match="schedule is 'cosin'.*'cosine'"):
        Process("cosin")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="prediction is 'sample'"):
        Process("linear", "sample")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="betas go from 0.02 to 0.0001"):
        Process("linear", "epsilon", 0.02, 1e-4)
