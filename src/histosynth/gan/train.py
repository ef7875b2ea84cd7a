"""Training the GAN: one function, read from top to bottom, that resumes by itself. What a step computes is in
`step.py`, what is written in `record.py`."""

from __future__ import annotations

import time
from pathlib import Path

from histosynth.core.progress import bar
from histosynth.core.types import Score
from histosynth.gan.choice import Choice
from histosynth.gan.config import GanConfig
from histosynth.gan.crew import Crew
from histosynth.gan.feed import Feed, usable
from histosynth.gan.players import pick_dtype, to_network
from histosynth.gan.record import CHECKPOINT, Books
from histosynth.gan.step import TrainingStep
from histosynth.tiles.batches import TileArray

__all__ = ["CHECKPOINT", "GanConfig", "TrainingStep", "pick_dtype", "to_network", "train_gan"]


def train_gan(
    data: TileArray,
    config: GanConfig,
    folder: Path | str,
    *,
    validation: TileArray | None = None,
    score: Score | None = None,
    device: str = "auto",
) -> Path:
    """Train a GAN on `data` in the run folder `folder`; repeat the call to resume.

    The weights after n steps are the same whether or not the training was killed on the way (CPU, one process).
    Under `accelerate launch` or `torchrun` the processes share every batch.

    Args:
        validation: tiles, of other patients, that choose the weights of the checkpoint. Without them, or without
            `score`, it gets the last ones.
        score: how far tiles are from real ones, such as the kernel distance.

    Returns:
        the path of the checkpoint: averaged generator ("G_ema."), discriminator ("D."), pathology head ("H."), card.

    Raises:
        DataError: tiles that cannot be used (see `usable`).
        SettingError, CheckpointError: `init`, an encoder or the device cannot be used, or the processes cannot share
            a batch.
        RunError: the folder holds another run, or a loss is not finite.
    """
    data, validation, config = usable(data, validation, config)
    crew = Crew.join(device)
    crew.share(config.batch, config.accumulate)  # refused here, not after the minutes of a decoder
    with Books(folder, data, validation, config, crew) as books:
        if books.target.is_file():
            return books.target
        steps = config.length(len(data), len(data.members))
        learner = TrainingStep(config, data.classes, crew, steps)
        choice = Choice(config, validation, score)
        step, spent, stopped_by = 0, 0.0, ""
        state, latents = books.state(), None
        if state is None:
            learner.players.load()
        else:
            learner.restore(state)
            choice.restore(state["choice"])
            step, spent, stopped_by = state["step"], state["seconds"], state["card"]["stopped_by"]
        if config.space == "latents":
            latents = books.latents(learner.players, refine=state is None)
        seconds_left = books.seconds
        pin = crew.device.type == "cuda"
        with Feed(data, config, steps, pin=pin, latents=latents, processes=crew.count) as feed:
            if state is None:
                learner.players.start(to_network(feed(0).images, crew.device))

            started = time.monotonic()
            with bar("Training the GAN", total=steps, done=step) as tick:
                while step < steps and not stopped_by:
                    batch = feed(step)
                    seconds = spent + time.monotonic() - started
                    on_clock = config.schedule == "clock" and seconds_left is not None
                    progress = crew.led(max(step / steps, seconds / seconds_left)) if on_clock else None
                    learner(step, batch.images, batch.labels, progress)
                    step += 1

                    # whether to go on; processes that share a training agree on it now and then
                    seconds = spent + time.monotonic() - started
                    row_due = step % config.log_every == 0
                    if step < steps and (crew.count == 1 or row_due):
                        if crew.any(seconds_left is not None and seconds >= seconds_left):
                            stopped_by = "clock"
                        elif row_due and crew.any(bool(learner.steering.stopped_by)):
                            stopped_by = learner.steering.stopped_by or "another process"
                    last = step == steps or bool(stopped_by)

                    # books
                    if choice.due(step, last):
                        if crew.leads:
                            choice.look(step, learner.players)
                        if crew.any(choice.best.stop) and not last:
                            stopped_by, last = "patience", True
                    note = ""
                    if row_due:
                        row = books.log(step, learner, choice, seconds)
                        note = f"D {row['d_loss']:.2f}, G {row['g_loss']:.2f}, p {row['ada_p']:.2f}"
                    tick(1, note)
                    if last or (config.sample_every and step % config.sample_every == 0):
                        books.sample(step, learner)
                    if last or step % config.save_every == 0:
                        books.save(step, learner, choice, seconds, stopped_by)
        books.finish(step, learner, choice, stopped_by)
    return books.target
