"""Progress with time left: a live bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LINE_EVERY_S = 15.0

Tick = Callable[..., None]


@lru_cache(maxsize=1)
def console() -> Console:
    """The console that progress and messages share (standard error, so that output can be piped)."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=quiet())


def quiet() -> bool:
    """HISTOSYNTH_QUIET=1 silences progress and messages."""
    return os.environ.get("HISTOSYNTH_QUIET", "") not in ("", "0")


def say(message: str) -> None:
    """Print a line to the user."""
    console().print(message, markup=False, soft_wrap=True)


@contextmanager
def bar(description: str, total: float, done: float = 0) -> Iterator[Tick]:
    """Give `tick(advance=1, note="")`.

    Args:
        description: what is being done.
        total: how many units there are.
        done: how many were done by an earlier, interrupted run.
    """
    if quiet():
        yield lambda advance=1, note="": None
    elif sys.stderr.isatty():
        with _live_bar(description, total, done) as tick:
            yield tick
    else:
        yield _line_printer(description, total, done)


@contextmanager
def _live_bar(description: str, total: float, done: float) -> Iterator[Tick]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console()) as progress:
        task = progress.add_task(description, total=total, completed=int(done), note="")

        def tick(advance: float = 1, note: str = "") -> None:
            if note:
                progress.update(task, advance=advance, note=note)
            else:
                progress.update(task, advance=advance)

        yield tick


def _line_printer(description: str, total: float, done: float) -> Tick:
    start = last = time.monotonic()
    count = done
    say(f"{description}: {done:g} of {total:g}" if done else f"{description} ...")

    def tick(advance: float = 1, note: str = "") -> None:
        nonlocal last, count
        count += advance
        now = time.monotonic()
        finished = count >= total > count - advance
        if now - last < _LINE_EVERY_S and not finished:
            return
        last = now
        left = (now - start) / max(count - done, 1e-9) * (total - count)
        tail = f"done in {duration(now - start)}" if finished else f"{duration(left)} left"
        say(f"{description}: {count:g} of {total:g}, {tail}{', ' + note if note else ''}")

    return tick


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 05 s, 2 h 10 min."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
