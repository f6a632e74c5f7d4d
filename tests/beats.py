"""A clock for upper bounds on a busy machine."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

BEAT_SECONDS = 0.01


@contextmanager
def beating() -> Iterator[Callable[[], float]]:
    """Tells seconds. It stands still when the machine does, and is slow when threads wait for a CPU."""
    beats = 0
    stop = threading.Event()

    def beat() -> None:
        nonlocal beats
        while not stop.wait(BEAT_SECONDS):
            beats += 1

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield lambda: beats * BEAT_SECONDS
    finally:
        stop.set()
        thread.join()
