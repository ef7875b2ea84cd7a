"""Run tasks in several processes: bounded queues, a clean stop, and nothing left running when the parent dies.

Workers never come from a plain fork, because the parent may have the threads of torch or BLAS. A task depends on
its own arguments only, so the results are the same for any number of workers.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from histosynth.core.errors import RunError, SettingError

Task = TypeVar("Task")
Result = TypeVar("Result")

_METHOD = "forkserver" if sys.platform == "linux" else "spawn"
_WAITING = 2  # tasks a worker that are handed out ahead; more would only cost memory

_stop: Any = None  # in a worker: the event that asks it to stop
_setup: Callable[[], Callable[[Any], Any]] | None = None  # in a worker: makes what does a task
_work: Callable[[Any], Any] | None = None


class Stopped(Exception):
    """The parent asked a worker to stop in the middle of a task."""


def default_workers() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_stop() -> None:
    """Leave a task early when the parent wants to stop; called between tiles.

    Raises:
        Stopped: it does.
    """
    if _stop is not None and _stop.is_set():
        raise Stopped


def run_tasks(
    setup: Callable[[], Callable[[Task], Result]],
    tasks: Iterable[Task],
    workers: int,
    finished: Callable[[Result], None],
) -> None:
    """Do every task, in this process (workers = 1) or in several; `finished` gets the results as they come.

    Args:
        setup: picklable; called once a process, gives the function that does a task.
        tasks: picklable; taken from the iterable only as fast as they are done.
        workers: number of processes.
        finished: called in this process.

    Raises:
        SettingError: fewer than one worker.
        RunError: a worker died.
    """
    if workers < 1:
        raise SettingError(f"workers is {workers}.", "Give 1 or more.")
    if workers == 1:
        with one_thread():
            work = setup()
            for task in tasks:
                finished(work(task))
        return
    import multiprocessing

    context = multiprocessing.get_context(_METHOD)
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(stop, setup))
    try:
        queue = iter(tasks)
        waiting: set[Future[Result]] = {pool.submit(_do, t) for t in islice(queue, _WAITING * workers)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                finished(future.result())
            waiting |= {pool.submit(_do, t) for t in islice(queue, len(done))}
    except BrokenProcessPool as error:
        raise RunError(
            "A worker process ended without a word; most often the memory was used up.",
            "Repeat the command with fewer workers (--workers 1): finished parts are kept. In a script, "
            "make the call under `if __name__ == '__main__':`.",
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Numerical libraries use one thread, so that sums are added in the same order in every process."""
    from threadpoolctl import threadpool_limits

    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    with threadpool_limits(1):
        if torch:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)


def _start(stop: Any, setup: Callable[[], Callable[[Any], Any]]) -> None:
    global _stop, _setup
    from multiprocessing import parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"  # for libraries that this process loads from now on
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    _stop, _setup = stop, setup


def _die_with(sentinel: int) -> None:
    """Workers hold both ends of their queue, so they would wait for ever when the parent is killed."""
    from multiprocessing.connection import wait as wait_for

    wait_for([sentinel])
    os._exit(1)


def _do(task: Any) -> Any:
    global _work
    with one_thread():
        if _work is None and _setup is not None:  # here and not in the initialiser, whose errors would be lost
            _work = _setup()
        assert _work is not None
        return _work(task)
