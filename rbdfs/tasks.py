"""Work that runs to its end even if its caller is cancelled, and work that lets others run."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Final, TypeVar

import trio

log = logging.getLogger(__name__)

T = TypeVar("T")

SLICE: Final = 256
"""Items that are worked on before other tasks get their turn: at 10 µs each, a read waits for 3 ms."""


async def in_slices(items: Iterable[T], size: int = SLICE) -> AsyncIterator[T]:
    """The items; after each `size` of them other tasks get their turn. For loops over all images of a pool."""
    for number, item in enumerate(items, 1):
        yield item
        if not number % size:
            await trio.lowlevel.checkpoint()


class BackgroundTasks:
    """Runs work that must not be cut short, such as closing an image, in system tasks. All in the trio thread."""

    def __init__(self) -> None:
        self._running = 0
        self._idle = trio.Event()

    async def run(
        self, work: Callable[[], Awaitable[T]], unwanted: Callable[[T], Awaitable[object]] | None = None
    ) -> T:
        """Return what `work` returns, or raise what it raises. A cancel ends only the waiting: then `unwanted` gets the
        result."""
        ended = trio.Event()
        is_wanted = True
        results: list[T] = []
        errors: list[Exception] = []

        async def task() -> None:
            try:
                results.append(await work())
            except Exception as error:
                errors.append(error)
            finally:
                ended.set()
            if results and unwanted is not None and not is_wanted:
                await unwanted(results[0])

        self.start(task)
        try:
            await ended.wait()
        except trio.Cancelled:
            is_wanted = False
            if results and unwanted is not None:  # the work ended just before the cancel
                self.start(partial(unwanted, results[0]))
            raise
        if errors:
            raise errors[0]
        return results[0]

    async def wait(self) -> None:
        """Wait until nothing runs."""
        while self._running:
            await self._idle.wait()

    def start(self, work: Callable[[], Awaitable[object]]) -> None:
        """Start work that nobody waits for; its errors are logged."""
        self._running += 1
        trio.lowlevel.spawn_system_task(self._guarded, work)

    async def _guarded(self, work: Callable[[], Awaitable[object]]) -> None:
        try:
            await work()
        except Exception:  # out of a system task it would end the mount for everyone
            log.exception("a background task failed")
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
                self._idle = trio.Event()
