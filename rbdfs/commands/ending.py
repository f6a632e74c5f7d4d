"""How a command ends that somebody wants to end: at a signal, and in time."""

import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

log = logging.getLogger(__name__)

STOP_SECONDS = 4.0
"""How long a stop waits for reads in flight and for images to close, before it ends the process all the same."""


async def until_signalled(work: Callable[[], Awaitable[None]]) -> signal.Signals | None:
    """Do the work, to its end or until SIGINT, SIGTERM or SIGHUP cancels it: that signal, None if it came to its end.

    What the work raises comes out of a nursery, maybe wrapped: it should raise nothing.
    """
    received: list[signal.Signals] = []
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_at_signal() -> None:
                received.append(signal.Signals(await anext(signals)))
                nursery.cancel_scope.cancel()

            nursery.start_soon(stop_at_signal)
            await work()
            nursery.cancel_scope.cancel()
    return received[0] if received else None


@contextmanager
def exit_at_the_latest(status: int, seconds: float = STOP_SECONDS) -> Iterator[None]:
    """Reads that no OSD answers must not keep a process alive that has nothing more to do: all is said by now."""

    def give_up() -> None:
        log.warning("images could not be closed within %s s; leaving them", seconds)
        logging.shutdown()
        os._exit(status)

    deadline = threading.Timer(seconds, give_up)
    deadline.daemon = True
    deadline.start()
    try:
        yield
    finally:
        deadline.cancel()
