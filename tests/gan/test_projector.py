"""Projection: images made by the generator are found again, each on its own, the same every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from histosynth import encoders
from histosynth.cli import main
from histosynth.core.checkpoint import load_checkpoint, save_checkpoint
from histosynth.core.errors import CheckpointError, DataError, RunError, SettingError
from histosynth.encoders.lpips import Lpips, build, read_heads
from histosynth.gan.likeness import Likeness, load_likeness
from histosynth.gan.projector import Projection, ProjectSettings, _Search, project, structure
from histosynth.gan.sample import GanGenerator
from histosynth.study.projection import ProjectFiles, project_tiles
from histosynth.tiles.images import write_png
from tests.gan.helpers import TINY, tiny_shape
from tests.gan.test_sample import CARD, trained

QUICK = ProjectSettings(steps=4, encoder="none", candidates=8)


@pytest.fixture(scope="module")
def maker() -> GanGenerator:
    return GanGenerator(trained(tiny_shape()), CARD, torch.device("cpu"))


@pytest.fixture(scope="module")
def checkpoint(maker: GanGenerator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {k: getattr(maker.network.shape, k) for k in ("size", "classes", *TINY)}
    tensors = {f"G_ema.{k}": v for k, v in maker.network.state_dict().items()}
    card = CARD | {"kind": "gan", "shape": shape, "licence": "CC0"}
    return save_checkpoint(tmp_path_factory.mktemp("gan") / "gan.safetensors", tensors, card)


def test_own_tiles_are_found_again(maker: GanGenerator) -> None:
    tiles = next(maker.sample([2], [12]))
    settings = ProjectSettings(steps=60, encoder="none", candidates=16, ramp_up=0.0)
    found = project(maker, tiles, settings)
    assert found.latents.shape == (1, maker.layers, 12) and found.trace.shape == (1, 60)
    assert found.distances["psnr"].min() > 22
    assert (found.trace[:, -1] < 0.2 * found.trace[:, 0]).all()
    assert torch.equal(maker.decode(found.latents, noise=found.noise), found.images)
    error = (tiles.float() - found.images.float()).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(found.distances["rmse"], error.sqrt())
    torch.testing.assert_close(found.distances["psnr"], 10 * torch.log10(65025 / error))


def test_white_and_black_pixels_are_explained_from_beyond_the_range(maker: GanGenerator) -> None:
    codes = maker.latents([0], [3])
    made = maker.synthesise(codes).detach()
    scaled = made / made.abs().quantile(0.5)  # half of all pixels are white or black
    tile = ((scaled + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    search = _Search(maker, QUICK, None)
    target = tile.float() / 127.5 - 1
    assert search._loss(scaled, target, []).item() < 1e-4
    plain = 4 * (scaled - target).square().mean().item()
    assert plain > 0.5
    wrong = search._loss(-scaled, target, []).item()
    assert wrong == pytest.approx(4 * (-scaled - target).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, space="w", start="mean", noise="constant"),
                                      replace(QUICK, encoder="tissue-tiny")])  # fmt: skip
def test_an_image_is_projected_alone_and_the_same_every_time(maker: GanGenerator, settings: ProjectSettings) -> None:
    tiles = next(maker.sample([0, 1, 2], [1, 2, 3]))
    together = project(maker, tiles, settings)
    alone = project(maker, tiles[1:2], settings)
    for name in ("latents", "noise", "images", "trace"):
        assert torch.equal(getattr(alone, name)[0], getattr(together, name)[1]), name
    for name, values in alone.distances.items():
        assert torch.equal(values[0], together.distances[name][1]), name
    other = project(maker, tiles[1:2], replace(settings, seed=1))
    assert not torch.equal(other.latents, alone.latents)


def test_the_start(maker: GanGenerator) -> None:
    tiles = next(maker.sample([0, 1], [1, 2], noise="constant"))
    still = replace(QUICK, steps=1, rate=1e-12, space="w", start="mean", search=0.0)
    mapping = maker.network.mapping
    torch.testing.assert_close(project(maker, tiles, still).latents, mapping.w_avg.expand(2, -1))
    torch.testing.assert_close(project(maker, tiles, still, labels=[2, 0]).latents, mapping.w_mean[[2, 0]])
    # a candidate is found by its own picture
    best = replace(still, start="best", noise="constant")
    first = project(maker, tiles, best)
    again = project(maker, first.images, best)
    torch.testing.assert_close(again.latents, first.latents)
    assert again.distances["rmse"].max() == 0
    loss = {s: project(maker, tiles, replace(best, start=s)).trace[:, 0] for s in ("best", "mean")}
    assert (loss["best"] <= loss["mean"]).all()


def test_constant_noise_stays_and_fitted_noise_is_standardised(maker: GanGenerator) -> None:
    tiles = next(maker.sample([0], [1]))
    start = torch.cat([p.flatten(1) for p in maker.network.const_noise()], dim=1)
    assert torch.equal(project(maker, tiles, replace(QUICK, noise="constant")).noise, start)
    fitted = project(maker, tiles, QUICK).noise
    assert not torch.equal(fitted, start)
    for plane in maker.network.shape_noise(fitted):
        assert abs(plane.mean().item()) < 1e-5 and plane.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def reference_structure(planes: list[np.ndarray]) -> float:
    """Appendix D of 1912.04958, product by product."""
    total = 0.0
    for plane in planes:
        while True:
            r = len(plane)
            for shift in ((0, 1), (1, 0)):
                products = [plane[y, x] * plane[y - shift[0], x - shift[1]] for y in range(r) for x in range(r)]
                total += (sum(products) / r**2) ** 2
            if r <= 8:
                break
            plane = plane.reshape(r // 2, 2, r // 2, 2).mean(axis=(1, 3)) * 2
    return total


def test_structure_of_noise(rng: np.random.Generator) -> None:
    planes = [rng.normal(size=(r, r)) for r in (4, 8, 16, 16, 32)]
    smooth = [np.cumsum(p, axis=0) / len(p) for p in planes]
    stacked = [torch.tensor(np.stack([a, b]))[:, None] for a, b in zip(planes, smooth, strict=True)]
    found = structure(stacked)
    assert found.tolist() == pytest.approx([reference_structure(planes), reference_structure(smooth)], rel=1e-9)
    plane = torch.randn(1, 1, 16, 16, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: structure([x]), (plane,))


@pytest.mark.parametrize("kind", ["tissue-tiny", "colour", "lpips"])
def test_likeness(kind: str) -> None:
    torch.manual_seed(0)
    part = (
        Lpips("alex", build("alex")["features"], read_heads("alex")).eval().requires_grad_(False)
        if kind == "lpips"
        else encoders.load(kind, "cpu")
    )
    likeness = Likeness(part)
    target = torch.rand(2, 3, 64, 64) * 2 - 1
    prepared = likeness.prepare(target)
    near = (target + 0.05 * torch.randn_like(target)).clamp(-1, 1).requires_grad_(True)
    far = torch.rand(2, 3, 64, 64) - 1
    same, close, distant = likeness(target, prepared), likeness(near, prepared), likeness(far, prepared)
    assert same.shape == (2,) and same.abs().max() < 1e-6
    assert (close > same).all() and (distant > close).all()
    close.sum().backward()
    assert near.grad is not None and near.grad.abs().sum() > 0
    one = likeness(target, likeness.prepare(target[:1]))
    assert one[0].abs() < 1e-6 and one[1] > 0


def test_which_likeness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HISTOSYNTH_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = load_likeness("auto", "cpu")
    assert found is not None and found.name == "tissue-tiny"
    assert load_likeness("none", "cpu") is None
    with pytest.raises(CheckpointError, match="lpips-vgg"):
        load_likeness("lpips-vgg", "cpu")
    with pytest.raises(SettingError, match="tissue-tiny"):
        load_likeness("tissue-tini", "cpu")


@pytest.mark.parametrize(("images", "match"), [
    (torch.zeros(1, 1, 32, 32, dtype=torch.uint8), r"\(1, 1, 32, 32\)"),
    (torch.zeros(3, 32, 32, dtype=torch.uint8), r"\(3, 32, 32\)"),
    (torch.zeros(1, 3, 32, 32), "float32"),
    (torch.zeros(1, 3, 32, 24, dtype=torch.uint8), "32 x 24"),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "64 x 64 px, the generator makes 32"),
])  # fmt: skip
def test_images_that_do_not_fit(maker: GanGenerator, images: Tensor, match: str) -> None:
    with pytest.raises(DataError, match=match):
        project(maker, images, QUICK)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"space": "z"}, {"rate": float("nan")}, {"noise": "random"},
                                   {"ramp_up": 2}, {"start": "zero"}, {"pixel": -1}, {"seed": -1}, {"candidates": 0},
                                   {"pixel": 0, "encoder": "none"}])  # fmt: skip
def test_impossible_settings(wrong: dict) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        ProjectSettings(**wrong)


def test_labels_that_do_not_fit(maker: GanGenerator) -> None:
    tiles = next(maker.sample([0], [1]))
    with pytest.raises(SettingError, match="Label 3"):
        project(maker, tiles, QUICK, labels=[3])
    with pytest.raises(SettingError, match="2 labels"):
        project(maker, tiles, QUICK, labels=[0, 1])


def test_no_image_gives_no_projection(maker: GanGenerator) -> None:
    found = project(maker, torch.zeros(0, 3, 32, 32, dtype=torch.uint8), QUICK)
    assert isinstance(found, Projection) and len(found) == 0 and found.trace.shape == (0, 4)


def test_the_verb(tmp_path: Path, maker: GanGenerator, checkpoint: Path) -> None:
    tiles = next(maker.sample([0, 1, 2], [1, 2, 3]))
    folder, out = tmp_path / "tiles" / "a", tmp_path / "out"
    for k, tile in enumerate(tiles[:2]):
        write_png(folder / f"{k}.png", tile.permute(1, 2, 0).numpy())
    large = np.repeat(np.repeat(tiles[2].permute(1, 2, 0).numpy(), 2, axis=0), 2, axis=1)
    write_png(tmp_path / "large.png", large)
    words = ["project", str(checkpoint), str(tmp_path / "tiles"), str(tmp_path / "large.png"), str(out)]
    words += ["--steps", "4", "--encoder", "none", "--candidates", "8", "--device", "cpu"]
    main(words)
    table = pd.read_csv(out / "projection.csv")
    assert table.name.tolist() == ["a/0.png", "a/1.png", "large.png"] and table.width.tolist() == [32, 32, 64]
    tensors, card = load_checkpoint(out / "latents.safetensors")
    expected = project(maker, tiles[:2], QUICK)
    assert torch.equal(tensors["latents"][:2], expected.latents) and torch.equal(tensors["noise"][:2], expected.noise)
    assert card["kind"] == "latents" and card["space"] == "w+" and card["names"] == table.name.tolist()
    assert card["licence"] == "CC0"
    np.testing.assert_allclose(table.psnr[:2], expected.distances["psnr"].numpy(), rtol=1e-4)
    assert (out / "sheet.png").is_file() and not (out / "parts").exists()
    main(words)  # a finished folder is made again from nothing, the same
    assert torch.equal(load_checkpoint(out / "latents.safetensors")[0]["latents"], tensors["latents"])
    with pytest.raises(SystemExit):
        main([*words, "--space", "w"])


def test_a_stopped_projection_goes_on(
    tmp_path: Path, maker: GanGenerator, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from histosynth.study import projection

    monkeypatch.setattr(projection, "_CHUNK", 2)
    for k, tile in enumerate(next(maker.sample([0, 1, 2], [1, 2, 3]))):
        write_png(tmp_path / "tiles" / f"{k}.png", tile.permute(1, 2, 0).numpy())
    calls = []

    def counted(*words: object) -> Projection:
        calls.append(len(words[1]))  # type: ignore[arg-type]
        if len(calls) == 2:
            raise KeyboardInterrupt
        return project(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(projection, "project", counted)
    with pytest.raises(KeyboardInterrupt):
        project_tiles(checkpoint, [tmp_path / "tiles"], tmp_path / "out", QUICK, ProjectFiles(device="cpu"))
    found = project_tiles(checkpoint, [tmp_path / "tiles"], tmp_path / "out", QUICK, ProjectFiles(device="cpu"))
    assert calls == [2, 1, 1] and found["rmse"] > 0
    with pytest.raises(RunError, match="other tiles or settings"):
        project_tiles(checkpoint, [tmp_path / "tiles"], tmp_path / "out", replace(QUICK, steps=5))


def test_files_that_do_not_fit(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no image")
    here = ProjectFiles(device="cpu")
    with pytest.raises(DataError, match="no tile"):
        project_tiles(checkpoint, [tmp_path / "empty"], tmp_path / "out", QUICK, here)
    with pytest.raises(DataError, match="gone.png"):
        project_tiles(checkpoint, [tmp_path / "gone.png"], tmp_path / "out", QUICK, here)
    with pytest.raises(DataError, match="bad.png"):
        project_tiles(checkpoint, [tmp_path / "bad.png"], tmp_path / "out", QUICK, here)
    with pytest.raises(SettingError, match="split"):
        project_tiles(checkpoint, [tmp_path / "empty"], tmp_path / "out", QUICK, ProjectFiles("test", device="cpu"))
    with pytest.raises(RunError, match="other files"):
        project_tiles(checkpoint, [tmp_path / "bad.png"], tmp_path, QUICK, here)
    with pytest.raises(SettingError, match="limit"):
        ProjectFiles(limit=0)
