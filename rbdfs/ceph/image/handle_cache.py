"""Images that are open in librbd, and those that were closed a moment ago, kept for who opens the image again.

That librbd opens an image costs more than all else of an open() but the watch, and one open() soon follows another:
`cp` comes after `file` or `cmp`, and `dd` twice. Nobody notices an image that is kept: it is open read-only, and what
holds off a removal is a watch of ours (header_watch.py), which ends with the file's close().
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

KEPT_SECONDS = 5.0
"""How long an image is kept: what a script or a person does next with the same file begins by then."""

KEPT_AT_MOST = 16
"""Images. Each took 0.4 MiB of memory here (16.2), and takes a quarter of a byte an object of a snapshot's object map;
who reads a pool, one image after the other, is not to keep all of it open."""


class Opened(NamedTuple):
    """An image that is open in librbd."""

    handle: LibrbdImage
    info: librbd.ImageInfo
    state: ImageState
    """As the headers had it just before it was opened."""
    is_immutable: bool = False
    """It is a snapshot, and was opened when nobody could be filling it any more."""

    def is_still(self, state: ImageState) -> bool:
        """Whether librbd would open the same now, by the same connection. It loads the object maps of snapshots: those
        that are being filled change without a trace in any header."""
        return (
            not self.handle.lifetime.is_over
            and (self.is_immutable or self.state.is_settled)
            and self.state.is_same_version(state)
        )


class _Kept(NamedTuple):
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
        self._kept: dict[ImageRef, _Kept] = {}  # the first is the first to be closed
        self._is_waiting = False
        self.background = BackgroundTasks()
        """What has to end before the connection does."""

    def take(self, image: ImageRef) -> Opened | None:
        """What is kept of an image; the caller closes or releases it."""
        kept = self._kept.pop(image, None)
        if kept is None:
            return None
        if kept.opened.handle.lifetime.is_over:
            self.background.start(partial(self._close, image, kept.opened.handle))
            return None
        return kept.opened

    async def open(self, image: ImageRef, state: ImageState, kept: Opened | None = None) -> Opened:
        """Open an image; `state` is what its headers said just before. Raises RbdfsError.

        What `take` gave is returned if librbd would open the same again, else it is closed.
        """
        if kept is not None:
            if kept.is_still(state):
                return kept
            await self.close(image, kept.handle)

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
        """Keep what `open` gave for the next `take`, if that can use it. No read may be in flight. Does not raise."""
        if image in self._kept or not opened.is_still(opened.state):
            await self.close(image, opened.handle)
            return
        self._kept[image] = _Kept(trio.current_time() + KEPT_SECONDS, opened)
        if not self._is_waiting:
            self._is_waiting = True
            trio.lowlevel.spawn_system_task(self._close_in_time)
        if len(self._kept) > KEPT_AT_MOST:
            first = next(iter(self._kept))
            await self.close(first, self._kept.pop(first).opened.handle)

    async def close(self, image: ImageRef, handle: LibrbdImage) -> None:
        """Close what `open` gave, once nothing uses it. A cancel ends the waiting alone; does not raise."""
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
        """Close all that is kept, and wait for what is being closed, or opened for somebody who has given up."""
        await self._close_kept(math.inf)
        await self.background.wait()

    async def _close_in_time(self) -> None:
        while self._kept:
            await trio.sleep_until(next(iter(self._kept.values())).until)
            await self._close_kept(trio.current_time())
        self._is_waiting = False

    async def _close_kept(self, now: float) -> None:
        """Close what is due."""
        for image, kept in list(self._kept.items()):
            if kept.until <= now and self._kept.get(image) is kept:  # not opened again meanwhile
                del self._kept[image]
                await self.close(image, kept.opened.handle)
