"""What an image is copied to, as a copy sees it: files and streams that are written, and files that are compared."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rbdfs.errors import TargetError
from rbdfs.image.backend import Buffer


class Target(Protocol):
    """Takes the bytes of an image. Its methods block, are called in worker threads, and raise TargetError."""

    in_order: bool = False
    """Whether writes and skips must come one at a time, in the order of the image, without gaps."""
    is_blank: bool = False
    """Whether each range that is neither written nor skipped reads as zeros."""

    def may_hold(self, offset: int, length: int) -> bool:  # noqa: ARG002
        """Whether `verified` may return the bytes of an earlier copy. Returns at once."""
        return False

    def verified(self, offset: int, length: int) -> Buffer | None:  # noqa: ARG002
        """The verified bytes of an earlier copy; None if they are missing or wrong."""
        return None

    def write(self, offset: int, data: Buffer) -> None:
        """Take bytes of the image that begin at the image offset `offset`. Unless `in_order`, threads may call it at
        the same time."""

    def skip(self, offset: int, length: int) -> None:
        """Take a range of the image that reads as zeros."""


class Output(Target, Protocol):
    """A target that becomes a copy of the image."""

    written_bytes: int

    def finish(self) -> None:
        """End the copy once all is written: sync it to the disk and close it. Raises TargetError."""

    def abandon(self) -> str:
        """Close an unfinished copy. Returns a sentence that says what is left of it, or nothing."""


@contextmanager
def errors_at(what: str, offset: int) -> Iterator[None]:
    """Turn an OSError into a TargetError: "cannot `what` at offset ...: ..."."""
    try:
        yield
    except OSError as error:
        raise TargetError(f"cannot {what} at offset {offset}: {error.strerror}", error.errno) from error


def lock(descriptor: int, operation: int, refusal: str) -> None:
    """Lock a file with flock(2) until it is closed. Raises OSError; TargetError(refusal) if somebody else has it."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        raise TargetError(refusal, errno.EBUSY) from None


def is_block_device(descriptor: int, path: Path) -> bool:
    """Whether it is a block device; False for a file. Raises TargetError for anything else."""
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISBLK(mode) and not stat.S_ISREG(mode):
        raise TargetError(f"{path} is neither a file nor a block device", errno.EINVAL)
    return stat.S_ISBLK(mode)
