"""PixCell read from folders and files that diffusers wrote, compared with diffusers' own networks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.diffusion.pixcell import Memory, PixCell, PixCellShape, PixCellTransformer
from histosynth.diffusion.pixcell.files import find_weights
from histosynth.diffusion.pixcell.transformer import TokenPositions, grid_positions
from histosynth.diffusion.pixcell.vae import SD35, build_vae
from tests.diffusion.pixcell_folder import STEM, TINY_VAE, edit, original_names, reference, uncond, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pixcell"))


@pytest.fixture(scope="module")
def model(folder: Path) -> PixCell:
    return PixCell.load(folder, device="cpu")


def inputs(model: PixCell, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(7)
    noisy = torch.randn(n, 16, model.latent_edge, model.latent_edge, generator=draw)
    return noisy, torch.tensor([3, 500, 999])[:n], torch.randn(n, model.tokens, model.dim, generator=draw)


def published_names(tokens: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of PixCell's tensors, written down from the published checkpoints."""
    w, h = 1152, 4608
    found: dict[str, tuple[int, ...]] = {
        "scale_shift_table": (2, w), "pos_embed.proj.weight": (w, 16, 2, 2), "pos_embed.proj.bias": (w,),
        "caption_projection.uncond_embedding": (tokens, 1536),
    }  # fmt: skip

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (rows, columns), (rows,)

    linear("adaln_single.emb.timestep_embedder.linear_1", w, 256)
    linear("adaln_single.emb.timestep_embedder.linear_2", w, w)
    linear("adaln_single.linear", 6 * w, w)
    linear("caption_projection.linear_1", w, 1536)
    linear("caption_projection.linear_2", w, w)
    linear("proj_out", 128, w)
    for i in range(28):
        block = f"transformer_blocks.{i}"
        found[f"{block}.scale_shift_table"] = (6, w)
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                linear(f"{block}.{attention}.{part}", w, w)
        linear(f"{block}.ff.net.0.proj", h, w)
        linear(f"{block}.ff.net.2", w, h)
    if tokens > 1:
        found["y_pos_embed.y_pos_embed"] = (1, tokens, 1536)
    return found


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [(PixCellShape(), 1), (PixCellShape(latent=128, tokens=16, interpolation_scale=2.0), 16)],
    ids=["256", "1024"],
)
def test_the_full_architecture_has_the_published_names_and_shapes(shape: PixCellShape, tokens: int) -> None:
    with torch.device("meta"):
        model = PixCellTransformer(shape)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == published_names(tokens)
    assert sum(p.numel() for p in model.parameters()) == 608_072_960
    assert len(list(model.parameters())) == 603
    assert shape.size == (256 if tokens == 1 else 1024)


def test_the_full_autoencoder_has_the_published_size() -> None:
    with torch.device("meta"):
        vae = build_vae(SD35)
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683
    assert len(vae.state_dict()) == 244
    assert vae.quant_conv is None and vae.post_quant_conv is None


def test_the_forward_pass_is_that_of_diffusers(model: PixCell) -> None:
    noisy, levels, context = inputs(model)
    with torch.no_grad():
        ours = model.denoise(noisy, levels, model.context(context))
        theirs = reference()(noisy, encoder_hidden_states=context, timestep=levels, return_dict=False,
                             added_cond_kwargs={"resolution": None, "aspect_ratio": None})[0]  # fmt: skip
    assert theirs.shape[1] == 32 and torch.equal(ours, theirs[:, :16])
    assert model.size == 32 and model.latent_edge == 4 and (model.tokens, model.dim) == (1, 12)
    assert not any(p.requires_grad for p in model.transformer.parameters())


def test_not_told_is_what_the_checkpoint_says(model: PixCell) -> None:
    assert torch.equal(model.unconditional(2), uncond()[None].expand(2, -1, -1))
    assert model.uncond.abs().max() > 0.1


def test_a_folder_of_a_plain_pixart_is_taken_with_the_extra_tensor_alone(tmp_path: Path) -> None:
    """What diffusers' save_pretrained writes: another _class_name, and no caption_num_tokens."""
    model = PixCell.load(write_folder(tmp_path, published=False, vae=False) / "transformer", device="cpu")
    assert model.tokens == 1 and torch.equal(model.uncond, uncond())


def test_positions_of_256_px_lie_two_apart() -> None:
    """interpolation_scale 0.5: coordinates 0, 2, ..., 30; diffusers' default for that size would be 1."""
    shape = PixCellShape()
    theirs = reference(sample_size=32, num_layers=1, num_attention_heads=16, attention_head_dim=72).pos_embed.pos_embed
    torch.testing.assert_close(grid_positions(shape), theirs, atol=1e-6, rtol=0)
    # channel 0 is the sine of the column itself
    columns = grid_positions(shape)[0, :16, 0]
    torch.testing.assert_close(columns, torch.sin(torch.arange(0, 32, 2).float()), atol=1e-6, rtol=0)


def test_token_positions_of_1024_px_are_those_of_the_parts() -> None:
    shape = PixCellShape(latent=128, tokens=16, interpolation_scale=2.0)
    positions = TokenPositions(shape).y_pos_embed
    assert positions.shape == (1, 16, 1536)
    coordinates = torch.tensor([4.0, 12, 20, 28])
    torch.testing.assert_close(positions[0, :4, 0], coordinates.sin(), atol=1e-6, rtol=0)  # columns, row by row
    torch.testing.assert_close(positions[0, ::4, 768], coordinates.sin(), atol=1e-6, rtol=0)  # rows
    slow = 10_000 ** (-383 / 384)
    torch.testing.assert_close(positions[0, :4, 767], (coordinates * slow).cos(), atol=1e-6, rtol=0)


def test_several_tokens_get_their_positions_before_they_are_projected(tmp_path: Path) -> None:
    model = PixCell.load(write_folder(tmp_path, tokens=4), device="cpu")
    noisy, levels, context = inputs(model)
    edge = 2
    positions = torch.empty(4, 12)
    for row in range(edge):  # the formula once more, number by number
        for column in range(edge):
            for c in range(12):
                place = (column if c < 6 else row) * (4 / edge / 2) + 4 // 4
                angle = place * 10_000 ** (-((c % 6) % 3) / 3)
                positions[row * edge + column, c] = math.sin(angle) if c % 6 < 3 else math.cos(angle)
    with torch.no_grad():
        ours = model.denoise(noisy, levels, model.context(context))
        theirs = reference(4)(noisy, encoder_hidden_states=context + positions, timestep=levels, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs[:, :16], atol=1e-5, rtol=1e-5)
    assert model.unconditional(1).shape == (1, 4, 12)


def test_stored_token_positions_are_used(tmp_path: Path) -> None:
    from tests.diffusion.pixcell_folder import rewrite

    stored = torch.randn(1, 4, 12)
    rewrite(write_folder(tmp_path, tokens=4) / "transformer" / STEM, {"y_pos_embed.y_pos_embed": stored})
    assert torch.equal(PixCell.load(tmp_path, device="cpu").transformer.y_pos_embed.y_pos_embed, stored)


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_original_names_give_the_same_network(folder: Path, model: PixCell, tmp_path: Path, wrapped: bool) -> None:
    tensors = original_names(load_file(folder / "transformer" / STEM), reference())
    path = tmp_path / "pixcell_256.ckpt"
    torch.save({"state_dict": tensors, "epoch": 3} if wrapped else tensors, path)
    (tmp_path / "config.json").write_text((folder / "transformer" / "config.json").read_text())
    other = PixCell.load(path, vae=folder / "vae", device="cpu")
    noisy, levels, context = inputs(model)
    with torch.no_grad():
        assert torch.equal(other.denoise(noisy, levels, context), model.denoise(noisy, levels, context))
    assert torch.equal(other.uncond, model.uncond)
    assert PixCell.load(tmp_path, device="cpu").files == (path,)  # found in its folder, too


def test_an_original_file_alone_tells_its_shape(tmp_path: Path) -> None:
    """Heads of 72 channels and the stored positions; nothing but the file."""
    network = reference(num_attention_heads=1, attention_head_dim=72, cross_attention_dim=72, sample_size=6)
    tensors = {k: v.clone() for k, v in network.state_dict().items()} | {
        "caption_projection.uncond_embedding": uncond()
    }
    path = tmp_path / "small.pth"
    torch.save({"state_dict": original_names(tensors, network)}, path)
    model = PixCell.load(path, device="cpu")
    assert (model.shape.heads, model.latent_edge, model.vae) == (1, 6, None)
    noisy, levels, context = inputs(model)
    with torch.no_grad():
        theirs = network(noisy, encoder_hidden_states=context, timestep=levels, return_dict=False)[0]
        torch.testing.assert_close(model.denoise(noisy, levels, context), theirs[:, :16])


def test_shards_are_read_as_one(folder: Path, model: PixCell, tmp_path: Path) -> None:
    write_folder(tmp_path)
    part = tmp_path / "transformer"
    (part / STEM).unlink()
    loaded = PixCellTransformer(model.shape)
    loaded.load_state_dict(model.transformer.state_dict())
    loaded.save_pretrained(part, max_shard_size="20KB")
    assert len(list(part.glob("*.safetensors"))) > 2 and not (part / STEM).exists()
    edit(part / "config.json", _class_name="PixCellTransformer2DModel")
    other = PixCell.load(tmp_path, device="cpu")
    noisy, levels, context = inputs(model)
    with torch.no_grad():
        assert torch.equal(other.denoise(noisy, levels, context), model.denoise(noisy, levels, context))


def test_latents_are_shifted_and_scaled(model: PixCell) -> None:
    theirs = AutoencoderKL.from_pretrained(model.files[0].parents[1] / "vae").eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = model.encode(images)
        posterior = theirs.encode(images).latent_dist
        torch.testing.assert_close(latents, (posterior.mean - 0.0609) * 1.5305, atol=1e-6, rtol=1e-5)
        decoded = model.decode(latents)
        torch.testing.assert_close(decoded, theirs.decode(posterior.mean).sample, atol=1e-5, rtol=1e-4)
        drawn = model.encode(images, seeds=[1, 2])
        assert torch.equal(drawn[1:], model.encode(images[1:], seeds=[2]))
        spread = (drawn - latents) / (posterior.std * 1.5305)
    assert latents.shape == (2, 16, 4, 4) and decoded.shape == images.shape
    assert 0.8 < spread.std() < 1.2


def test_an_autoencoder_without_scale_gets_pixcells_and_another_space_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    edit(tmp_path / "vae" / "config.json", scaling_factor=0.18215, shift_factor=None)
    vae = PixCell.load(tmp_path, device="cpu").require_vae()
    assert (vae.config.scaling_factor, vae.config.shift_factor) == (1.5305, 0.0609)
    edit(tmp_path / "vae" / "config.json", scaling_factor=0.3611, shift_factor=0.1159)
    with pytest.raises(CheckpointError, match="scaling_factor 0.3611"):
        PixCell.load(tmp_path, device="cpu")


def test_without_an_autoencoder_the_transformer_still_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: PixCell
) -> None:
    monkeypatch.setenv("HISTOSYNTH_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    alone = PixCell.load(write_folder(tmp_path / "p", vae=False), device="cpu")
    noisy, levels, context = inputs(model)
    with torch.no_grad():
        assert torch.equal(alone.denoise(noisy, levels, context), model.denoise(noisy, levels, context))
    with pytest.raises(CheckpointError, match="sd35-vae.*hf download stabilityai.*--vae") as caught:
        alone.decode(noisy)
    assert "HISTOSYNTH_WEIGHTS_SD35_VAE" in str(caught.value)
    # and from where the card says
    AutoencoderKL(**TINY_VAE).save_pretrained(tmp_path / "elsewhere")
    monkeypatch.setenv("HISTOSYNTH_WEIGHTS_SD35_VAE", str(tmp_path / "elsewhere"))
    assert PixCell.load(tmp_path / "p", device="cpu").vae is not None


def test_pixcell_is_found_by_its_card(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTOSYNTH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="CC BY-NC-ND 4.0.*hf download StonyBrook-CVLab/PixCell-256.*--weights"):
        PixCell.load(device="cpu")
    (tmp_path / "pixcell-256").symlink_to(folder)
    assert PixCell.load(device="cpu").card["licence"] == "CC BY-NC-ND 4.0"
    monkeypatch.setenv("HISTOSYNTH_WEIGHTS_PIXCELL_256", str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="gone, where they are not"):
        PixCell.load(device="cpu")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_near(folder: Path, model: PixCell, dtype: str) -> None:
    half = PixCell.load(folder, device="cpu", dtype=dtype)
    noisy, levels, context = inputs(model)
    with torch.no_grad():
        one, other = half.denoise(noisy, levels, half.context(context)), model.denoise(noisy, levels, context)
    assert one.dtype == torch.float32 and one.shape == other.shape
    assert (one - other).norm() < 0.05 * other.norm()
    assert half.require_vae().dtype == (torch.float32 if dtype == "fp16" else torch.bfloat16)  # force_upcast
    assert half.memory_statement().startswith("pixcell-256: transformer 0.00 GB (")


def test_saving_memory_changes_rounding_alone(folder: Path, model: PixCell) -> None:
    thrifty = PixCell.load(folder, device="cpu", memory=Memory(vae_tiling=True, attention_slicing=True))
    noisy, levels, context = inputs(model)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(thrifty.denoise(noisy, levels, context), model.denoise(noisy, levels, context),
                                   atol=1e-5, rtol=1e-4)  # fmt: skip
        torch.testing.assert_close(thrifty.encode(images), model.encode(images))
    names = {type(p).__name__ for p in thrifty.transformer.attn_processors.values()}
    assert names == {"SlicedAttnProcessor"}
    thrifty.save_memory(Memory())
    assert {type(p).__name__ for p in thrifty.transformer.attn_processors.values()} == {"AttnProcessor2_0"}


def test_tiling_decodes_large_latents_in_parts(folder: Path) -> None:
    model = PixCell.load(folder, device="cpu", memory=Memory(vae_tiling=True))
    latents = torch.randn(1, 16, 66, 66)
    with torch.no_grad():
        tiled = model.decode(latents)
        whole = model.save_memory(Memory()).decode(latents)
    assert tiled.shape == whole.shape == (1, 3, 528, 528)
    assert not torch.equal(tiled, whole)


def test_peft_wraps_the_transformer(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = PixCell.load(folder, device="cpu")
    noisy, levels, context = inputs(model)
    with torch.no_grad():
        before = model.denoise(noisy, levels, model.context(context))
    model.transformer = get_peft_model(model.transformer, LoraConfig(r=2, target_modules=["attn2.to_q", "attn2.to_v"]))
    context = context.requires_grad_()
    after = model.denoise(noisy, levels, model.context(context))
    torch.testing.assert_close(after, before)  # B starts at zero
    after.square().mean().backward()
    moved = [n for n, p in model.transformer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert moved and all("lora_B" in n for n in moved)
    assert context.grad is not None and context.grad.abs().max() > 0


def test_wrong_input_is_named(model: PixCell) -> None:
    with pytest.raises(DataError, match=r"shape \(2, 1, 11\).*\[N, 1, 12\]"):
        model.context(torch.zeros(2, 1, 11))
    with pytest.raises(DataError, match="int64"):
        model.context(torch.zeros(2, 1, 12, dtype=torch.long))
    with pytest.raises(DataError, match="torch.uint8"):
        model.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(DataError, match="30 x 32 px"):
        model.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(DataError, match="2 images came with 1 seeds"):
        model.encode(torch.zeros(2, 3, 32, 32), seeds=[1])
    with pytest.raises(SettingError, match="dtype is 'fp8'"):
        PixCell.load(model.files[0], device="cpu", dtype="fp8")
    assert model.decode(torch.empty(0, 16, 4, 4)).shape == (0, 3, 32, 32)


def test_a_file_of_weights_can_be_given_itself(folder: Path) -> None:
    weights = find_weights(folder / "transformer" / STEM, "transformer")
    assert weights.folder == folder and weights.config == folder / "transformer" / "config.json"
    assert PixCell.load(folder / "transformer" / STEM, device="cpu").vae is not None
    tensors = load_file(folder / "transformer" / STEM)
    alone = folder.parent / "alone.safetensors"
    save_file(tensors, alone)
    with pytest.raises(CheckpointError, match="16 wide.*number of attention heads.*config.json"):
        PixCell.load(alone, device="cpu")
