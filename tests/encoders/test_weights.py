"""Weight files: where they are looked for, what is refused, and what the messages say."""

import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from histosynth import encoders
from histosynth.core.errors import CheckpointError, HistosynthError, SettingError
from histosynth.encoders.obtain import obtain
from histosynth.encoders.weights import candidates, file_hash, parse_weights, read_tensors


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    for name in ("HISTOSYNTH_WEIGHTS", "HF_HUB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_the_first_place_wins(machine, monkeypatch):
    inception = "pt_inception-2015-12-05-6726825d.pth"
    assert encoders.locate("inception-v3") is None
    hub = put(machine / "hub" / "checkpoints" / inception)
    assert encoders.locate("inception-v3") == encoders.locate("inception-v3-legacy") == hub
    ours = put(machine / "histosynth_weights" / "inception-v3" / inception)
    assert encoders.locate("inception-v3") == encoders.locate("inception-v3-legacy-tf") == ours
    monkeypatch.setenv("HISTOSYNTH_WEIGHTS_INCEPTION_V3", str(put(machine / "mine.pth")))
    assert encoders.locate("inception-v3") == machine / "mine.pth"
    assert encoders.locate("inception-v3", put(machine / "given.pth")) == machine / "given.pth"
    assert encoders.locate("inception-v3", machine / "absent.pth") is None, "what was named is not replaced"
    assert encoders.locate("inception-v3", ours.parent) == ours


def test_the_cache_of_hugging_face(machine):
    repository = machine / "hf_hub_cache" / "models--MahmoodLab--UNI2-h"
    put(repository / "snapshots" / "aaa" / "pytorch_model.bin")
    new = put(repository / "snapshots" / "bbb" / "pytorch_model.bin")
    put(repository / "refs" / "main").write_text("bbb\n")
    assert encoders.locate("uni2-h") == new
    assert encoders.locate("uni") is None


def test_a_common_file_name_alone_says_nothing(machine):
    put(machine / "histosynth_weights" / "pytorch_model.bin")
    put(machine / "hub" / "checkpoints" / "pytorch_model.bin")
    assert encoders.locate("uni") is None and encoders.locate("clip") is None
    assert encoders.locate("uni", put(machine / "histosynth_weights" / "uni" / "pytorch_model.bin"))


def test_no_two_encoders_share_a_place_by_accident():
    seen: dict = {}
    for card in encoders.cards():
        for place in candidates(card):
            other = seen.setdefault(place, card)
            assert other.name == card.name or card.shared_with in (other.name, other.shared_with)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_file_that_would_run_code_is_refused(machine, capsys):
    for name, save in (("a.pth", torch.save), ("b.pth", lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2)))):
        path = machine / name
        save({"cls_token": torch.zeros(1), "x": Evil()}, path)
        with pytest.raises(CheckpointError, match="runs code|cannot be read"):
            encoders.load("pathoduet", "cpu", weights=path)
    assert "code ran" not in capsys.readouterr().out


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=200), kind=st.sampled_from(["raw", "zip", "safetensors", "old"]), cut=st.integers(0, 400)
)
def test_damage_is_always_explained(tmp_path, data, kind, cut):
    from safetensors.torch import save_file

    path, tensors = tmp_path / "file", {"a": torch.ones(3), "b": torch.zeros(2, 2)}
    if kind == "raw":
        path.write_bytes(data)
    elif kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - cut, 0)] if kind != "raw" else whole)
    try:
        found = read_tensors(path)
    except CheckpointError as error:
        assert str(path) in str(error) and error.remedy
    else:
        assert torch.equal(found["a"], tensors["a"]) and kind != "raw"


def test_wrappers_prefixes_and_half_precision(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(
        {"epoch": 3, "model": {"module.backbone.w": torch.ones(2).half(), "module.backbone.n": torch.tensor(7)}}, path
    )
    found = read_tensors(path)
    assert set(found) == {"w", "n"} and found["w"].dtype == torch.float32 and found["n"].dtype == torch.int64
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        read_tensors(path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="no tensors"):
        read_tensors(path)


def test_the_hash_follows_the_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    first = file_hash(path)
    path.write_bytes(b"other")
    assert file_hash(path) != first


def test_weights_on_the_command_line(tmp_path):
    assert parse_weights(["a.pth"], ["uni"]) == {"uni": encoders.Path("a.pth")}
    odd = str(tmp_path / "lr=3.pth")
    assert parse_weights([odd, f"clip={odd}"], ["clip"]) == {"clip": encoders.Path(odd)}
    assert parse_weights(["lpips-alex=a.pth"], ["uni", "lpips-alex"]) == {"lpips-alex": encoders.Path("a.pth")}
    with pytest.raises(SettingError, match="Say which one"):
        parse_weights(["a.pth"], ["uni", "clip"])
    with pytest.raises(SettingError, match="names 'virchow2', but the encoders are uni"):
        parse_weights(["virchow2=a.pth"], ["uni"])


def test_a_cached_download_is_found_in_any_case(monkeypatch, tmp_path):
    """MahmoodLab/UNI is also offered as MahmoodLab/uni, and the cache is named after what was asked for."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    file = tmp_path / "models--MahmoodLab--uni" / "snapshots" / "abc" / "pytorch_model.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    (tmp_path / "models--MahmoodLab--UNI2-h" / "snapshots" / "abc").mkdir(parents=True)
    assert encoders.locate("uni") == file and encoders.locate("uni2-h") is None


@pytest.mark.parametrize(
    "name", ["uni2-h", "pathoduet", "virchow2", "h-optimus-0", "phikon-v2", "mobilenet-v2", "colour"]
)
def test_what_may_not_be_fetched_is_not(name, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("histosynth.encoders.obtain.fetch", never)
    with pytest.raises(HistosynthError):
        obtain(name)


def test_fetched_files_lie_where_they_are_found(monkeypatch, machine):
    asked = []

    def fake(url, path, *, size, digest, patience):
        asked.append((url, digest))
        put(path)

    monkeypatch.setattr("histosynth.encoders.obtain.fetch", fake)
    for name in ("inception-v3-legacy", "inception-v3", "dinov2-l", "clip", "lpips-vgg"):
        assert obtain(name).is_file()
    assert encoders.locate("inception-v3") and encoders.locate("dinov2-l") and encoders.locate("clip")
    assert len(asked) == 4 and asked[0][1] == "sha256:6726825d" and asked[-1][1] == "sha256:397923af"
    assert all(url.startswith("https://") for url, _ in asked)
