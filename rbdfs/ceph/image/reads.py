"""Reads of an open image: librbd's bytes are passed on only if they are the image's.

librbd reads an object that is gone as zeros. So bytes that may be what is left of a removed image wait for a
revalidation (revalidate.py).
"""

import errno
import logging
from collections.abc import Callable
from functools import partial
from time import monotonic

import trio

from rbdfs.ceph.bindings.aio import LibrbdImage
from rbdfs.ceph.errors import reason_of
from rbdfs.ceph.image.reopening import ReopeningImage
from rbdfs.errors import BeyondEndError, RbdfsError, ReadError, StaleError

log = logging.getLogger(__name__)

OnRead = Callable[[bytes | RbdfsError], None]
"""As in rbdfs/image/backend.py."""

ATTEMPTS = 4
"""How often a read starts again because the image was reopened during it."""


class Reads:
    """Reads an image. All in the trio thread."""

    def __init__(self, image: ReopeningImage) -> None:
        self._image = image
        self._is_snapshot = image.is_snapshot
        self._health = image.health

    def start_read(self, offset: int, length: int, callback: OnRead, attempts: int = ATTEMPTS) -> None:
        """Start a read, as `ImageBackend.start_read` has it; start it again `attempts` times at most."""
        handle = self._image.handle
        try:
            handle.start_read(offset, length, partial(self._finish_read, handle, offset, length, callback, attempts))
        except ValueError:  # closed by now
            callback(StaleError(f"cannot read {self._image.spec} at {offset}: it was closed; open it again"))

    def _finish_read(
        self,
        handle: LibrbdImage,
        offset: int,
        length: int,
        callback: OnRead,
        attempts: int,
        result: int,
        data: bytes,
    ) -> None:
        """Pass on what librbd has read, or revalidate first if the image may have been removed or shrunk."""
        if result != length:
            self._fail_read(handle, offset, length, callback, attempts, result)
            return
        health = self._health
        health.last_result, health.last_at = result, monotonic()  # as `note`, without a call
        # An object of HEAD that was removed or cut ends with a zero, but a clone's shows its parent's bytes.
        image = self._image
        unit = image.stripe_unit
        if self._is_snapshot or image.may_show_parent or not data[-1] or 0 in data[unit - 1 - offset % unit :: unit]:
            handle.hold()
            image.revalidator.ask(partial(self._finish_if_valid, handle, offset, data, callback, attempts))
        else:
            callback(data)

    def _finish_if_valid(
        self,
        handle: LibrbdImage,
        offset: int,
        data: bytes,
        callback: OnRead,
        attempts: int,
        revalidated: int | RbdfsError,
    ) -> None:
        handle.release()
        what = self._what(offset, len(data))
        if isinstance(revalidated, StaleError):
            callback(revalidated)
        elif isinstance(revalidated, RbdfsError):
            callback(ReadError(f"{what}: cannot tell zeros from what was removed: {revalidated}", revalidated.errno))
        elif handle is not self._image.handle:  # another parent shows through now, or may have during the read
            if attempts:
                self.start_read(offset, len(data), callback, attempts - 1)
            else:
                callback(ReadError(f"{what}: the image and its parents change all the time", errno.EIO))
        elif revalidated < offset + len(data):
            callback(BeyondEndError(f"{what}: the image ends before"))
        else:
            callback(data)

    def _fail_read(
        self, handle: LibrbdImage, offset: int, length: int, callback: OnRead, attempts: int, result: int
    ) -> None:
        handle.lifetime.note(result)
        what = self._what(offset, length)
        if result >= 0 or result == -errno.EINVAL:
            callback(BeyondEndError(f"{what}: the image ends before"))
            return
        error = ReadError(f"{what}: {reason_of(-result)}", -result)
        if attempts and (result == -errno.ESHUTDOWN or handle.lifetime.is_over):
            handle.hold()
            again = partial(self.start_read, offset, length, callback, attempts - 1)
            trio.lowlevel.spawn_system_task(self._read_again, handle, again, callback, error)
        else:
            callback(error)

    async def _read_again(
        self, handle: LibrbdImage, again: Callable[[], None], callback: OnRead, error: RbdfsError
    ) -> None:
        """Read by a new connection if there is one, or if one can be made."""
        image = self._image
        try:
            if handle is image.handle and await handle.lifetime.is_over_after(error.errno):
                await image.revalidator.stable_size()  # which reopens the image
        except RbdfsError as failure:
            error = failure
        except Exception as failure:
            log.exception("a read could not be started again")
            error = RbdfsError(f"unexpected {type(failure).__name__}: {failure}")
        handle.release()
        try:
            if handle is image.handle:
                callback(error)
            else:
                again()
        except Exception:  # out of a system task it would end the mount for everyone
            log.exception("a read could not be answered")

    def _what(self, offset: int, length: int) -> str:
        return f"cannot read {self._image.spec} at {offset} (+{length})"
