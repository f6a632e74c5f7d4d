"""How a command stops: at a signal, and in time."""

import logging
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

log = logging.getLogger(__name__)

SIGNALLED = 128
"""Plus the signal's number, this is the exit status after a signal, as shells have it."""

STOP_SECONDS = 4.0
"""How long a stop waits for reads in flight and for images to close; then it ends the process."""

TICKS = 16
"""It waits in so many steps: time in which this machine stood still, as a virtual one may, counts as one."""


async def until_signalled(
    work: Callable[[], Awaitable[None]], end: Callable[[signal.Signals | None], Awaitable[None]]
) -> None:
    """Do the work until it ends or SIGINT, SIGTERM or SIGHUP cancels it; then call `end`, which no signal cancels.

    `end` gets the signal, None if the work ended by itself. The work must raise nothing: a nursery might wrap it.
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
    """Exit with `status` if the body takes longer than `STOP_SECONDS`, because no OSD answers.

    All must be printed by then. `last` is called before such an exit, in another thread.
    """

    def give_up() -> None:
        if any(ended.wait(STOP_SECONDS / TICKS) for _ in range(TICKS)):
            return
        log.warning("images could not be closed within %s s; leaving them", STOP_SECONDS)
        last()
        logging.shutdown()
        os._exit(status)

    ended = threading.Event()
    threading.Thread(target=give_up, name="deadline", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
