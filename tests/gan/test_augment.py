"""Adaptive augmentation: per sample, differentiable, exact at p = 0, steered in the right direction."""

from __future__ import annotations

import torch

from histosynth.gan.augment import AdaController, _geometry, augment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_p_zero_is_the_identity() -> None:
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    assert augment(x, 0.0, generator()) is x


def test_p_one_changes_every_sample_and_small_p_leaves_most_exact() -> None:
    x = torch.rand(32, 3, 16, 16) * 2 - 1
    strong = augment(x, 1.0, generator())
    assert strong.shape == x.shape and torch.isfinite(strong).all()
    assert ((strong - x).abs().amax(dim=(1, 2, 3)) > 1e-3).all()
    weak = augment(x, 0.01, generator())
    exact = (weak == x).flatten(1).all(dim=1)
    assert 20 <= int(exact.sum()) < 32


def test_the_share_of_changed_samples_follows_p() -> None:
    x = torch.rand(2000, 3, 4, 4) * 2 - 1
    changed = (augment(x, 0.1, generator()) != x).flatten(1).any(dim=1).float().mean().item()
    # ten changes with probability 0.1 each, some of which may leave a tile as it is
    assert 0.5 < changed < 1 - 0.9**10 + 0.03


def test_a_sample_does_not_depend_on_the_others() -> None:
    x = torch.rand(6, 3, 16, 16) * 2 - 1
    other = torch.rand(6, 3, 16, 16) * 2 - 1
    other[2] = x[2]
    torch.testing.assert_close(
        augment(x, 0.7, generator(3))[2], augment(other, 0.7, generator(3))[2], rtol=0, atol=1e-6
    )


def test_gradients_flow_to_every_sample() -> None:
    x = (torch.rand(8, 3, 16, 16) * 1.6 - 0.8).requires_grad_(True)
    augment(x, 0.8, generator()).square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert (x.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


def test_flip_and_quarter_turn_are_exact_symmetries() -> None:
    x = torch.rand(1, 3, 8, 8)
    uniform, normal = torch.full((1, 12), 0.9), torch.zeros(1, 12)
    uniform[0, 0], uniform[0, 5] = 0.0, 0.1  # flip only
    torch.testing.assert_close(_geometry(x, 0.5, uniform, normal), x.flip(-1), rtol=0, atol=1e-5)
    uniform[0, 0], uniform[0, 1], uniform[0, 6] = 0.9, 0.0, 0.3  # quarter turn only
    turned = _geometry(x, 0.5, uniform, normal)
    assert min((turned - x.rot90(k, (-2, -1))).abs().max().item() for k in (1, 3)) < 1e-5


def test_shift_moves_by_whole_pixels() -> None:
    x = torch.rand(1, 3, 16, 16)
    uniform, normal = torch.full((1, 12), 0.9), torch.zeros(1, 12)
    uniform[0, 2], uniform[0, 7], uniform[0, 8] = 0.0, 1.0, 0.5  # two pixels along x
    moved = _geometry(x, 0.5, uniform, normal)
    torch.testing.assert_close(moved[..., :-2], x[..., 2:], rtol=0, atol=1e-5)


def test_controller_moves_towards_the_target() -> None:
    over, under = AdaController(0.6, 1.0, 16), AdaController(0.6, 1.0, 16)
    under.p = 0.5
    for step in range(8):
        over.update(torch.ones(16), step)
        under.update(torch.cat([torch.ones(8), -torch.ones(8)]), step)
    assert over.r_t == 1 and under.r_t == 0
    assert abs(over.p - 2 * 16 * 4 / 1000) < 1e-9
    assert abs(under.p - (0.5 - 2 * 16 * 4 / 1000)) < 1e-9
    for step in range(4000):
        over.update(torch.ones(16), step)
    assert over.p == 1.0


def test_controller_resumes_in_the_middle_of_an_interval() -> None:
    logits = [torch.randn(4, generator=generator(k)) + 0.5 for k in range(10)]
    whole, half = AdaController(0.6, 0.1, 4), AdaController(0.6, 0.1, 4)
    for step in range(10):
        whole.update(logits[step], step)
    for step in range(5):
        half.update(logits[step], step)
    resumed = AdaController(0.6, 0.1, 4)
    resumed.restore(half.state())
    for step in range(5, 10):
        resumed.update(logits[step], step)
    assert resumed.state() == whole.state()
