"""Replies to the kernel: data, errors, those of pyfuse3, and notifications."""

import errno
import logging
import os
from contextlib import suppress
from time import monotonic
from typing import Final

from rbdfs.errors import RbdfsError
from rbdfs.fuse import protocol
from rbdfs.fuse.protocol import REPLY
from rbdfs.fuse.requests import Requests
from rbdfs.fuse.trouble_log import TroubleLog
from rbdfs.image.backend import Buffer

log = logging.getLogger(__name__)

_GONE: Final = (errno.ENOENT, errno.ENODEV, errno.EBADF, errno.ECONNABORTED, errno.EPIPE)
"""The kernel's errors for a reply that nobody waits for: interrupted, answered before, unmounted, closed."""


class Replies:
    """Writes to the kernel's device. No method raises."""

    def __init__(self, kernel: int, requests: Requests, troubles: TroubleLog) -> None:
        """`kernel` is the descriptor of /dev/fuse."""
        self.kernel = kernel
        """-1 once nothing is answered any more."""
        self._requests = requests
        self._troubles = troubles

    def send(self, unique: int, reply: bytes | bytearray) -> None:
        """Pass on a whole reply."""
        try:
            os.write(self.kernel, reply)
        except OSError as error:
            self.refused(unique, error)

    def send_data(self, unique: int, data: Buffer) -> None:
        """Answer with data. `Device` does so for reads itself: a call for each would cost more."""
        try:
            os.writev(self.kernel, (REPLY.pack(REPLY.size + len(data), 0, unique), data))
        except OSError as error:
            self.refused(unique, error)
        else:
            self._requests.end(unique, 0, monotonic())

    def fail_with(self, unique: int, inode: int, operation: str, error: RbdfsError) -> None:
        """Answer with an error that operators should know of."""
        self._troubles.failed(inode, operation, error)
        self.fail(unique, error.errno)

    def fail(self, unique: int, error: int) -> None:
        """Answer with an errno; the kernel ignores it if the request is answered already."""
        if not 0 < error <= protocol.ERRNO_MAX or error == errno.ENOSYS:  # after ENOSYS the kernel never asks again
            error = errno.EIO
        self._requests.end(unique, error, monotonic())
        with suppress(OSError):
            os.write(self.kernel, REPLY.pack(REPLY.size, -error, unique))

    def refused(self, unique: int, error: OSError) -> None:
        """The kernel has refused a reply."""
        if error.errno in _GONE:
            log.debug("a reply was not taken: %s", error)
            self._requests.end(unique, 0, monotonic())
        else:
            log.error("a reply was refused, the process that asked gets EIO: %s", error)
            self.fail(unique, errno.EIO)

    def notify(self, inode: int) -> None:
        """Have the kernel ask for the attributes of an inode before it uses them again. Never waits."""
        with suppress(OSError):  # ENOENT: it does not know the inode; else it is unmounted
            os.write(self.kernel, protocol.invalidate_attributes(inode))
