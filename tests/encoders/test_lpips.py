"""LPIPS against the lpips package, with the same random networks."""

import pytest
import torch

from histosynth.core.errors import CheckpointError, DataError, SettingError
from histosynth.encoders.lpips import load_lpips

MODELS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


def backbone_file(net, folder):
    from torchvision import models

    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = getattr(models, MODELS[net])(weights=None).state_dict()
    # the classifier is of no use here, and is most of the file
    file = {k: torch.empty(v.shape) if k.startswith("features") else torch.zeros(1) for k, v in shapes.items()}
    for value in file.values():
        if value.ndim > 1:
            value.normal_(0, (1.5 / value[0].numel()) ** 0.5)
        else:
            value.normal_(0, 0.1)
    torch.save(file, folder / f"{net}.pth")
    return folder / f"{net}.pth"


@pytest.mark.parametrize("net", MODELS)
def test_the_same_distance_as_the_package(net, tmp_path):
    peer = pytest.importorskip("lpips")
    path = backbone_file(net, tmp_path)
    theirs = peer.LPIPS(net=net, pnet_rand=True, verbose=False)
    tensors = torch.load(path, weights_only=True)
    theirs.net.load_state_dict({k: tensors["features." + k.split(".", 1)[1]] for k in theirs.net.state_dict()})
    ours = load_lpips(net, path)
    one, two = torch.randint(0, 256, (2, 2, 3, 64, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = [x.float() / 127.5 - 1 for x in (one, two)]
    with torch.no_grad():
        expected = theirs(*floats).flatten()
        wrong_range = theirs(*(x.float() / 255 for x in (one, two))).flatten()
    found = ours(one, two)
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(
        ours.differentiable(*floats), expected, atol=1e-5
    )
    # the mistake of giving the package [0, 1] shrinks the distance; from uint8 it cannot be made
    assert (wrong_range < expected - 1e-3).all()


def test_a_distance(tmp_path):
    ours = load_lpips("squeeze", backbone_file("squeeze", tmp_path))
    one, two = torch.randint(0, 256, (2, 17, 3, 40, 40), dtype=torch.uint8)
    near = (one.int() + torch.randint(-3, 4, one.shape)).clamp(0, 255).to(torch.uint8)
    assert (ours(one, one) == 0).all() and torch.allclose(ours(one, two), ours(two, one), atol=1e-6)
    assert (ours(one, near) < ours(one, two)).all()
    assert torch.allclose(ours(one[16:], two[16:]), ours(one, two)[16:], atol=1e-5)
    assert ours(one[:0], two[:0]).shape == (0,)
    moving = (one[:1].float() / 127.5 - 1).requires_grad_()
    ours.differentiable(moving, two[:1].float() / 127.5 - 1).sum().backward()
    assert moving.grad.abs().sum() > 0 and moving.grad.isfinite().all()


def test_wrong_input(tmp_path, monkeypatch):
    ours = load_lpips("alex", backbone_file("alex", tmp_path))
    tiles = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    for one, two in ((tiles, tiles / 255), (tiles, tiles[:1]), (tiles[0], tiles[0]), (tiles[..., :9], tiles[..., :9])):
        with pytest.raises(DataError):
            ours(one, two)
    with pytest.raises(SettingError, match="alexnet"):
        load_lpips("alexnet")
    with pytest.raises(CheckpointError, match="does not fit lpips-vgg"):
        load_lpips("vgg", tmp_path / "alex.pth")
    monkeypatch.setenv("HISTOSYNTH_WEIGHTS", str(tmp_path / "none"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    with pytest.raises(CheckpointError, match="--fetch lpips-alex"):
        load_lpips("alex")
