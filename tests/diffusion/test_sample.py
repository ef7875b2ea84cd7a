"""Generation: a tile depends on its class and seed alone, and checkpoints give it back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from histosynth.autoencoder.network import Autoencoder, AutoencoderShape
from histosynth.core.errors import DataError, SettingError
from histosynth.core.types import LatentGenerator
from histosynth.diffusion import sample as sampling
from histosynth.diffusion.adapter import Conditioner
from histosynth.diffusion.backbone import NetworkShape
from histosynth.diffusion.conditions import Teller, between, draw_condition
from histosynth.diffusion.convolutional import FastUNet, ToldUNet, UNetShape
from histosynth.diffusion.fast import fast_network
from histosynth.diffusion.lora import LoraShape, attach_lora
from histosynth.diffusion.model import Bank, LatentDiffusion, new_model
from histosynth.diffusion.sample import DiffusionGenerator, run_solver
from histosynth.diffusion.share import apply_lora
from histosynth.diffusion.solve import Solving, solve
from histosynth.diffusion.transformer import TransformerShape

CPU = torch.device("cpu")


def make_model(
    size: int = 32, shape: NetworkShape = TransformerShape(width=64, layers=2, heads=2, tokens=2)
) -> LatentDiffusion:
    """Random weights, large enough that neighbours or rounding would show."""
    torch.manual_seed(3)
    model = new_model(shape, Autoencoder(AutoencoderShape(width=16, blocks=1)), {"name": "x", "dim": 8}, "ab", size)
    for module in (model.transformer, model.autoencoder):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.12)
    model.bank = Bank(
        [torch.randn(5, 8), torch.randn(3, 8)], [[f"t{i}" for i in range(5)], [f"u{i}" for i in range(3)]]
    )
    return model


@pytest.fixture(scope="module")
def generator() -> DiffusionGenerator:
    return DiffusionGenerator(make_model(), CPU, "auto")


def made(generator: DiffusionGenerator, labels: list[int], seeds: list[int], **settings: object) -> torch.Tensor:
    return torch.cat(list(generator.sample(labels, seeds, steps=3, **settings)))  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [
    {"precision": "fp32"}, {"precision": "bf16"}, {"solver": "euler-a"}, {"solver": "ddpm", "precision": "bf16"},
    {"condition": "interpolate", "towards": "b"}, {"guidance_from": 300, "guidance_to": 700},
], ids=str)  # fmt: skip
def test_a_tile_depends_on_its_class_and_seed_alone(generator: DiffusionGenerator, settings: dict[str, Any]) -> None:
    labels, seeds = [0, 1, 0, 1, 1, 0, 0], [5, 6, 7, 8, 9, 5, 11]
    first = made(generator, labels, seeds, **settings)
    assert first.dtype == torch.uint8 and first.shape == (7, 3, 32, 32)
    for batch_size in (1, 3, 16):
        batches = list(generator.sample(labels, seeds, batch_size=batch_size, steps=3, **settings))
        assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert torch.equal(torch.cat(batches), first)
    assert torch.equal(first[0], first[5]) and not torch.equal(first[0], first[1])
    # other neighbours, another place, another number of passes through the networks
    crowd = made(generator, [1] * 8 + labels[::-1], [*range(100, 108), *seeds[::-1]], **settings)
    assert torch.equal(crowd[8:].flip(0), first)
    alone = torch.cat([made(generator, [k], [s], **settings) for k, s in zip(labels, seeds, strict=True)])
    assert torch.equal(alone, first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_so_do_tiles_of_the_shipped_network_in_wide_batches(precision: str) -> None:
    generator = DiffusionGenerator.from_checkpoint("base", "cpu", precision)  # type: ignore[arg-type]
    labels, seeds = [k % 9 for k in range(19)], list(range(19))
    together = torch.cat(list(generator.sample(labels, seeds, steps=2)))
    for some in ([0], [3, 17], [18, 5, 9]):
        apart = torch.cat(list(generator.sample([labels[k] for k in some], some, steps=2)))
        assert torch.equal(apart, together[some])


@pytest.mark.parametrize(("same", "expected"), [(True, [2, 16, 4, 1]), (False, [2] * 12)])
def test_batches_are_wide_where_no_bit_changes(
    same: bool, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def noted(model: LatentDiffusion, noise: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        seen.append(len(noise))
        return solve(model, noise, *rest, **more)

    monkeypatch.setattr(FastUNet, "same_in_every_batch", lambda *told: same)
    monkeypatch.setattr(sampling, "solve", noted)
    generator = DiffusionGenerator(make_model(shape=UNetShape(width=8)), CPU)
    made(generator, [0], [0])  # one tile is not worth a look
    made(generator, [0] * 19, list(range(19)))
    made(generator, [0], [0])
    assert seen == expected


@pytest.mark.parametrize(("what", "same"), [("nothing", True), ("neighbours", False), ("place", False)])
def test_one_look_tells_what_a_prediction_depends_on(what: str, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def predicted(self: ToldUNet, noisy: torch.Tensor, step: int) -> torch.Tensor:
        means = self.told[0][0][step, : len(noisy)].mean(dim=1)[:, None, None, None]
        if what == "neighbours":
            return noisy * means.mean()
        return noisy * means + (what == "place") * 1e-6 * torch.arange(len(noisy))[:, None, None, None]

    monkeypatch.setattr(ToldUNet, "__call__", predicted)
    fast = fast_network(make_model(shape=UNetShape(width=8)).backbone, None)
    assert isinstance(fast, FastUNet) and fast.same_in_every_batch(8, 8) is same


def test_latents_decode_to_the_tiles(generator: DiffusionGenerator) -> None:
    labels, seeds = [0, 1, 1], [1, 2, 3]
    latents = generator.latents(labels, seeds, steps=3)
    assert latents.shape == (3, 4, 8, 8) and latents.dtype == torch.float32
    assert torch.equal(generator.decode(latents), made(generator, labels, seeds))
    assert isinstance(generator, LatentGenerator)


def test_guidance_of_one_is_the_conditional_model(generator: DiffusionGenerator) -> None:
    """v = u + g (c - u): at g = 1 only c counts, and g near 1 comes near it."""
    model = generator.model
    noise, embeddings = torch.randn(16, 4, 8, 8), torch.randn(16, 8)
    labels, told = torch.zeros(16, dtype=torch.long), torch.ones(16, dtype=torch.bool)

    def run(guidance: float) -> torch.Tensor:
        return run_solver(model, noise, embeddings, labels, told, guidance=guidance, steps=3, precision="fp32")

    conditional = run(1.0)
    torch.testing.assert_close(run(1.0 + 1e-6), conditional, atol=1e-3, rtol=1e-3)
    assert (run(3.0) - conditional).abs().max() > 1e-2
    before = model.conditioner.no_class.detach().clone()
    model.conditioner.no_class.data += 1.0  # the unconditional branch
    try:
        assert torch.equal(run(1.0), conditional)
        assert not torch.equal(run(3.0), conditional)
    finally:
        model.conditioner.no_class.data.copy_(before)


def test_a_class_without_a_bank_is_made_from_its_token(generator: DiffusionGenerator) -> None:
    model = make_model()
    model.bank = Bank([torch.empty(0, 8), model.bank.values[1]], [[], ["u0", "u1", "u2"]])
    tiles = made(DiffusionGenerator(model, CPU), [0, 1], [1, 1])
    assert not torch.equal(tiles[0], tiles[1])


def test_nothing_asked_nothing_made(generator: DiffusionGenerator) -> None:
    assert list(generator.sample([], [])) == []
    assert generator.latents([], []).shape == (0, 4, 8, 8)
    assert generator.decode(torch.empty(0, 4, 8, 8)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("labels", "seeds", "settings", "message"),
    [
        ([2], [1], {}, "label is 2"),
        ([0], [1, 2], {}, "1 labels came with 2 seeds"),
        ([0], [1], {"batch_size": 0}, "batch_size is 0"),
        ([0], [1], {"guidance": float("nan")}, "guidance is nan"),
        ([0], [1], {"guidance": -1.0}, "guidance is -1"),
        ([0], [1], {"guidance_from": 600, "guidance_to": 300}, "guidance_from is 600 and guidance_to 300"),
        ([0], [1], {"guidance_to": 1000}, "guidance_to 1000"),
        ([0], [1], {"steps": 0}, "steps is 0"),
        ([0], [1], {"solver": "dmp++"}, r"no solver 'dmp\+\+'.*Did you mean 'dpm\+\+'"),
        ([0], [1], {"condition": "tiles"}, "condition is 'tiles'.*Did you mean 'tile'"),
        ([0], [1], {"precision": "int8"}, "precision is 'int8'"),
        ([0], [1], {"like": "t0"}, "like is 't0' with condition 'bank'"),
        ([0], [1], {"condition": "tile", "like": "t9"}, "like is 't9', which is not among the 8 training tiles"),
        ([0], [1], {"condition": "tile", "towards": "b"}, "towards is 'b' with condition 'tile'"),
        ([0], [1], {"condition": "interpolate", "towards": "c"}, "towards is 'c', no class here"),
        ([0], [1], {"condition": "interpolate", "share": 1.5}, "share is 1.5"),
        ([0], [1], {"guidence": 1.0}, "no setting 'guidence'.*Did you mean 'guidance'"),
    ],
)
def test_requests_that_cannot_be_met_are_named(
    generator: DiffusionGenerator, labels: list[int], seeds: list[int], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingError, match=message):  # when it is asked for, not when the first tile is taken
        generator.sample(labels, seeds, **{"steps": 3} | settings)


def test_a_checkpoint_gives_the_same_tiles_again(tuned_path: Path) -> None:
    one = DiffusionGenerator.from_checkpoint(tuned_path, device="cpu", precision="fp32")
    assert one.classes == ("STR", "TUM", "LYM") and one.size == 16 and one.card["kind"] == "diffusion"
    assert 0 < one.card["trainable"] < one.card["parameters"]
    first = made(one, [0, 1, 2], [1, 2, 3])
    assert torch.equal(made(DiffusionGenerator.from_checkpoint(tuned_path, "cpu", "fp32"), [0, 1, 2], [1, 2, 3]), first)


def test_base_and_lora_file_make_the_tiles_of_the_whole_checkpoint(tuned_path: Path, base_path: Path) -> None:
    share = tuned_path.with_name("lora.safetensors")
    assert share.stat().st_size < tuned_path.stat().st_size / 2
    whole = DiffusionGenerator.from_checkpoint(tuned_path, "cpu", "fp32")
    built = DiffusionGenerator(apply_lora(share), CPU, "fp32")
    named = DiffusionGenerator(apply_lora(share, base_path), CPU, "fp32")
    latents = whole.latents([0, 1, 2], [1, 2, 3], steps=3)
    torch.testing.assert_close(built.latents([0, 1, 2], [1, 2, 3], steps=3), latents, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(named.latents([0, 1, 2], [1, 2, 3], steps=3), latents, atol=1e-3, rtol=1e-3)


def test_the_conditioner_is_told_which_tokens_are_whose() -> None:
    conditioner = Conditioner(dim=8, classes=2, width=16, tokens=3)
    context, _ = conditioner(torch.zeros(2, 8), torch.tensor([0, 1]))
    assert torch.equal(context[0, :3], context[1, :3]) and not torch.equal(context[0, 3], context[1, 3])


@pytest.mark.parametrize("tokens", [2, 4])
def test_the_fast_pass_is_the_same_function(tokens: int) -> None:
    """Folded cross-attention, joined projections and early modulation against the network's own forward pass."""
    torch.manual_seed(0)
    shape = TransformerShape(width=32, layers=3, heads=2, tokens=tokens)
    model = new_model(shape, Autoencoder(AutoencoderShape(width=16, blocks=1)), {"name": "x", "dim": 8}, "ab", 32)
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.frozen()
    fast = fast_network(model.backbone, None)
    assert fast is not None
    context, levels = torch.randn(5, tokens + 1, 32), torch.tensor([999, 500, 3])
    told, noisy = fast.tell(context, levels), torch.randn(5, 4, 8, 8)
    for k, level in enumerate(levels):
        own = model.backbone.denoise(noisy, level.expand(5), context)
        assert own.std() > 0.1
        torch.testing.assert_close(told(noisy, k), own, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(told(noisy[:2], k), own[:2], atol=1e-4, rtol=1e-4)
    half = fast_network(model.backbone, torch.bfloat16)
    assert half is not None
    away = (half.tell(context, levels)(noisy, 1) - model.backbone.denoise(noisy, levels[1].expand(5), context)).std()
    assert away < 0.02 * own.std()


def test_tiles_are_those_of_the_slow_pass(generator: DiffusionGenerator) -> None:
    slow = DiffusionGenerator(generator.model, CPU, "fp32", fast=False)
    settings = {"precision": "fp32", "steps": 5}
    one, other = (g.latents([0, 1, 1], [1, 2, 3], **settings) for g in (generator, slow))
    torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-3)


def test_networks_of_another_build_go_without_the_fast_pass() -> None:
    model = make_model()
    attach = model.backbone.network
    model.transformer = attach_lora(attach, LoraShape(2, 2.0, ("to_q",), "all"))
    assert fast_network(model.backbone, None) is None
    wide = TransformerShape(width=32, layers=1, heads=4, tokens=8)  # folding would cost more than it saves
    stage = Autoencoder(AutoencoderShape(width=16, blocks=1))
    assert fast_network(new_model(wide, stage, {"name": "x", "dim": 8}, "ab", 32).backbone, None) is None


def test_the_interval_of_guidance(generator: DiffusionGenerator) -> None:
    """Outside of it the conditional prediction counts alone; the whole range is plain guidance."""

    def run(**settings: Any) -> torch.Tensor:
        return generator.latents([0, 1], [1, 2], steps=8, precision="fp32", **settings)

    assert torch.equal(run(guidance=3.0, guidance_from=0, guidance_to=999), run(guidance=3.0))
    none, whole = run(guidance=1.0), run(guidance=3.0)
    part = run(guidance=3.0, guidance_from=300, guidance_to=700)
    assert not torch.equal(part, none) and not torch.equal(part, whole)
    levels = generator.model.backbone.process.solver("dpm++", 8).timesteps
    between = int(levels[3]) + 1  # no step stands on this level
    assert torch.equal(run(guidance=3.0, guidance_from=between, guidance_to=between), none)


def test_solvers_end_at_like_tiles_and_draw_from_the_seed(generator: DiffusionGenerator) -> None:
    tiles = {name: generator.latents([0], [4], steps=60, solver=name, guidance=1.0) for name in ("dpm++", "ddim")}
    torch.testing.assert_close(tiles["dpm++"], tiles["ddim"], atol=0.3, rtol=0.1)
    for name in ("euler-a", "ddpm"):
        for steps in (1, 2, 3, 4):  # few steps leave the last levels of the cosine schedule in one leap
            one, again, other = (generator.latents([0], [s], steps=steps, solver=name) for s in (4, 4, 5))
            assert bool(one.isfinite().all()) and torch.equal(one, again) and not torch.equal(one, other)


def test_conditions_and_where_they_come_from(generator: DiffusionGenerator) -> None:
    bank = generator.model.bank
    labels, seeds = [0, 1] * 20, list(range(40))
    named = generator.origins(labels, seeds, condition="tile")["reference"]
    assert {n[0] for n in named[::2]} == {"t"} and {n[0] for n in named[1::2]} == {"u"} and len(set(named)) == 8
    tell = Teller(bank, "ab", "tile")
    told = tell(0, 7)
    assert torch.equal(told.embedding, bank.values[0][bank.ids[0].index(told.reference)])  # type: ignore[arg-type]
    assert set(generator.origins(labels, seeds, condition="tile", like="u2")["reference"]) == {"u2"}
    assert torch.equal(Teller(bank, "ab", "prototype")(1, 3).embedding, bank.values[1].mean(0))  # type: ignore[arg-type]
    assert set(generator.origins(labels, seeds, condition="prototype")["reference"]) == {""}
    # two entries of the bank are mixed; where both draws are the same tile, that one tile is named
    mixed = generator.origins(labels, seeds)["reference"]
    alone = [n for n in mixed if n]
    assert 0 < len(alone) < 20
    first = mixed.index(alone[0])
    drawn = draw_condition(bank, labels[first], seeds[first], noise=0.0)
    near = bank.values[labels[first]][bank.ids[labels[first]].index(alone[0])]
    torch.testing.assert_close(drawn, near)
    assert torch.equal(made(generator, [0], [3], condition="tile", like="t1"),
                       made(generator, [0], [3], condition="interpolate", like="t1", share=0.0))  # fmt: skip


def test_interpolation_goes_from_one_to_the_other(generator: DiffusionGenerator) -> None:
    bank = generator.model.bank
    for towards, other in (("", 0), ("b", 1)):
        ways = [Teller(bank, "ab", "interpolate", "t1", towards, share)(0, 5) for share in (0, 0.5, 1)]
        assert {w.reference for w in ways} == {"t1"} and len({w.second_reference for w in ways}) == 1
        assert ways[0].second_reference != "t1"
        end = bank.values[other][bank.ids[other].index(ways[0].second_reference)]
        assert torch.equal(ways[0].embedding, bank.values[0][1])  # type: ignore[arg-type]
        assert torch.equal(ways[2].embedding, end)  # type: ignore[arg-type]
        assert [w.other for w in ways] == [other if towards else -1] * 3
        assert [w.share for w in ways] == ([0, 0.5, 1] if towards else [0, 0, 0])
    # the far end of the way to another class is that class's tile, token and all
    ends = {"condition": "interpolate", "like": "t1", "towards": "b", "share": 1.0}
    name = generator.origins([0], [5], **ends)["second_reference"][0]
    assert torch.equal(made(generator, [0], [5], **ends), made(generator, [1], [5], condition="tile", like=name))
    lengths = torch.stack([between(a, b, 0.5, torch.zeros(9), torch.zeros(9)) for a, b in torch.randn(300, 2, 9)])
    assert abs(lengths.norm(dim=1).mean() - torch.randn(300, 9).norm(dim=1).mean()) < 0.3  # a line gives 0.7 times


def test_classes_without_training_tiles_and_checkpoints_without_a_bank() -> None:
    model = make_model()
    model.bank = Bank([torch.randn(1, 8), torch.empty(0, 8)], [["t0"], []])
    one = DiffusionGenerator(model, CPU)
    for condition in ("tile", "prototype", "interpolate"):
        with pytest.raises(
            SettingError, match=f"condition is '{condition}', but the checkpoint's training had no tile of b"
        ):
            one.sample([0, 1], [1, 2], condition=condition)
        assert one.origins([0], [1], condition=condition)["reference"] == ["t0"]  # its only tile
    assert one.origins([1], [1], condition="tile", like="t0")["reference"] == ["t0"]
    with pytest.raises(SettingError, match="no tile of b"):
        one.sample([0], [1], condition="interpolate", towards="b")
    model.bank = Bank()
    with pytest.raises(SettingError, match="no bank of training embeddings"):
        DiffusionGenerator(model, CPU).sample([0], [1], condition="tile")
    assert len(made(DiffusionGenerator(model, CPU), [0, 1], [1, 2])) == 2


def test_sdedit_keeps_more_with_less_noise(generator: DiffusionGenerator) -> None:
    images = torch.randint(0, 255, (3, 3, 32, 32), dtype=torch.uint8)
    labels, seeds = [0, 1, 0], [1, 2, 3]

    def edit(strength: float, batch_size: int = 16, **settings: Any) -> torch.Tensor:
        how = {"steps": 10, "guidance": 1.0, "precision": "fp32"} | settings
        return torch.cat(list(generator.edit(images, labels, seeds, strength, batch_size, **how)))

    # the autoencoder of the test is random: what can be kept is its round trip
    kept = generator.decode(generator.model.backbone.encode(images)).float()
    away = [(edit(s).float() - kept).abs().mean() for s in (0.1, 0.5, 1.0)]
    assert away[0] < away[1] < away[2]
    assert torch.equal(edit(0.5, 1), edit(0.5)) and torch.equal(
        edit(0.3, solver="euler-a"), edit(0.3, 2, solver="euler-a")
    )
    fixed = edit(0.5, embeddings=torch.zeros(3, 8))
    assert fixed.shape == images.shape and not torch.equal(fixed, edit(0.5))


@pytest.mark.parametrize("solver", ["dpm++", "ddim", "euler-a", "ddpm"])
def test_sdedit_starts_at_the_level_that_strength_says(generator: DiffusionGenerator, solver: str) -> None:
    """The first noisy latents are the tile's at that level: their noise has the deviation of the schedule."""
    seen: list[tuple[int, torch.Tensor]] = []
    process, clean = generator.model.backbone.process, torch.zeros(2, 4, 8, 8)
    noise, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 64)
    solve(generator.model, noise, context, Solving(guidance=1.0, steps=10, solver=solver), "fp32", clean=clean,
          strength=0.4, generators=[torch.Generator().manual_seed(k) for k in range(2)],
          watch=lambda k, level, noisy, _: seen.append((level, noisy)))  # fmt: skip
    assert len(seen) == 4
    level, noisy = seen[0]
    assert level == int(process.solver(solver, 10).timesteps[6])
    torch.testing.assert_close(noisy, process.add(clean, noise, torch.tensor([level, level])), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("strength", "shape", "more", "error"),
    [
        (0.0, (1, 3, 32, 32), {}, SettingError("strength is 0.0")),
        (1.2, (1, 3, 32, 32), {}, SettingError("strength is 1.2")),
        (float("nan"), (1, 3, 32, 32), {}, SettingError("strength is nan")),
        (0.5, (1, 3, 64, 64), {}, DataError(r"The tiles are torch.uint8 \[1, 3, 64, 64\].*\[1, 3, 32, 32\]")),
        (0.5, (2, 3, 32, 32), {}, DataError("one tile a label")),
        (0.5, (1, 3, 32, 32), {"embeddings": torch.zeros(1, 9)}, DataError("embeddings are")),
    ],
)
def test_edits_that_cannot_be_made(
    generator: DiffusionGenerator, strength: float, shape: tuple[int, ...], more: dict[str, Any], error: Exception
) -> None:
    with pytest.raises(type(error), match=str(error)):
        generator.edit(torch.zeros(shape, dtype=torch.uint8), [0], [1], strength, **more)


def test_watching_shows_every_step_and_ends_at_the_tiles(generator: DiffusionGenerator) -> None:
    labels, seeds = [0, 1, 1], [1, 2, 3]
    for solver in ("dpm++", "euler-a"):
        steps = generator.watch(labels, seeds, steps=5, solver=solver)
        assert len(steps) == 6 and steps[0][0] > 900 and steps[-1][0] == 0
        assert [level for level, _, _ in steps] == sorted((level for level, _, _ in steps), reverse=True)
        assert all(side.shape == (3, 3, 32, 32) for _, *sides in steps for side in sides)
        assert torch.equal(steps[-1][1], torch.cat(list(generator.sample(labels, seeds, steps=5, solver=solver))))
    # the network's last expectation is the tile itself
    apart = (steps[-2][2].int() - steps[-1][1].int()).abs().float().mean()
    assert apart < 3


def test_nothing_stays_that_a_training_could_trip_over(generator: DiffusionGenerator) -> None:
    """Panels are drawn in the middle of a training: tensors of inference mode must not outlive them."""
    generator.watch([0], [1], steps=2)
    process = generator.model.backbone.process
    weights = process.weight(torch.tensor([5]), 5.0)
    value = torch.ones(1, requires_grad=True)
    (weights * value).sum().backward()
    latents = generator.latents([0], [1], steps=2)
    (latents * value).sum().backward()
    tiles = next(generator.sample([0], [1], steps=2))
    tiles[0] = 0
    assert value.grad is not None and not latents.is_inference() and not tiles.is_inference()
