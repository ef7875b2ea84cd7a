"""Exported networks give our logits, at any number of tiles, and say what they are."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
import torch

from histosynth.classify.config import ClassifierConfig
from histosynth.classify.export import FACTS, TOLERANCE, export
from histosynth.classify.fit import fit
from histosynth.classify.network import ARCHITECTURES
from histosynth.core.errors import RunError, SettingError
from histosynth.tiles.batches import TileArray

_CLASSES = ("A", "B", "C")


def _tiles(n: int, seed: int) -> TileArray:
    images = np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
    return TileArray(images, np.arange(n) % 3, [str(i) for i in range(n)], _CLASSES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    found = {}
    for name in ARCHITECTURES:
        config = ClassifierConfig(steps=2, batch=6, width=0.25, weights="none")
        model = fit(name, _tiles(12, 0), _tiles(24, 1), config, seed=0, device="cpu")
        found[name] = (model.save(folder / f"{name}.safetensors"), model)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torchscript(trained, tmp_path, name):
    path, model = trained[name]
    found = export(path, tmp_path / "net.ts")
    extra = {FACTS: ""}
    network = torch.jit.load(str(found.path), _extra_files=extra)
    _same(network, model, json.loads(extra[FACTS]))


def test_torch_export(trained, tmp_path):
    path, model = trained["resnet-18"]
    found = export(path, tmp_path / "net.pt2")
    extra = {FACTS: ""}
    network = torch.export.load(str(found.path), extra_files=extra).module()
    _same(network, model, json.loads(extra[FACTS]))


@pytest.mark.parametrize(
    "name", ["resnet-18", *(pytest.param(n, marks=pytest.mark.slow) for n in list(ARCHITECTURES)[:2])]
)
def test_onnx(trained, tmp_path, name):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path, model = trained[name]
    found = export(path, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(found.path), providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["histosynth"])
    _same(lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]), model, facts)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def _same(network, model, facts) -> None:
    assert facts["classes"] == list(_CLASSES) and facts["size"] == 32 and facts["temperature"] == model.temperature
    for n in (1, 7):
        images = _tiles(n, 5).tensor()
        expected = model.logits(images)
        with torch.no_grad():
            assert float((network(images) - expected).abs().max()) <= TOLERANCE * max(1, float(expected.abs().max()))


def test_what_cannot_be_exported_is_refused(trained, tmp_path, monkeypatch):
    path = trained["mobilenet-v2"][0]
    with pytest.raises(SettingError, match=r"\.ts, \.pt2, \.onnx"):
        export(path, tmp_path / "net.pt")
    probe = fit("knn:colour", _tiles(12, 0), _tiles(24, 1), seed=0, device="cpu")
    with pytest.raises(SettingError, match="probe"):
        export(probe.save(tmp_path / "probe.safetensors"), tmp_path / "net.ts")
    usual = builtins.__import__

    def without(name, *rest):
        if name == "onnx":
            raise ImportError(name=name)
        return usual(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingError, match=r"histosynth\[export\]"):
        export(path, tmp_path / "net.onnx")


def test_other_logits_are_noticed_and_nothing_is_left(trained, tmp_path, monkeypatch):
    from histosynth.classify import export as module

    monkeypatch.setitem(module.FORMS, ".ts", ("TorchScript", lambda *_: lambda tiles: torch.zeros(len(tiles), 3)))
    with pytest.raises(RunError, match="differ"):
        export(trained["mobilenet-v2"][0], tmp_path / "net.ts")
    assert not list(tmp_path.iterdir())
