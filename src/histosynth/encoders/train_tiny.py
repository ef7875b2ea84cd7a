"""How `tissue-tiny` was made: `python -m histosynth.encoders.train_tiny --out FOLDER --minutes M`.

Simulated tissue of many hospitals teaches the network three things at once: to name the class, to measure
what is true of the tile (nuclei, glands, stain taken up), and to give two views of a tile that differ in
stain, focus, turn and compression the same features (VICReg: Bardes, Ponce & LeCun 2022, eq. 1 to 6), so
that the features carry more than the nine classes.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from histosynth.core.checkpoint import load_state, save_checkpoint, save_state
from histosynth.core.device import pick_device
from histosynth.core.files import atomic_path
from histosynth.core.progress import bar
from histosynth.core.run import Run, is_finished
from histosynth.core.seeds import derive, numpy_rng, torch_generator
from histosynth.encoders.colour import ColourEncoder
from histosynth.encoders.tiny import DIM, INPUT, TinyNetwork, TissueTiny
from histosynth.encoders.views import view
from histosynth.tiles.phantom import CLASSES, make_hospital, make_patient, render

CACHED_PX = 72
TRUTHS = ("nuclei per 1000 square micron (log)", "nuclei area", "gland area", "haematoxylin", "eosin")
_SOURCE_PX, _SOURCES_A_PART = 144, 90


@dataclass(frozen=True)
class TinyConfig:
    """Settings of the encoder's training."""

    sources: int = 3600
    """Simulated fields of the training hospitals; each gives three tiles."""
    probe_sources: int = 450
    """Fields of the held-out hospitals."""
    hospitals: int = 60
    """Training hospitals, of six patients each, with staining from alike to far apart."""
    field_min_um: float = 130.0
    """Smallest field; the tiles of a field are the whole of it and two crops of 45 to 80 % of its width."""
    field_max_um: float = 350.0
    """Largest field."""
    steps: int = 500
    """Training steps."""
    batch: int = 96
    """Tiles a step; each is seen in two views."""
    learning_rate: float = 2e-3
    """Highest learning rate of AdamW, after a warm-up and before a cosine decay."""
    weight_decay: float = 0.02
    """Weight decay of AdamW."""
    truth_weight: float = 0.5
    """Weight of the measured truths (Huber loss on standardised values) against the class loss (1)."""
    invariance_weight: float = 0.04
    """Weight of the VICReg terms, which are 25 invariance + 25 variance + 1 covariance."""
    minutes: float | None = None
    """Stop training after so many minutes; the decay of the learning rate then follows the clock."""
    save_every: int = 50
    """Steps between two resume states."""
    seed: int = 7001
    """Seed of hospitals, tiles and training."""


class Tissue(NamedTuple):
    """Simulated tiles with truths: images uint8 [N, 3, 72, 72], labels int64 [N], truths float32 [N, 5]."""

    images: np.ndarray
    labels: np.ndarray
    truths: np.ndarray


class Student(nn.Module):
    """The network with the heads that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = TinyNetwork()
        self.classes = nn.Linear(DIM, len(CLASSES))
        self.truths = nn.Linear(DIM, len(TRUTHS))
        self.projector = nn.Sequential(nn.Linear(DIM, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512))


def train_tissue_tiny(config: TinyConfig, folder: Path, *, device: str = "auto") -> Path:
    """Train the encoder; go on where an earlier call with the same settings stopped.

    Returns:
        folder/checkpoints/tissue-tiny.safetensors, in half precision, with the accuracy of a linear probe on
        held-out hospitals in its card.

    Raises:
        RunError: the folder holds a run with other settings, or cannot be written.
    """
    target = Path(folder) / "checkpoints" / "tissue-tiny.safetensors"
    if is_finished(folder) and target.exists():
        return target
    place = pick_device(device)
    with Run.open(folder, "train encoder", config) as run:
        # data
        tissue = simulate_tissue(config, Path(folder) / "cache", "training")
        held_out = simulate_tissue(config, Path(folder) / "cache", "held-out")
        centre, scale = tissue.truths.mean(0), tissue.truths.std(0)
        truths = torch.from_numpy((tissue.truths - centre) / scale)

        # model and optimiser
        torch.manual_seed(derive(config.seed, "weights"))
        student = Student().to(place).to(memory_format=torch.channels_last)
        matrices = [p for p in student.parameters() if p.ndim > 1]
        others = [p for p in student.parameters() if p.ndim <= 1]
        optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
        )
        first, spent = 0, 0.0
        if run.state_path.exists():
            state = load_state(run.state_path)
            first, spent = state["step"], state["spent"]
            student.load_state_dict(state["student"])
            optimiser.load_state_dict(state["optimiser"])
            run.truncate_log(first)

        # training
        cap = None if config.minutes is None else config.minutes * 60
        started, step = time.monotonic() - spent, first
        with bar("Encoder", config.steps, first) as tick:
            while step < config.steps and (cap is None or time.monotonic() - started < cap):
                done = max(step / config.steps, (time.monotonic() - started) / cap if cap else 0.0)
                rate = config.learning_rate * min(1, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * done))
                for group in optimiser.param_groups:
                    group["lr"] = float(rate)

                index = indices_at(len(tissue.labels), step, config)
                images = torch.from_numpy(tissue.images[index])
                labels = torch.from_numpy(tissue.labels[index]).to(place)
                known = truths[torch.from_numpy(index)].to(place)
                # one view as a user's tile, the other as far from it as hospitals and scanners go
                views = torch.cat(
                    [
                        view(images, INPUT, torch_generator(config.seed, "view a", step), strength=0.5),
                        view(images, INPUT, torch_generator(config.seed, "view b", step), strength=1.0),
                    ]
                ).to(place)
                with torch.autocast(place.type, torch.bfloat16):
                    features = student.network(views)
                    named = student.classes(features).float()
                    measured = student.truths(features).float()
                    one, two = student.projector(features).float().chunk(2)
                class_loss = F.cross_entropy(named, labels.repeat(2), label_smoothing=0.05)
                truth_loss = F.huber_loss(measured, known.repeat(2, 1))
                same, spread, apart = vicreg(one, two)
                loss = (
                    class_loss
                    + config.truth_weight * truth_loss
                    + config.invariance_weight * (25 * same + 25 * spread + apart)
                )
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(student.parameters(), 5.0)
                optimiser.step()
                step += 1

                tick(1, f"loss {loss.item():.2f}")
                if step % 20 == 0 or step == config.steps:
                    right = (named.argmax(1) == labels.repeat(2)).float().mean()
                    run.log(
                        step, loss=loss.item(), classes=class_loss.item(), accuracy=right.item(),
                        truths=truth_loss.item(), same=same.item(), spread=spread.item(), apart=apart.item(),
                    )  # fmt: skip
                if step % config.save_every == 0:
                    save_state(
                        run.state_path,
                        {
                            "step": step, "spent": time.monotonic() - started,
                            "student": student.state_dict(), "optimiser": optimiser.state_dict(),
                        },
                    )  # fmt: skip

        # the network alone, as it will be used: rounded to half precision, then probed
        tensors = {k: v.half().float() if v.is_floating_point() else v for k, v in student.network.state_dict().items()}
        finished = TinyNetwork()
        finished.load_state_dict(tensors)
        probe = {
            "tissue-tiny": probe_accuracy(TissueTiny(finished, ""), tissue, held_out),
            "colour": probe_accuracy(ColourEncoder(), tissue, held_out),
        }
        card = {
            "kind": "encoder",
            "name": "tissue-tiny",
            "config": asdict(config),
            "dim": DIM,
            "size": INPUT,
            "classes": list(CLASSES),
            "parameters": sum(p.numel() for p in finished.parameters()),
            "steps": step,
            "stopped_by_clock": step < config.steps,
            "seconds": round(time.monotonic() - started, 1),
            "probe_held_out_hospitals": probe,
            "licence": "Apache-2.0",
            "parents": [],
            "trained_on": f"{len(tissue.labels)} simulated tiles of {config.hospitals} simulated hospitals",
            "command": "python -m histosynth.encoders.train_tiny --out FOLDER"
            + (f" --minutes {config.minutes:g}" if config.minutes else ""),
        }
        save_checkpoint(target, tensors, card, half=True)
        run.finish(steps=step, probe=probe)
    return target


def vicreg(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Invariance, variance and covariance terms of two float batches [N, D] (Bardes et al. 2022)."""
    same = F.mse_loss(one, two)
    spread = one.new_zeros(())
    apart = one.new_zeros(())
    for side in (one, two):
        centred = side - side.mean(0)
        spread = spread + F.relu(1 - (centred.var(0) + 1e-4).sqrt()).mean() / 2
        covariance = centred.T @ centred / (len(side) - 1)
        apart = apart + (covariance.square().sum() - covariance.diagonal().square().sum()) / side.shape[1]
    return same, spread, apart


def indices_at(count: int, step: int, config: TinyConfig) -> np.ndarray:
    """The tiles of step `step`: a new random order every pass."""
    places = np.arange(step * config.batch, (step + 1) * config.batch)
    orders = {p: numpy_rng(config.seed, "order", int(p)).permutation(count) for p in np.unique(places // count)}
    return np.array([orders[p // count][p % count] for p in places])


def simulate_tissue(config: TinyConfig, cache: Path, side: str) -> Tissue:
    """The tiles of the "training" or "held-out" hospitals, in parts that are kept on disk."""
    sources = config.sources if side == "training" else config.probe_sources
    parts: list[dict[str, np.ndarray]] = []
    with bar(f"Simulate {side} tissue", sources) as tick:
        for start in range(0, sources, _SOURCES_A_PART):
            path = cache / f"{side}-{start:06d}.npz"
            stop = min(start + _SOURCES_A_PART, sources)
            if not path.exists():
                tiles = [tile for i in range(start, stop) for tile in _tiles_of(config, side, i)]
                images, labels, truths = zip(*tiles, strict=True)
                with atomic_path(path) as temporary:
                    np.savez(temporary, images=np.stack(images), labels=np.array(labels), truths=np.stack(truths))
            with np.load(path) as stored:
                parts.append({name: stored[name] for name in stored.files})
            tick(stop - start)
    return Tissue(*(np.concatenate([part[name] for part in parts]) for name in Tissue._fields))


def probe_accuracy(encoder: TissueTiny | ColourEncoder, tissue: Tissue, held_out: Tissue) -> float:
    """Accuracy on held-out hospitals of a logistic regression on features of the training hospitals."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = slice(0, min(3000, len(tissue.labels)))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    probe.fit(encoder.encode(torch.from_numpy(tissue.images[known])).numpy(), tissue.labels[known])
    features = encoder.encode(torch.from_numpy(held_out.images)).numpy()
    return float((probe.predict(features) == held_out.labels).mean())


def _tiles_of(config: TinyConfig, side: str, index: int) -> list[tuple[np.ndarray, int, np.ndarray]]:
    """One simulated field as three tiles, each (image [3, 72, 72], label, truths [5])."""
    rng = numpy_rng(config.seed, side, "source", index)
    label = index % len(CLASSES)
    house = int(rng.integers(config.hospitals))
    shift = float(numpy_rng(config.seed, side, "shift", house).uniform(0.2, 1.0))
    hospital = make_hospital(derive(config.seed, side, house), shift=shift)
    patient = make_patient(derive(config.seed, side, house, int(rng.integers(6))), hospital)
    field = float(np.exp(rng.uniform(np.log(config.field_min_um), np.log(config.field_max_um))))
    tile = render(
        CLASSES[label], patient=patient, seed=derive(config.seed, side, "tile", index), size=_SOURCE_PX, field_um=field
    )
    taken_up = tile.density / (patient.concentrations[:, None, None] * patient.thickness)
    found = []
    for width in (_SOURCE_PX, int(_SOURCE_PX * rng.uniform(0.62, 0.80)), int(_SOURCE_PX * rng.uniform(0.45, 0.62))):
        top, left = rng.integers(0, _SOURCE_PX - width + 1, size=2)
        window = (slice(top, top + width), slice(left, left + width))
        nuclei = tile.nuclei[window]
        area = (field * width / _SOURCE_PX) ** 2 / 1000
        truths = [
            np.log1p(np.count_nonzero(np.unique(nuclei)) / area),
            (nuclei > 0).mean(),
            tile.glands[window].mean(),
            *taken_up[:, window[0], window[1]].mean((1, 2)),
        ]
        pixels = torch.from_numpy(np.ascontiguousarray(tile.image[window].transpose(2, 0, 1)))[None].float()
        pixels = F.interpolate(pixels, (CACHED_PX, CACHED_PX), mode="bilinear", antialias=True)
        image = pixels[0].round().clamp(0, 255).to(torch.uint8).numpy()
        found.append((image, label, np.array(truths, np.float32)))
    return found


if __name__ == "__main__":
    import cyclopts

    def main(
        out: Path, *, config: Annotated[TinyConfig, cyclopts.Parameter(name="*")] = TinyConfig(), device: str = "auto"
    ) -> None:
        """Train the encoder tissue-tiny on simulated tissue into the folder OUT."""
        print(train_tissue_tiny(config, out, device=device))

    cyclopts.run(main)
