"""Logs troubles, each with the image that has it."""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import trio

from rbdfs.errors import RbdfsError
from rbdfs.fuse.troubles import Line, Troubles
from rbdfs.spec import ImageSpec

log = logging.getLogger(__name__)

TELL_SECONDS = 5.0
"""How often to check whether a trouble is over."""

LAST_ERRORS: Final = 20
"""Errors to keep for `rbdfs status`."""


class LastError(NamedTuple):
    """An error that was answered."""

    at: float
    """In seconds since the epoch."""
    operation: str
    message: str


class TroubleLog:
    """Logs what `Troubles` says should be logged."""

    def __init__(self, troubles: Troubles, image_of: Callable[[int], ImageSpec | None]) -> None:
        """`image_of` says which image an inode is."""
        self.are_open = False
        """Whether anything is wrong. If not, `worked` need not be called, so that a successful read costs one test."""
        self.last: deque[LastError] = deque(maxlen=LAST_ERRORS)
        """The oldest first."""
        self._troubles = troubles
        self._image_of = image_of

    def failed(self, inode: int | None, operation: str, error: Exception) -> None:
        """Note that an operation has failed. Logs a traceback if the error is not one of ours."""
        now = trio.current_time()
        if isinstance(error, RbdfsError):
            text = self._troubles.fail(error.errno, inode, operation, str(error), now)
        else:
            sentence = f"{operation} failed unexpectedly, the process that asked gets EIO: {error!r}"
            text = self._troubles.fail(type(error).__name__, inode, operation, sentence, now)
        self.are_open = True
        self.last.append(LastError(time.time(), operation, str(error) or repr(error)))
        if text is not None:
            self._log(Line(logging.ERROR, text, inode), None if isinstance(error, RbdfsError) else error)

    def worked(self, inode: int | None, operation: str) -> None:
        """Note that an operation has worked while there is a trouble."""
        self._troubles.work(inode, operation, trio.current_time())

    def summary(self) -> str:
        """Return in one line what is wrong now; empty if nothing is."""
        return self._troubles.summary()

    async def tell(self) -> None:
        """Log troubles that go on and troubles that are over, until cancelled."""
        while True:
            await trio.sleep(TELL_SECONDS)
            for line in self._troubles.due(trio.current_time()):
                self._log(line)
            self.are_open = self._troubles.are_open

    def _log(self, line: Line, error: Exception | None = None) -> None:
        image = None if line.inode is None else self._image_of(line.inode)
        text = line.text if image is None or str(image) in line.text else f"{image}: {line.text}"
        log.log(line.level, "%s", text, exc_info=error, extra={"image": image})
