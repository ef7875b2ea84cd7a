"""Checkpoints that are damaged or mean harm: each is refused with its name, and nothing of it runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from histosynth.core.errors import CheckpointError
from histosynth.diffusion.pixcell import PixCell
from histosynth.diffusion.pixcell.files import resolve
from histosynth.diffusion.pixcell.shape import measured
from tests.diffusion.pixcell_folder import STEM, edit, rewrite, write_folder


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "pixcell")
    return tmp_path / "pixcell"


def refused(folder: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        PixCell.load(folder, device="cpu")


@pytest.mark.parametrize("name", ["pixcell_256.ckpt", "transformer/diffusion_pytorch_model.bin"])
def test_a_pickle_that_runs_a_command_is_refused_unrun(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "transformer" / STEM).unlink()
    torch.save({"state_dict": {"x": torch.zeros(2), "y": Bomb(tmp_path / "ran")}}, folder / name)
    refused(folder, f"{Path(name).name} is not a plain file of weights.*runs code")
    assert not (tmp_path / "ran").exists()


def test_the_autoencoder_is_read_as_carefully(folder: Path, tmp_path: Path) -> None:
    (folder / "vae" / STEM).unlink()
    torch.save({"x": Bomb(tmp_path / "ran")}, folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is not a plain file of weights"):
        PixCell.load(folder, vae=folder / "vae", device="cpu")
    assert not (tmp_path / "ran").exists()


def test_code_beside_the_weights_is_not_run(folder: Path, tmp_path: Path) -> None:
    """The published folders hold a module of code; here it would leave a mark."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    for place in ("transformer/pixcell_transformer_2d.py", "pipeline.py", "transformer/__init__.py"):
        (folder / place).write_text(code)
    kinds = {
        "_class_name": ["pipeline", "Evil"],
        "transformer": ["pixcell_transformer_2d", "PixCellTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(kinds))
    PixCell.load(folder, device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": ["evil", "Model"]}, r"_class_name \['evil', 'Model'\]; no code"),
        ({"_class_name": "UNet2DConditionModel"}, "_class_name 'UNet2DConditionModel'"),
        ({"auto_map": {"AutoModel": "evil--code.Model"}}, "'auto_map', which asks for code"),
        ({"custom_pipeline": "evil/pipe"}, "'custom_pipeline', which is unknown"),
        ({"num_layers": 10**9}, "num_layers is 1000000000, but the weights have 2"),
        ({"num_layers": -1}, "num_layers -1"),
        ({"num_layers": "2"}, "num_layers '2'"),
        ({"num_layers": True}, "num_layers True"),
        ({"attention_head_dim": 10**6}, "cross_attention_dim 16 beside 2 heads of 1000000"),
        ({"caption_num_tokens": 4}, "caption_num_tokens is 4, but the weights have 1"),
        ({"sample_size": 10**6}, "sample_size 1000000"),
        ({"sample_size": 5}, "sample_size 5 with patches of 2"),
        ({"caption_channels": None}, "caption_channels None"),
        ({"interpolation_scale": 0}, "interpolation_scale 0"),
        ({"interpolation_scale": float("nan")}, "interpolation_scale nan"),
        ({"norm_eps": "0"}, "norm_eps '0'"),
        ({"activation_fn": "relu"}, "activation_fn 'relu'"),
        ({"use_additional_conditions": True}, "use_additional_conditions True"),
        ({"cross_attention_dim": 32}, "cross_attention_dim 32"),
    ],
)
def test_settings_that_pixcell_cannot_have_are_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit(folder / "transformer" / "config.json", **changes)
    refused(folder, f"transformer/config.json .*{words}")


@pytest.mark.parametrize("content", ["{", "[]", '"text"', ""])
def test_a_config_that_is_no_object_is_refused(folder: Path, content: str) -> None:
    (folder / "transformer" / "config.json").write_text(content)
    refused(folder, "config.json")


def test_zeros_do_not_stand_in_for_not_told(folder: Path) -> None:
    rewrite(folder / "transformer" / STEM, {}, drop=("caption_projection.uncond_embedding",))
    refused(folder, "no tensor caption_projection.uncond_embedding.*zeros would not do")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("transformer_blocks.1.attn2.to_q.weight", torch.zeros(16, 8), "1 have another shape .*attn2.to_q.weight"),
        ("proj_out.bias", None, "1 of 58 tensors are missing .proj_out.bias"),
        ("surprise", torch.zeros(2), "1 are unknown .surprise"),
        ("proj_out.bias", torch.full((128,), float("nan")), "proj_out.bias .* no finite numbers"),
        ("proj_out.bias", torch.zeros(128, dtype=torch.long), "proj_out.bias .* no finite numbers"),
        ("pos_embed.proj.weight", torch.zeros(16), r"pos_embed.proj.weight .* \(16,\)"),
        ("pos_embed.pos_embed", torch.zeros(1, 9, 16), r"pos_embed.pos_embed .*\(1, 9, 16\) instead of \(1, 4, 16\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, name: str, value: torch.Tensor | None, words: str) -> None:
    extra = {} if value is None else {name: value}
    rewrite(folder / "transformer" / STEM, extra, drop=() if extra else (name,))
    refused(folder, words)


def test_a_cut_file_is_refused(folder: Path) -> None:
    path = folder / "transformer" / STEM
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "cannot be read")


def shard(folder: Path, names: dict[str, str]) -> Path:
    """Replace the file of weights by two shards; `names` changes what the index says."""
    path = folder / "transformer" / STEM
    tensors = load_file(path)
    path.unlink()
    listing = {}
    for i, part in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({k: tensors[k] for k in part}, path.with_name(file))
        listing |= dict.fromkeys(part, file)
    index = path.with_name(f"{STEM}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": listing | names}))
    return index


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/part.safetensors",
        "..\\x.safetensors",
        "part.bin",
        "",
        ".hidden.safetensors",
    ],
)
def test_shards_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    save_file({"stolen": torch.zeros(2)}, folder / "secret.safetensors")
    shard(folder, {"stolen": name})
    refused(folder, "names the shard .*, which is no safetensors file of the same folder")


def test_shards_that_lack_something_are_refused(folder: Path) -> None:
    index = shard(folder, {"more": "diffusion_pytorch_model-00001-of-00002.safetensors"})
    refused(folder, "names the tensor more, which no shard has")
    edit(index, weight_map={"more": "gone.safetensors"})
    refused(folder, "gone.safetensors, which is missing")
    for broken in ({}, [], 3):
        edit(index, weight_map=broken)
        refused(folder, "has no weight_map")
    edit(index, weight_map={"a": 3})
    refused(folder, "names the shard 3")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"_class_name": "Evil"}, "_class_name 'Evil'; no code"),
        ({"auto_map": {"x": "y"}}, "'auto_map'"),
        ({"down_block_types": ["os.system"] * 4}, "down_block_types"),
        ({"block_out_channels": [10**9]}, "block_out_channels"),
        ({"block_out_channels": "many"}, "block_out_channels 'many'"),
        ({"layers_per_block": 10**6}, "layers_per_block 1000000"),
        ({"latent_channels": 4}, "4 latent channels, the transformer 16"),
        ({"use_quant_conv": True}, "quant_conv"),
    ],
)
def test_an_autoencoder_of_another_kind_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit(folder / "vae" / "config.json", **changes)
    refused(folder, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
        ({"prediction_type": "sample"}, "prediction_type 'sample'"),
        ({"num_train_timesteps": 50}, "50 levels"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"beta_end": "0.02"}, "betas from 0.0001 to '0.02'"),
        ({"beta_end": 1.5}, "betas go from 0.0001 to 1.5"),
    ],
)
def test_a_noising_process_that_is_not_known_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    refused(folder, words)


def test_nothing_where_a_checkpoint_should_be(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none does not exist.*OWNER/NAME")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no weights of a transformer")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "is no file of weights")
    (tmp_path / "empty" / "x.pth").write_bytes(b"not weights")
    refused(tmp_path / "empty" / "x.pth", "x.pth")


def test_another_network_is_named(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", "no tensor pos_embed.proj.weight")
    with pytest.raises(CheckpointError, match="shape"):
        measured({"pos_embed.proj.weight": torch.zeros(2)}, tmp_path)


def test_a_repository_is_asked_for_weights_and_never_for_code(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    model = PixCell.load("StonyBrook-CVLab/PixCell-256", token="read-me", device="cpu")
    assert model.vae is not None and model.card["source"] == "StonyBrook-CVLab/PixCell-256"
    assert asked["name"] == "StonyBrook-CVLab/PixCell-256" and asked["token"] == "read-me"
    assert "trust_remote_code" not in asked
    assert all(p.endswith((".json", ".safetensors")) for p in asked["allow_patterns"])


def test_a_repository_that_cannot_be_had_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(name: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="no folder some/model, and the repository .* no network"):
        resolve("some/model", ("transformer",), None)
    # a path is never taken for a repository
    assert resolve("/some/model", ("transformer",), None) == Path("/some/model")
    assert resolve(Path("some/model"), ("transformer",), None) == Path("some/model")
