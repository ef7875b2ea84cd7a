"""LoRA: which layers it reaches, that it starts at nothing, merges exactly, and travels alone."""

import copy

import pytest
import torch

from histosynth.core.errors import CheckpointError, SettingError
from histosynth.diffusion.lora import (
    ATTENTION,
    LoraShape,
    attach_lora,
    count_targets,
    load_lora_tensors,
    lora_tensors,
    merged,
)
from histosynth.diffusion.transformer import TransformerShape, build_transformer, denoise

SHAPE = TransformerShape(width=32, layers=3, heads=2, tokens=2)


@pytest.fixture
def base() -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_transformer(SHAPE, 4)
    for parameter in model.parameters():  # the zero-initialised output would hide every change
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 4, 4, generator=g), torch.tensor([10, 700]), torch.randn(2, 3, 32, generator=g)


def randomise(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def test_every_attention_projection_is_reached(base: torch.nn.Module) -> None:
    assert count_targets(base, ATTENTION) == dict.fromkeys(ATTENTION, 2 * SHAPE.layers)
    assert count_targets(base, ["attn2.to_q"]) == {"attn2.to_q": SHAPE.layers}
    model = attach_lora(base, LoraShape(4, 8))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * SHAPE.layers * len(ATTENTION)
    assert all("lora_" in n for n in trained)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == len(trained) // 2 * 4 * 64


def test_a_target_that_matches_nothing_is_an_error_although_others_match(base: torch.nn.Module) -> None:
    with pytest.raises(SettingError, match=r"to_quary.*to_q"):
        attach_lora(base, LoraShape(4, 8, ("to_k", "to_quary")))
    with pytest.raises(SettingError, match="empty"):
        attach_lora(base, LoraShape(4, 8, ()))
    with pytest.raises(SettingError, match="lora_rank is 0"):
        attach_lora(base, LoraShape(0, 8))


def test_it_starts_at_nothing_and_merges_into_the_same_function(
    base: torch.nn.Module, inputs: tuple[torch.Tensor, ...]
) -> None:
    plain_names = set(base.state_dict())
    with torch.no_grad():
        before = denoise(base, *inputs)
        model = attach_lora(copy.deepcopy(base), LoraShape(2, 4))
        assert torch.equal(denoise(model, *inputs), before)
        randomise(model)
        after = denoise(model, *inputs)
        assert (after - before).abs().max() > 1e-2
        whole = merged(model)
        assert set(whole.state_dict()) == plain_names
        torch.testing.assert_close(denoise(whole, *inputs), after, atol=1e-4, rtol=1e-4)
    assert merged(base) is base


def test_it_travels_alone(base: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    model = attach_lora(copy.deepcopy(base), LoraShape(2, 4))
    randomise(model)
    tensors = lora_tensors(model)
    assert len(tensors) == 2 * 2 * SHAPE.layers * 4 and all("lora_" in k for k in tensors)
    other = attach_lora(copy.deepcopy(base), LoraShape(2, 4))
    load_lora_tensors(other, tensors)
    with torch.no_grad():
        assert torch.equal(denoise(other, *inputs), denoise(model, *inputs))
    with pytest.raises(CheckpointError, match="does not fit"):
        load_lora_tensors(attach_lora(copy.deepcopy(base), LoraShape(3, 4)), tensors)
