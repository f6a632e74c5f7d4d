"""One image that is open in the cluster: reads, size, and whether anybody can have written to it."""

import errno
import logging
import os
import struct
from collections.abc import Callable
from functools import partial
from typing import TypeVar, TypeVarTuple

import rados
import rbd
import trio

from rbdfs.ceph import header, librbd
from rbdfs.ceph.aio import Handover, ReadHandle
from rbdfs.ceph.errors import translated
from rbdfs.errors import BeyondEndError, RbdfsError, ReadError, StaleError
from rbdfs.spec import ImageSpec
from rbdfs.threads import in_thread, in_thread_to_its_end

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

OnComplete = Callable[[bytes | RbdfsError], None]

OpenHandle = Callable[[bool], ReadHandle]
"""Opens an image in librbd, read-only if told so; blocks, raises RbdfsError."""

# The argument of cls_lock's get_info, encoded: version 1, compatible with 1, length, the name of librbd's managed lock.
_GET_LOCK_INFO = struct.pack("<BBI", 1, 1, 4 + len("rbd_lock")) + header.encode_string("rbd_lock")


_MAP_INVALID = rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID

OBJECTS_ASKED_AT_ONCE = 256
"""Of an image without a fast-diff map: what SEEK_DATA waits for, some 10 ms at 0.3 ms a round trip."""


class CephImage:
    """The HEAD of an image that is open in librbd: an `ImageSource` (rbdfs/image/source.py).

    Where the key allows it the image is open as for writing, though nothing is ever written: only so does librbd hold a
    watch, and only with a watch is `rbd rm` refused meanwhile, and do reads follow a resize. `osd 'profile
    rbd-read-only'` allows no watch; then it is open read-only, and opened anew when the size has changed.
    """

    def __init__(
        self, spec: ImageSpec, image_id: str, ioctx: rados.Ioctx, handover: Handover, open_handle: OpenHandle
    ) -> None:
        """To be followed by `_open`; `open` does both. `ioctx` is closed with the image."""
        self.spec = spec
        self._header = header.object_name(image_id)
        self._id = image_id
        self._ioctx = ioctx
        self._handover = handover
        self._open_handle = open_handle
        self._in_flight: dict[ReadHandle, int] = {}
        self._one_is_idle = trio.Event()
        self._resizing = trio.Lock()

    @classmethod
    async def open(
        cls, spec: ImageSpec, image_id: str, ioctx: rados.Ioctx, handover: Handover, open_handle: OpenHandle
    ) -> "CephImage":
        """Open the image by `open_handle(read_only)`, which blocks. `ioctx` is given away. Raises RbdfsError."""
        image = cls(spec, image_id, ioctx, handover, open_handle)
        try:
            await image._open()
        except BaseException:
            ioctx.close()
            raise
        return image

    async def _open(self) -> None:
        try:
            self._handle, info = await in_thread_to_its_end(self._open_and_look)
        except RbdfsError as error:
            raise RbdfsError(f"cannot open {self.spec}: {error}", error.errno) from error
        self._handle.start()
        self._in_flight[self._handle] = 0
        self.size = info.size
        self.object_size = 1 << info.order
        self.stripe_unit = info.stripe_unit
        self.stripe_count = info.stripe_count

    def _open_and_look(self) -> tuple[ReadHandle, librbd.ImageInfo]:
        try:
            handle, self.is_watched = self._open_handle(False), True
        except RbdfsError as error:
            if error.errno != errno.EPERM:
                raise
            log.info("%s: the key may not watch the image, so nothing holds off its removal", self.spec)
            handle, self.is_watched = self._open_handle(True), False
        return handle, handle.info()

    def aio_read(self, offset: int, length: int, oncomplete: OnComplete) -> None:
        """See `ImageSource.aio_read`."""
        handle = self._handle
        self._in_flight[handle] += 1
        handle.aio_read(offset, length, partial(self._finish, handle, offset, length, oncomplete))

    def _finish(
        self, handle: ReadHandle, offset: int, length: int, oncomplete: OnComplete, result: int, data: bytes
    ) -> None:
        self._ended(handle)
        if result == length:
            oncomplete(data)
            return
        what = f"cannot read {self.spec} at {offset} (+{length})"
        if result >= 0 or result == -errno.EINVAL:
            oncomplete(BeyondEndError(f"{what}: the image ends before"))
        else:
            oncomplete(ReadError(f"{what}: {os.strerror(-result)}", -result))

    def _ended(self, handle: ReadHandle) -> None:
        self._in_flight[handle] -= 1
        if not self._in_flight[handle]:
            self._one_is_idle.set()
            self._one_is_idle = trio.Event()

    async def _blocking(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call what blocks and uses the open image, in a thread. A cancel abandons it, but `close` waits for it."""
        handle = self._handle
        self._in_flight[handle] += 1

        def call() -> T:
            try:
                return function(*args)
            finally:
                self._handover.post(partial(self._ended, handle))

        return await in_thread(call)

    async def refresh(self) -> int:
        """See `ImageSource.refresh`."""
        if await self._ask_size() != self.size:
            async with self._resizing:
                size = await self._ask_size()
                if size != self.size:
                    await self._follow_resize()
                    self.size = size
        return self.size

    async def _ask_size(self) -> int:
        try:
            size, _ = await header.get_size(self._handover, self._ioctx, self._id)
        except RbdfsError as error:
            if error.errno == errno.ENOENT:
                raise StaleError(f"{self.spec} was removed while it was open") from error
            raise
        return size

    async def _follow_resize(self) -> None:
        if self.is_watched:
            # librbd clips a read to the size that it knows before it looks at the header: this makes it look.
            await self._blocking(self._handle.info)
            return
        stale = self._handle
        await self._open()
        await self._close_handle(stale)

    async def extents_window(self) -> int:
        """See `ImageSource.extents_window`.

        With a valid fast-diff map librbd answers for the whole image at the price of loading the map, and loads it for
        each call. Without, each object is asked for its snapshots, ten at a time.
        """
        with translated(f"ask for the features of {self.spec}"):
            info = await self._blocking(self._handle.info)
        if info.features & rbd.RBD_FEATURE_FAST_DIFF and not info.flags & _MAP_INVALID:
            return max(info.size, 1)
        return OBJECTS_ASKED_AT_ONCE * self.object_size * self.stripe_count

    async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """See `ImageSource.extents`: `rbd_diff_iterate2` from the beginning of time, by whole objects."""
        with translated(f"ask where {self.spec} holds data"):
            return await self._blocking(self._handle.extents, offset, length)

    async def write_version(self) -> int | None:
        """See `ImageSource.write_version`.

        Whoever writes to an image with the exclusive-lock feature takes the lock first, which is an entry in the header
        object. So while the header has the same version and nobody holds the lock, nobody writes. (Reads, watches and
        what is written under a lock that is held do not move the version: tried with 16.2.)
        """
        with translated(f"ask for the state of {self.spec}"):
            return await self._blocking(self._ask_write_version)

    def _ask_write_version(self) -> int | None:
        # The version comes first: a lock that is taken or given back after it shows in the next version.
        self._ioctx.stat(self._header)
        version = int(self._ioctx.get_last_version())
        if not self._handle.info().features & rbd.RBD_FEATURE_EXCLUSIVE_LOCK:
            return None
        _, info = self._ioctx.execute(self._header, "lock", "get_info", _GET_LOCK_INFO)
        (lockers,) = struct.unpack_from("<I", info, 6)
        return None if lockers else version

    async def close(self) -> None:
        """See `ImageSource.close`."""
        await self._close_handle(self._handle)
        self._ioctx.close()

    async def _close_handle(self, handle: ReadHandle) -> None:
        while self._in_flight[handle]:
            await self._one_is_idle.wait()
        del self._in_flight[handle]
        try:
            await handle.aclose()
        except RbdfsError as error:
            log.warning("%s could not be closed in good order: %s", self.spec, error)
