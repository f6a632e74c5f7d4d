"""One image that is open in the cluster: reads, size, and whether anybody can have written to it."""

import errno
import logging
import os
import struct
from collections.abc import Callable
from functools import partial

import rados
import rbd
import trio

from rbdfs.ceph import header
from rbdfs.ceph.aio import Handover, in_thread, in_thread_to_its_end
from rbdfs.ceph.errors import errno_of, translated
from rbdfs.errors import BeyondEndError, RbdfsError, ReadError, StaleError
from rbdfs.spec import ImageSpec

log = logging.getLogger(__name__)

OnComplete = Callable[[bytes | RbdfsError], None]

# The argument of cls_lock's get_info, encoded: version 1, compatible with 1, length, the name of librbd's managed lock.
_GET_LOCK_INFO = struct.pack("<BBI", 1, 1, 4 + len("rbd_lock")) + header.encode_string("rbd_lock")


class CephImage:
    """The HEAD of an image, open through Ceph's `rbd` binding: an `ImageSource` (rbdfs/image/source.py).

    Where the key allows it the image is open as for writing, though nothing is ever written: only so does librbd hold a
    watch, and only with a watch is `rbd rm` refused meanwhile, and do reads follow a resize. `osd 'profile
    rbd-read-only'` allows no watch; then it is open read-only, and opened anew when the size has changed.
    """

    def __init__(self, spec: ImageSpec, image_id: str, ioctx: rados.Ioctx, handover: Handover) -> None:
        """Blocks; `open` is for trio. Raises Ceph's own errors. `ioctx` is closed with the image."""
        self.spec = spec
        self._id = image_id
        self._ioctx = ioctx
        self._handover = handover
        self._in_flight = 0
        self._idle = trio.Event()
        self._image = self._open()
        self.size: int = self._image.size()
        self.object_size: int = self._image.stat()["obj_size"]
        self.stripe_unit: int = self._image.stripe_unit()
        self.stripe_count: int = self._image.stripe_count()

    @classmethod
    async def open(cls, spec: ImageSpec, image_id: str, ioctx: rados.Ioctx, handover: Handover) -> "CephImage":
        """Open the image; `ioctx` is given away. Raises RbdfsError."""
        with translated(f"open {spec}"):
            try:
                return await in_thread_to_its_end(cls, spec, image_id, ioctx, handover)
            except BaseException:
                ioctx.close()
                raise

    def _open(self) -> rbd.Image:
        try:
            image = rbd.Image(self._ioctx, image_id=self._id, read_only=False)
            self.is_watched = True
        except rbd.PermissionError:
            image = rbd.Image(self._ioctx, image_id=self._id, read_only=True)
            self.is_watched = False
            log.info("%s: the key may not watch the image, so nothing holds off its removal", self.spec)
        return image

    def aio_read(self, offset: int, length: int, oncomplete: OnComplete) -> None:
        """See `ImageSource.aio_read`."""
        self._in_flight += 1

        def arrived(completion: rbd.Completion, data: bytes) -> None:
            self._handover.post(partial(finish, completion.get_return_value(), data))

        finish = partial(self._finish, offset, length, oncomplete)
        try:
            self._image.aio_read(offset, length, arrived)
        except (rados.Error, rbd.Error) as error:
            self._handover.post(partial(finish, -errno_of(error), b""))

    def _finish(self, offset: int, length: int, oncomplete: OnComplete, result: int, data: bytes) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._idle.set()
            self._idle = trio.Event()
        if result == length:
            oncomplete(data)
            return
        what = f"cannot read {self.spec} at {offset} (+{length})"
        if result >= 0 or result == -errno.EINVAL:
            oncomplete(BeyondEndError(f"{what}: the image ends before"))
        else:
            oncomplete(ReadError(f"{what}: {os.strerror(-result)}", -result))

    async def refresh(self) -> int:
        """See `ImageSource.refresh`."""
        try:
            size, _ = await header.get_size(self._handover, self._ioctx, self._id)
        except RbdfsError as error:
            if error.errno == errno.ENOENT:
                raise StaleError(f"{self.spec} was removed while it was open") from error
            raise
        if size != self.size:
            if self.is_watched:
                # librbd clips a read to the size that it knows before it looks at the header: size() makes it look.
                await in_thread(self._image.size)
            else:
                await self._reopen()
        self.size = size
        return size

    async def _reopen(self) -> None:
        stale = self._image
        with translated(f"open {self.spec} again after a resize"):
            self._image = await in_thread_to_its_end(self._open)
            await in_thread_to_its_end(stale.close)

    async def write_version(self) -> int | None:
        """See `ImageSource.write_version`.

        Whoever writes to an image with the exclusive-lock feature takes the lock first, which is an entry in the header
        object. So while the header has the same version and nobody holds the lock, nobody writes. (Reads, watches and
        what is written under a lock that is held do not move the version: tried with 16.2.)
        """
        with translated(f"ask for the state of {self.spec}"):
            return await in_thread(self._ask_write_version)

    def _ask_write_version(self) -> int | None:
        # The version comes first: a lock that is taken or given back after it shows in the next version.
        self._ioctx.stat(header.object_name(self._id))
        version = int(self._ioctx.get_last_version())
        if not self._image.features() & rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
            return None
        _, info = self._ioctx.execute(header.object_name(self._id), "lock", "get_info", _GET_LOCK_INFO)
        (lockers,) = struct.unpack_from("<I", info, 6)
        return None if lockers else version

    async def close(self) -> None:
        """See `ImageSource.close`."""
        while self._in_flight:
            await self._idle.wait()
        try:
            await in_thread_to_its_end(self._close)
        except (rados.Error, rbd.Error):
            log.warning("%s could not be closed in good order", self.spec, exc_info=True)

    def _close(self) -> None:
        try:
            self._image.close()
        finally:
            self._ioctx.close()
