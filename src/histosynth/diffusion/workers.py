"""Several processes that train one model, each with its share of a step's micro-batches.

    accelerate launch --num_processes 2 -m histosynth train diffusion TILES --accumulate 4 ...

Everything random in a step follows from the seed and the step's number, so that every process draws the whole step
and computes its share; gradients are added up over the processes. The result is that of one process but for the
order of the sum.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from histosynth.core.device import pick_device
from histosynth.core.errors import SettingError
from histosynth.core.run import Run

PATIENCE = timedelta(days=1)
"""How long a process waits for the first one, which refines decoders and embeds tiles alone."""


@dataclass
class Follower:
    """What stands for a `Run` in a process that writes nothing."""

    folder: Path
    resumed: bool = True

    @property
    def state_path(self) -> Path:
        return self.folder / "state" / "state.safetensors"

    def checkpoint_path(self, name: str) -> Path:
        return self.folder / "checkpoints" / f"{name}.safetensors"

    def truncate_log(self, step: int) -> None:
        """Nothing: the first process keeps the log."""


class Workers:
    """The processes that `accelerate launch` or torchrun started, or this one alone.

    Attributes:
        count: how many there are.
        rank: which one this is.
        main: whether this one writes files and speaks.
        device: where this one computes.
    """

    def __init__(self, device: str) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank, self._state = 0, None
        if self.count == 1:
            self.device = pick_device(device)
        else:
            from accelerate import PartialState

            self._state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
            self.rank, self.device = self._state.process_index, self._state.device
        self.main = self.rank == 0

    def check(self, accumulate: int, autoencoder: str) -> None:
        """Refuse settings that cannot be shared.

        Raises:
            SettingError: the processes do not divide the micro-batches, or an autoencoder would be trained first.
        """
        if accumulate % self.count:
            raise SettingError(
                f"accumulate is {accumulate} with {self.count} processes.", f"Give a multiple of {self.count}."
            )
        if self.count > 1 and autoencoder == "train":
            raise SettingError("autoencoder is 'train' with several processes.", "Train it first, and give its path.")

    @contextmanager
    def open_run(self, folder: Path | str, verb: str, settings: Any, parents: Sequence[str]) -> Iterator[Any]:
        """The run in the first process, a `Follower` in the others."""
        if self.main:
            with Run.open(folder, verb, settings, parents=parents) as run:
                self.wait()
                yield run
        else:
            self.wait()
            yield Follower(Path(folder))

    @contextmanager
    def first(self) -> Iterator[None]:
        """The first process goes through the block before the others do."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def wait(self) -> None:
        """Until every process is here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    def agree(self, over: bool) -> bool:
        """What the first process says: clocks may differ."""
        if self.count == 1:
            return over
        said = torch.tensor([float(over and self.main)], device=self.device)
        torch.distributed.broadcast(said, src=0)
        return bool(said.item())

    def mine(self, parts: Sequence[Any]) -> list[Any]:
        """This process's share of a step's micro-batches."""
        return list(parts[self.rank :: self.count])

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients over the processes, in place."""
        if self.count == 1:
            return
        for parameter in parameters:
            # a process whose share did not reach a parameter still takes part in the sum
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    def add(self, values: Tensor) -> Tensor:
        """Numbers added up over the processes."""
        if self.count > 1:
            values = values.to(self.device)
            torch.distributed.all_reduce(values)
        return values
