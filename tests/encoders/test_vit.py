"""Vision transformers: exact layouts on the meta device, numbers on small ones, and PathoDuet's tokens."""

import pytest
import torch
import torch.nn.functional as F

from histosynth import encoders
from histosynth.core.errors import CheckpointError
from histosynth.encoders import clip, pathoduet, vit
from tests.encoders.random_weights import shrink, small_file, spread

# tensors, numbers, and shapes that tell: from the model cards and published files
LAYOUTS = {
    "dinov2-s": (174, 21_628_800, {"pos_embed": (1, 257, 384), "blocks.11.ls2.gamma": (384,)}),
    "dinov2-b": (174, 85_724_928, {"pos_embed": (1, 257, 768), "blocks.11.ls2.gamma": (768,)}),
    "dinov2-l": (342, 303_227_904, {"pos_embed": (1, 257, 1024), "blocks.23.ls2.gamma": (1024,)}),
    "uni": (342, 303_350_784, {"pos_embed": (1, 197, 1024), "patch_embed.proj.weight": (1024, 3, 16, 16)}),
    "uni2-h": (
        343,
        681_394_176,
        {
            "pos_embed": (1, 256, 1536),
            "reg_token": (1, 8, 1536),
            "blocks.23.mlp.fc1.weight": (8192, 1536),
            "blocks.23.mlp.fc2.weight": (1536, 4096),
            "blocks.0.ls1.gamma": (1536,),
        },
    ),
    "virchow2": (
        455,
        631_239_424,
        {
            "pos_embed": (1, 261, 1280),
            "reg_token": (1, 4, 1280),
            "blocks.31.mlp.fc1.weight": (6832, 1280),
            "blocks.31.mlp.fc2.weight": (1280, 3416),
        },
    ),
    "h-optimus-0": (
        567,
        1_134_774_272,
        {"pos_embed": (1, 256, 1536), "reg_token": (1, 4, 1536), "blocks.39.mlp.fc1.weight": (8192, 1536)},
    ),
    "phikon-v2": (342, 303_350_784, {"pos_embed": (1, 197, 1024), "blocks.23.ls1.gamma": (1024,)}),
}


@pytest.mark.parametrize("name", vit.ARCHITECTURES)
def test_exact_names_and_shapes(name):
    with torch.device("meta"):
        tensors = vit.build(name).state_dict()
    count, numbers, shapes = LAYOUTS[name]
    assert len(tensors) == count and sum(v.numel() for v in tensors.values()) == numbers
    assert {k: tuple(tensors[k].shape) for k in shapes} == shapes


def test_clip_and_pathoduet_have_the_published_sizes():
    with torch.device("meta"):
        duet, half = pathoduet.PathoDuet().state_dict(), clip.ImageHalf().model.state_dict()
    assert sum(v.numel() for v in duet.values()) == 85_800_192
    assert tuple(duet["pretext_token"].shape) == (1, 1, 768) and tuple(duet["pos_embed"].shape) == (1, 198, 768)
    assert tuple(duet["blocks.11.attn.qkv.weight"].shape) == (2304, 768) and "fc_norm.weight" in duet
    assert sum(v.numel() for v in half.values()) == 304_293_888
    assert tuple(half["visual_projection.weight"].shape) == (768, 1024)


SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64, "patch_size": 16, "mlp_ratio": 4}


@pytest.mark.parametrize("old_names", [True, False])
def test_the_layout_of_transformers_gives_its_features(tmp_path, old_names):
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=64, patch_size=16
    )
    theirs = spread(transformers.Dinov2Model(config).eval())
    tensors = theirs.state_dict()
    if old_names:  # those of the published file
        parts = {"q": "query", "k": "key", "v": "value"}
        renames = {f"attention.{new}_proj.": f"attention.attention.{old}." for new, old in parts.items()}
        renames["attention.o_proj."] = "attention.output.dense."
        for old, new in renames.items():
            tensors = {k.replace(old, new): v for k, v in tensors.items()}
    ours = vit.build("phikon-v2", **SMALL)
    vit.place(ours, dict(tensors), tmp_path / "x", "phikon-v2")
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(pixel_values=x).last_hidden_state[:, 0]
        assert torch.allclose(vit.Pooled(ours.eval(), "class")(x), expected, atol=2e-5)


def test_virchow2_leaves_the_registers_out():
    network = vit.Pooled(vit.build("virchow2", **{**SMALL, "mlp_ratio": 2}).eval(), "class and patches")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = network.transformer.forward_features(x)
        assert tokens.shape == (1, 1 + 4 + 16, 48)
        assert torch.allclose(network(x), torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1), atol=1e-6)


def test_positions_for_518_pixels_are_brought_to_224(monkeypatch, tmp_path):
    shrink(monkeypatch)
    tensors = spread(vit.build("dinov2-s")).state_dict()
    # a plane over the grid keeps its slope, whatever the number of points
    rows = torch.linspace(0.5 / 37, 1 - 0.5 / 37, 37)
    plane = rows.view(37, 1, 1).expand(37, 37, 384).reshape(1, 1369, 384)
    path = tmp_path / "dinov2_vits14_pretrain.pth"
    positions = torch.cat([torch.full((1, 1, 384), 7.0), plane], 1)
    torch.save(tensors | {"pos_embed": positions, "mask_token": plane[0, 0]}, path)
    encoder = encoders.load("dinov2-s", "cpu", weights=path)
    found = encoder.network.transformer.pos_embed.view(257, 384)
    assert (found[0] == 7).all()
    middle = found[1:, 0].view(16, 16)[2:-2, 5]
    assert float((middle[-1] - middle[0]) / 11) == pytest.approx(1 / 16.1, abs=2e-4)


@pytest.mark.parametrize(
    "name, other, said",
    [
        ("uni", "dinov2-l", "another shape (pos_embed is (1, 257, 1024) instead of (1, 197, 1024)"),
        ("uni2-h", "h-optimus-0", "It seems to be H-optimus-0"),
        ("h-optimus-0", "uni2-h", "It seems to be UNI2-h"),
        ("virchow2", "pathoduet", "It seems to be PathoDuet"),
        ("pathoduet", "dinov2-b", "has no pretext_token"),
        ("clip", "dinov2-b", "tensors are missing (vision_model."),
    ],
)
def test_the_wrong_file_is_named(name, other, said, monkeypatch, tmp_path):
    shrink(monkeypatch)
    path = small_file(other, tmp_path)
    with pytest.raises(CheckpointError) as error:
        encoders.load(name, "cpu", weights=path)
    assert said in str(error.value) and str(path) in str(error.value)


class TestPathoDuet:
    def network(self):
        torch.manual_seed(0)
        return spread(pathoduet.PathoDuet(size=32, patch=16, dim=24, depth=2, heads=2)).eval()

    def by_hand(self, network, x, pretext=True):
        """The forward pass from the paper's formulas, without timm."""
        p = dict(network.named_parameters())
        patches = F.conv2d(x, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=16).flatten(2).mT
        ones = torch.ones(len(x), 1, 1)
        first = [p["pretext_token"] * ones] if pretext else []
        positions = p["pos_embed"] if pretext else p["pos_embed"][:, 1:]
        t = torch.cat([*first, p["cls_token"] * ones, patches], 1) + positions
        for i in range(2):
            b = {k.removeprefix(f"blocks.{i}."): v for k, v in p.items() if k.startswith(f"blocks.{i}.")}
            h = F.layer_norm(t, (24,), b["norm1.weight"], b["norm1.bias"], 1e-6)
            q, k, v = F.linear(h, b["attn.qkv.weight"], b["attn.qkv.bias"]).view(len(x), -1, 3, 2, 12).unbind(2)
            weights = torch.einsum("nqhd,nkhd->nhqk", q, k).div(12**0.5).softmax(-1)
            h = torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2)
            t = t + F.linear(h, b["attn.proj.weight"], b["attn.proj.bias"])
            h = F.layer_norm(t, (24,), b["norm2.weight"], b["norm2.bias"], 1e-6)
            h = F.gelu(F.linear(h, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
            t = t + F.linear(h, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
        pooled = t[:, 2 if pretext else 1 :].mean(1)
        return F.layer_norm(pooled, (24,), p["fc_norm.weight"], p["fc_norm.bias"], 1e-6)

    def test_against_the_formulas(self):
        network, x = self.network(), torch.rand(3, 3, 32, 32)
        with torch.no_grad():
            assert torch.allclose(network(x), self.by_hand(network, x), atol=1e-5)
            assert not torch.allclose(network(x), self.by_hand(network, x, pretext=False), atol=1e-2)

    def test_its_pixels_are_in_0_1_and_nothing_else(self):
        grey = torch.tensor([0.0, 127.5, 255.0]).view(1, 3, 1, 1).expand(1, 3, 224, 224)
        assert pathoduet.DOOR(grey)[0, :, 0, 0].tolist() == [0.0, 0.5, 1.0]

    def test_a_perceptual_loss_has_gradients(self, monkeypatch, tmp_path):
        shrink(monkeypatch)
        encoder = encoders.load("pathoduet", "cpu", weights=small_file("pathoduet", tmp_path))
        fake = torch.zeros(1, 3, 64, 64, requires_grad=True)
        real = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        (encoder.differentiable(fake) - encoder.differentiable(real / 127.5 - 1)).square().mean().backward()
        assert (fake.grad != 0).float().mean() > 0.99
        assert not any(p.requires_grad for p in encoder.network.parameters())

    def test_washed_out_tiles_have_other_features(self, monkeypatch, tmp_path):
        """The mistake of scaling twice: [0, 1] taken for [-1, 1] lands in [0.5, 1]."""
        shrink(monkeypatch)
        encoder = encoders.load("pathoduet", "cpu", weights=small_file("pathoduet", tmp_path))
        encoder.micro_batch = 1
        tiles = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        right = encoder.encode(tiles)
        assert torch.allclose(encoder.differentiable(tiles / 127.5 - 1), right, atol=1e-4)
        assert (encoder.differentiable(tiles / 255) - right).abs().max() > 1e-2
