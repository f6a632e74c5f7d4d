"""Images that are open in librbd; those that were closed a moment ago stay open for the next open().

Opening an image in librbd costs more than everything else of an open() except the watch, and one open() soon follows
another: `cp` comes after `file` or `cmp`. Other clients do not notice a cached image: it is open read-only, and only
our own watch (header_watch.py), which ends with the file's close(), holds off a removal.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import trio

from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph.bindings import librados, librbd
from rbdfs.ceph.bindings.aio import LibrbdImage
from rbdfs.ceph.bindings.lifetime import by_the_newest
from rbdfs.ceph.image.image_state import ImageState
from rbdfs.errors import RbdfsError
from rbdfs.tasks import BackgroundTasks
from rbdfs.threads import run_in_thread

log = logging.getLogger(__name__)

CACHED_SECONDS = 5.0
"""How long an image stays open: the next thing that a script or a person does with the file begins within it."""

CACHED_AT_MOST = 16
"""Images: a program that reads all images of a pool, one after the other, must not leave all of them open. Each took
0.4 MiB of memory here (16.2); a snapshot's object map takes a quarter of a byte for each object."""


class Opened(NamedTuple):
    """An image that is open in librbd."""

    handle: LibrbdImage
    info: librbd.ImageInfo
    state: ImageState
    """What the headers said just before it was opened."""
    is_immutable: bool = False
    """It is a snapshot that nobody could be filling any more when it was opened."""

    def is_still(self, state: ImageState) -> bool:
        """Whether librbd would open the same now, by the same connection.

        librbd loads the object maps of snapshots, and the map of a snapshot that is being filled changes without a
        trace in any header."""
        return (
            not self.handle.lifetime.is_over
            and (self.is_immutable or self.state.is_complete)
            and self.state.is_same_version(state)
        )


class _Cached(NamedTuple):
    until: float
    opened: Opened


class HandleCache:
    """Opens images in librbd, and closes them, some of them later."""

    def __init__(
        self,
        ioctx_of: Callable[[Namespace], librados.Ioctx],
        open_handle: Callable[[librados.Ioctx, ImageRef], LibrbdImage],
    ) -> None:
        """`open_handle` blocks. Both raise RbdfsError."""
        self._ioctx_of = ioctx_of
        self._open_handle = open_handle
        self._cached: dict[ImageRef, _Cached] = {}  # in the order in which they are closed
        self._is_waiting = False
        self.background = BackgroundTasks()
        """Opens and closes that must end before the connection does."""

    def take(self, image: ImageRef) -> Opened | None:
        """Take an image out of the cache; the caller must close or release it."""
        cached = self._cached.pop(image, None)
        if cached is None:
            return None
        if cached.opened.handle.lifetime.is_over:
            self.background.start(partial(self._close, image, cached.opened.handle))
            return None
        return cached.opened

    async def open(self, image: ImageRef, state: ImageState, cached: Opened | None = None) -> Opened:
        """Open an image; `state` is what its headers said just before. Raises RbdfsError.

        `cached`, from `take`, is returned if librbd would open the same again, else it is closed.
        """
        if cached is not None:
            if cached.is_still(state):
                return cached
            await self.close(image, cached.handle)

        async def current() -> librados.Ioctx:
            return self._ioctx_of(image.namespace)

        async def open_by(ioctx: librados.Ioctx) -> Opened:
            return await self.background.run(
                partial(self._open_and_start, ioctx, image, state), lambda opened: self._close(image, opened.handle)
            )

        return await by_the_newest(current, open_by)

    async def _open_and_start(self, ioctx: librados.Ioctx, image: ImageRef, state: ImageState) -> Opened:
        ioctx.lifetime.hold()  # until it is closed
        try:
            opened = await run_in_thread(self._open, ioctx, image, state, lane=ioctx.lane)
        except BaseException:
            ioctx.lifetime.release()
            raise
        opened.handle.start()
        return opened

    def _open(self, ioctx: librados.Ioctx, image: ImageRef, state: ImageState) -> Opened:
        handle = self._open_handle(ioctx, image)
        try:
            return Opened(handle, handle.info(), state)
        except RbdfsError:
            handle.close_unused()
            raise

    async def release(self, image: ImageRef, opened: Opened) -> None:
        """Cache an image for the next `take` if it can be used then, else close it. No read may be in flight. Does not
        raise."""
        if image in self._cached or not opened.is_still(opened.state):
            await self.close(image, opened.handle)
            return
        self._cached[image] = _Cached(trio.current_time() + CACHED_SECONDS, opened)
        if not self._is_waiting:
            self._is_waiting = True
            trio.lowlevel.spawn_system_task(self._close_in_time)
        if len(self._cached) > CACHED_AT_MOST:
            first = next(iter(self._cached))
            await self.close(first, self._cached.pop(first).opened.handle)

    async def close(self, image: ImageRef, handle: LibrbdImage) -> None:
        """Close an image once nothing uses it. A cancel ends only the waiting. Does not raise."""
        await self.background.run(partial(self._close, image, handle))

    async def _close(self, image: ImageRef, handle: LibrbdImage) -> None:
        await handle.wait_until_idle()
        try:
            await handle.aclose()
        except RbdfsError as error:
            where = f"image {image.id} of {image.namespace}"
            log.warning("%s could not be closed in good order: %s", where, error)
        finally:
            handle.lifetime.release()

    async def aclose(self) -> None:
        """Close all cached images, and wait for opens and closes that are still running."""
        await self._close_cached(math.inf)
        await self.background.wait()

    async def _close_in_time(self) -> None:
        while self._cached:
            await trio.sleep_until(next(iter(self._cached.values())).until)
            await self._close_cached(trio.current_time())
        self._is_waiting = False

    async def _close_cached(self, now: float) -> None:
        """Close the images whose time is up."""
        for image, cached in list(self._cached.items()):
            if cached.until <= now and self._cached.get(image) is cached:  # it was not opened again
                del self._cached[image]
                await self.close(image, cached.opened.handle)
