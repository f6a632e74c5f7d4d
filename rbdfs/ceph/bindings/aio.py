"""The one thread boundary: from threads of librados and librbd to the trio task that waits for them.

There are two ways. Image data comes by librbd's event API: a completion is a count on an eventfd, and the trio thread
fetches completions when it gets to it, so no thread of Ceph's ever needs the GIL. The few answers of object classes
come by callbacks: each runs Python in one of Ceph's threads, where it only hands over the result and returns. A batch
of them costs one wake-up of the trio thread.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Generic, Protocol, TypeVar, TypeVarTuple

import rados
import rbd
import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings import librados, librbd
from rbdfs.ceph.bindings.health import ConnectionHealth
from rbdfs.threads import run_in_thread

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Holdable(Protocol):
    """An object that must not be closed while it is in use."""

    def hold(self) -> None:
        """Keep it open until `release`."""

    def release(self) -> None:
        """End one `hold`."""


class Portal:
    """Carries calls from any thread into the trio thread, in order."""

    def __init__(self) -> None:
        """Make it in the trio thread that is to be called."""
        self.health = ConnectionHealth()
        """What the results that came through here say about the cluster."""
        self._token = trio.lowlevel.current_trio_token()
        self._arrived: deque[Callable[[], None]] = deque()
        self._woken = False

    def post(self, delivery: Callable[[], None]) -> None:
        """Call `delivery` in the trio thread, later. May be called in any thread; returns at once, never raises."""
        self._arrived.append(delivery)
        # If this reads a flag that _deliver is about to clear, _deliver has not looked at the queue yet.
        if not self._woken:
            self._woken = True
            try:
                self._token.run_sync_soon(self._deliver)
            except trio.RunFinishedError:
                log.debug("a completion arrived after the end")

    async def run_holding(self, user: Holdable, function: Callable[[*Ts], T], *args: *Ts, lane: Hashable = None) -> T:
        """Call a blocking function in a thread, and hold `user` until it ends. A cancel abandons the call."""
        user.hold()
        turn = [user]  # the thread or the cancel takes it out, whichever is first, and releases it

        def call() -> T:
            turn.pop()
            try:
                return function(*args)
            finally:
                self.post(user.release)

        try:
            return await run_in_thread(call, abandon_on_cancel=True, lane=lane)
        except trio.Cancelled:
            with suppress(IndexError):
                turn.pop().release()
            raise

    def _deliver(self) -> None:
        self._woken = False
        while self._arrived:
            try:
                self._arrived.popleft()()
            except Exception:
                log.exception("a completion could not be delivered")


class Future(Generic[T]):
    """A result that one task waits for."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._values: list[T] = []

    def set(self, value: T) -> None:
        """Set the result. Call it in the trio thread, once."""
        self._values.append(value)
        self._event.set()

    async def get(self) -> T:
        """Wait for the result. A cancel ends only the waiting."""
        await self._event.wait()
        return self._values[0]


class LibrbdImage:
    """An image that is open in librbd, read-only; its reads complete by librbd's event API."""

    def __init__(self, ioctx: librados.Ioctx, image: ImageRef) -> None:
        """Open the image. Blocks. Raises RbdfsError. Hold the connection until the image is closed."""
        self.lifetime = ioctx.lifetime
        self.lane = ioctx.lane
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._image = librbd.open_image(
                ioctx, self._event, image.id, snap_id=image.snapshot_id, by_name=image.format == 1
            )
        except BaseException:
            os.close(self._event)
            raise
        self.start_read = self._image.start_read
        self.refuse_reads = self._image.refuse_reads
        self.info = self._image.info
        self.watchers = self._image.watchers
        self.invalidate_cache = self._image.invalidate_cache
        self._dispatching = trio.CancelScope()
        self._holds = 0
        self._idle: trio.Event | None = None
        """Set when nothing is in flight; None if no task waits for that."""

    def start(self) -> None:
        """Start to deliver completions. Call it in the trio thread, before the first read."""
        trio.lowlevel.spawn_system_task(self._dispatch)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Where a range holds data, its own or its parent's: (image offset, length) pairs of whole objects. Blocks."""
        return [(found.offset, found.length) for found in self._image.diff(offset, length)]

    def changes(self, since: str | None, offset: int, length: int) -> list[librbd.Diff]:
        """Where a range was written, discarded or cut off since a snapshot, or ever, as the OSDs know it. Blocks."""
        return self._image.diff(offset, length, since_snapshot=since, whole_object=False)

    def hold(self) -> None:
        """Make `wait_until_idle` wait for a `release` too."""
        self._holds += 1

    def release(self) -> None:
        """End one `hold`."""
        self._holds -= 1
        self._tell_if_idle()

    async def wait_until_idle(self) -> None:
        """Return when no read is in flight and there is no `hold`. It is still so when this task is woken."""
        while not self._is_idle():
            if self._idle is None:
                self._idle = trio.Event()
            await self._idle.wait()

    def _is_idle(self) -> bool:
        return not self._holds and not self._image.reads_in_flight

    def _tell_if_idle(self) -> None:
        if self._idle is not None and self._is_idle():
            self._idle.set()
            self._idle = None

    async def _dispatch(self) -> None:
        with self._dispatching:
            while True:
                await trio.lowlevel.wait_readable(self._event)
                # First the eventfd, then the completions: one that comes in between is announced again.
                os.eventfd_read(self._event)
                self._image.complete_reads()
                if self._idle is not None:
                    self._tell_if_idle()

    def close_unused(self) -> None:
        """Close an image that was not started. Blocks."""
        try:
            self._image.close()
        finally:
            os.close(self._event)

    async def aclose(self) -> None:
        """Close the image. No read may be in flight. Raises RbdfsError."""
        self._dispatching.cancel()
        try:
            await run_in_thread(self._image.close, lane=self.lane)
        finally:
            os.close(self._event)


class _Image(rbd.Image):  # type: ignore[misc]
    """An image that does not ask for its name.

    If that is not UTF-8, the binding's constructor raises, and leaves the image open until it is garbage-collected.
    """

    def get_name(self) -> str:
        return ""


def open_in_librbd(ioctx: rados.Ioctx, ref: ImageRef) -> rbd.Image:
    """Open an image or a snapshot read-only, by Ceph's own binding. Blocks; raises its errors."""
    which = {"name": ref.id} if ref.format == 1 else {"image_id": ref.id}
    image = _Image(ioctx, read_only=True, **which)
    if ref.snapshot_id is not None:
        try:
            image.set_snap_by_id(ref.snapshot_id)
        except rbd.Error:
            image.close()
            raise
    return image
