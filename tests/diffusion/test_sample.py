"""Generation: a tile depends on its class and seed alone, and checkpoints give it back."""

from pathlib import Path

import pytest
import torch

from histosynth.core.errors import SettingError
from histosynth.core.types import LatentGenerator
from histosynth.diffusion.adapter import Conditioner
from histosynth.diffusion.autoencoder import Autoencoder, AutoencoderShape
from histosynth.diffusion.model import Bank, LatentDiffusion, new_model
from histosynth.diffusion.sample import DiffusionGenerator, run_solver
from histosynth.diffusion.share import apply_lora
from histosynth.diffusion.transformer import TransformerShape

CPU = torch.device("cpu")


def make_model(size: int = 64) -> LatentDiffusion:
    """Random weights, large enough that neighbours or rounding would show."""
    torch.manual_seed(3)
    shape = TransformerShape(width=64, layers=2, heads=2, tokens=2)
    model = new_model(shape, Autoencoder(AutoencoderShape(width=16, blocks=1)), {"name": "x", "dim": 8}, "ab", size)
    for module in (model.transformer, model.autoencoder):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.12)
    model.bank = Bank([torch.randn(5, 8), torch.randn(3, 8)], [["t"] * 5, ["u"] * 3])
    return model


@pytest.fixture(scope="module")
def generator() -> DiffusionGenerator:
    return DiffusionGenerator(make_model(), CPU, "auto")


def made(generator: DiffusionGenerator, labels: list[int], seeds: list[int], **settings: object) -> torch.Tensor:
    return torch.cat(list(generator.sample(labels, seeds, steps=3, **settings)))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_tile_depends_on_its_class_and_seed_alone(
    generator: DiffusionGenerator, batch_size: int, precision: str
) -> None:
    generator = DiffusionGenerator(generator.model, CPU, precision)  # type: ignore[arg-type]
    labels, seeds = [0, 1, 0, 1, 1, 0, 0], [5, 6, 7, 8, 9, 5, 11]
    first = made(generator, labels, seeds)
    assert first.dtype == torch.uint8 and first.shape == (7, 3, 64, 64)
    batches = list(generator.sample(labels, seeds, batch_size=batch_size, steps=3))
    assert [len(b) for b in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), first)
    assert torch.equal(first[0], first[5]) and not torch.equal(first[0], first[1])
    # other neighbours, another place, another number of passes through the networks
    crowd = made(generator, [1] * 18 + labels[::-1], [*range(100, 118), *seeds[::-1]], batch_size=batch_size)
    assert torch.equal(crowd[18:].flip(0), first)
    alone = torch.cat([made(generator, [k], [s], batch_size=batch_size) for k, s in zip(labels, seeds, strict=True)])
    assert torch.equal(alone, first)


def test_latents_decode_to_the_tiles(generator: DiffusionGenerator) -> None:
    labels, seeds = [0, 1, 1], [1, 2, 3]
    latents = generator.latents(labels, seeds, steps=3)
    assert latents.shape == (3, 4, 16, 16) and latents.dtype == torch.float32
    assert torch.equal(generator.decode(latents), made(generator, labels, seeds))
    assert isinstance(generator, LatentGenerator)


def test_guidance_of_one_is_the_conditional_model(generator: DiffusionGenerator) -> None:
    """v = u + g (c - u): at g = 1 only c counts, and g near 1 comes near it."""
    model = generator.model
    noise, embeddings = torch.randn(16, 4, 16, 16), torch.randn(16, 8)
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
    model.bank = Bank([torch.empty(0, 8), model.bank.values[1]], [[], ["u"] * 3])
    tiles = made(DiffusionGenerator(model, CPU), [0, 1], [1, 1])
    assert not torch.equal(tiles[0], tiles[1])


def test_nothing_asked_nothing_made(generator: DiffusionGenerator) -> None:
    assert list(generator.sample([], [])) == []
    assert generator.latents([], []).shape == (0, 4, 16, 16)
    assert generator.decode(torch.empty(0, 4, 16, 16)).shape == (0, 3, 64, 64)


@pytest.mark.parametrize(
    ("labels", "seeds", "settings", "message"),
    [
        ([2], [1], {}, "label is 2"),
        ([0], [1, 2], {}, "1 labels came with 2 seeds"),
        ([0], [1], {"batch_size": 0}, "batch_size is 0"),
        ([0], [1], {"guidance": float("nan")}, "guidance is nan"),
    ],
)
def test_requests_that_cannot_be_met_are_named(
    generator: DiffusionGenerator, labels: list[int], seeds: list[int], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        made(generator, labels, seeds, **settings)


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
