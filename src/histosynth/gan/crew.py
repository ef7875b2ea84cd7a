"""The processes that share a training, one a GPU: started by `accelerate launch` or `torchrun`, otherwise just one.

Every process sees the same batch and learns from its own part of it; the gradients are averaged. Gradients are
averaged by hand, since the wrapper of torch does not know the second derivatives of the gradient penalty.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Self

import torch
from torch import Tensor

from histosynth.core.device import pick_device
from histosynth.core.errors import SettingError


class Crew:
    """This process among those that train together.

    Attributes:
        device: where this process computes.
        rank, count: its number, and how many there are.
    """

    def __init__(self, device: torch.device, accelerator: Any = None) -> None:
        self.device, self._accelerator = device, accelerator
        self.rank = accelerator.process_index if accelerator else 0
        self.count = accelerator.num_processes if accelerator else 1

    @classmethod
    def join(cls, device: str = "auto") -> Self:
        """The crew that the launcher started, or a crew of one on `device`.

        Raises:
            SettingError: there is no such device.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(pick_device(device))
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        # the others wait for the first one, which refines the decoder alone
        patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
        accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=[patience])
        return cls(accelerator.device, accelerator)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batch: int, accumulate: int) -> list[tuple[int, slice]]:
        """(number, rows) of the parts of a batch that this process takes, one after another.

        The numbers count over all processes: two processes draw what one process with twice the parts draws.

        Raises:
            SettingError: the batch cannot be divided so.
        """
        parts = self.count * accumulate
        if batch % parts:
            raise SettingError(
                f"batch is {batch}, for {self.count} process(es) with {accumulate} part(s) each.",
                f"Use a multiple of {parts}.",
            )
        rows = batch // parts
        mine = range(self.rank * accumulate, (self.rank + 1) * accumulate)
        return [(k, slice(k * rows, (k + 1) * rows)) for k in mine]

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its mean over the processes."""
        if self._accelerator is None:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self._accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="mean")
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all processes, one below the other."""
        return values if self._accelerator is None else self._accelerator.gather(values.contiguous())

    def any(self, flag: bool) -> bool:
        """Whether any process says yes; a process with something to decide alone must not go its own way."""
        if self._accelerator is None:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        return bool(self._accelerator.reduce(votes, reduction="sum").item())

    def led(self, value: float) -> float:
        """The first process's value, where each has its own, such as of its clock."""
        if self._accelerator is None:
            return value
        from accelerate.utils import broadcast

        found: Tensor = broadcast(torch.tensor([value], dtype=torch.float64, device=self.device))
        return float(found.item())

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
