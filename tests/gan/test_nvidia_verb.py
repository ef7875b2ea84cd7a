"""`histosynth convert` as a user runs it, and what can be done with its checkpoint afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from histosynth.cli import main
from histosynth.core.checkpoint import load_checkpoint, read_card
from histosynth.gan.discriminator import Discriminator
from histosynth.gan.generator import Generator
from histosynth.gan.transfer import start_from
from histosynth.tiles.tileset import TileSet
from tests.gan.nvidia_pickles import dump, snapshot
from tests.gan.test_nvidia_convert import SHAPE, exported


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return dump(snapshot(exported(SHAPE, tmp_path)), tmp_path / "network-snapshot-000100.pkl")


def test_a_pickle_becomes_tiles(network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("histosynth.study.verbs.convert.say", said.append)
    out = tmp_path / "net.safetensors"
    main(["convert", str(network), str(out), "--classes", "ADI,STR,TUM"])
    heard = "\n".join(said)
    for part in ("16 px", "3 classes (ADI, STR, TUM)", network.name, "non-commercial", str(out)):
        assert part in heard, part
    assert f"{read_card(out)['parameters']:,}" in heard
    main(["generate", str(out), str(tmp_path / "tiles"), "--per-class", "2", "--device", "cpu"])
    table = TileSet.open(tmp_path / "tiles").table
    assert sorted(table.label.tolist()) == ["ADI", "ADI", "STR", "STR", "TUM", "TUM"]


def test_a_checkpoint_goes_back_and_comes_again(network: Path, tmp_path: Path) -> None:
    main(["convert", str(network), str(tmp_path / "a.safetensors")])
    main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.pt")])
    main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "c.safetensors"), "--to", "nvidia"])
    value = torch.load(tmp_path / "b.pt", weights_only=True)
    assert value["G_ema"]["synthesis.b4.const"].shape == (16, 4, 4) and value["D_kwargs"]["c_dim"] == 3
    main(["convert", str(tmp_path / "b.pt"), str(tmp_path / "d.safetensors")])
    main(["convert", str(tmp_path / "c.safetensors"), str(tmp_path / "e.safetensors")])
    first, *others = (load_checkpoint(tmp_path / f"{k}.safetensors")[0] for k in "ade")
    for tensors in others:
        assert tensors.keys() == first.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, first[name], atol=1e-6, rtol=1e-6)


def test_a_training_starts_from_it(network: Path, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    main(["convert", str(network), str(out), "--classes", "ADI,STR,TUM"])
    generator, judge = Generator(SHAPE), Discriminator(SHAPE)
    start_from(str(out), generator, judge, ("TUM", "STR", "ADI"), seed=0)
    tensors, _ = load_checkpoint(out)
    assert torch.equal(generator.blocks["b8"].conv0.conv.weight, tensors["G_ema.blocks.b8.conv0.conv.weight"])
    assert torch.equal(generator.mapping.embedding, tensors["G_ema.mapping.embedding"].flip(0))
    assert torch.equal(judge.conv.weight, tensors["D.conv.weight"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["absent.pkl", "x.safetensors"], "absent.pkl"),
        (["NET", "x.pkl"], "x.pkl"),
        (["NET", "x.safetensors", "--classes", "a,b"], "3"),
        (["NET", "x.pt"], "network-snapshot"),
        (["NET", "x.pt", "--classes", "a"], "classes"),
        (["NET", "x.safetensors", "--to", "tensorflow"], ""),
    ],
)
def test_wrong_words_exit_with_2_and_write_nothing(
    words: list[str], named: str, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = [str(network) if w == "NET" else str(tmp_path / w) if "." in w else w for w in words]
    with pytest.raises(SystemExit) as caught:
        main(["convert", *full])
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / words[1]).exists()
