"""Threads of matrix products."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def on_one_thread(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Run `function` with one thread in matrix products.

    For products so thin that threads only wait for each other, and whose sums, split over threads, would round
    differently.
    """

    @wraps(function)
    def run(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        with _blas().limit(limits=1):
            return function(*args, **kwargs)

    return run
