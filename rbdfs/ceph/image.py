"""One image or snapshot that is open in the cluster: reads, size, and what others have done to it meanwhile."""

import errno
import logging
import struct
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar, TypeVarTuple

import rados
import rbd
import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph import header, librados
from rbdfs.ceph.aio import Handover, LibrbdImage
from rbdfs.ceph.changes import (
    GET_LOCK,
    SNAPSHOT_SECONDS,
    Format1Look,
    HeadLook,
    Look,
    Looks,
    SnapshotLook,
    locked_by,
)
from rbdfs.ceph.errors import reason_of, translated
from rbdfs.ceph.handles import Handles, Opened
from rbdfs.ceph.header_watch import HeaderWatch
from rbdfs.ceph.read_op import Call, ReadOperations, Request
from rbdfs.errors import BeyondEndError, RbdfsError, ReadError, StaleError
from rbdfs.spec import ImageSpec
from rbdfs.threads import in_thread

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

OnRead = Callable[[bytes | RbdfsError], None]
"""As the image's side has it (rbdfs/image/backend.py)."""

_MAP_INVALID = rbd.RBD_FLAG_OBJECT_MAP_INVALID | rbd.RBD_FLAG_FAST_DIFF_INVALID

OBJECTS_ASKED_AT_ONCE = 256
"""Of an image without a fast-diff map: what SEEK_DATA waits for, some 10 ms at 0.3 ms a round trip."""

REVALIDATE_SECONDS = 1.0
"""How often an image is looked at while it is read, so that readers served from the cache also learn that it was
removed."""

SNAPSHOT_VERSION = 0
"""The write version of what nobody writes to."""


class Asks(NamedTuple):
    """Where an image's header is asked, and how."""

    operations: ReadOperations
    ioctx: librados.Ioctx


class CephImage:
    """An image or a snapshot that is open in librbd: an `ImageBackend` (rbdfs/image/backend.py).

    It is open read-only, always: open as for writing, librbd takes the exclusive lock to list extents, and of an image
    with a journal even to read, away from the VM that writes to it. Read-only, librbd hears of nothing that others do,
    so we look ourselves (changes.py), open the image anew when its size has changed, and watch it where the key allows
    that: only so is `rbd rm` refused meanwhile. A snapshot is not watched, which would not hold off its removal.
    """

    def __init__(self, spec: ImageSpec, image: ImageRef, asks: Asks, handover: Handover, handles: Handles) -> None:
        """`open` does this, and opens the image."""
        self.spec = spec
        self.is_snapshot = image.snapshot_id is not None
        self.revalidate_due = False
        self.watch: HeaderWatch | None = None
        self._image = image
        self._header = header.object_of(image)
        self._asks = asks
        self._handover = handover
        self._handles = handles
        self._features = 0
        self._is_clone = False
        self._handle: LibrbdImage
        self._opened: Opened | None = None
        self._resizing = trio.Lock()

    @classmethod
    async def open(
        cls,
        spec: ImageSpec,
        image: ImageRef,
        ioctx: rados.Ioctx,
        asks: Asks,
        handover: Handover,
        handles: Handles,
    ) -> "CephImage":
        """Open the image by `handles`, and watch it by `ioctx`. Raises RbdfsError."""
        opened = cls(spec, image, asks, handover, handles)
        try:
            await opened._watch_and_open(ioctx)
            await opened._begin_to_look()
        except BaseException:
            with trio.CancelScope(shield=True):
                await opened._undo()
            raise
        return opened

    async def _watch_and_open(self, ioctx: rados.Ioctx) -> None:
        """Both at once, for each takes as long. What is removed before the watch holds that off, the first look finds
        gone."""
        version = await self._ask_header()
        failure: RbdfsError | None = None
        async with trio.open_nursery() as nursery:
            if not self.is_snapshot:
                nursery.start_soon(self._begin_to_watch, ioctx)
            try:
                await self._open(version)
            except RbdfsError as error:  # out of the nursery it would come in an ExceptionGroup
                failure = error
        if failure is not None:
            raise failure

    async def _begin_to_watch(self, ioctx: rados.Ioctx) -> None:
        self.watch = await HeaderWatch.begin(self.spec, ioctx, self._header, self._handover)

    async def _undo(self) -> None:
        if self._opened is not None:
            await self._handle.wait_until_idle()
            await self._handles.close(self._image, self._handle)
        if self.watch is not None:
            await self.watch.aclose()

    async def _ask_header(self) -> int | None:
        """The features, and whether it is a clone. Returns the version of `Opened`.

        None where more than the image's own header says what librbd opens: of a clone the headers of its parents, in
        the middle of a migration that of the source. Nor is it asked of format 1. Raises RbdfsError: ENOENT where there
        is no header.
        """
        if self._image.format == 1:
            return None
        calls = (
            header.GET_FEATURES,
            Call(b"parent_overlap_get", struct.pack("<Q", header.snapshot_id_of(self._image))),
        )
        reply = await self._asks.operations.ask(Request(self._asks.ioctx, self._header, calls))
        (self._features,) = struct.unpack_from("<Q", reply.answer(0, f"open {self.spec}"))
        result, overlap = reply.calls[1]  # an optional number; OSDs before Nautilus do not know the method
        # Once a clone, it is one until its close: reads of before it was flattened may still be under way.
        self._is_clone |= result < 0 or overlap[0] != 0
        return None if self._is_clone or self._features & rbd.RBD_FEATURE_MIGRATING else reply.version

    async def _open(self, version: int | None) -> None:
        try:
            self._opened = await self._handles.open(self._image, version)
        except RbdfsError as error:
            raise RbdfsError(f"cannot open {self.spec}: {error}{await self._hint(error)}", error.errno) from error
        self._handle, info, _ = self._opened
        self.size = info.size
        self.object_size = 1 << info.order
        self.stripe_unit = info.stripe_unit
        self.stripe_count = info.stripe_count

    async def _hint(self, error: RbdfsError) -> str:
        """What else there is to say of an image that cannot be opened."""
        if error.errno not in (errno.EPERM, errno.EACCES, errno.ENOENT):
            return ""
        try:
            reply = await self._asks.operations.ask(header.request(self._asks.ioctx, self._image))
            parent = header.decode(self._image, reply).parent
        except RbdfsError:
            return ""
        if parent is None:
            return ""
        where = f"image {parent.image.id} of pool {parent.image.namespace.pool.id}"
        if error.errno == errno.ENOENT:
            return f"; it is a clone: is its parent, {where}, still there?"
        return f"; it is a clone: the key must be allowed to read its parent as well, {where}"

    async def _begin_to_look(self) -> None:
        operations, ioctx = self._asks
        look: Look
        if self._image.format == 1:
            look = Format1Look(self.spec, self._image, operations, ioctx, self._watchers)
        elif self.is_snapshot:
            look = SnapshotLook(self.spec, self._image, operations, ioctx, size=self.size, features=self._features)
        else:
            look = HeadLook(self.spec, self._image, operations, ioctx, self._watchers, features=self._features)
        self._looks = Looks(look, self._set_revalidate_due)
        await self._looks.begin()
        trio.lowlevel.spawn_system_task(self._revalidate_later)

    async def _watchers(self) -> frozenset[int]:
        return await self._blocking(self._handle.watchers)

    def start_read(self, offset: int, length: int, callback: OnRead) -> None:
        """See `ImageBackend.start_read`."""
        try:
            self._handle.start_read(offset, length, partial(self._finish_read, offset, length, callback))
        except ValueError:  # closed by now
            callback(StaleError(f"cannot read {self.spec} at {offset}: it was closed; open it again"))

    def _finish_read(self, offset: int, length: int, callback: OnRead, result: int, data: bytes) -> None:
        """librbd has answered: these bytes are the image's, or may be what is left of one that was removed."""
        if result != length:
            what = f"cannot read {self.spec} at {offset} (+{length})"
            if result >= 0 or result == -errno.EINVAL:
                callback(BeyondEndError(f"{what}: the image ends before"))
            else:
                callback(ReadError(f"{what}: {reason_of(-result)}", -result))
            return
        # An object of HEAD that was removed or cut ends with a zero, but a clone's shows its parent's bytes.
        if self.is_snapshot:
            in_doubt = trio.current_time() - self._looks.in_place > SNAPSHOT_SECONDS
        else:
            unit = self.stripe_unit
            in_doubt = self._is_clone or not data[-1] or 0 in data[unit - 1 - offset % unit :: unit]
        if not in_doubt:
            callback(data)
            return
        self._handle.hold()
        self._looks.ask(partial(self._finish_if_in_place, self._handle, offset, callback, data))

    def _finish_if_in_place(
        self, handle: LibrbdImage, offset: int, callback: OnRead, data: bytes, looked: int | RbdfsError
    ) -> None:
        handle.release()
        what = f"cannot read {self.spec} at {offset} (+{len(data)})"
        if isinstance(looked, StaleError):
            callback(looked)
        elif isinstance(looked, RbdfsError):
            callback(ReadError(f"{what}: cannot tell zeros from what was removed: {looked}", looked.errno))
        elif looked < offset + len(data):
            callback(BeyondEndError(f"{what}: the image ends before"))
        else:
            callback(data)

    async def _blocking(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Call what blocks and uses the open image, in a thread. A cancel abandons it, but `close` waits for it."""
        handle = self._handle
        handle.hold()

        def call() -> T:
            try:
                return function(*args)
            finally:
                self._handover.post(handle.release)

        return await in_thread(call)

    @property
    def stale(self) -> StaleError | None:
        """See `ImageBackend.stale`."""
        return self._looks.stale

    def revalidate_soon(self) -> None:
        """See `ImageBackend.revalidate_soon`."""
        if self._looks.stale is not None:
            raise self._looks.stale
        self.revalidate_due = False
        self._handle.hold()
        self._looks.ask(partial(self._revalidated, self._handle))
        if self.watch is not None:
            self.watch.renew_if_lost()

    def _revalidated(self, handle: LibrbdImage, _: int | RbdfsError) -> None:
        handle.release()
        trio.lowlevel.spawn_system_task(self._revalidate_later)

    async def _revalidate_later(self) -> None:
        await trio.sleep(REVALIDATE_SECONDS)
        self.revalidate_due = True

    def _set_revalidate_due(self) -> None:
        self.revalidate_due = True

    async def verify(self) -> None:
        """See `ImageBackend.verify`."""
        if self._looks.stale is not None:
            raise self._looks.stale
        try:
            await self._looks.look()
        except StaleError as error:
            self._looks.mark_stale(error)
            raise

    async def refresh(self) -> int:
        """See `ImageBackend.refresh`."""
        if await self._ask_size() != self.size:
            async with self._resizing:
                size = await self._ask_size()
                if size != self.size:
                    await self._open_anew()  # librbd clips reads to the size that it knows
                    self.size = size
        return self.size

    async def _ask_size(self) -> int:
        if self._looks.stale is not None:
            raise self._looks.stale
        return (await self._looks.look()).size

    async def _open_anew(self) -> None:
        stale = self._handle
        await self._open(await self._ask_header())
        with trio.CancelScope(shield=True):
            await stale.wait_until_idle()
            await self._handles.close(self._image, stale)

    async def _flags(self) -> int:
        """As the header has them now. Raises RbdfsError."""
        if self._image.format == 1:
            return 0
        call = Call(b"get_flags", struct.pack("<Q", header.snapshot_id_of(self._image)))
        reply = await self._asks.operations.ask(Request(self._asks.ioctx, self._header, (call,)))
        return int.from_bytes(reply.answer(0, f"ask for the flags of {self.spec}"), "little")

    async def extents_window(self) -> int:
        """See `ImageBackend.extents_window`.

        With a valid fast-diff map librbd answers for the whole image at the price of loading the map, and loads it for
        each call. Without, each object is asked for its snapshots, ten at a time.
        """
        with translated(f"ask for the features of {self.spec}"):
            info = await self._blocking(self._handle.info)
            if not info.flags & _MAP_INVALID and await self._flags() & _MAP_INVALID:
                await self._open_anew()  # librbd would still believe the maps
                info = await self._blocking(self._handle.info)
        if info.features & rbd.RBD_FEATURE_FAST_DIFF and not info.flags & _MAP_INVALID:
            return max(info.size, 1)
        return OBJECTS_ASKED_AT_ONCE * self.object_size * self.stripe_count

    async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """See `ImageBackend.extents`: `rbd_diff_iterate2` from the beginning of time, by whole objects."""
        with translated(f"ask where {self.spec} holds data"):
            found = await self._blocking(self._handle.extents, offset, length)
        # What was removed is no hole.
        if await self._looks.settled_size() < offset + length:
            raise BeyondEndError(f"cannot ask where {self.spec} holds data: it was shrunk meanwhile")
        return found

    async def write_version(self) -> int | None:
        """See `ImageBackend.write_version`.

        Whoever writes to an image with the exclusive-lock feature takes the lock first, which is an entry in the header
        object. So while the header has the same version and nobody holds the lock, nobody writes. (Reads, watches and
        what is written under a lock that is held do not move the version: tried with 16.2.)
        """
        if self.is_snapshot:
            await self.verify()
            return SNAPSHOT_VERSION
        if self._image.format == 1:
            return None
        calls = (
            header.GET_FEATURES,
            GET_LOCK,
        )
        # One message: the version is of the moment when nobody held the lock.
        reply = await self._asks.operations.ask(Request(self._asks.ioctx, self._header, calls))
        what = f"ask for the state of {self.spec}"
        (features,) = struct.unpack_from("<Q", reply.answer(0, what))
        lockers = locked_by(reply.answer(1, what))
        return None if lockers or not features & rbd.RBD_FEATURE_EXCLUSIVE_LOCK else reply.version

    async def close(self) -> None:
        """See `ImageBackend.close`."""
        await self._handle.wait_until_idle()
        if self._opened is not None:
            await self._handles.close_later(self._image, self._opened)
        if self.watch is not None:
            await self.watch.aclose()
