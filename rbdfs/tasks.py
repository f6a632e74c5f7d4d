"""Work that goes on to its end, whatever becomes of who waits for it."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import trio

log = logging.getLogger(__name__)

T = TypeVar("T")


class BackgroundTasks:
    """Runs what must not be cut short, as the closing of an image, in tasks of their own: a cancel of who waits for it
    ends the waiting alone. All in the trio thread."""

    def __init__(self) -> None:
        self._running = 0
        self._idle = trio.Event()

    async def run(
        self, work: Callable[[], Awaitable[T]], unwanted: Callable[[T], Awaitable[object]] | None = None
    ) -> T:
        """Returns what `work` returns, or raises what it raises. After a cancel `unwanted` gets what it returned."""
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
            if results and unwanted is not None:  # it ended at the moment of the cancel
                self.start(partial(unwanted, results[0]))
            raise
        if errors:
            raise errors[0]
        return results[0]

    async def wait(self) -> None:
        """Until nothing runs any more."""
        while self._running:
            await self._idle.wait()

    def start(self, work: Callable[[], Awaitable[object]]) -> None:
        """Begin what nobody waits for; what it raises is logged."""
        self._running += 1
        trio.lowlevel.spawn_system_task(self._guarded, work)

    async def _guarded(self, work: Callable[[], Awaitable[object]]) -> None:
        try:
            await work()
        except Exception:  # out of a system task it would end the mount for everyone
            log.exception("what nobody waits for has failed")
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()
                self._idle = trio.Event()
