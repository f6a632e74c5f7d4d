"""Tests that are coroutines, and how they wait for what is answered by a callback."""

import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any, ParamSpec, Protocol, TypeVar

import trio
import trio.testing

from rbdfs.errors import RbdfsError
from rbdfs.image.backend import Buffer, OnRead
from rbdfs.image.holes import Kind
from rbdfs.image.open_image import OpenImage

P = ParamSpec("P")
T = TypeVar("T")


def in_trio(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test in a trio loop of its own. In it, fixtures that are async context managers are entered."""

    async def run_with_fixtures(*args: P.args, **kwargs: P.kwargs) -> None:
        async with AsyncExitStack() as stack:
            for name, fixture in kwargs.items():
                if isinstance(fixture, AbstractAsyncContextManager):
                    kwargs[name] = await stack.enter_async_context(fixture)
            await test(*args, **kwargs)

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        trio.run(partial(run_with_fixtures, *args, **kwargs))

    return run


def with_a_clock(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """As `in_trio`, in no time: when all tasks sleep, the clock jumps."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        trio.run(partial(test, *args, **kwargs), clock=trio.testing.MockClock(autojump_threshold=0))

    return run


class Turns:
    """How often another task had its turn."""

    def __init__(self) -> None:
        self.count = 0

    async def take(self) -> None:
        """Until it is cancelled."""
        while True:
            self.count += 1
            await trio.lowlevel.checkpoint()


@asynccontextmanager
async def counted_turns() -> AsyncIterator[Turns]:
    """Those during the block."""
    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.take)
        yield turns
        nursery.cancel_scope.cancel()


class Reader(Protocol):
    """What bytes can be read from: an open image, or a backend."""

    def start_read(self, offset: int, length: int, callback: OnRead) -> None:
        """As `pread`, with a callback."""


async def read(reader: Reader, offset: int, length: int) -> Buffer:
    """One read, waited for. Raises its error."""
    return await answer(partial(reader.start_read, offset, length))


async def seek(image: OpenImage, offset: int, kind: Kind) -> int | None:
    """One seek, waited for. Raises its error."""
    return await answer(partial(image.start_seek, offset, kind))


async def answer(start: Callable[[Callable[[T | RbdfsError], None]], None]) -> T:
    """What the callback is given that `start` is called with. Raises it if it is an error."""
    answers: list[T | RbdfsError] = []
    answered = trio.Event()

    def callback(result: T | RbdfsError) -> None:
        answers.append(result)
        answered.set()

    start(callback)
    await answered.wait()
    assert len(answers) == 1
    result = answers[0]
    if isinstance(result, RbdfsError):
        raise result
    return result
