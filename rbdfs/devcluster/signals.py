"""The signals that ask us to end: when they may interrupt, and when they have to wait."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked us to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In the main thread: the first signal raises `Interrupted`; a second does not cut the clean-up short."""

    def interrupt(signum: int, _frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signum)

    previous = {each: signal.getsignal(each) for each in SIGNALS}
    try:
        for each, handler in previous.items():
            if handler is not signal.SIG_IGN:  # nohup, or a shell's background job
                signal.signal(each, interrupt)
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """What is begun in here is finished: a signal takes effect afterwards."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
