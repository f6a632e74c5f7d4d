"""How a command ends that somebody wants to end: at a signal, and in time."""

import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

log = logging.getLogger(__name__)

SIGNALLED = 128
"""And the signal's number is the exit status: the shell's convention."""

STOP_SECONDS = 4.0
"""How long a stop waits for reads in flight and for images to close, before it ends the process all the same."""


async def until_signalled(
    work: Callable[[], Awaitable[None]], end: Callable[[signal.Signals | None], Awaitable[None]]
) -> None:
    """Do the work, to its end or until SIGINT, SIGTERM or SIGHUP cancels it; then end it, which no signal cuts short.

    `end` is given the signal, None if the work came to its end. The work must raise nothing: it would come out of a
    nursery, maybe wrapped.
    """
    received: list[signal.Signals] = []
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:
            working = trio.CancelScope()

            async def listen() -> None:
                async for number in signals:
                    received.append(signal.Signals(number))
                    working.cancel()

            nursery.start_soon(listen)
            with working:
                await work()
            await end(received[0] if working.cancelled_caught else None)
            nursery.cancel_scope.cancel()


@contextmanager
def exit_at_the_latest(status: int, last: Callable[[], None] = lambda: None) -> Iterator[None]:
    """What no OSD answers must not keep a process alive that has nothing more to do: all is said by now.

    `last` is called before it exits so, in another thread.
    """

    def give_up() -> None:
        log.warning("images could not be closed within %s s; leaving them", STOP_SECONDS)
        last()
        logging.shutdown()
        os._exit(status)

    deadline = threading.Timer(STOP_SECONDS, give_up)
    deadline.daemon = True
    deadline.start()
    try:
        yield
    finally:
        deadline.cancel()
