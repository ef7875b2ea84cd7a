"""The augmentation against independent computations, its statistics, and what training asks of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d, map_coordinates
from scipy.spatial.transform import Rotation
from torch import Tensor

from histosynth.core.errors import DataError, SettingError
from histosynth.gan.augment import PIPES, Pipe, augment
from histosynth.gan.augmentation import colour, corruption, draws, geometry, wavelets
from histosynth.gan.augmentation.draws import COLUMNS, Draws
from histosynth.gan.losses import r1_penalty


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_images(count: int, size: int, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, size, size, generator=generator(seed)) * 1.8 - 0.9


def drawn(p: float = 0.5, **values: float | tuple[float, ...]) -> Draws:
    """Draws of one sample where only the named changes happen, with these uniform numbers."""
    row = torch.full((1, COLUMNS), 0.999)
    for name, value in values.items():
        first = draws._FIRST[name.replace("_", " ")]
        numbers = value if isinstance(value, tuple) else (value,)
        row[0, first] = 0.0
        row[0, first + 1 : first + 1 + len(numbers)] = torch.tensor(numbers)
    return Draws(row, p)


def upper(normal: float) -> float:
    """The uniform number that becomes this normal one."""
    return 0.5 * (1 + math.erf(normal / math.sqrt(2)))


# geometry


def test_p_zero_and_the_empty_pipe_are_the_identity() -> None:
    x = noise_images(4, 16)
    assert augment(x, 0.0, generator()) is x
    assert augment(x, 1.0, generator(), "none") is x


def test_flip_and_quarter_turns_are_exact() -> None:
    x = noise_images(1, 8)
    pipe = PIPES["blit"]
    assert torch.equal(geometry.geometry(x, pipe, drawn(flip=0.2), False), x.flip(-1))
    assert torch.equal(geometry.geometry(x, pipe, drawn(flip=0.7), False), x)
    turned = [geometry.geometry(x, pipe, drawn(quarter=(k + 0.5) / 4), False) for k in range(4)]
    wanted = [x.rot90(k, (-2, -1)) for k in range(4)]
    assert torch.equal(turned[0], wanted[0]) and torch.equal(turned[2], wanted[2])
    assert {torch.equal(turned[1], wanted[k]) for k in (1, 3)} == {True, False}
    assert torch.equal(turned[3], turned[1].rot90(2, (-2, -1)))


def test_whole_pixel_shift_is_mirror_padding_and_a_crop() -> None:
    x = noise_images(1, 16)
    moved = geometry.geometry(x, PIPES["blit"], drawn(shift=(1.0, 0.25)), False)  # 2 px right, 1 px up
    padded = np.pad(x[0].numpy(), ((0, 0), (2, 2), (2, 2)), mode="symmetric")
    np.testing.assert_array_equal(moved[0].numpy(), padded[:, 3:19, 0:16])


def warped_by_scipy(x: Tensor, forward: np.ndarray) -> np.ndarray:
    """Every output pixel from the input at the inverse of `forward`, which maps places (x, y, 1) in half images."""
    size = x.shape[-1]
    middles = (np.arange(size) * 2 + 1) / size - 1
    across, down = np.meshgrid(middles, middles)
    inverse = np.linalg.inv(forward)
    source = inverse[:2] @ np.stack([across.ravel(), down.ravel(), np.ones(size * size)])
    rows, columns = ((source[k] + 1) * size / 2 - 0.5 for k in (1, 0))
    channels = [map_coordinates(c, [rows, columns], order=1, mode="reflect") for c in x[0].double().numpy()]
    return np.stack(channels).reshape(3, size, size)


def test_all_geometry_at_once_in_the_order_of_the_paper() -> None:
    x = noise_images(1, 16)
    pipe = PIPES["bg"]
    chosen = drawn(
        flip=0.1, quarter=0.3, shift=(0.9, 0.2), scale=upper(0.7), turn=0.6, stretch=upper(-1.1),
        turn_again=0.45, drift=(upper(0.5), upper(-0.3)),
    )  # fmt: skip

    def rotation(angle: float) -> np.ndarray:
        cos, sin = math.cos(angle), math.sin(angle)
        return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])

    def move(right: float, down: float) -> np.ndarray:
        return np.array([[1, 0, right], [0, 1, down], [0, 0, 1.0]])

    forward = np.eye(3)
    for change in (
        np.diag([-1.0, 1, 1]),
        rotation(math.pi / 2),
        move(*(np.round((np.array([0.9, 0.2]) * 2 - 1) * 2) * 2 / 16)),
        np.diag([2 ** (0.2 * 0.7), 2 ** (0.2 * 0.7), 1]),
        rotation((0.6 * 2 - 1) * math.pi),
        np.diag([2 ** (0.2 * -1.1), 2 ** (0.2 * 1.1), 1]),
        rotation((0.45 * 2 - 1) * math.pi),
        move(2 * 0.125 * 0.5, 2 * 0.125 * -0.3),
    ):
        forward = change @ forward
    moved = geometry.geometry(x, pipe, chosen, False)
    np.testing.assert_allclose(moved[0].numpy(), warped_by_scipy(x, forward), atol=2e-5)


def wave(across: Tensor, down: Tensor) -> Tensor:
    return torch.sin(5 * across + 2 * down) + 0.3 * torch.cos(7 * down - 3 * across)


@pytest.mark.parametrize("degrees", [0, 30, 90, 180])
def test_fine_warp_puts_slow_signals_in_the_right_place(degrees: int) -> None:
    size = 64
    middles = (torch.arange(size) * 2 + 1) / size - 1
    down, across = torch.meshgrid(middles, middles, indexing="ij")
    image = wave(across, down).expand(1, 3, -1, -1).contiguous()
    cos, sin = 0.7 * math.cos(math.radians(degrees)), 0.7 * math.sin(math.radians(degrees))
    place = torch.tensor([[[cos, sin, 0.03], [-sin, cos, 0.02]]])
    there = cos * across + sin * down + 0.03, -sin * across + cos * down + 0.02
    wanted = wave(*there)
    inside = (there[0].abs() < 0.85) & (there[1].abs() < 0.85)
    fine = (geometry.fine_warp(image, place)[0, 0] - wanted).abs()[inside].max()
    rough = (geometry.warp(image, place)[0, 0] - wanted).abs()[inside].max()
    assert fine < 0.002 and fine < rough / 3


def test_fine_warp_gives_the_identity_back_and_aliases_little() -> None:
    x = noise_images(2, 32)
    same = torch.eye(3)[:2].expand(2, -1, -1)
    error = (geometry.fine_warp(x, same) - x).abs()
    assert error[..., 4:-4, 4:-4].max() < 1e-5 and error.max() < 0.05
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1  # too fine for the shrunk image: what remains is alias
    shrunk = torch.tensor([[[1.3, 0.0, 0.0], [0.0, 1.3, 0.0]]])
    assert geometry.fine_warp(stripes, shrunk).std() < geometry.warp(stripes, shrunk).std() / 2


# filters


@pytest.mark.parametrize(("taps", "moments"), [(wavelets.SYMLET_6, 6), (wavelets.SYMLET_2, 2)])
def test_the_wavelets_are_orthogonal_with_vanishing_moments(taps: np.ndarray, moments: int) -> None:
    for shift in range(0, len(taps), 2):
        assert taps[: len(taps) - shift] @ taps[shift:] == pytest.approx(float(shift == 0), abs=1e-10)
    signs = (-1.0) ** np.arange(len(taps))
    places = np.arange(len(taps)) / len(taps)
    for power in range(moments):
        assert abs((signs * taps) @ places**power) < 1e-8


def test_bands_add_up_and_hold_an_octave_each() -> None:
    bank = wavelets.band_taps()
    unchanged = np.zeros(bank.shape[1])
    unchanged[len(unchanged) // 2] = 1
    np.testing.assert_allclose(bank.sum(axis=0), unchanged, atol=1e-12)
    np.testing.assert_allclose(bank, bank[:, ::-1], atol=1e-12)
    reach = np.arange(bank.shape[1]) - bank.shape[1] // 2
    for band, frequency in enumerate((0.02, 0.19, 0.36, 0.9)):  # of half the sampling rate
        response = np.abs(bank @ np.exp(1j * math.pi * frequency * reach))
        assert response.argmax() == band and response[band] > 0.7


def test_filtering_equals_separable_convolution_with_mirrored_edges() -> None:
    x = noise_images(2, 16)
    gains = torch.tensor([[1.0, 1, 1, 1], [0.4, 2.0, 0.7, 1.6]])
    filtered = corruption.filtered(x, gains)
    torch.testing.assert_close(filtered[0], x[0], rtol=0, atol=1e-5)
    taps = gains[1].numpy() @ wavelets.band_taps()
    wanted = correlate1d(correlate1d(x[1].double().numpy(), taps, axis=1, mode="reflect"), taps, axis=2, mode="reflect")
    np.testing.assert_allclose(filtered[1].numpy(), wanted, atol=1e-5)


def test_band_gains_keep_the_expected_power() -> None:
    gains = corruption.band_gains(PIPES["filter"], drawn(band_2=upper(1.5)))
    raw = np.array([1, 1, 2**1.5, 1])
    np.testing.assert_allclose(gains[0].numpy(), raw / math.sqrt((raw**2 * [10, 1, 1, 1]).sum() / 13), rtol=1e-4)
    np.testing.assert_allclose(corruption.band_gains(PIPES["filter"], drawn())[0].numpy(), 1, rtol=1e-6)


# colour


def test_colour_matrix_against_numpy_in_the_order_of_the_paper() -> None:
    values = {"brightness": upper(0.8), "contrast": upper(-0.5), "luma": 0.1, "hue": 0.7, "saturation": upper(0.6)}
    matrix = colour.colour_matrix(PIPES["color"], drawn(**values))[0].double().numpy()
    axis = np.ones(3) / math.sqrt(3)
    along = np.outer(axis, axis)
    pixels = np.random.default_rng(0).uniform(-1, 1, (3, 50))
    wanted = 2 ** (0.5 * -0.5) * (pixels + 0.2 * 0.8)
    wanted = (np.eye(3) - 2 * along) @ wanted
    wanted = Rotation.from_rotvec(axis * (0.7 * 2 - 1) * math.pi).as_matrix() @ wanted
    wanted = (along + 2**0.6 * (np.eye(3) - along)) @ wanted
    np.testing.assert_allclose(matrix[:3, :3] @ pixels + matrix[:3, 3:], wanted, atol=1e-5)
    np.testing.assert_allclose(matrix[3], [0, 0, 0, 1], atol=1e-6)
    images = torch.from_numpy(pixels[:, :49].reshape(1, 3, 7, 7)).float()
    changed = colour.colour(images, PIPES["color"], drawn(**values))
    np.testing.assert_allclose(changed.numpy().reshape(3, 49), wanted[:, :49], atol=1e-5)


def test_grey_stays_grey_under_hue_and_saturation() -> None:
    x = noise_images(1, 8)[:, :1].repeat(1, 3, 1, 1)
    changed = colour.colour(x, PIPES["color"], drawn(hue=0.9, saturation=0.9))
    torch.testing.assert_close(changed, x, rtol=0, atol=1e-5)


def unit(vector: tuple[float, ...]) -> np.ndarray:
    return np.array(vector) / np.linalg.norm(vector)


def test_stain_changes_the_amounts_of_the_two_stains_only() -> None:
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0, 0.6, (2, 64))
    columns = np.stack([unit(colour.HAEMATOXYLIN), unit(colour.EOSIN)], axis=1)
    across = np.cross(columns[:, 0], columns[:, 1])[:, None] * 0.1
    rest = across / np.linalg.norm(across) * rng.uniform(0, 0.05, 64)

    def painted(densities: np.ndarray) -> Tensor:
        return torch.from_numpy(np.exp(-densities) * 2 - 1).float().view(1, 3, 8, 8)

    pipe = Pipe(stain=0.5)
    changed = colour.stain(painted(columns @ amounts + rest), pipe, drawn(stain=(upper(1.2), upper(-0.8))))
    factors = 2 ** (0.5 * np.array([[1.2], [-0.8]]))
    wanted = painted(columns @ (amounts * factors) + rest)
    torch.testing.assert_close(changed, wanted, rtol=0, atol=1e-4)
    white = torch.ones(1, 3, 4, 4)
    torch.testing.assert_close(colour.stain(white, pipe, drawn(stain=(0.9, 0.1))), white, rtol=0, atol=1e-5)


def test_channel_strength_is_a_power_of_the_transmission_after_the_stains() -> None:
    x = noise_images(1, 8)
    numbers = (upper(0.4), upper(-1.0), upper(2.0))
    changed = colour.stain(x, Pipe(channels=0.5), drawn(channels=numbers))
    for channel, normal in enumerate((0.4, -1.0, 2.0)):
        wanted = ((x[0, channel] + 1) / 2) ** (2 ** (0.5 * normal)) * 2 - 1
        torch.testing.assert_close(changed[0, channel], wanted, rtol=0, atol=1e-5)
    both = colour.stain(x, Pipe(stain=0.5, channels=0.5), drawn(stain=(0.9, 0.2), channels=numbers))
    first = colour.stain(x, Pipe(stain=0.5), drawn(stain=(0.9, 0.2)))
    then = colour.stain(first, Pipe(channels=0.5), drawn(channels=numbers))
    torch.testing.assert_close(both, then, rtol=0, atol=2e-3)  # but for the floor of the darkest pixels


# noise and holes


def test_noise_has_the_drawn_strength() -> None:
    x = torch.zeros(1, 3, 64, 64)
    noisy = corruption.noise(x, PIPES["noise"], drawn(noise=upper(-1.3)), generator())
    assert noisy.std().item() == pytest.approx(0.1 * 1.3, rel=0.03) and abs(noisy.mean().item()) < 0.005


def test_cutout_is_a_rectangle_around_its_middle() -> None:
    x = torch.ones(1, 3, 16, 16)
    holed = corruption.cutout(x, PIPES["cutout"], drawn(cutout=(0.5, 0.25)))
    wanted = x.clone()
    wanted[:, :, 0:8, 4:12] = 0  # x from a quarter to three quarters, y from 0 to a half
    assert torch.equal(holed, wanted)


# chance


def changes(pipe: Pipe) -> list[str]:
    return [name for name, value in vars(pipe).items() if value]


@pytest.mark.parametrize("name", changes(replace(PIPES["bgcfnc"], stain=0.3, channels=0.3)))
def test_every_change_happens_with_probability_p(name: str) -> None:
    whole = replace(PIPES["bgcfnc"], stain=0.3, channels=0.3)
    alone = Pipe(**{name: getattr(whole, name)})
    x = noise_images(4000, 8)
    changed = (augment(x, 0.2, generator(), alone) != x).flatten(1).any(dim=1).float().mean().item()
    idle = {"flip": 1 / 2, "luma": 1 / 2, "quarter": 1 / 4, "shift": 1 / 9}.get(name, 0.0)  # ends where it began
    share = 1 - 0.8**4 if name == "bands" else 0.2 * (1 - idle)
    slack = 0.06 if name == "shift" else 0.025  # of its three places, the middle one has half the chance, not a third
    assert changed == pytest.approx(share, abs=slack)


def test_two_rotations_together_happen_with_probability_p() -> None:
    numbers = Draws.new(20000, 0.3, generator())
    ons = [geometry._MAPS[name](PIPES["bgc"], numbers, 16)[0] for name in ("turn", "turn again")]
    assert (ons[0] | ons[1]).float().mean().item() == pytest.approx(0.3, abs=0.015)
    single = geometry._MAPS["turn"](PIPES["tissue"], numbers, 16)[0]
    assert single.float().mean().item() == pytest.approx(0.3, abs=0.015)


def test_changes_are_independent_and_the_numbers_are_what_they_say() -> None:
    numbers = Draws.new(20000, 0.5, generator())
    names = list(draws._TAKES)
    happened = torch.stack([numbers.on(name) for name in names]).float()
    correlation = torch.corrcoef(happened) - torch.eye(len(names))
    assert correlation.abs().max() < 0.04
    assert draws._FIRST["cutout"] + 3 == COLUMNS
    normal = numbers.normal("channels")
    assert normal.shape == (20000, 3) and torch.isfinite(numbers.normals).all()
    assert abs(normal.mean().item()) < 0.02 and abs(normal.std().item() - 1) < 0.02
    assert torch.isfinite(Draws(torch.tensor([[0.0] * COLUMNS, [1 - 2.0**-24] * COLUMNS]), 1.0).normals).all()


def test_p_one_changes_every_sample_and_small_p_leaves_most_exact() -> None:
    x = noise_images(32, 16)
    strong = augment(x, 1.0, generator())
    assert strong.shape == x.shape and torch.isfinite(strong).all()
    assert ((strong - x).abs().amax(dim=(1, 2, 3)) > 1e-3).all()
    weak = augment(x, 0.01, generator())
    exact = (weak == x).flatten(1).all(dim=1)
    assert 20 <= int(exact.sum()) < 32


# what training asks of it


@pytest.mark.parametrize("fine", [False, True])
def test_a_sample_does_not_depend_on_the_others(fine: bool) -> None:
    x, other = noise_images(6, 16, 1), noise_images(9, 16, 2)
    other[2] = x[2]
    mine, its = (augment(batch, 0.6, generator(3), "bgcf", fine)[2] for batch in (x, other))
    torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pipe", ["bgcfnc", "histology"])
@pytest.mark.parametrize("fine", [False, True])
def test_a_gpu_computes_the_same(monkeypatch: pytest.MonkeyPatch, pipe: str, fine: bool) -> None:
    x = noise_images(8, 16)
    chosen = augment(x, 0.4, generator(), pipe, fine)
    monkeypatch.setattr(geometry, "SELECTING", ())  # compute every sample, then choose
    torch.testing.assert_close(augment(x, 0.4, generator(), pipe, fine), chosen, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fine", [False, True])
def test_nothing_waits_for_a_gpu(fine: bool) -> None:
    # a tensor without values refuses to be read
    x = torch.empty(4, 3, 16, 16, device="meta")
    numbers = Draws(torch.empty(4, COLUMNS, device="meta"), 0.5)
    pipe = replace(PIPES["bgcfnc"], stain=0.3, channels=0.3)
    for change in (colour.colour, colour.stain, corruption.bands, corruption.cutout):
        assert change(x, pipe, numbers).shape == x.shape
    assert geometry.geometry(x, pipe, numbers, fine).shape == x.shape
    with pytest.raises(RuntimeError):
        bool(numbers.on("flip").any())


@pytest.mark.parametrize("pipe", ["tissue", "histology", "bgcfnc"])
@pytest.mark.parametrize("fine", [False, True])
def test_gradients_are_those_of_finite_differences(pipe: str, fine: bool) -> None:
    x = (noise_images(3, 8).double() * 0.8).requires_grad_(True)

    def run(images: Tensor) -> Tensor:
        return augment(images, 0.6, generator(5), replace(PIPES[pipe], channels=0.2), fine)

    # the filters are float32 numbers; in float64 the function stays smooth all the same
    assert torch.autograd.gradcheck(run, x, fast_mode=True, atol=1e-4)
    assert torch.autograd.gradgradcheck(run, x, fast_mode=True, atol=1e-4)


def test_r1_runs_through_the_augmentation() -> None:
    judge = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.LazyLinear(1)
    )
    x = noise_images(4, 16).requires_grad_(True)
    for fine in (False, True):
        r1_penalty(judge(augment(x, 0.7, generator(), "bgcfnc", fine)).squeeze(1), x).backward()
    weight = judge[0].weight.grad
    assert weight is not None and torch.isfinite(weight).all() and weight.abs().sum() > 0


def test_gradients_flow_to_every_sample() -> None:
    x = noise_images(8, 16).requires_grad_(True)
    augment(x, 0.8, generator()).square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    assert (x.grad.abs().sum(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("pipe", list(PIPES))
def test_every_pipe_takes_half_precision_and_any_memory_layout(pipe: str) -> None:
    x = noise_images(4, 16)
    whole = augment(x, 0.7, generator(), pipe)
    half = augment(x.bfloat16(), 0.7, generator(), pipe)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, rtol=0.1, atol=0.3)
    last = augment(x.contiguous(memory_format=torch.channels_last), 0.7, generator(), pipe)
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-5)


def test_black_and_too_bright_pixels_stay_finite() -> None:
    x = torch.stack([torch.full((3, 8, 8), -1.5), torch.full((3, 8, 8), 1.5)]).requires_grad_(True)
    changed = augment(x, 1.0, generator(), replace(PIPES["bgcfnc"], stain=1.0, channels=1.0))
    changed.sum().backward()
    assert torch.isfinite(changed).all() and x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("shape", [(2, 3, 8, 16), (2, 1, 8, 8), (3, 8, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"\[N, 3, S, S\]"):
        augment(torch.zeros(shape), 0.5, generator())


def test_impossible_settings_are_refused() -> None:
    x = noise_images(1, 8)
    with pytest.raises(SettingError, match="'bcg'"):
        augment(x, 0.5, generator(), "bcg")
    with pytest.raises(SettingError, match=r"1\.5"):
        augment(x, 1.5, generator())
    for bad in ({"rotation": 200.0}, {"scale": -0.1}, {"noise": math.nan}):
        with pytest.raises(SettingError, match=next(iter(bad))):
            Pipe(**bad)
