"""The pathology head: gradients reach the generator through the encoder, judges, mixing, licence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from histosynth import encoders
from histosynth.core.errors import DataError, SettingError
from histosynth.core.types import EncoderCard
from histosynth.encoders import pathoduet, tiny, vit
from histosynth.encoders.door import IMAGENET, Door
from histosynth.encoders.frozen import FrozenEncoder
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.head import PathologyHead, encoder_card, licence_of
from histosynth.gan.judges import Judge, Mixing, SpectralConv
from histosynth.gan.losses import discriminator_loss, generator_loss
from tests.encoders.random_weights import spread

SMALL = {"width": 8, "widest": 16}


@pytest.fixture(scope="module")
def tissue() -> tiny.TissueTiny:
    """tissue-tiny with random weights: its contract does not rest on what it has learned."""
    torch.manual_seed(0)
    return tiny.TissueTiny(spread(tiny.TinyNetwork()), "random")


def tiles(n: int = 3, size: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def transformer(name: str) -> FrozenEncoder:
    """One narrow block of the real architecture with random weights, behind the real door's mean and deviation."""
    if name == "pathoduet":
        network: nn.Module = pathoduet.PathoDuet(32, 16, 48, 1, 4)
        door = Door(32, "bilinear", (0.0,) * 3, (255.0,) * 3)
    else:
        network = vit.build(name, depth=1, mlp_ratio=0.25, embed_dim=48, num_heads=4, img_size=28)
        door = Door(28, "bicubic", *IMAGENET)
    card = EncoderCard(name, 48, door.size, "CC BY-NC-ND 4.0", commercial=False)
    return FrozenEncoder(card, spread(network), door, "random")


def reaches_the_generator(head: PathologyHead, size: int) -> None:
    """Every weight of the generator has a gradient, and the loss changes along it as it says."""
    torch.manual_seed(1)
    shape = Shape(size=size, classes=3, channel_base=256, channel_max=16, z_dim=8, w_dim=12)
    generator = Generator(shape)
    z, labels = torch.randn(4, shape.z_dim), torch.tensor([0, 1, 2, 0])
    head.requires_grad_(False)

    def loss() -> Tensor:
        return generator_loss(head(generator(z, labels, None), labels))

    loss().backward()
    learned = {n: p for n, p in generator.named_parameters() if "noise" not in n}  # there is no noise here
    grads = {n: p.grad for n, p in learned.items()}
    assert all(g is not None and g.abs().max() > 0 for g in grads.values())

    length = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    step = 3e-4 / float(length)  # small, since rectifiers have corners
    ends = []
    with torch.no_grad():
        for sign in (1, -2):  # forwards from the start, then back to the other side
            for n, p in learned.items():
                p += sign * step * grads[n] / length
            ends.append(float(loss()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(length), rel=0.03)


@pytest.mark.parametrize("mode", ["maps", "features"])
def test_gradients_reach_the_generator_through_tissue_tiny(tissue, mode) -> None:
    torch.manual_seed(0)
    reaches_the_generator(PathologyHead(tissue, 3, mode, **SMALL), 32)


@pytest.mark.parametrize("name", ["pathoduet", "uni2-h"])
def test_gradients_reach_the_generator_through_transformers(name) -> None:
    torch.manual_seed(0)
    head = PathologyHead(transformer(name), 3, hidden=16)
    assert head.mode == "features"
    reaches_the_generator(head, 32)


def test_the_encoder_stays_frozen_and_outside(tissue) -> None:
    head = PathologyHead(tissue, 3, **SMALL)
    before = copy.deepcopy(tissue.network.state_dict())
    adam = torch.optim.Adam(head.parameters(), lr=0.01)
    head(tiles(), torch.tensor([0, 1, 2])).square().mean().backward()
    adam.step()
    assert all(torch.equal(v, before[k]) for k, v in tissue.network.state_dict().items())
    assert all(p.grad is None for p in tissue.network.parameters())
    ours = sum(p.numel() for p in head.judges.parameters())
    assert sum(p.numel() for p in head.parameters()) == ours
    assert not any("network" in k or "encoder" in k for k in head.state_dict())


class Blind(nn.Module):
    """An encoder as the prototypes had it: `no_grad` around the features. It is also a module."""

    card = EncoderCard("blind", 4, 32, "MIT")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def encode(self, images: Tensor) -> Tensor:
        return self.differentiable(images.float() / 127.5 - 1)

    @torch.no_grad()
    def differentiable(self, images: Tensor) -> Tensor:
        return self.layer(images).mean((2, 3))


class Seeing(Blind):
    def differentiable(self, images: Tensor) -> Tensor:
        return self.layer(images).mean((2, 3))


def test_an_encoder_that_cuts_the_gradient_is_refused() -> None:
    with pytest.raises(SettingError, match="blind.*no gradient"):
        PathologyHead(Blind(), 3)
    head = PathologyHead(Seeing(), 3, hidden=4)
    assert not any(k.split(".")[0] == "layer" or "encoder" in k for k in head.state_dict())
    with pytest.raises(SettingError, match="no feature maps"):
        PathologyHead(Seeing(), 3, "maps")
    with pytest.raises(SettingError, match="mode"):
        PathologyHead(Seeing(), 3, "nonsense")


@pytest.mark.parametrize("size", [32, 64, 97, 224])
def test_any_tile_size_gives_the_same_logits_a_map(tissue, size) -> None:
    head = PathologyHead(tissue, 3, **SMALL)
    x = tiles(2, size).requires_grad_(True)
    logits = head(x, torch.tensor([0, 1]))
    assert logits.shape == (2, 4 * 16) and logits.dtype == torch.float32
    logits.sum().backward()
    assert (x.grad.abs().sum((1, 2, 3)) > 0).all()
    with pytest.raises(DataError, match="2 tiles and 3 labels"):
        head(x, torch.tensor([0, 1, 2]))


def test_any_list_of_maps_will_do() -> None:
    class Two:
        card = EncoderCard("two", 0, 0, "MIT")

        def encode(self, images: Tensor) -> Tensor:
            return images.float().mean((2, 3))

        differentiable = encode

        def maps(self, images: Tensor) -> list[Tensor]:
            pooled = nn.functional.adaptive_avg_pool2d(images, (14, 10))
            return [images.repeat(1, 3, 1, 1), pooled, pooled.mean((2, 3), keepdim=True)]

    head = PathologyHead(Two(), 2, **SMALL)
    assert head(tiles(2, 48), torch.tensor([0, 1])).shape == (2, 48)
    assert head(tiles(2, 200), torch.tensor([0, 1])).shape == (2, 48)


def test_a_tile_is_judged_alone(tissue) -> None:
    torch.manual_seed(0)
    head = PathologyHead(tissue, 3, **SMALL).eval()
    x, labels = tiles(5), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(head(x, labels)[2:3], head(x[2:3], labels[2:3]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tissue-tiny", "uni2-h"])
def test_bfloat16_is_close_to_float32(tissue, name) -> None:
    torch.manual_seed(0)
    head = PathologyHead(tissue if name == "tissue-tiny" else transformer(name), 3, **SMALL).eval()
    x, labels = tiles(8), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    exact, rough = head(x, labels), head(x, labels, torch.bfloat16)
    assert rough.dtype == torch.float32
    assert (exact - rough).abs().mean() < 0.05 * exact.std()


def test_a_young_generator_far_outside_the_range_is_judged_too() -> None:
    head = PathologyHead(transformer("pathoduet"), 3, hidden=4)
    x = (100 * tiles(2)).requires_grad_(True)  # the encoder alone would take these for grey levels
    head(x, torch.tensor([0, 1])).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", ["maps", "features"])
def test_classes_count_and_tiles_without_one_are_judged_without(tissue, mode) -> None:
    torch.manual_seed(0)
    head = PathologyHead(tissue, 3, mode, **SMALL).eval()
    x = tiles(2)
    free = head(x, None)
    torch.testing.assert_close(head(x, torch.tensor([-1, -1])), free)
    one = head(x, torch.tensor([2, -1]))
    assert (one[0] - free[0]).abs().max() > 1e-3
    torch.testing.assert_close(one[1], free[1])
    unconditional = PathologyHead(tissue, 1, mode, **SMALL)
    assert not any("embedding" in n for n, _ in unconditional.named_parameters())
    torch.testing.assert_close(unconditional.eval()(x, None), unconditional(x, torch.zeros(2, dtype=torch.long)))


def test_it_learns_to_tell_two_kinds_of_tiles_and_their_classes(tissue) -> None:
    torch.manual_seed(0)
    head = PathologyHead(tissue, 2, **SMALL)
    adam = torch.optim.Adam(head.parameters(), lr=0.02)
    labels = torch.tensor([0, 1, 0, 1])
    real = 0.5 * torch.sin(torch.arange(64) * 0.8) + 0.1 * tiles(4) + (labels * 0.6 - 0.3)[:, None, None, None]
    losses = []
    for _ in range(20):
        right, wrong = head(torch.cat([real, real]), torch.cat([labels, 1 - labels])).chunk(2)
        loss = discriminator_loss(right, wrong)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.2 and losses[-1] < 0.5  # 2 log 2 is a guess


def test_calibration_brings_any_features_to_one_scale() -> None:
    class Loud(Seeing):
        def differentiable(self, images: Tensor) -> Tensor:
            return 300 * super().differentiable(images)

    torch.manual_seed(0)
    loud, x = Loud(), tiles(16)
    quiet = Seeing()
    quiet.load_state_dict(loud.state_dict())
    heads = [PathologyHead(e, 3, hidden=4) for e in (loud, quiet)]
    heads[1].load_state_dict(heads[0].state_dict())
    for head in heads:
        head.eval().calibrate(x)
    assert float(heads[0].scales) < float(heads[1].scales)
    a, b = (head(x, None) for head in heads)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_resume_equals_an_uninterrupted_training(tissue) -> None:
    labels = torch.tensor([0, 1, 2])

    def steps(head: PathologyHead, adam: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            loss = discriminator_loss(head(tiles(3, seed=step), labels), head(tiles(3, seed=100 + step), labels))
            adam.zero_grad()
            loss.backward()
            adam.step()

    def new(seed: int) -> tuple[PathologyHead, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        head = PathologyHead(tissue, 3, **SMALL, seed=seed)
        return head, torch.optim.Adam(head.parameters(), lr=0.01)

    whole, adam = new(0)
    steps(whole, adam, 0, 2)
    kept, moments = copy.deepcopy(whole.state_dict()), copy.deepcopy(adam.state_dict())
    steps(whole, adam, 2, 4)
    again, adam = new(9)
    again.load_state_dict(kept)
    adam.load_state_dict(moments)
    again(tiles(), labels)  # looking at it changes nothing
    again.load_state_dict(kept)
    steps(again, adam, 2, 4)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in again.state_dict().items())


def test_spectral_weights_have_norm_one_and_the_gradient_of_the_quotient() -> None:
    torch.manual_seed(0)
    layer = SpectralConv(5, 7, 3, padding=1)
    layer.weight.data += torch.einsum("o,ikl->oikl", torch.randn(7), torch.randn(5, 3, 3))  # one value above the others
    x = torch.randn(2, 5, 6, 6)
    for _ in range(200):
        layer(x)
    layer.requires_grad_(False)
    at_rest = layer.u.clone()
    layer(x)
    assert torch.equal(layer.u, at_rest)  # a forward that does not learn leaves the vector alone
    layer.requires_grad_(True).eval()

    weight = layer.weight.detach().clone().requires_grad_(True)
    normal = weight / torch.linalg.matrix_norm(weight.flatten(1), 2)  # the oracle: a singular value decomposition
    expected = nn.functional.conv2d(x, normal, layer.bias, padding=1)
    found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn_like(found)
    (a,) = torch.autograd.grad((found * cotangent).sum(), layer.weight)
    (b,) = torch.autograd.grad((expected * cotangent).sum(), weight)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_new_spectral_weights_are_normalised_already() -> None:
    torch.manual_seed(0)
    layer = SpectralConv(16, 16, 3, padding=1)
    layer.bias.data.zero_()
    response = layer.eval()(torch.eye(144).view(144, 16, 3, 3))[:, :, 1, 1]
    assert 0.99 < float(torch.linalg.matrix_norm(response.detach(), 2)) < 1.3


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(("lean", "widths"), [(False, [8, 16, 16, 16]), (True, [12, 16, 16])])
def test_judges_halve_down_to_the_grid(smooth, lean, widths) -> None:
    judge = Judge(6, 32, 3, 8, 16, smooth=smooth, lean=lean)
    assert [layer.out_channels for layer in judge.layers] == widths
    x = torch.randn(2, 6, 32, 32, requires_grad=True)
    logits = judge(x, torch.tensor([0, 2]))
    assert logits.shape == (2, 16)
    logits.sum().backward()
    assert (x.grad.abs().sum(1) > 0).all()  # every pixel of the map is looked at


def test_the_projection_is_the_inner_product_with_the_embedding() -> None:
    torch.manual_seed(0)
    judge = Judge(6, 1, 3, width=0, grid=1).eval()
    x, labels = torch.randn(4, 6, 1, 1), torch.tensor([0, 1, 2, 1])
    flat = x[:, :, 0, 0]
    linear = flat @ (judge.out.weight.flatten() / judge.out.weight.norm()) + judge.out.bias
    expected = linear + (flat * judge.embedding[labels]).sum(1) / 6**0.5
    torch.testing.assert_close(judge(x, labels)[:, 0], expected)


@pytest.mark.parametrize("kernel", [1, 3])
def test_mixing_is_fixed_seeded_and_blends_all_coarser_maps(kernel) -> None:
    mixing, same, other = (Mixing([4, 6, 40], 8, 16, kernel, seed=s) for s in (1, 1, 2))
    assert mixing.widths == [8, 8, 16] and not list(mixing.parameters())
    maps = [torch.randn(2, 4, 16, 16), torch.randn(2, 6, 8, 8), torch.randn(2, 40, 4, 4)]
    found = mixing(maps)
    assert [tuple(x.shape) for x in found] == [(2, 8, 16, 16), (2, 8, 8, 8), (2, 16, 4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(found, same(maps), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found, other(maps), strict=True))
    other.load_state_dict(mixing.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(found, other(maps), strict=True))

    for changed in range(3):
        moved = [x + (i == changed) for i, x in enumerate(maps)]
        differs = [not torch.equal(a, b) for a, b in zip(found, mixing(moved), strict=True)]
        assert differs == [i <= changed for i in range(3)]
    weight = mixing.get_buffer("scale1")  # the oracle: enlarge, then convolve, as the paper has it
    deep = nn.functional.conv2d(maps[2], mixing.get_buffer("channel2"))
    enlarged = nn.functional.interpolate(deep, scale_factor=2.0, mode="bilinear", align_corners=False)
    own = nn.functional.conv2d(maps[1], mixing.get_buffer("channel1"))
    torch.testing.assert_close(found[1], own + nn.functional.conv2d(enlarged, weight, padding=kernel // 2))
    # about the size of what comes in: each level adds the energy of the one below
    assert all(0.4 < float(x.square().mean()) < 6 for x in found)


def test_the_licence_of_the_encoder_is_inherited(tissue) -> None:
    bound = transformer("uni2-h")
    assert licence_of([]) == licence_of([tissue]) == "Apache-2.0"
    assert licence_of([tissue, bound, bound]) == "CC BY-NC-ND 4.0 (trained through uni2-h)"
    assert encoder_card(bound) == {
        "name": "uni2-h",
        "licence": "CC BY-NC-ND 4.0",
        "commercial": False,
        "weights_hash": "random",
    }
    assert encoders.card("uni2-h").licence == "CC BY-NC-ND 4.0" and not encoders.card("uni2-h").commercial
