"""The recipe: accumulation, resuming after a kill, held-out loss, memory, and settings that cannot be."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from histosynth.autoencoder.cache import symmetries
from histosynth.autoencoder.train import AutoencoderConfig, split_apart, train_autoencoder
from histosynth.core.checkpoint import load_checkpoint, load_state, read_card
from histosynth.core.errors import DataError, SettingError
from histosynth.diffusion.adapter import Conditioner
from histosynth.diffusion.align import Alignment
from histosynth.diffusion.cache import open_cache
from histosynth.diffusion.config import DiffusionConfig, check_config
from histosynth.diffusion.draws import Source
from histosynth.diffusion.memory import activation_bytes, training_memory
from histosynth.diffusion.model import load_model
from histosynth.diffusion.noise import draw_levels
from histosynth.diffusion.start import choose_trained, halve
from histosynth.diffusion.train import losses, train_diffusion
from histosynth.diffusion.validation import Validation
from histosynth.tiles.batches import TileArray, symmetry
from tests.diffusion.helpers import CLASSES, TINY, ColourMeans, make_tiles, tuning

CPU = torch.device("cpu")
PRESETS = sorted((Path(__file__).parents[2] / "src/histosynth/presets/diffusion").glob("*.yaml"))


@pytest.fixture(scope="module")
def out_tiles() -> TileArray:
    """Tiles of other patients."""
    tiles = make_tiles(dict(zip(CLASSES, (3, 2, 3), strict=True)), seed=7)
    return replace(tiles, ids=[f"o{i}" for i in range(8)], groups=["p9"] * 8)


def gradients(base_path: Path, tiles: TileArray, folder: Path, **changes: object) -> dict[str, torch.Tensor]:
    """Those of one step, over all its micro-batches."""
    config = tuning(base_path, **changes)
    model = load_model(base_path)
    torch.manual_seed(0)
    choose_trained(model, config)
    raw = ColourMeans().encode(tiles.tensor()).numpy()
    cache = open_cache(folder, tiles, model.backbone, raw, config, CPU)
    embeddings = model.conditioner.standardise(torch.from_numpy(raw))
    for part in Source(tiles, cache, embeddings, config, CPU).parts(3):
        denoising, classes, _ = losses(model, part, config)
        ((denoising + config.ce_weight * classes) / config.accumulate).backward()
    named = {f"{k}.{n}": p for k, m in model.modules().items() for n, p in m.named_parameters()}
    return {name: p.grad for name, p in named.items() if p.grad is not None}


def test_micro_batches_give_the_gradient_of_the_whole_batch(base_path: Path, tiles: TileArray, tmp_path: Path) -> None:
    whole = gradients(base_path, tiles, tmp_path, batch=8, accumulate=1)
    parts = gradients(base_path, tiles, tmp_path, batch=8, accumulate=4)
    assert whole.keys() == parts.keys() and len(whole) > 20
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-5, rtol=1e-4, msg=name)
    again = gradients(base_path, tiles, tmp_path, batch=8, accumulate=4, checkpointing=True)
    for name, value in parts.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_a_training_killed_without_warning_ends_bit_for_bit_the_same(tmp_path: Path, base_path: Path) -> None:
    """SIGKILL between two states, with accumulation, averaged weights and a held-out loss; then the same again."""
    script = f"""
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from dataclasses import replace
from histosynth.diffusion.train import train_diffusion
from tests.diffusion.helpers import CLASSES, ColourMeans, make_tiles, tuning
tiles = make_tiles(dict(zip(CLASSES, (9, 7, 8), strict=True)))
out = replace(make_tiles({{c: 2 for c in CLASSES}}, seed=7), ids=[f"o{{i}}" for i in range(6)])
config = tuning(Path({str(base_path)!r}), steps=int(sys.argv[2]), batch=4, accumulate=2, save_every=2,
                validate_every=3, ema=0.9)
train_diffusion(tiles, config, sys.argv[1], device="cpu", encoder=ColourMeans(), held_out=out)
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "HISTOSYNTH_QUIET": "1"}
    command = [sys.executable, "-c", script, str(tmp_path / "killed"), "400"]
    process = subprocess.Popen(command, cwd=root, env=environment)
    state = tmp_path / "killed" / "state" / "state.safetensors"
    try:
        while not (state.exists() and load_state(state)["step"] >= 8):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    # the same settings but for the number of steps: take the killed run on to the step of its next states
    step = load_state(state)["step"]
    assert step < 400 and not (tmp_path / "killed" / "checkpoints").exists()
    tiles = make_tiles(dict(zip(CLASSES, (9, 7, 8), strict=True)))
    out = replace(make_tiles(dict.fromkeys(CLASSES, 2), seed=7), ids=[f"o{i}" for i in range(6)])
    config = tuning(base_path, steps=400, batch=4, accumulate=2, save_every=2, validate_every=3, ema=0.9)
    ended: list[dict[str, object]] = []
    for folder in ("killed", "whole"):
        stop = step + 4

        def at_stop(loss: float, now: int, setting: str, stop: int = stop) -> None:
            if now == stop:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("histosynth.diffusion.train.check_finite", at_stop)
            train_diffusion(tiles, config, tmp_path / folder, device="cpu", encoder=ColourMeans(), held_out=out)
        ended.append(load_state(tmp_path / folder / "state" / "state.safetensors"))
    killed, whole = ended
    assert killed["step"] == whole["step"] == step + 4
    for part in ("parameters", "averages"):
        assert all(torch.equal(killed[part][k], whole[part][k]) for k in whole[part])  # type: ignore[index]
    assert killed["best"]["loss"] == whole["best"]["loss"]  # type: ignore[index]
    rows = [(tmp_path / f / "metrics.csv").read_text() for f in ("killed", "whole")]
    assert rows[0] == rows[1] and "val_loss" in rows[0]


def test_the_weights_with_the_lowest_held_out_loss_are_kept(
    tiles: TileArray, out_tiles: TileArray, encoder: ColourMeans, base_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = tuning(base_path, steps=8, validate_every=2, save_every=8)
    path = train_diffusion(tiles, config, tmp_path / "honest", device="cpu", encoder=encoder, held_out=out_tiles)
    rows = [line.split(",") for line in (tmp_path / "honest/metrics.csv").read_text().splitlines()]
    found = {int(r[0]): float(r[rows[0].index("val_loss")]) for r in rows[1:]}
    card = read_card(path)
    assert list(found) == [2, 4, 6, 8] and all(0 < v < 10 for v in found.values())
    assert card["chosen_step"] == min(found, key=found.__getitem__)
    assert card["val_loss"] == pytest.approx(min(found.values()), rel=1e-4)

    said = {2: 3.0, 4: 1.0, 6: float("nan"), 8: 2.0}

    def measure(self: Validation, model: object, step: int) -> float:
        self.loss, self.step = said[step], step
        return self.loss

    monkeypatch.setattr(Validation, "measure", measure)
    path = train_diffusion(tiles, config, tmp_path / "run", device="cpu", encoder=encoder, held_out=out_tiles)
    card, made = read_card(path), load_checkpoint(path)[0]
    assert (card["chosen_on"], card["chosen_step"], card["val_loss"]) == ("held-out tiles", 4, 1.0)
    state = load_state(tmp_path / "run/state/state.safetensors")
    name = "conditioner.adapter.layers.0.weight"
    assert torch.equal(made[name], state["best"]["values"][name])
    assert not torch.equal(made[name], state["averages"][name])
    last = train_diffusion(tiles, tuning(base_path, steps=8), tmp_path / "last", device="cpu", encoder=encoder)
    assert "chosen_on" not in read_card(last) and torch.equal(load_checkpoint(last)[0][name], state["averages"][name])


def test_held_out_tiles_of_training_patients_are_refused(
    tiles: TileArray, out_tiles: TileArray, encoder: ColourMeans, base_path: Path, tmp_path: Path
) -> None:
    known = replace(tiles, groups=["p1"] * 12 + ["p9"] * 12)
    config = tuning(base_path, validate_every=2)
    with pytest.raises(DataError, match="'p9' first"):
        train_diffusion(known, config, tmp_path / "a", device="cpu", encoder=encoder, held_out=out_tiles)
    with pytest.raises(SettingError, match="no held-out tiles"):
        train_diffusion(tiles, config, tmp_path / "b", device="cpu", encoder=encoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 3, "batch": 4}, "accumulate is 3, which does not divide batch 4.*1, 2, 4"),
        ({"lora_blocks": "0,2"}, "denoiser has 2 blocks"),
        ({"lora_blocks": "1-0"}, "lora_blocks is '1-0'"),
        ({"lora_blocks": "-1"}, "lora_blocks is '-1'"),
        ({"lora_blocks": "1", "lora_targets": ("to_q", "transformer_blocks.0.attn1.to_k")}, "of the blocks 1"),
        ({"half_base": True}, "half_base is set with precision 'fp32'"),
        ({"class_join": "add"}, "class_join is 'add', but the start"),
        ({"levels": "even"}, "levels is 'even'"),
        ({"lr_lora": 0.0}, "lr_lora is 0.0"),
        ({"lr_lora": float("nan")}, "lr_lora is nan"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"min_snr": -1.0}, "min_snr is -1.0"),
        ({"decoder": 1.0}, "decoder is 1.0"),
        ({"lora_rank": 4096}, "lora_rank is 4096"),
        ({"align": 0.5, "encoder": "plain"}, "gives no feature maps"),
    ],
)
def test_settings_that_cannot_be_are_named(
    changes: dict[str, object], message: str, tiles: TileArray, base_path: Path, tmp_path: Path
) -> None:
    class Plain(ColourMeans):
        maps = None  # type: ignore[assignment]

    encoder = Plain() if "encoder" in changes else ColourMeans()
    with pytest.raises(SettingError, match=message):
        train_diffusion(tiles, tuning(base_path, **changes), tmp_path / "run", device="cpu", encoder=encoder)


def test_tiles_that_are_not_square_are_named(base_path: Path, encoder: ColourMeans, tmp_path: Path) -> None:
    images = np.zeros((2, 3, 24, 16), np.uint8)
    odd = TileArray(images, np.zeros(2, np.int64), ["a", "b"], ("X",))
    with pytest.raises(DataError, match="16 px by 24, but size is 16"):
        train_diffusion(odd, tuning(base_path), tmp_path / "run", device="cpu", encoder=encoder)


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_presets_hold_settings_that_there_are(path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    config = DiffusionConfig(**settings)
    check_config(config)
    assert path.stem.split("-")[1] == str(config.size)


def test_the_pixcell_preset_fits_a_card_of_8_gb() -> None:
    """PixCell-256 itself, on the meta device: shapes without values."""
    from histosynth.diffusion.model import with_conditioner
    from histosynth.diffusion.noise import Process
    from histosynth.diffusion.pixcell.model import PixCell
    from histosynth.diffusion.pixcell.shape import PixCellShape
    from histosynth.diffusion.pixcell.transformer import PixCellTransformer
    from histosynth.diffusion.pixcell.vae import build_vae
    from histosynth.diffusion.pixcell_backbone import PixCellBackbone

    preset = next(p for p in PRESETS if p.stem == "pixcell-256-lora")
    config = DiffusionConfig(**yaml.safe_load(preset.read_text()))
    with torch.device("meta"):
        parts = PixCellTransformer(), build_vae()
    whole = PixCell(*parts, PixCellShape(), Process("linear", "epsilon"), torch.zeros(1, 1536), {})
    backbone = PixCellBackbone(whole, {})
    model = with_conditioner(backbone, {"name": "uni2-h", "dim": 1536}, list("abcdefghi"), 256)
    choose_trained(model, config)
    halve(model, torch.float16)
    card = torch.device("cuda")  # nothing is put there
    found = training_memory(model, config, card)
    # by hand: 28 blocks, 8 layers, A and B of 1152 x 8; the adapter 1536 -> 3072 -> 1536; nine classes
    low_rank = 28 * 8 * 2 * 1152 * 8
    adapter = 1536 * 3072 + 3072 + 3072 * 1536 + 1536
    trained = low_rank + adapter + (9 + 1) * 1536 + 9 * 1536 + 9
    assert found.gradients == 4 * trained and found.optimiser == 12 * trained
    frozen = 608_072_960 * 2 + 83_819_683 * 4  # float16; the autoencoder asks for float32
    assert found.weights == pytest.approx(frozen + 4 * trained, rel=0.01)
    assert found.total < 4e9
    # without what saves memory, a batch of 4 at once in float32
    plain = replace(config, accumulate=1, checkpointing=False, half_base=False, precision="fp32")
    assert training_memory(model, plain, card).activations > 20 * found.activations
    encoder = 681_394_176 * 4  # UNI2-h stands beside the others while it embeds the tiles
    assert found.weights + encoder + found.overhead + 1e9 < 8e9


def test_activations_are_what_autograd_saves(base_path: Path) -> None:
    """The count on shapes alone against a real forward pass in float32."""
    model = load_model(base_path)
    choose_trained(model, tuning(base_path))
    network = model.transformer
    held = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    context = model.conditioner.untold(3).detach().contiguous().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.backbone.denoise(torch.randn(3, 4, 4, 4), torch.tensor([1, 2, 3]), context)
    counted = activation_bytes(model.backbone, 3, context.shape[1], half=None, checkpointing=False)
    assert counted == pytest.approx(sum(saved.values()), rel=0.02)
    twice = activation_bytes(model.backbone, 6, context.shape[1], half=None, checkpointing=False)
    assert twice == pytest.approx(2 * counted, rel=0.02)
    assert activation_bytes(model.backbone, 3, context.shape[1], half=None, checkpointing=True) < 0.8 * counted


def test_levels_are_drawn_as_they_say(rng: np.random.Generator) -> None:
    levels = draw_levels("logit-normal", 4000, rng)
    z = torch.logit((levels.double() + 0.5) / 1000)
    assert levels.min() >= 0 and levels.max() <= 999
    assert z.mean().abs() < 0.05 and z.std() == pytest.approx(1, abs=0.05)
    assert draw_levels("uniform", 4000, rng).float().std() == pytest.approx(1000 / 12**0.5, rel=0.02)


def test_views_in_the_cache_are_the_symmetries_of_the_tile(base_path: Path, tiles: TileArray, tmp_path: Path) -> None:
    model, config = load_model(base_path), tuning(base_path)
    raw = ColourMeans().encode(tiles.tensor()).numpy()
    cache = open_cache(tmp_path, tiles, model.backbone, raw, config, CPU)
    turns = symmetries(len(tiles), 8, config.seed)
    assert cache.latents.shape == (8, len(tiles), 4, 4, 4) and sorted(turns[0].tolist()) == list(range(8))
    picked, views = np.array([3, 20]), np.array([5, 2])
    images = torch.stack([symmetry(tiles.tensor()[i], int(turns[i, v])) for i, v in zip(picked, views, strict=True)])
    torch.testing.assert_close(cache.batch(picked, views), model.backbone.encode(images), atol=2e-3, rtol=2e-3)
    # other pixels under the same ids are other tiles
    other = replace(tiles, images=255 - tiles.images)
    assert not np.array_equal(open_cache(tmp_path, other, model.backbone, raw, config, CPU).latents, cache.latents)


def test_alignment_rewards_tokens_that_tell_the_maps(base_path: Path, encoder: ColourMeans) -> None:
    model = load_model(base_path)
    found = Alignment.of(model, encoder, tuning(base_path, align=0.5))
    assert found is not None
    maps = found.mapper(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8))
    assert maps.shape == (2, 3, 2, 2)
    levels = torch.tensor([100, 500])
    context, noisy = model.conditioner.untold(2).contiguous(), torch.randn(2, 4, 4, 4)
    optimizer = torch.optim.Adam(found.project.parameters(), 0.05)
    first = None
    for _ in range(30):
        model.backbone.denoise(noisy, levels, context)
        loss = found.loss(maps)
        first = first if first is not None else loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0 <= loss.item() < 0.5 * first <= 1


def test_training_with_alignment_leaves_nothing_of_it_behind(
    tiles: TileArray, encoder: ColourMeans, autoencoder_path: Path, base_path: Path, tmp_path: Path
) -> None:
    config = DiffusionConfig(init="none", autoencoder=str(autoencoder_path), align=0.5, levels="logit-normal", **TINY)
    path = train_diffusion(tiles, config, tmp_path / "run", device="cpu", encoder=encoder)
    assert load_checkpoint(path)[0].keys() == load_checkpoint(base_path)[0].keys()
    assert "align" in (tmp_path / "run/metrics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_with_the_frozen_weights_in_it(
    tiles: TileArray, encoder: ColourMeans, base_path: Path, tmp_path: Path, precision: str
) -> None:
    config = tuning(base_path, precision=precision, half_base=True, steps=3, save_every=2)
    path = train_diffusion(tiles, config, tmp_path / "run", device="cpu", encoder=encoder)
    base, made = load_checkpoint(base_path)[0], load_checkpoint(path)[0]
    name = "transformer.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(made[name].float(), base[name], atol=0.2, rtol=0.05)
    assert made["conditioner.adapter.layers.0.weight"].dtype == torch.float32


def test_told_nothing_passes_through_an_adapter_that_starts_as_nothing() -> None:
    torch.manual_seed(0)
    nothing = torch.randn(1, 6)
    conditioner = Conditioner(6, 3, 6, 1, join="add", identity=True, unconditional=nothing)
    raw = torch.randn(20, 6) * 3 + 1
    conditioner.measure(raw)
    told, labels = conditioner.standardise(raw), torch.arange(20) % 3
    context, logits = conditioner(told, labels)
    torch.testing.assert_close(context[:, 0], raw, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(conditioner.untold(2), nothing.expand(2, 1, 6))
    assert logits.shape == (20, 3)
    with torch.no_grad():
        conditioner.adapter.layers[-1].bias += 1
    torch.testing.assert_close(conditioner.untold(1)[0], nothing + 1)
    silent = torch.zeros(20, dtype=torch.bool)
    torch.testing.assert_close(conditioner(told, labels, silent, silent)[0], conditioner.untold(20))
    assert not conditioner.no_embedding.requires_grad


def test_class_joined_by_adding_or_not_at_all() -> None:
    torch.manual_seed(0)
    embeddings, labels = torch.randn(2, 6), torch.tensor([0, 1])
    added = Conditioner(6, 3, 8, 2, join="add")
    before, _ = added(embeddings, labels)
    assert before.shape == (2, 2, 8)
    with torch.no_grad():
        added.class_tokens.weight[1] = 2
    after, _ = added(embeddings, labels)
    torch.testing.assert_close(after - before, torch.tensor([0.0, 2])[:, None, None].expand(2, 2, 8))
    none = Conditioner(6, 3, 8, 2, join="none")
    assert torch.equal(none(embeddings, labels)[0], none(embeddings, labels.flip(0))[0])


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(tmp_path: Path, base_path: Path) -> None:
    """accelerate launch on two CPU processes: each computes every second micro-batch, and gradients are added up."""
    script = tmp_path / "train.py"
    script.write_text(f"""
import sys
import torch
torch.set_num_threads(1)
from pathlib import Path
from histosynth.diffusion.train import train_diffusion
from tests.diffusion.helpers import CLASSES, ColourMeans, make_tiles, tuning
tiles = make_tiles(dict(zip(CLASSES, (9, 7, 8), strict=True)))
config = tuning(Path({str(base_path)!r}), batch=4, accumulate=2, steps=4)
train_diffusion(tiles, config, sys.argv[1], device="cpu", encoder=ColourMeans())
""")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "HISTOSYNTH_QUIET": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    for folder, words in (("two", launch), ("one", [sys.executable])):
        done = subprocess.run([*words, str(script), str(tmp_path / folder)], cwd=root, env=environment,
                              capture_output=True, text=True, timeout=600, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_checkpoint(tmp_path / f / "checkpoints/diffusion.safetensors")[0] for f in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3, msg=name)
    moved = "conditioner.adapter.layers.0.weight"
    assert not torch.equal(one[moved], load_checkpoint(base_path)[0][moved])


def test_an_autoencoder_is_measured_on_other_patients(tmp_path: Path) -> None:
    tiles = replace(make_tiles({"A": 30, "B": 30}), groups=[f"p{i % 12}" for i in range(60)])
    config = AutoencoderConfig(size=16, steps=1, batch=4, width=8, blocks=1, held_out=0.1)
    train, test = split_apart(tiles, config)
    assert len(test) == 5 and set(test.groups or ()).isdisjoint(train.groups or ()) and len(train) == 55
    card = read_card(train_autoencoder(tiles, config, tmp_path / "run", device="cpu"))
    assert card["held_out_patients"] == 1 and card["held_out_tiles"] == 5
    alone = replace(tiles, groups=["p0"] * 60)
    assert len(split_apart(alone, config)[0]) == 60, "one patient cannot stand on both sides"


def test_the_base_is_trained_with_a_falling_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from histosynth.study import base

    class Enough(Exception):
        pass

    def stop(data: TileArray, settings: AutoencoderConfig, folder: Path, device: str) -> Path:
        assert settings.schedule == "clock" and settings.seconds == 60
        raise Enough

    monkeypatch.setattr("histosynth.autoencoder.train.train_autoencoder", stop)
    with pytest.raises(Enough):
        base._autoencoder(make_tiles({"A": 2}), base.BaseConfig(out=tmp_path, seconds=60), tmp_path / "run")
