"""What a training writes: rows of the log, pictures, resume states, the checkpoint with its card, a film."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from histosynth.autoencoder.cache import latents_of
from histosynth.autoencoder.refine import refine_decoder, refinement
from histosynth.core.checkpoint import learned_before, load_state, read_card, save_state
from histosynth.core.errors import RunError
from histosynth.core.precision import Precision
from histosynth.core.progress import say
from histosynth.core.run import Run, plain
from histosynth.gan.choice import Choice
from histosynth.gan.config import GanConfig
from histosynth.gan.crew import Crew
from histosynth.gan.head import encoder_card, licence_of
from histosynth.gan.players import Players
from histosynth.gan.sample import write_grid
from histosynth.gan.step import TrainingStep
from histosynth.gan.transfer import export
from histosynth.tiles.batches import TileArray
from histosynth.tiles.film import film, training_frames

CHECKPOINT = "gan"
# after step and epoch; then the terms of the losses, the guards, KID, seconds and thousand tiles
_COLUMNS = (
    "d_loss", "g_loss", "real_mu", "real_min", "real_max", "fake_mu", "fake_min", "fake_max", "ada_p", "acc", "acc_ema",
    "alpha",
)  # fmt: skip


class Books:
    """The run folder of a training. In a crew only the first process writes; all can read.

    Attributes:
        target: path of the checkpoint.
    """

    def __init__(
        self, folder: Path | str, data: TileArray, validation: TileArray | None, config: GanConfig, crew: Crew
    ) -> None:
        """Raises:
        RunError: the folder holds another run.
        """
        self.data, self.config, self.crew = data, config, crew
        self.digest = data.digest()
        settings = plain(config) | {"data": self.digest}
        settings |= {"validation": validation.digest()} if validation is not None else {}
        self.run = Run(Path(folder), {}, resumed=False)
        if crew.leads:
            self.run = Run.open(folder, "train gan", settings, parents=config.parents())
        crew.wait()
        self.target = self.run.checkpoint_path(CHECKPOINT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.crew.leads:
            self.run.__exit__(kind, error, trace)

    def state(self) -> dict[str, Any] | None:
        """Where an earlier call stopped, or nothing."""
        path = self.run.state_path
        found = load_state(path) if path.exists() else None
        if self.crew.leads:
            self.run.truncate_log(found["step"] if found else 0)
        self.crew.wait()
        return found

    @property
    def _own_autoencoder(self) -> bool:
        """Whether the autoencoder is the one that the settings name, and not the start's."""
        return self.config.space == "latents" and self.config.init == "none"

    @property
    def seconds(self) -> float | None:
        """The cap on the training, less what the decoder took of it."""
        cap = self.config.seconds
        return cap and max(1e-6, cap - refinement(self.decoder).get("seconds", 0.0))

    @property
    def decoder(self) -> Path:
        """Where the decoder is refined."""
        return self.run.folder / "decoder"

    def latents(self, players: Players, refine: bool) -> tuple[np.ndarray, np.ndarray]:
        """The latents of all tiles, kept in the run folder; see `latents_of`.

        Args:
            refine: first teach the decoder these tiles, where that is wanted.
        """
        config, device = self.config, self.crew.device
        precision: Precision = "bf16" if players.dtype == torch.bfloat16 else "fp32"
        own = players.generator.autoencoder
        assert own is not None
        if not self.crew.leads:
            self.crew.wait()
        if refine and config.decoder:
            steps = config.length(len(self.data), len(self.data.members))
            refined = refine_decoder(
                self.data, own.cpu(), self.decoder, steps=round(steps * config.decoder),
                seconds=config.seconds and config.seconds * config.decoder, schedule=config.schedule,
                precision=precision, seed=config.seed, save_every=config.save_every, device=str(device),
            )  # fmt: skip
            players.set_autoencoder(refined, players.latent_space)
            own.to(device)
        found = latents_of(self.run.folder / "cache", self.data, own, config.seed, device, precision)
        if self.crew.leads:
            self.crew.wait()
        return found

    def log(self, step: int, learner: TrainingStep, choice: Choice, seconds: float) -> dict[str, float]:
        """Write a row of the log, and what the guards have to say; gives the row."""
        self.require_finite(learner, step)
        epoch = (step - 1) // self.config.epoch(len(self.data), len(self.data.members))
        found = learner.meter.row() | learner.steering.row()
        row = {"epoch": epoch, **{name: found.pop(name) for name in _COLUMNS}, **found}
        row |= {"kid": choice.latest} if choice.active else {}
        row |= {"seconds": seconds, "kimg": step * self.config.batch / 1000}
        warnings = learner.steering.take_warnings()
        if self.crew.leads:
            self.run.log(step, **row)
            for warning in warnings:
                say(f"Step {step}: {warning}")
        return row

    def sample(self, step: int, learner: TrainingStep) -> None:
        """A picture of the same codes of every class."""
        if self.crew.leads:
            write_grid(learner.players.average, self.run.sample_path(f"step-{step:06d}.png"), classes=self.data.classes)

    def save(self, step: int, learner: TrainingStep, choice: Choice, seconds: float, stopped_by: str) -> None:
        """Write what a resumed training needs, and a checkpoint of it where snapshots are wanted."""
        self.require_finite(learner, step)
        total = float(learner.players.total())
        if total - total != 0:
            raise self._diverged("weights", step - 1, total)
        state = learner.state() | {"choice": choice.state(), "step": step, "seconds": seconds}
        state["card"] = self._card(step, learner, choice, stopped_by)
        if self.crew.leads:
            save_state(self.run.state_path, state)
            if self.config.snapshots:
                export(self.run.state_path, self.run.checkpoint_path(f"{CHECKPOINT}-step-{step:06d}"), chosen=False)
        self.crew.wait()

    def finish(self, step: int, learner: TrainingStep, choice: Choice, stopped_by: str) -> None:
        """Write the checkpoint and the film."""
        if self.crew.leads:
            if self.config.head and self.config.alpha_gate and not learner.steering.alpha_seen:
                say("The gate never opened: alpha stayed 0 and the pathology head had no part in the training.")
            samples = self.run.folder / "samples"
            if self.config.film and len([*samples.glob("step-*.png")]) > 1:
                film(samples / "training.gif", training_frames(samples))
            export(self.run.state_path, self.target)
            results = {"steps": step, "stopped_by": stopped_by, "stopped_by_clock": stopped_by == "clock"}
            results |= {k: v for k, v in choice.card(step).items() if k != "validation"}
            self.run.finish(**results, **learner.steering.row(), checkpoint=str(self.target))
        self.crew.wait()

    def require_finite(self, learner: TrainingStep, step: int) -> None:
        """Raises:
        RunError: a loss was not finite; the last good weights are then in a checkpoint of their own.
        """
        bad = learner.meter.not_finite()
        if bad is not None:
            raise self._diverged(*bad)

    def _diverged(self, name: str, step: int, value: float) -> RunError:
        advice = "Train in a new folder with precision=fp32, or lower lr_g and lr_d."
        if self.run.state_path.exists() and self.crew.leads:
            rescued = export(self.run.state_path, self.run.checkpoint_path(f"{CHECKPOINT}-last-good"), chosen=False)
            advice += f" The last good weights are in {rescued}; init takes that path."
        return RunError(f"{name} is {value} at step {step}: the training diverged.", advice)

    def _card(self, step: int, learner: TrainingStep, choice: Choice, stopped_by: str) -> dict[str, Any]:
        config, data, players = self.config, self.data, learner.players
        seen_through = {encoder.card.name: encoder for encoder in players.encoders.values()}
        chosen = choice.card(step)
        if chosen["chosen_on"] == "val" and (both := [n for n in seen_through if n in choice.best.measure.split()]):
            chosen["chosen_note"] = f"The training saw gradients of {both[0]} too, so this score favours it."
        return {
            "kind": "gan",
            "name": f"gan-{config.size}",
            "config": plain(config),
            "shape": asdict(players.generator.shape),
            "classes": list(data.classes),
            "size": config.size,
            "parameters": sum(p.numel() for p in players.average.parameters()),
            "latent_space": players.latent_space,
            "parameters_discriminator": sum(p.numel() for p in players.discriminator.parameters()),
            "trainable": sum(p.numel() for p in [*players.making, *players.judging]),
            "init": config.init if config.init in ("base", "none") else Path(config.init).name,
            "steps": step,
            "kimg": step * config.batch / 1000,
            "stopped_by": stopped_by,
            "stopped_by_clock": stopped_by == "clock",
            "decoder": refinement(self.decoder),
            "encoders": {role: encoder_card(encoder) for role, encoder in players.encoders.items()},
            "licence": licence_of([*seen_through.values()], _inherited(config)),
            "parents": config.parents(),
            "trained_on": {"tiles": len(data), "classes": data.counts()},
            "data": self.digest,
            "learned_before": learned_before(config.init, config.autoencoder if self._own_autoencoder else "none"),
            "alpha_seen": learner.steering.alpha_seen,
            **chosen,
            "command": config.command(),
        }


def _inherited(config: GanConfig) -> str:
    """The licence of the weights that the training started from."""
    if config.init in ("base", "none"):
        return "Apache-2.0"
    return str(read_card(config.init).get("licence") or "unknown")
