"""Images that are open in librbd, and those that were closed a moment ago, kept for who opens the image again.

That librbd opens an image costs more than all else of an open() but the watch, and one open() soon follows another:
`cp` comes after `file` or `cmp`, and `dd` twice. Nobody notices an image that is kept: it is open read-only, and what
holds off a removal is a watch of ours (header_watch.py), which ends with the file's close().
"""

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph import librbd
from rbdfs.ceph.aio import LibrbdImage
from rbdfs.errors import RbdfsError
from rbdfs.threads import in_thread_to_its_end

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
    version: int | None
    """Of its header object, from before it was opened: while the header has it, librbd would open the same again. None
    where that cannot be told from this header alone."""


class _Kept(NamedTuple):
    until: float
    opened: Opened


class Handles:
    """Opens images in librbd, and closes them, some of them later."""

    def __init__(self, open_handle: Callable[[ImageRef], LibrbdImage]) -> None:
        """`open_handle` blocks, and raises RbdfsError."""
        self._open_handle = open_handle
        self._kept: dict[ImageRef, _Kept] = {}  # the first is the first to be closed
        self._is_waiting = False
        self._closing = trio.Lock()

    async def open(self, image: ImageRef, version: int | None) -> Opened:
        """Open an image; `version` is that of its header, asked for just before. Raises RbdfsError."""
        kept = self._kept.pop(image, None)
        if kept is not None:
            if kept.opened.version == version:
                return kept.opened
            await self.close(image, kept.opened.handle)
        opened = await in_thread_to_its_end(self._open, image, version)
        opened.handle.start()
        return opened

    def _open(self, image: ImageRef, version: int | None) -> Opened:
        handle = self._open_handle(image)
        return Opened(handle, handle.info(), version)

    async def close_later(self, image: ImageRef, opened: Opened) -> None:
        """Keep what `open` gave, if it has a version, for the next `open`. No read may be in flight. Does not raise."""
        if opened.version is None or image in self._kept:
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
        """Close what `open` gave. No read may be in flight. A cancel waits for it; does not raise."""
        with trio.CancelScope(shield=True):
            try:
                await handle.aclose()
            except RbdfsError as error:
                where = f"image {image.id} of {image.namespace}"
                log.warning("%s could not be closed in good order: %s", where, error)

    async def aclose(self) -> None:
        """Close all that is kept."""
        await self._close_kept(math.inf)

    async def _close_in_time(self) -> None:
        while self._kept:
            await trio.sleep_until(next(iter(self._kept.values())).until)
            await self._close_kept(trio.current_time())
        self._is_waiting = False

    async def _close_kept(self, now: float) -> None:
        """Close what is due. Whoever comes second returns when the first is done as well."""
        async with self._closing:
            for image, kept in list(self._kept.items()):
                if kept.until <= now and self._kept.get(image) is kept:  # not opened again meanwhile
                    del self._kept[image]
                    await self.close(image, kept.opened.handle)
