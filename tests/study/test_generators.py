"""Synthetic tile sets: settings reach the generators that take them, rows record them, stopped calls go on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from histosynth.core.checkpoint import load_checkpoint, save_checkpoint
from histosynth.core.errors import RunError, SettingError
from histosynth.core.types import GeneratorFamily
from histosynth.gan.generator import Generator, Shape
from histosynth.gan.sample import GanGenerator
from histosynth.study import generators
from histosynth.study.generators import GenerateConfig, make_tiles
from histosynth.tiles.images import read_rgb

SHAPE = Shape(size=16, classes=2, channel_base=128, channel_max=8, z_dim=8, w_dim=8)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = Generator(SHAPE)
    network.mapping.measure_mean(16)
    tensors = {f"G_ema.{k}": v for k, v in network.state_dict().items()}
    card = {"kind": "gan", "classes": ["ADI", "TUM"], "shape": asdict(SHAPE)}
    return save_checkpoint(tmp_path / "gan.safetensors", tensors, card)


def config(**changes: object) -> GenerateConfig:
    return GenerateConfig(**({"per_class": 3, "device": "cpu"} | changes))  # type: ignore[arg-type]


def test_truncation_reaches_the_tiles_and_their_rows(checkpoint: Path, tmp_path: Path) -> None:
    made = make_tiles(checkpoint, tmp_path / "out", config(truncation=0.5, truncation_cutoff=2))
    rows = made.table
    assert (rows.truncation == 0.5).all() and (rows.truncation_cutoff == 2).all() and (rows.precision == "fp32").all()
    assert made.meta["sampling"]["truncation"] == 0.5
    generator = GanGenerator.from_checkpoint(checkpoint, "cpu")
    labels = [generator.classes.index(label) for label in rows.label]
    again = torch.cat(list(generator.sample(labels, rows.seed.tolist(), truncation=0.5, truncation_cutoff=2)))
    for path, tile in zip(rows.path, again, strict=True):
        assert np.array_equal(read_rgb(made.folder / path)[0], tile.permute(1, 2, 0).numpy())


def test_a_stopped_call_goes_on_with_the_same_settings_only(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_tiles(checkpoint, tmp_path / "whole", config(truncation=0.5))
    written, real = [], generators.write_png

    def writing(path: Path, tile: np.ndarray) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        real(path, tile)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(generators, "write_png", writing)
        with pytest.raises(KeyboardInterrupt):
            make_tiles(checkpoint, out, config(truncation=0.5))
    before = [path.stat().st_mtime_ns for path in written]
    for other in ({}, {"truncation": 0.4}, {"truncation": 0.5, "precision": "bf16"}):
        with pytest.raises(RunError, match="setting"):
            make_tiles(checkpoint, out, config(**other))
    made = make_tiles(checkpoint, out, config(truncation=0.5, batch_size=1))
    assert made.digest == whole.digest and [path.stat().st_mtime_ns for path in written] == before


def test_settings_out_of_range_leave_no_folder(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="truncation is 3"):
        make_tiles(checkpoint, tmp_path / "out", config(truncation=3.0))
    assert not (tmp_path / "out").exists()


class Plain:
    """A generator that has no settings of its own."""

    classes, size, card = ("ADI",), 16, {"kind": "plain"}

    def sample(self, labels, seeds, batch_size=16):
        yield torch.zeros(len(labels), 3, 16, 16, dtype=torch.uint8)


def test_a_generator_without_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = GeneratorFamily("plain", "Plain", train=lambda: tmp_path, load=lambda path, device: Plain(),  # type: ignore[arg-type]
                             steps_per_second=1.0, tiles_per_second=1.0)  # fmt: skip
    monkeypatch.setattr(generators, "load", lambda path, device: family.load(Path(path), device))
    path = save_checkpoint(tmp_path / "plain.safetensors", {"a": torch.zeros(1)}, {"kind": "plain"})
    with pytest.raises(SettingError, match="truncation is 0.5, but a generator of kind 'plain'"):
        make_tiles(path, tmp_path / "out", config(truncation=0.5))
    made = make_tiles(path, tmp_path / "out", config(per_class=2))
    assert len(made.table) == 2 and "truncation" not in made.table and made.meta["sampling"] == {}


def test_classes_without_a_training_tile_are_left_out_unless_asked_for(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(generators, "say", said.append)
    tensors, card = load_checkpoint(checkpoint)
    for key, value in (("classes", {"ADI": 5, "TUM": 0}), ("per_class", {"ADI": 5, "TUM": 0}), (None, "tissue")):
        trained_on = {key: value} if key else value
        path = save_checkpoint(tmp_path / f"{key}.safetensors", tensors, card | {"trained_on": trained_on})
        made = make_tiles(path, tmp_path / f"out {key}", config())
        assert made.classes == (("ADI",) if key else ("ADI", "TUM"))
    asked = make_tiles(tmp_path / "classes.safetensors", tmp_path / "asked", config(classes=("TUM",)))
    assert asked.classes == ("TUM",) and len(said) == 2 and "no tile of them: TUM" in said[0]
