"""Training: what is frozen stays frozen, an interruption leaves no trace, odd sets and settings."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from histosynth.autoencoder import train as autoencoder_module
from histosynth.autoencoder.network import load_autoencoder
from histosynth.autoencoder.train import AutoencoderConfig, train_autoencoder
from histosynth.core.checkpoint import load_checkpoint, read_card
from histosynth.core.errors import CheckpointError, DataError, RunError, SettingError
from histosynth.core.training import Clock, rate
from histosynth.diffusion import backbone as backbone_module
from histosynth.diffusion import train as train_module
from histosynth.diffusion.model import export_base, load_model
from histosynth.diffusion.start import way_of_tuning
from histosynth.diffusion.train import DiffusionConfig, choose_trained, train_diffusion
from histosynth.tiles.batches import TileArray
from tests.diffusion.helpers import CLASSES, TINY, ColourMeans, make_tiles, tuning


def changed(a: Path, b: Path) -> set[str]:
    one, other = load_checkpoint(a)[0], load_checkpoint(b)[0]
    return {k for k in one if k in other and not torch.equal(one[k], other[k])}


def interrupt(monkeypatch: pytest.MonkeyPatch, module: object, at: int) -> None:
    """Stop the training as a kill would: between a saved state and the next."""

    def stop(loss: float, step: int, setting: str) -> None:
        if step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "check_finite", stop)


def test_adapter_and_lora_change_and_the_base_stays_frozen(base_path: Path, tuned_path: Path) -> None:
    moved = changed(base_path, tuned_path)
    attention = {k for k in moved if k.startswith("transformer.")}
    assert len(attention) == 2 * 2 * 4
    assert all(".attn" in k and ".to_" in k and k.endswith("weight") for k in attention)
    assert {"conditioner.adapter.layers.0.weight", "conditioner.class_tokens.weight", "conditioner.no_class"} <= moved
    # the decoder learns the texture of the tiles; the latents stay
    first_stage = {k.removeprefix("autoencoder.") for k in moved if k.startswith("autoencoder.")}
    assert first_stage and all(k.startswith(("decoder.", "coarse_out.", "shift", "scale")) for k in first_stage)
    assert "conditioner.mean" not in moved  # the base's adapter keeps the scale it knows


def test_without_a_share_for_it_the_autoencoder_stays(
    tiles: TileArray, encoder: ColourMeans, base_path: Path, tmp_path: Path
) -> None:
    config = tuning(base_path, steps=1, decoder=0.0)
    path = train_diffusion(tiles, config, tmp_path / "run", device="cpu", encoder=encoder)
    assert not any(k.startswith("autoencoder.") for k in changed(base_path, path))
    assert read_card(path)["decoder"] == {} and not (tmp_path / "run" / "decoder").exists()


@pytest.mark.parametrize("own", [True, False], ids=["trained on these tiles", "of other tiles"])
def test_from_scratch_the_decoder_of_another_autoencoder_learns_these_tiles_too(
    own: bool, tiles: TileArray, encoder: ColourMeans, autoencoder_path: Path, tmp_path: Path
) -> None:
    first = {"autoencoder": "train", "autoencoder_steps": 1} if own else {"autoencoder": str(autoencoder_path)}
    config = DiffusionConfig(**TINY, init="none", decoder=0.5, **first)
    path = train_diffusion(tiles, config, tmp_path / "run", device="cpu", encoder=encoder)
    refined = read_card(path)["decoder"]
    assert refined == {} if own else refined["steps"] == 3
    assert (tmp_path / "run" / "decoder").exists() is not own


@pytest.mark.parametrize("mode", ["adapter", "lora", "full"])
def test_each_way_of_fine_tuning_trains_its_part(base_path: Path, mode: str) -> None:
    model = load_model(base_path)
    choose_trained(model, tuning(base_path, finetune=mode))
    trained = {k: any(p.requires_grad for p in m.parameters()) for k, m in model.modules().items()}
    assert trained["transformer"] == (mode != "adapter")
    adapter = any(p.requires_grad for p in model.conditioner.adapter.parameters())
    assert adapter == (mode != "lora")
    assert model.conditioner.class_tokens.weight.requires_grad
    names = [n for n, p in model.transformer.named_parameters() if p.requires_grad]
    assert all("lora_" in n for n in names) == (mode != "full")


def test_left_open_all_weights_of_a_compact_start_learn(
    tiles: TileArray, encoder: ColourMeans, base_path: Path, tmp_path: Path
) -> None:
    model = load_model(base_path)
    assert way_of_tuning(model, tuning(base_path, finetune="auto")) == "full"
    assert way_of_tuning(model, tuning(base_path, finetune="lora")) == "lora"
    assert way_of_tuning(model, tuning(base_path, finetune="adapter", init="none")) == "full"
    path = train_diffusion(
        tiles, tuning(base_path, finetune="auto", steps=1), tmp_path / "run", device="cpu", encoder=encoder
    )
    moved = changed(base_path, path)
    assert any(".ff." in name for name in moved)
    assert not path.with_name("lora.safetensors").exists()


@pytest.mark.parametrize("at", [1, 4])  # before the first state is saved, when the decoder is done, and after
def test_an_interrupted_training_ends_bit_for_bit_like_one_that_was_not(
    tiles: TileArray, encoder: ColourMeans, base_path: Path, tuned_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, at: int,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, train_module, at=at)
        train_diffusion(tiles, tuning(base_path), tmp_path / "run", device="cpu", encoder=encoder)
    path = train_diffusion(tiles, tuning(base_path), tmp_path / "run", device="cpu", encoder=encoder)
    assert changed(path, tuned_path) == set()
    assert changed(path.with_name("lora.safetensors"), tuned_path.with_name("lora.safetensors")) == set()


def test_so_does_an_autoencoder(
    tiles: TileArray, autoencoder_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoencoderConfig(size=16, steps=8, batch=4, width=8, blocks=1, save_every=4, precision="fp32")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, autoencoder_module, at=6)
        train_autoencoder(tiles, config, tmp_path / "run", device="cpu")
    path = train_autoencoder(tiles, config, tmp_path / "run", device="cpu")
    assert changed(path, autoencoder_path) == set()
    assert read_card(path)["latent_space"] == read_card(autoencoder_path)["latent_space"]


def test_a_finished_folder_returns_at_once_and_other_settings_are_refused(
    tiles: TileArray, encoder: ColourMeans, base_path: Path, tuned_path: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tuned_path.parents[1], tmp_path / "run")
    before = (folder / "checkpoints/diffusion.safetensors").stat().st_mtime_ns
    path = train_diffusion(tiles, tuning(base_path), folder, device="cpu", encoder=encoder)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(RunError, match="lora_rank"):
        train_diffusion(tiles, tuning(base_path, lora_rank=3), folder, device="cpu", encoder=encoder)


def test_a_loss_that_is_no_number_stops_the_training(
    tiles: TileArray, encoder: ColourMeans, base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> torch.Tensor:
        return torch.full((4, 4, 4, 4), float("nan"), requires_grad=True)

    monkeypatch.setattr(backbone_module, "denoise", broken)
    with pytest.raises(RunError, match="loss is nan at step 0"):
        train_diffusion(tiles, tuning(base_path), tmp_path / "run", device="cpu", encoder=encoder)


@pytest.mark.parametrize("counts", [{"ONE": 3}, {"A": 1, "EMPTY": 0, "B": 2}])
def test_few_tiles_one_class_and_classes_without_tiles(
    counts: dict[str, int], encoder: ColourMeans, base_path: Path, tmp_path: Path
) -> None:
    small = make_tiles(counts)
    path = train_diffusion(small, tuning(base_path, steps=2), tmp_path / "run", device="cpu", encoder=encoder)
    model = load_model(path)
    assert model.classes == tuple(counts)
    assert [len(v) for v in model.bank.values] == list(counts.values())
    assert (tmp_path / "run/samples/final.png").is_file()


def test_an_autoencoder_can_be_trained_on_the_way_and_from_three_tiles(encoder: ColourMeans, tmp_path: Path) -> None:
    config = DiffusionConfig(**{**TINY, "steps": 1}, init="none", autoencoder="train", autoencoder_steps=1)
    path = train_diffusion(make_tiles({"ONE": 3}), config, tmp_path / "run", device="cpu", encoder=encoder)
    assert read_card(path)["latent_space"]


def test_another_encoder_gets_a_new_adapter_and_keeps_the_class_tokens(
    tiles: TileArray, base_path: Path, tmp_path: Path
) -> None:
    other = ColourMeans("other", dim=20)
    config = tuning(base_path, steps=1, lr_adapter=1e-9)
    path = train_diffusion(tiles, config, tmp_path / "run", device="cpu", encoder=other)
    model, base = load_model(path), load_model(base_path)
    assert model.encoder == {"name": "other", "dim": 20} and model.conditioner.mean.shape == (20,)
    torch.testing.assert_close(model.conditioner.class_tokens.weight, base.conditioner.class_tokens.weight)
    with pytest.raises(SettingError, match="finetune=lora"):
        train_diffusion(tiles, tuning(base_path, finetune="lora"), tmp_path / "lora", device="cpu", encoder=other)


def test_the_decoder_can_be_refined_without_leaving_the_latent_space(
    tiles: TileArray, autoencoder_path: Path, tmp_path: Path
) -> None:
    config = AutoencoderConfig(size=16, steps=2, batch=4, init=str(autoencoder_path), part="decoder", save_every=9)
    path = train_autoencoder(tiles, config, tmp_path / "run", device="cpu")
    moved = changed(path, autoencoder_path)
    assert moved and not any(k.startswith(("encoder.", "coarse_in", "shift", "scale")) for k in moved)
    assert load_autoencoder(path)[0].name == load_autoencoder(autoencoder_path)[0].name


def test_a_base_to_ship_is_half_as_large_and_needs_its_own_autoencoder(
    base_path: Path, autoencoder_path: Path, tiles: TileArray, tmp_path: Path
) -> None:
    out = export_base_without_asset(base_path, tmp_path)
    assert out.stat().st_size < 0.62 * base_path.stat().st_size
    model = load_model(out, load_autoencoder(autoencoder_path)[0])
    assert [len(v) for v in model.bank.values] == [2, 2, 2] == [len(i) for i in model.bank.ids]
    config = AutoencoderConfig(size=16, steps=1, batch=4, width=8, blocks=1, seed=9)
    stranger = train_autoencoder(tiles, config, tmp_path / "stranger", device="cpu")
    with pytest.raises(CheckpointError, match="another autoencoder"):
        load_model(out, load_autoencoder(stranger)[0])


def export_base_without_asset(checkpoint: Path, folder: Path) -> Path:
    return export_base(checkpoint, folder / "base.safetensors", bank=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": "all"}, "finetune is 'all'"),
        ({"batch": 0}, "batch is 0"),
        ({"cfg_dropout": 0.9, "class_dropout": 0.2}, "add up to at most 1"),
        ({"lora_targets": ("to_z",), "decoder": 0.5}, "to_z"),
        ({"lora_targets": ("to_q",), "finetune": "full"}, "lora_targets is .*nothing of low rank"),
        ({"lora_blocks": "1", "finetune": "adapter"}, "lora_blocks is '1'"),
        ({"lora_targets": ("to_q",), "init": "none", "autoencoder": "train"}, "nothing of low rank .*init=none"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"layers": 7}, "layers is 7, but the start"),
        ({"sampling": "odd"}, "sampling is 'odd'"),
    ],
)
def test_settings_that_cannot_be_used_are_named(
    changes: dict[str, object], message: str, tiles: TileArray, encoder: ColourMeans, base_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match=message):
        train_diffusion(tiles, tuning(base_path, **changes), tmp_path / "run", device="cpu", encoder=encoder)
    # said before the minutes that a decoder or an autoencoder takes
    assert not (tmp_path / "run/decoder").exists() and not (tmp_path / "run/autoencoder").exists()


def test_tiles_that_cannot_be_used_are_named(
    tiles: TileArray, encoder: ColourMeans, base_path: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no tile"):
        train_diffusion(tiles.subset([]), tuning(base_path), tmp_path / "a", encoder=encoder)
    with pytest.raises(DataError, match="16 px, but size is 24"):
        train_diffusion(tiles, tuning(base_path, size=24), tmp_path / "b", encoder=encoder)
    with pytest.raises(DataError, match="16 px, but size is 24"):
        train_autoencoder(tiles, AutoencoderConfig(size=24), tmp_path / "c")
    with pytest.raises(SettingError, match="part is 'decoder'"):
        train_autoencoder(tiles, AutoencoderConfig(size=16, part="decoder"), tmp_path / "d")


def test_the_learning_rate_ends_at_the_true_end() -> None:
    assert rate(0, 0.0, 10) == pytest.approx(0.1) and rate(10, 0.0, 10) == 1
    assert rate(100, 1.0, 10) == pytest.approx(0.01)
    clock = Clock(100, None)
    assert clock.progress(50) == 0.5 and clock.is_over(100) and not clock.is_over(99)
    late = Clock(10**9, seconds=100.0, schedule="clock", spent=150.0)
    assert late.progress(1) == 1 and late.is_over(1)
    assert np.isclose(Clock(10**9, 100.0, "clock", spent=50.0).progress(1), 0.5, atol=1e-3)
    assert Clock(100, 100.0, spent=99.0).progress(1) == 0.01, "a cap alone leaves the learning rate to the steps"


def test_the_clock_cuts_a_training_and_says_so(
    tiles: TileArray, encoder: ColourMeans, base_path: Path, tmp_path: Path
) -> None:
    path = train_diffusion(tiles, tuning(base_path, seconds=1e-6), tmp_path / "run", device="cpu", encoder=encoder)
    card = read_card(path)
    assert card["steps"] == 0 and card["stopped_by_clock"]
    assert card["classes"] == list(CLASSES) and card["kind"] == "diffusion"
