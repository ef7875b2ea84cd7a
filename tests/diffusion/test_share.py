"""LoRA as small files: peft's own reader, diffusers' own reader, blends, pretrained backbones, hostile cards."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from histosynth.core.checkpoint import load_checkpoint, read_card, save_checkpoint
from histosynth.core.errors import CheckpointError, SettingError
from histosynth.diffusion.lora import (
    LoraShape,
    attach_lora,
    block_numbers,
    describe_lora,
    lora_tensors,
    merge,
    merged,
    unmerge,
)
from histosynth.diffusion.model import load_model
from histosynth.diffusion.sample import DiffusionGenerator
from histosynth.diffusion.share import apply_lora, blend, save_peft
from histosynth.diffusion.train import DiffusionConfig, train_diffusion
from histosynth.diffusion.transformer import TransformerShape, build_transformer, denoise
from histosynth.tiles.batches import TileArray
from tests.diffusion.helpers import TINY, ColourMeans, make_tiles, tuning
from tests.diffusion.pixcell_folder import write_folder

WEIGHTS = "pytorch_lora_weights.safetensors"
CPU = torch.device("cpu")
ARGUMENTS = (torch.randn(2, 4, 4, 4), torch.tensor([10, 700]), torch.randn(2, 3, 32))


def tuned_network(seed: int, rank: int = 2, blocks: str = "all") -> PeftModel:
    torch.manual_seed(0)
    base = build_transformer(TransformerShape(width=32, layers=3, heads=2, tokens=2), 4)
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = attach_lora(base.eval(), LoraShape(rank, 4.0, blocks=blocks))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_lora_reaches_the_chosen_blocks_alone() -> None:
    model = tuned_network(1, blocks="0,2")
    assert {n.split("transformer_blocks.")[1][0] for n in lora_tensors(model)} == {"0", "2"}
    assert "in 16 layers of 2 of 3 blocks (to_q 4, to_k 4, to_v 4, to_out.0 4)" in describe_lora(model)
    assert block_numbers("0, 8-11,3", 12) == [0, 3, 8, 9, 10, 11] and block_numbers("all", 2) == [0, 1]
    for odd in ("", "a", "3-1", "0,,2", "12", "1-12", "9999999999"):
        with pytest.raises(SettingError, match="lora_blocks is"):
            block_numbers(odd, 12)


def test_merging_in_place_and_back() -> None:
    model = tuned_network(1)
    weight = model.get_base_model().transformer_blocks[0].attn1.to_q.base_layer.weight
    with torch.no_grad():
        before, plain = denoise(model, *ARGUMENTS), weight.clone()
        merge(model)
        torch.testing.assert_close(denoise(model, *ARGUMENTS), before, atol=1e-4, rtol=1e-4)
        assert (weight - plain).abs().max() > 0.1
        unmerge(model)
        torch.testing.assert_close(weight, plain, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(denoise(model, *ARGUMENTS), before, atol=1e-4, rtol=1e-4)


def test_peft_itself_reads_what_is_written(tmp_path: Path) -> None:
    model = tuned_network(1, blocks="1-2")
    save_peft(tmp_path, model, "compact")
    bare = copy.deepcopy(model).unload()
    read = PeftModel.from_pretrained(bare, str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(denoise(read, *ARGUMENTS), denoise(model, *ARGUMENTS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("targets", "count"), [((), 4 * (2 + 8)), (("attn2.to_k",), 4)])
def test_the_compact_unet_learns_by_lora(
    tiles: TileArray, encoder: ColourMeans, unet_path: Path, tmp_path: Path, targets: tuple[str, ...], count: int
) -> None:
    """The prototype's fallback froze its LoRA by mistake; here B moves away from zero, convolutions included."""
    config = tuning(unet_path, steps=4, lora_blocks="1-4", checkpointing=True, accumulate=2, lora_targets=targets)
    path = train_diffusion(tiles, config, tmp_path / "tuned", device="cpu", encoder=encoder)
    model = apply_lora(path.with_name("lora.safetensors"))
    changes = {n: v for n, v in lora_tensors(model.transformer).items() if "lora_B" in n}  # type: ignore[arg-type]
    assert len(changes) == count
    # at the lowest resolution a tile of 16 px is one place, which attends to itself whatever it asks
    single = ("2.attn1.to_q", "2.attn1.to_k", "3.attn1.to_q", "3.attn1.to_k", "4.attn1.to_q", "4.attn1.to_k")
    assert all((v.abs().max() > 0) != any(s in n for s in single) for n, v in changes.items())
    one, other = DiffusionGenerator.from_checkpoint(path, "cpu", "fp32"), DiffusionGenerator(model, CPU, "fp32")
    latents = one.latents([0, 1], [1, 2], steps=3)
    torch.testing.assert_close(other.latents([0, 1], [1, 2], steps=3), latents, atol=1e-3, rtol=1e-3)


def pixcell_run(folder: Path, out: Path, encoder: ColourMeans, **changes: object) -> Path:
    tiles = make_tiles({"STR": 5, "TUM": 3, "RARE": 1, "NONE": 0}, size=32)
    config = replace(
        tuning(folder, size=32, steps=3, accumulate=2, checkpointing=True, sample_steps=2, lora_blocks="1", **changes),
        lr_adapter=1e-2,
    )
    return train_diffusion(tiles, config, out, device="cpu", encoder=encoder)


def test_pixcell_is_adapted_by_the_same_recipe_and_not_copied(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pixcell")
    native = ColourMeans("uni2-h", 12)
    path = pixcell_run(folder, tmp_path / "run", native, finetune="auto")
    tensors, card = load_checkpoint(path)
    assert not any(name.startswith(("transformer.", "autoencoder.")) for name in tensors)
    assert card["backbone"] == "pixcell" and "NC" in card["licence"] and card["conditioner"]["identity"]
    assert {n.split("transformer_blocks.")[1][0] for n in tensors if n.startswith("lora.")} == {"1"}
    assert any(v.abs().max() > 0 for n, v in tensors.items() if "lora_B" in n)
    assert tensors["conditioner.class_tokens.weight"][:3].abs().max() > 0
    one = DiffusionGenerator.from_checkpoint(path, "cpu", "fp32")
    made = one.latents([0, 1, 2, 3], [1, 2, 3, 4], steps=2)
    assert made.shape == (4, 16, 4, 4) and torch.isfinite(made).all()
    share = path.with_name("lora.safetensors")
    again = DiffusionGenerator(apply_lora(share), CPU, "fp32").latents([0, 1, 2, 3], [1, 2, 3, 4], steps=2)
    assert torch.equal(again, made)
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError):
        load_model(path)
    source = card["source"] | {"path": str(moved)}
    assert torch.equal(DiffusionGenerator(load_model(path, source=source), CPU, "fp32").latents([0], [1], steps=2),
                       made[:1])  # fmt: skip


def test_pixcell_starts_as_it_was_and_hears_another_encoder_through_a_new_adapter(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pixcell")
    native, other = ColourMeans("uni2-h", 12), ColourMeans("other", 20)
    path = pixcell_run(folder, tmp_path / "a", native, lr_lora=1e-9)
    model = load_model(path)
    torch.nn.init.zeros_(model.conditioner.adapter.layers[-1].weight)
    torch.nn.init.zeros_(model.conditioner.adapter.layers[-1].bias)
    torch.nn.init.zeros_(model.conditioner.class_tokens.weight)
    raw = native.encode(make_tiles({"A": 4}, size=32).tensor())
    context, _ = model.conditioner(model.conditioner.standardise(raw), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(context[:, 0], raw, atol=1e-3, rtol=1e-3)
    card = read_card(pixcell_run(folder, tmp_path / "b", other))
    assert not card["conditioner"]["identity"] and card["encoder"]["dim"] == 20
    for changes, message in (
        ({"finetune": "full"}, "finetune is 'full'"),
        ({"finetune": "lora"}, "finetune is 'lora'"),
    ):
        with pytest.raises(SettingError, match=message):
            pixcell_run(folder, tmp_path / changes["finetune"], native, **changes)
    with pytest.raises(SettingError, match="size is 64, but .* draws 32 px"):
        train_diffusion(make_tiles({"A": 2}, size=64), tuning(folder, size=64), tmp_path / "d", device="cpu",
                        encoder=native)  # fmt: skip


@pytest.fixture(scope="module")
def shares(base_path: Path, encoder: ColourMeans, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one base, of other classes, ranks and layers."""
    out = tmp_path_factory.mktemp("shares")
    first, second = make_tiles({"STR": 4, "TUM": 4}, seed=1), make_tiles({"TUM": 4, "CYST": 3}, seed=2)
    other = tuning(base_path, lora_rank=3, lora_targets=("attn2.to_q",), lora_blocks="1", seed=3)
    paths = [
        train_diffusion(first, tuning(base_path), out / "a", device="cpu", encoder=encoder),
        train_diffusion(second, other, out / "b", device="cpu", encoder=encoder),
    ]
    return [path.with_name("lora.safetensors") for path in paths]


def test_blends_add_the_changes_by_their_weights(shares: list[Path]) -> None:
    made = blend(shares, [0.75, 0.5])
    assert made.classes == ("STR", "TUM", "CYST") and [len(v) for v in made.bank.values] == [4, 8, 3]
    models = [apply_lora(path) for path in shares]

    def change(model: object, name: str) -> torch.Tensor:
        layer = model.transformer.get_base_model().get_submodule(name)  # type: ignore[attr-defined]
        return layer.get_delta_weight("default") if hasattr(layer, "get_delta_weight") else torch.zeros(1)

    for name in ("transformer_blocks.1.attn2.to_q", "transformer_blocks.0.attn1.to_v"):
        expected = 0.75 * change(models[0], name) + 0.5 * change(models[1], name)
        torch.testing.assert_close(change(made, name), expected, atol=1e-6, rtol=1e-4)
    tokens = [m.conditioner.class_tokens.weight for m in models]
    torch.testing.assert_close(made.conditioner.class_tokens.weight[0], tokens[0][0])
    torch.testing.assert_close(made.conditioner.class_tokens.weight[1], 0.6 * tokens[0][1] + 0.4 * tokens[1][0])
    alone = blend(shares[:1], [1.0])
    latents = DiffusionGenerator(alone, CPU, "fp32").latents([0, 1], [1, 2], steps=2)
    whole = DiffusionGenerator(models[0], CPU, "fp32").latents([0, 1], [1, 2], steps=2)
    torch.testing.assert_close(latents, whole, atol=1e-4, rtol=1e-4)


def test_blends_that_make_no_sense_are_refused(shares: list[Path], base_path: Path, tmp_path: Path) -> None:
    for weights in ([1.0], [1.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(SettingError, match="weights"):
            blend(shares, weights)
    stranger = train_diffusion(make_tiles({"STR": 3}), tuning(base_path, steps=1), tmp_path / "c", device="cpu",
                               encoder=ColourMeans("other", 20)).with_name("lora.safetensors")  # fmt: skip
    with pytest.raises(CheckpointError, match="cannot be blended"):
        blend([shares[0], stranger], [1, 1])


@pytest.mark.parametrize(
    "change",
    [
        {"encoder": {"name": "x", "dim": 10**12}},
        {"encoder": {"name": "x", "dim": -3}},
        {"encoder": {"name": "x", "dim": 13}},
        {"classes": []},
        {"classes": ["STR"]},
        {"classes": None},
        {"network": {"width": 10**9, "layers": 2, "heads": 2, "tokens": 2, "patch": 2, "channels": 4}},
        {"network": {"width": 32, "layers": 3, "heads": 2, "tokens": 2, "patch": 2, "channels": 4}},
        {"conditioner": {"join": "add", "identity": True}},
        {"backbone": "unet"},
        {"architecture": "unet"},
        {"architecture": "odd"},
        {"source": {"kind": "elsewhere", "path": "/etc"}},
        {"process": {"schedule": "odd"}},
        {"bank_ids": [["a"]]},
        {"size": "large"},
        {"encoder": None},
    ],
)
def test_cards_that_lie_are_refused(change: dict[str, object], base_path: Path, tmp_path: Path) -> None:
    tensors, card = load_checkpoint(base_path)
    path = save_checkpoint(tmp_path / "odd.safetensors", tensors, json.loads(json.dumps(card)) | change)
    with pytest.raises(CheckpointError):
        load_model(path)


def test_lora_on_another_base_is_refused(
    tuned_path: Path, tiles: TileArray, autoencoder_path: Path, encoder: ColourMeans, tmp_path: Path
) -> None:
    changes = {"init": "none", "autoencoder": str(autoencoder_path), "width": 16, "layers": 1, "heads": 2, "tokens": 2,
               "backbone": "transformer"}  # fmt: skip
    other = train_diffusion(tiles, tuning(tmp_path, steps=1, **changes), tmp_path / "o", device="cpu", encoder=encoder)
    with pytest.raises(CheckpointError, match="does not fit"):
        apply_lora(tuned_path.with_name("lora.safetensors"), other)
    broken = tmp_path / "lora.safetensors"
    broken.write_bytes(tuned_path.with_name("lora.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        apply_lora(broken)


def test_a_share_file_of_the_first_version_still_opens(tuned_path: Path, base_path: Path, tmp_path: Path) -> None:
    tensors, card = load_checkpoint(tuned_path.with_name("lora.safetensors"))
    new = ("lora", "conditioner", "process", "backbone", "source", "network", "autoencoder", "latent_space")
    old = save_checkpoint(tmp_path / "lora.safetensors", tensors, {k: v for k, v in card.items() if k not in new})
    one, other = (
        DiffusionGenerator(apply_lora(p, base_path), CPU, "fp32") for p in (old, tuned_path.parent / old.name)
    )
    assert torch.equal(one.latents([0, 2], [1, 2], steps=2), other.latents([0, 2], [1, 2], steps=2))


def test_unet_changes_of_other_layers_and_blocks_add_up(
    tiles: TileArray, encoder: ColourMeans, unet_path: Path, tmp_path: Path
) -> None:
    """A layer that one of the files lacks stays as it is there, convolutions too."""
    shares, networks = [], []
    for name, changes in (("a", {"lora_targets": ("conv1", "attn2.to_q")}), ("b", {"lora_blocks": "1-2"})):
        config = tuning(unet_path, steps=3, lr_lora=0.05, **changes)
        path = train_diffusion(tiles, config, tmp_path / name, device="cpu", encoder=encoder)
        shares.append(path.with_name("lora.safetensors"))
        networks.append(merged(apply_lora(shares[-1]).transformer).state_dict())
    base = load_model(unet_path).transformer.state_dict()
    both = merged(blend(shares, [0.5, 2.0]).transformer).state_dict()
    for name, value in base.items():
        expected = value + 0.5 * (networks[0][name] - value) + 2.0 * (networks[1][name] - value)
        torch.testing.assert_close(both[name], expected, atol=1e-5, rtol=1e-4)
    assert (both["blocks.1.conv1.weight"] - base["blocks.1.conv1.weight"]).abs().max() > 1e-3


def test_an_adapter_does_not_go_onto_another_architecture(
    tiles: TileArray, encoder: ColourMeans, autoencoder_path: Path, tmp_path: Path
) -> None:
    """The conditioner would fit: both have contexts of 24 channels."""
    paths = []
    for name, changes in (("unet", {"width": 8, "layers": 1}), ("transformer", {"width": 24})):
        config = DiffusionConfig(**TINY | changes | {"steps": 1, "backbone": name}, init="none",
                                 autoencoder=str(autoencoder_path))  # fmt: skip
        paths.append(train_diffusion(tiles, config, tmp_path / name, device="cpu", encoder=encoder))
    config = tuning(paths[1], steps=1, finetune="adapter")
    share = train_diffusion(tiles, config, tmp_path / "share", device="cpu", encoder=encoder)
    share = share.with_name("lora.safetensors")
    assert apply_lora(share).backbone.card()["architecture"] == "transformer"
    with pytest.raises(CheckpointError, match="trained on a transformer"):
        apply_lora(share, paths[0])
    with pytest.raises(SettingError, match="backbone is 'transformer', but the start"):
        train_diffusion(tiles, tuning(paths[0], backbone="transformer"), tmp_path / "x", device="cpu", encoder=encoder)


@pytest.mark.parametrize("network", [{"heads": 2.0}, {"heads": True}, {"layers": 300}, {"tokens": 0}])
def test_shapes_that_no_unet_has_are_refused(network: dict[str, object], unet_path: Path, tmp_path: Path) -> None:
    tensors, card = load_checkpoint(unet_path)
    card = json.loads(json.dumps(card))
    card["network"] |= network
    with pytest.raises(CheckpointError, match=next(iter(network))):
        load_model(save_checkpoint(tmp_path / "odd.safetensors", tensors, card))
