"""The one thread boundary: what librados and librbd do in threads of their own → the task in trio that waits for it.

Two ways lead over it. By librbd's event API a completion is a count on an eventfd, and the trio thread fetches what is
there when it gets to it: no thread of Ceph's ever needs the GIL. By a callback, as Ceph's Python bindings have it, each
completion runs Python in one of Ceph's threads; it does one thing there, hand over what it got, and leaves, and a batch
of them costs one wake-up of the trio thread. Image data comes by events (measured: README, "Benchmarks"), by callbacks
where that cannot be had; the few answers of object classes always come by callbacks.
"""

import logging
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Generic, Protocol, TypeVar

import rados
import rbd
import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph import librados, librbd
from rbdfs.ceph.errors import errno_of, translated
from rbdfs.ceph.memory import Data
from rbdfs.threads import in_thread_to_its_end

log = logging.getLogger(__name__)

T = TypeVar("T")

Deliver = Callable[[int, Data], None]
"""Takes a read's result, a count of bytes or a negative errno, and the bytes."""


class Handover:
    """Carries calls from any thread into the trio thread, in order."""

    def __init__(self) -> None:
        """To be made in the trio thread that is to be called."""
        self._token = trio.lowlevel.current_trio_token()
        self._arrived: deque[Callable[[], None]] = deque()
        self._woken = False

    def post(self, delivery: Callable[[], None]) -> None:
        """Have `delivery` called in the trio thread. For any thread; returns at once, never raises."""
        self._arrived.append(delivery)
        # If this reads a flag that _deliver is about to clear, _deliver has not looked at the queue yet.
        if not self._woken:
            self._woken = True
            try:
                self._token.run_sync_soon(self._deliver)
            except trio.RunFinishedError:
                log.debug("a completion arrived after the end")

    def _deliver(self) -> None:
        self._woken = False
        while self._arrived:
            try:
                self._arrived.popleft()()
            except Exception:
                log.exception("a completion could not be delivered")


class Answer(Generic[T]):
    """The one result that a task waits for."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._values: list[T] = []

    def give(self, value: T) -> None:
        """In the trio thread, once."""
        self._values.append(value)
        self._event.set()

    async def get(self) -> T:
        """A cancel abandons what was asked for: its result is dropped."""
        await self._event.wait()
        return self._values[0]


class ReadHandle(Protocol):
    """An image that is open in librbd, whichever way its completions come. All but `aio_read` blocks."""

    def start(self) -> None:
        """In the trio thread, before the first read."""

    def aio_read(self, offset: int, length: int, deliver: Deliver) -> None:
        """Start a read; `deliver` is called later, in the trio thread. Never raises."""

    def info(self) -> librbd.ImageInfo:
        """Size, layout, features and flags, after a look at the header if it has changed."""

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Where a range holds data, the parent's included: (image offset, length) pairs of whole objects."""

    def watchers(self) -> frozenset[int]:
        """The clients that watch the image's header, by their ids."""

    def open_raw(self) -> librbd.Image[None] | None:
        """The image once more, for reads by C calls alone; None where reads need callbacks in Python. Blocks."""

    async def aclose(self) -> None:
        """Close. No read may be in flight. Raises RbdfsError."""


class EventImage:
    """Reads by librbd's event API."""

    def __init__(self, ioctx: librados.Ioctx, image: ImageRef) -> None:
        """Blocks. Raises RbdfsError."""
        self._open = partial(
            librbd.open_image, ioctx, image_id=image.id, snap_id=image.snapshot_id, by_name=image.format == 1
        )
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._image: librbd.Image[Deliver] = self._open(self._event)
        except BaseException:
            os.close(self._event)
            raise
        self.info = self._image.info
        self.watchers = self._image.watchers
        self._dispatching = trio.CancelScope()

    def start(self) -> None:
        """See `ReadHandle.start`."""
        trio.lowlevel.spawn_system_task(self._dispatch)

    def aio_read(self, offset: int, length: int, deliver: Deliver) -> None:
        """See `ReadHandle.aio_read`."""
        self._image.submit(offset, length, deliver)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """See `ReadHandle.extents`."""
        return [(found.offset, found.length) for found in self._image.diff(offset, length)]

    def open_raw(self) -> librbd.Image[None]:
        """See `ReadHandle.open_raw`. librbd announces completions on an image's eventfd whoever waits for them, so it
        takes an image without one."""
        return self._open(None)

    async def _dispatch(self) -> None:
        with self._dispatching:
            while True:
                await trio.lowlevel.wait_readable(self._event)
                # First the eventfd, then the completions: one that comes in between is counted again.
                os.eventfd_read(self._event)
                self._deliver(self._image.drain())

    def _deliver(self, completed: list[tuple[Deliver, int, Data]]) -> None:
        # In a frame of its own: that of a task that waits would hold on to the last data.
        for deliver, result, data in completed:
            try:
                deliver(result, data)
            except Exception:
                log.exception("a completion could not be delivered")

    async def aclose(self) -> None:
        """See `ReadHandle.aclose`."""
        self._dispatching.cancel()
        try:
            await in_thread_to_its_end(self._image.close)
        finally:
            os.close(self._event)


def open_in_librbd(ioctx: rados.Ioctx, ref: ImageRef) -> rbd.Image:
    """An image or a snapshot, read-only, by Ceph's own binding. Blocks; raises its errors."""
    which = {"name": ref.id} if ref.format == 1 else {"image_id": ref.id}
    image = rbd.Image(ioctx, read_only=True, **which)
    if ref.snapshot_id is not None:
        try:
            image.set_snap_by_id(ref.snapshot_id)
        except rbd.Error:
            image.close()
            raise
    return image


class CallbackImage:
    """Reads by callbacks of Ceph's own binding."""

    def __init__(self, ioctx: rados.Ioctx, image: ImageRef, handover: Handover) -> None:
        """Blocks. Raises RbdfsError."""
        self._handover = handover
        with translated(f"open image {image.id}"):
            self._image = open_in_librbd(ioctx, image)

    def start(self) -> None:
        """See `ReadHandle.start`."""

    def aio_read(self, offset: int, length: int, deliver: Deliver) -> None:
        """See `ReadHandle.aio_read`."""

        def arrived(completion: rbd.Completion, data: bytes) -> None:
            self._handover.post(partial(deliver, completion.get_return_value(), data))

        try:
            self._image.aio_read(offset, length, arrived)
        except rbd.Error as error:
            self._handover.post(partial(deliver, -errno_of(error), b""))

    def info(self) -> librbd.ImageInfo:
        """See `ReadHandle.info`."""
        image = self._image
        with translated("ask for an image's size"):
            stat = image.stat()
            return librbd.ImageInfo(
                size=image.size(),
                order=stat["order"],
                stripe_unit=image.stripe_unit(),
                stripe_count=image.stripe_count(),
                features=image.features(),
                flags=image.flags(),
                object_prefix=stat["block_name_prefix"],
            )

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """See `ReadHandle.extents`."""
        found: list[tuple[int, int]] = []
        with translated("list an image's extents"):
            self._image.diff_iterate(
                offset, length, None, lambda start, count, _exists: found.append((start, count)), True, True
            )
        return found

    def watchers(self) -> frozenset[int]:
        """See `ReadHandle.watchers`."""
        with translated("list who watches an image"):
            return frozenset(watcher["id"] for watcher in self._image.watchers_list())

    def open_raw(self) -> None:
        """See `ReadHandle.open_raw`."""

    async def aclose(self) -> None:
        """See `ReadHandle.aclose`."""
        with translated("close an image"):
            await in_thread_to_its_end(self._image.close)
