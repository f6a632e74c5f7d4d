"""Tests that are coroutines."""

import functools
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, ParamSpec

import trio

P = ParamSpec("P")


def in_trio(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test in a trio loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        trio.run(partial(test, *args, **kwargs))

    return run
