"""One open file over an image: the read path between a read() of the kernel and an object of the cluster."""

import errno
import logging
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from functools import partial
from time import monotonic

import trio

from rbdfs.errors import BeyondEndError, RbdfsError, StaleError
from rbdfs.image.backend import ImageBackend, OnRead, ReadResult
from rbdfs.image.cache import ObjectCache
from rbdfs.image.cached_image import CachedImage
from rbdfs.image.extents import assume_data, learn_window
from rbdfs.image.holes import HoleMap, Kind
from rbdfs.image.readahead import STALL_SECONDS, Readahead

log = logging.getLogger(__name__)

ZEROS = bytes(1 << 20)
"""The answer to reads of a known hole; the kernel asks for no more at once."""

FLUSH_SECONDS = 2.0
"""How long a close() waits to learn whether the image is still there."""

RANDOM_BYTES_MAX = 64 * 1024
"""A random reader's reads of up to this size are not kept in the cache: the kernel's page cache keeps them, and to keep
tens of thousands of small fetches costs more than they save."""

WINDOWS_OF_A_MAP = 256
"""Answers of an object map to ask for when a snapshot is first read, to learn all its holes: up to 64 TiB."""

OnSeek = Callable[[int | RbdfsError | None], None]
"""Takes the offset that a seek has found, None for lseek(2)'s ENXIO, or an error. Must not raise."""


class ReadaheadShare:
    """Divides a third of the cache among the sequential streams of all open files.

    Bytes in flight count twice, and bytes that were just read are newer in the LRU than those ahead of the reader: with
    more than a third, readahead would evict itself before it is read.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.files: list[Readahead] = []

    def limit(self) -> int:
        """Return how many bytes one stream may have ahead of its reader now."""
        streams = sum(readahead.sequential_streams for readahead in self.files)
        return self.budget_bytes // 3 // max(1, streams)


@dataclass(slots=True)
class OpenState:
    """What all open files of one image share."""

    key: Hashable
    """What `OpenImages` knows the image by."""
    backend: ImageBackend
    cached: CachedImage
    holes: HoleMap | None = None
    """The known holes of a snapshot. Those of a HEAD belong to each open()."""


class OpenImage:
    """One open() of an image. It answers a read up to the end of the image with all its bytes, or with an error.

    Reads and seeks are calls with a callback. Most end without a task; those that have to ask the cluster for more than
    data go on in one.
    """

    def __init__(self, state: OpenState, cache: ObjectCache, share: ReadaheadShare) -> None:
        self._state = state
        self._cache = cache
        self._share = share
        self._readahead = Readahead(state.cached.layout.fetch_bytes)
        share.files.append(self._readahead)
        self._holes = state.holes or HoleMap(state.backend.size)
        self._stale: StaleError | None = None

    @property
    def key(self) -> Hashable:
        """What `OpenImages` knows the image by."""
        return self._state.key

    @property
    def size(self) -> int:
        """Bytes, as of the last answer of the cluster."""
        return self._state.backend.size

    def start_read(self, offset: int, length: int, callback: OnRead) -> None:
        """Read the bytes [offset, offset + length) of the image; fewer only if the image ends there.

        `callback` is called once, from here or later. It gets the bytes, or an RbdfsError with librbd's errno; never
        less in the middle, and never zeros for what could not be read.
        """
        state = self._state
        backend = state.backend
        if backend.revalidate_due:
            try:
                backend.revalidate_soon()
            except StaleError as error:
                self._finish(callback, error)
                return
        size = backend.size
        holes = self._holes
        if offset + length > size or (state.holes is not None and not state.holes.is_asked):
            self._in_a_task(partial(self._read_after_asking, offset, length, callback), callback)
            return
        if holes.has_holes and holes.size == size:
            if state.holes is not None and length <= len(ZEROS) and holes.is_hole(offset, length):
                callback(memoryview(ZEROS)[:length])
                return
            self._read_ahead_past_holes(holes, offset, length)
        elif ahead := self._readahead.on_read(offset, length, size, self._share.limit):
            self._prefetch(*ahead)
        finish = partial(self._finish_read, offset, length, monotonic(), callback)
        keep = not self._readahead.is_random or length > RANDOM_BYTES_MAX
        self._cache.start_read(state.cached, offset, length, finish, keep=keep)

    def _finish_read(self, offset: int, length: int, began: float, callback: OnRead, result: ReadResult) -> None:
        """Pass on the answer of the cache."""
        if (waited := monotonic() - began) > STALL_SECONDS:
            self._readahead.on_wait(waited)
        if not isinstance(result, RbdfsError):
            callback(result)
        elif isinstance(result, BeyondEndError):
            # Others have shrunk the image. Either it ends before this range, and that is the answer, or only the
            # readahead that this read waited for goes beyond the end.
            self._in_a_task(partial(self._read_again, offset, length, callback), callback)
        else:
            self._finish(callback, result)

    def _finish(self, callback: OnRead, result: ReadResult) -> None:
        if isinstance(result, StaleError):
            self._stale = result
        callback(result)

    async def _read_again(self, offset: int, length: int, callback: OnRead) -> None:
        await self._state.backend.refresh_size()
        await self._read_after_asking(offset, length, callback)

    async def _read_after_asking(self, offset: int, length: int, callback: OnRead) -> None:
        """Ask the cluster for the size, or for a snapshot's holes, and then read."""
        state = self._state
        if state.holes is not None:
            await self._ask_for_holes(state.holes)
        size = state.backend.size
        if offset + length > size:
            size = await state.backend.refresh_size()
        length = min(length, size - offset)
        if length <= 0:
            callback(b"")
        elif state.holes is not None and state.holes.is_hole(offset, length):
            callback(bytes(length))
        else:
            self._cache.start_read(state.cached, offset, length, partial(self._finish, callback))

    def _in_a_task(self, work: Callable[[], Awaitable[None]], callback: Callable[[RbdfsError], None]) -> None:
        """Run `work`, which calls the callback, in a task. If it raises, the callback gets the error."""

        async def guarded() -> None:
            try:
                await work()
                return
            except RbdfsError as error:
                failure = error
            except Exception as error:  # out of a system task it would end the mount for everyone
                log.exception("a read or a seek failed unexpectedly")
                failure = RbdfsError(f"unexpected {type(error).__name__}: {error}")
            if isinstance(failure, StaleError):
                self._stale = failure
            try:
                callback(failure)
            except Exception:
                log.exception("a read or a seek could not be answered")

        trio.lowlevel.spawn_system_task(guarded)

    def _read_ahead_past_holes(self, holes: HoleMap, offset: int, length: int) -> None:
        """Count a stream's bytes without the known holes, so that a reader that skips a hole is still sequential."""
        start, end = holes.rank(offset), holes.rank(offset + length)
        if start == end:
            return
        ahead = self._readahead.on_read(start, end - start, holes.rank(holes.size), self._share.limit)
        if ahead is not None:
            for part in holes.present(*ahead):
                self._prefetch(*part)

    def _prefetch(self, start: int, end: int) -> None:
        fetch_bytes = self._readahead.fetch_bytes
        while start < end:
            stop = min(end, (start // fetch_bytes + 1) * fetch_bytes)
            self._cache.prefetch(self._state.cached, start, stop - start)
            start = stop

    async def _ask_for_holes(self, holes: HoleMap) -> None:
        """Learn all holes of a snapshot, once: reads of them then ask no OSD."""
        if holes.is_asked:
            return
        holes.is_asked = True
        backend = self._state.backend
        try:
            # Only if it costs milliseconds: one answer for the whole image, or a few of an object map.
            window = await backend.extents_window()
            if window * (WINDOWS_OF_A_MAP if backend.has_map else 1) >= holes.size:
                for position in range(0, holes.size, window):
                    await self._learn(position)
        except RbdfsError as error:
            log.info("holes are read like data: %s", error)

    def start_seek(self, offset: int, kind: Kind, callback: OnSeek) -> None:
        """Find where the next data or the next hole begins, at or after `offset`; the end counts as a hole.

        `callback` is called once, from here or later. It gets None past the end, and after the last data: lseek(2)'s
        ENXIO. If the cluster refuses to say, it is data; if it does not answer, that is an error.
        """
        if offset < self.size == self._holes.size:
            segment = self._holes.find(offset, kind)
            if segment is not None and segment.kind is kind:
                callback(max(offset, segment.start))
                return
        self._in_a_task(partial(self._seek_by_asking, offset, kind, callback), callback)

    async def _seek_by_asking(self, offset: int, kind: Kind, callback: OnSeek) -> None:
        backend = self._state.backend
        size = -1
        while size != backend.size:  # "no more" holds only for the size that the image has now
            size = backend.size
            if size != self._holes.size:
                self._holes = HoleMap(size)
            while size == backend.size and (segment := self._holes.find(offset, kind)) and segment.kind is not kind:
                await self._learn(max(offset, segment.start))
            if size == backend.size and segment is not None:
                callback(max(offset, segment.start))
                return
            if not backend.is_immutable:
                await backend.refresh_size()
        callback(size if kind is Kind.HOLE and offset < size else None)

    async def _learn(self, position: int) -> None:
        """Learn where the window around `position` holds data, for this open() alone.

        If the cluster refuses to say, it is data. Raises RbdfsError (ETIMEDOUT) if it does not answer. Learns nothing
        if others have shrunk the image: then the backend has the new size.
        """
        backend, holes = self._state.backend, self._holes
        try:
            await learn_window(holes, backend, position)
        except RbdfsError as error:
            if isinstance(error, BeyondEndError) and await backend.refresh_size() != holes.size:
                return
            if error.errno == errno.ETIMEDOUT:
                raise  # the next seek may have an answer
            assume_data(holes, position, error)

    async def flush(self) -> None:
        """Check at a close(). Raises StaleError if a read found the image gone, or if it is gone now."""
        if self._stale is None:
            with trio.move_on_after(FLUSH_SECONDS):
                try:
                    await self._state.backend.verify()
                except StaleError as error:
                    self._stale = error
                except RbdfsError as error:
                    log.debug("at close: %s", error)
        if self._stale is not None:
            raise self._stale

    def close(self) -> None:
        """End this open(): nothing more is read ahead."""
        self._share.files.remove(self._readahead)
