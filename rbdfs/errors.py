"""What can go wrong, as one family: each error carries the errno that a reader of the mount gets."""

import errno
import logging
from typing import Final

NOTICE: Final = logging.INFO + 5
"""The level of good news that an operator should see without -v: a trouble is over (syslog's `notice`)."""


class RbdfsError(Exception):
    """An error that is understood: a sentence for a person, an errno for a process.

    The sentence says what failed, on which image or pool, and where possible the next step.
    """

    errno: int = errno.EIO

    def __init__(self, message: str, errnum: int | None = None) -> None:
        super().__init__(message)
        if errnum is not None:
            self.errno = errnum


class UsageError(RbdfsError):
    """The command line, or what it names, cannot be right; nothing was tried."""

    errno = errno.EINVAL


class ConnectError(RbdfsError):
    """The cluster could not be reached or let us not in."""

    errno = errno.ENOTCONN


class MountError(RbdfsError):
    """The mount point cannot be used, or the kernel refused the mount."""


class ReadError(RbdfsError):
    """librbd could not read a range of an image; the errno is librbd's, EIO where it gave none."""


class BeyondEndError(ReadError):
    """librbd found the image to end before the range that was to be read: it is shorter than we knew, or still is."""

    errno = errno.EINVAL


class StaleError(RbdfsError):
    """The image or snapshot behind an open file is gone; what could be read of it would be zeros."""


class TargetError(RbdfsError):
    """What an image is copied to cannot be made, or not be written."""


class LabelError(TargetError):
    """A file is not known to be the copy that it would have to be, to be brought up to date by what has changed."""
