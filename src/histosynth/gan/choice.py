"""Which weights the checkpoint gets: those whose tiles are nearest to validation tiles, not the last ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from histosynth.core.seeds import derive, numpy_rng
from histosynth.core.types import Score
from histosynth.gan.config import GanConfig
from histosynth.gan.guards import BestCheckpoint
from histosynth.gan.players import Players
from histosynth.gan.render import render
from histosynth.tiles.batches import TileArray


class Choice:
    """Scores the averaged generator against validation tiles and keeps the best weights.

    Attributes:
        best: the score and step of the best so far.
        curve: (step, score) of every look.
        kept: the weights of the best by network; empty before the first.
    """

    def __init__(self, config: GanConfig, validation: TileArray | None, score: Score | None) -> None:
        self.score, self.every = score, config.validate_every
        self.active = validation is not None and score is not None and config.validate_every > 0
        self.best = BestCheckpoint(score.name if score is not None else "", config.patience)
        self.curve: list[list[float]] = []
        self.kept: dict[str, dict[str, torch.Tensor]] = {}
        if validation is None or not self.active:
            return
        # a fixed number of fake tiles for every real one, so that the classes weigh the same on both sides
        picked: list[int] = []
        labels: list[int] = []
        for label, kinds in sorted(validation.members.items()):
            rows = numpy_rng(config.seed, "validation", label).permutation(np.concatenate([*kinds.values()]))
            picked += sorted(rows[: config.validate_per_class].tolist())
            labels += [label] * (min(len(rows), config.validate_per_class) * config.validate_draws)
        self.real = torch.from_numpy(np.ascontiguousarray(validation.images[picked]))
        self.labels = labels
        self.seeds = [derive(config.seed, "validation tile", k) for k in range(len(labels))]

    def due(self, step: int, last: bool) -> bool:
        """Whether to look after `step` steps."""
        return self.active and (last or step % self.every == 0)

    def look(self, step: int, players: Players) -> float:
        """Score the average after `step` steps; the smaller, the better."""
        assert self.score is not None
        found = self.score(self.real, render(players.average, self.labels, self.seeds))
        self.curve.append([step, found])
        if self.best.update(found, step):
            chosen = {name: network for name, network in players.networks.items() if name != "generator"}
            self.kept = {
                name: {k: v.detach().clone() for k, v in network.state_dict().items()}
                for name, network in chosen.items()
            }
        return found

    @property
    def latest(self) -> float:
        """The last score; not a number before the first."""
        return self.curve[-1][1] if self.curve else math.nan

    def card(self, step: int) -> dict[str, Any]:
        """What the card says of the choice after `step` steps."""
        if self.best.step < 0:
            return {"chosen_on": "last step", "chosen_step": step}
        return {
            "chosen_on": "val",
            "chosen_by": self.best.measure,
            "chosen_step": self.best.step,
            "chosen_score": self.best.score,
            "validation_tiles": len(self.real),
            "validation": self.curve,
        }

    def state(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"best": self.best.state(), "curve": self.curve, "kept": self.kept}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.best.restore(state["best"])
        self.curve, self.kept = state["curve"], state["kept"]
