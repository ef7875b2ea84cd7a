"""Run the cells of the grid that have no file yet: here, in several processes, or on a Ray cluster.

A cell depends on its own settings alone and runs on one thread, so the results are the same wherever it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from histosynth.classify.fit import ticks
from histosynth.core.device import pick_device
from histosynth.core.errors import RunError, SettingError
from histosynth.core.pool import default_workers, one_thread, run_tasks
from histosynth.core.progress import bar
from histosynth.study.usefulness.cells import (
    Material,
    Places,
    Settings,
    cell_path,
    cell_worker,
    judged_path,
    open_material,
    run_cell,
)
from histosynth.study.usefulness.plan import Cell


def run_grid(
    cells: Sequence[Cell],
    places: Places,
    settings: Settings,
    *,
    workers: int | None = None,
    ray: bool = False,
    material: Material | None = None,
) -> None:
    """Train and test every cell that is not whole.

    Args:
        workers: processes; None: all processors, or 1 where the classifiers are trained on a GPU.
        ray: hand the cells to Ray.
        material: of `places`, where the caller has it open already.

    Raises:
        SettingError: Ray was asked for and is not installed.
        RunError: a worker died, or a cell cannot be trained or written.
    """
    todo = [cell for cell in cells if not is_whole(cell, settings)]
    length = ticks(settings.kind, settings.config)
    device = pick_device(settings.device)
    workers = workers or (default_workers() if device.type == "cpu" else 1)
    with bar("Classifiers", len(cells) * length, (len(cells) - len(todo)) * length) as tick:
        if not todo:
            return
        if ray:
            run_on_ray(partial(cell_worker, places, settings), todo, workers, device.type, lambda _: tick(length))
        elif workers == 1 or len(todo) == 1:
            material = material or open_material(places)
            with one_thread():
                for cell in todo:
                    run_cell(cell, material, settings, lambda name=cell.arm.title: tick(1, name))
        else:
            workers = min(workers, len(todo))
            run_tasks(partial(cell_worker, places, settings), todo, workers, lambda done: tick(length, done.arm.title))


def is_whole(cell: Cell, settings: Settings) -> bool:
    """Whether all files of a cell are there."""
    path = cell_path(settings.out, cell.key)
    files = [path, path.with_suffix(".npz"), *([judged_path(settings.out, cell.seed)] if settings.judges(cell) else [])]
    return all(file.exists() for file in files)


def run_on_ray(
    setup: Callable[[], Callable[[Any], Any]],
    tasks: Iterable[Any],
    workers: int,
    device: str,
    finished: Callable[[Any], None],
) -> None:
    """As `core.pool.run_tasks`, with Ray's actors for processes.

    Args:
        setup: called once in every actor. On a cluster all nodes must see the same folders.
        device: "cuda": the actors share the GPUs evenly.

    Raises:
        SettingError: Ray is not installed.
        RunError: an actor died.
    """
    try:
        import ray
    except ImportError as error:
        remedy = "Install it (pip install 'histosynth[ray]'), or use --workers."
        raise SettingError("ray is asked for, but is not installed.", remedy) from error
    address = os.environ.get("RAY_ADDRESS")
    started = not ray.is_initialized()
    if started:
        local = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, **local)
    try:
        gpus = ray.cluster_resources().get("GPU", 0) if device == "cuda" else 0
        make = ray.remote(num_cpus=1, num_gpus=min(1.0, gpus / workers))(_Actor)
        actors = [make.remote(setup) for _ in range(workers)]
        queue = iter(tasks)
        running = {actor.work.remote(task): actor for actor, task in zip(actors, queue, strict=False)}
        while running:
            done, _ = ray.wait(list(running))
            for reference in done:
                actor = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # what the cell said, as it would be without Ray
                except ray.exceptions.RayActorError as error:
                    raise RunError(
                        "An actor of Ray ended without a word.", "Repeat the command: whole cells are kept."
                    ) from error
                finished(result)
                if (task := next(queue, None)) is not None:
                    running[actor.work.remote(task)] = actor
    finally:
        if started:
            ray.shutdown()


class _Actor:
    """A process of Ray's that keeps the tiles open between cells."""

    def __init__(self, setup: Callable[[], Callable[[Any], Any]]) -> None:
        with one_thread():
            self._work = setup()

    def work(self, task: Any) -> Any:
        with one_thread():
            return self._work(task)
