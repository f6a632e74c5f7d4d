"""The one thread boundary: what librados and librbd do in threads of their own → the task in trio that waits for it.

Two ways lead over it. By librbd's event API a completion is a count on an eventfd, and the trio thread fetches what is
there when it gets to it: no thread of Ceph's ever needs the GIL. Image data comes this way. By a callback, as Ceph's
Python bindings have it, each completion runs Python in one of Ceph's threads; it does one thing there, hand over what
it got, and leaves, and a batch of them costs one wake-up of the trio thread. The few answers of object classes come so.
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
    """What must not be closed while it is used."""

    def hold(self) -> None:
        """It is used."""

    def release(self) -> None:
        """It is not any more."""


class Portal:
    """Carries calls from any thread into the trio thread, in order."""

    def __init__(self) -> None:
        """To be made in the trio thread that is to be called."""
        self.health = ConnectionHealth()
        """What is known of the cluster by what came over here."""
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

    async def run_holding(self, user: Holdable, function: Callable[[*Ts], T], *args: *Ts, lane: Hashable = None) -> T:
        """Call what blocks and uses `user`, in a thread. A cancel abandons the call, and `user` is held to its end."""
        user.hold()
        turn = [user]  # who takes it out of here releases it: the thread, or the cancel if that comes first

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
    """The one result that a task waits for."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._values: list[T] = []

    def set(self, value: T) -> None:
        """In the trio thread, once."""
        self._values.append(value)
        self._event.set()

    async def get(self) -> T:
        """A cancel abandons what was asked for: its result is dropped."""
        await self._event.wait()
        return self._values[0]


class LibrbdImage:
    """An image that is open in librbd, read-only; its reads complete by librbd's event API."""

    def __init__(self, ioctx: librados.Ioctx, image: ImageRef) -> None:
        """Blocks. Raises RbdfsError. The connection is to be held until it is closed."""
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
        """Set when nothing is in flight, if somebody waits for that."""

    def start(self) -> None:
        """Begin to deliver completions. In the trio thread, before the first read."""
        trio.lowlevel.spawn_system_task(self._dispatch)

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Where a range holds data, the parent's included: (image offset, length) pairs of whole objects. Blocks."""
        return [(found.offset, found.length) for found in self._image.diff(offset, length)]

    def changes(self, since: str | None, offset: int, length: int) -> list[librbd.Diff]:
        """What of a range was written, discarded or cut off since a snapshot, or ever, as the OSDs know it. Blocks."""
        return self._image.diff(offset, length, since_snapshot=since, whole_object=False)

    def hold(self) -> None:
        """Have `wait_until_idle` wait for a `release` as well, for what is no read in flight."""
        self._holds += 1

    def release(self) -> None:
        """What was held for has ended."""
        self._holds -= 1
        self._tell_if_idle()

    async def wait_until_idle(self) -> None:
        """Return when no read is in flight and nothing is held: not when that was so before this task was woken."""
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
                # First the eventfd, then the completions: one that comes in between is counted again.
                os.eventfd_read(self._event)
                self._image.complete_reads()
                if self._idle is not None:
                    self._tell_if_idle()

    def close_unused(self) -> None:
        """Close what `start` was not called for. Blocks."""
        try:
            self._image.close()
        finally:
            os.close(self._event)

    async def aclose(self) -> None:
        """Close. No read may be in flight. Raises RbdfsError."""
        self._dispatching.cancel()
        try:
            await run_in_thread(self._image.close, lane=self.lane)
        finally:
            os.close(self._event)


class _Image(rbd.Image):  # type: ignore[misc]
    """One that is not asked for its name, which Ceph's binding cannot decode if it is not UTF-8.

    It would raise then in its constructor, with the image open, to be closed by whenever the garbage is collected.
    """

    def get_name(self) -> str:
        return ""


def open_in_librbd(ioctx: rados.Ioctx, ref: ImageRef) -> rbd.Image:
    """An image or a snapshot, read-only, by Ceph's own binding. Blocks; raises its errors."""
    which = {"name": ref.id} if ref.format == 1 else {"image_id": ref.id}
    image = _Image(ioctx, read_only=True, **which)
    if ref.snapshot_id is not None:
        try:
            image.set_snap_by_id(ref.snapshot_id)
        except rbd.Error:
            image.close()
            raise
    return image
