"""One open file over an image: the read path between a read() of the kernel and an object of the cluster."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import trio

from rbdfs.errors import BeyondEndError, RbdfsError, StaleError
from rbdfs.image.held_blocks import HeldBlocks
from rbdfs.image.holes import HoleMap, Kind
from rbdfs.image.object_cache import CachedImage, ObjectCache, Span
from rbdfs.image.readahead import Readahead
from rbdfs.image.source import Buffer, ImageSource, ReadResult
from rbdfs.shortcut import RawImage, Shortcut

log = logging.getLogger(__name__)

ZEROS = bytes(1 << 20)
"""What every read in a known hole is answered from; the kernel asks for no more at once."""

FLUSH_SECONDS = 2.0
"""How long a close() waits to hear whether the image is still there."""


Done = Callable[[Span | RbdfsError | None], None]


class ReadaheadShare:
    """The sequential streams of all open files: they divide a third of the cache between them.

    What is in flight takes twice its bytes, and what was just read is newer in the LRU than what waits ahead of the
    reader: with more than a third, readahead would push itself out before it is read.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.files: list[Readahead] = []

    def limit(self) -> int:
        """Bytes that one stream may have ahead of its reader now."""
        streams = sum(readahead.sequential_streams for readahead in self.files)
        return self.budget_bytes // 3 // max(1, streams)


@dataclass(slots=True)
class OpenState:
    """What all opens of one image share: the image in the cluster, and what the cache holds of it."""

    source: ImageSource
    cached: CachedImage
    holes: HoleMap | None = None
    """What is known of a snapshot's holes, by whoever asked first. A HEAD's belong to each open()."""


class OpenImage:
    """One open() of an image: reads are clamped to its size and answered whole, or with an error."""

    def __init__(self, state: OpenState, cache: ObjectCache, share: ReadaheadShare) -> None:
        self._state = state
        self._cache = cache
        self._share = share
        self._readahead = Readahead(state.cached.layout.transfer)
        share.files.append(self._readahead)
        self._holes = state.holes or HoleMap(state.source.size)
        self._stale: StaleError | None = None

    @property
    def size(self) -> int:
        """Bytes, as last heard of the cluster."""
        return self._state.source.size

    async def read(self, offset: int, length: int) -> Buffer:
        """The bytes [offset, offset + length) of the image, fewer only where the image ends.

        Raises RbdfsError with librbd's errno; never returns less in the middle, and never zeros for what could not be
        read.
        """
        try:
            try:
                return await self._read(offset, length)
            except BeyondEndError:
                # Others have shrunk the image under us. Either it ends before this range, and that is the answer, or
                # only the readahead that this read waited for went beyond the end, and this read does not.
                await self._state.source.refresh()
                return await self._read(offset, length)
        except StaleError as error:
            self._stale = error
            raise

    async def _read(self, offset: int, length: int) -> Buffer:
        state = self._state
        state.source.heed()
        size = state.source.size
        if offset + length > size:
            size = await state.source.refresh()
            length = min(length, size - offset)
            if length <= 0:
                return b""
        if state.holes is not None:
            await self._ask_for_holes(state.holes)
            if state.holes.is_hole(offset, length):
                return memoryview(ZEROS)[:length] if length <= len(ZEROS) else bytes(length)
        self._read_ahead(offset, length, size)
        return await self._cache.read(state.cached, offset, length)

    def begin_read(self, offset: int, length: int, done: Done) -> None:
        """As `read`, by a call, for reads that need no task: `done` is called once, from here or later.

        It gets the bytes, an error, or None where `read` must answer, since the cluster has to be asked for more than
        data.
        """
        state = self._state
        try:
            state.source.heed()
        except StaleError as error:
            self._stale = error
            done(error)
            return
        size = state.source.size
        if offset + length > size or length > len(ZEROS) or (state.holes is not None and not state.holes.is_asked):
            done(None)
            return
        if state.holes is not None and state.holes.is_hole(offset, length):
            done(Span(ZEROS, 0, length))
            return
        self._read_ahead(offset, length, size)
        began = trio.current_time()

        def arrived(result: Span | RbdfsError) -> None:
            self._readahead.on_wait(trio.current_time() - began)
            self._pass_on(done, result)

        self._cache.begin_read(state.cached, offset, length, arrived)

    @property
    def is_scattered(self) -> bool:
        """Whether it is read here and there, so that neither cache nor readahead have a part in it."""
        return self._readahead.is_scattered

    async def shorten(self, make: Callable[[RawImage, HeldBlocks], Shortcut]) -> Shortcut | None:
        """A way to the image's data by C calls alone, see `ImageSource.shorten`; for all who have it open."""
        held = self._state.cached.held_blocks()
        return await self._state.source.shorten(lambda raw: make(raw, held))

    def settle(self, offset: int, length: int, result: int, data: bytes, done: Done) -> None:
        """As `begin_read`, for a read that a shortcut has made: `result` is librbd's."""

        def settled(answer: ReadResult) -> None:
            self._pass_on(done, answer if isinstance(answer, RbdfsError) else Span(answer, 0, len(answer)))

        self._state.source.settle(offset, length, result, data, settled)

    def _pass_on(self, done: Done, result: Span | RbdfsError) -> None:
        if isinstance(result, StaleError):
            self._stale = result
        done(None if isinstance(result, BeyondEndError) else result)

    def _read_ahead(self, offset: int, length: int, size: int) -> None:
        holes = self._holes
        if not holes.has_holes or holes.size != size:
            ahead = self._readahead.on_read(offset, length, size, self._share.limit)
            if ahead is not None:
                self._prefetch(*ahead)
            return
        # A stream goes by what is not known to be hole: whoever skips a hole has read ahead what lies behind it.
        start, end = holes.rank(offset), holes.rank(offset + length)
        ahead = (
            self._readahead.on_read(start, end - start, holes.rank(size), self._share.limit) if start < end else None
        )
        if ahead is not None:
            for part in holes.present(*ahead):
                self._prefetch(*part)

    async def _ask_for_holes(self, holes: HoleMap) -> None:
        """Learn, once, what a snapshot holds: reads of its holes then ask no OSD."""
        if holes.is_asked:
            return
        holes.is_asked = True
        source = self._state.source
        try:
            # Only where one answer tells of all of it: then it costs milliseconds.
            if await source.extents_window() >= holes.size:
                await self._learn(source, 0)
        except RbdfsError as error:
            log.info("holes are read like data: %s", error)

    async def flush(self) -> None:
        """What close() is told: raises StaleError if a read found the image gone, or if it is gone now."""
        if self._stale is None:
            with trio.move_on_after(FLUSH_SECONDS):
                try:
                    await self._state.source.verify()
                except StaleError as error:
                    self._stale = error
                except RbdfsError as error:
                    log.debug("at close: %s", error)
        if self._stale is not None:
            raise self._stale

    async def seek(self, offset: int, kind: Kind) -> int | None:
        """Where the next data or the next hole begins, at or after `offset`, in bytes; the end counts as a hole.

        None past the end, and after the last data: lseek(2)'s ENXIO. What the cluster does not answer is data.
        """
        source = self._state.source
        size = source.size if offset < source.size else await source.refresh()
        if size != self._holes.size:
            self._holes = HoleMap(size)
        if offset >= size:
            return None
        while segment := self._holes.find(offset, kind):
            position = max(offset, segment.start)
            if segment.kind is kind:
                return position
            await self._learn(source, position)
        return size if kind is Kind.HOLE else None

    async def _learn(self, source: ImageSource, position: int) -> None:
        """Ask what the window around `position` holds. What was learned belongs to this open() alone."""
        holes = self._holes
        try:
            window = await source.extents_window()
            start = position - position % window
            end = min(start + window, holes.size)
            holes.learn(start, end, await source.extents(start, end - start))
        except RbdfsError as error:
            log.warning("from %d on, holes are read like data: %s", position, error)
            holes.learn(position, holes.size, [(position, holes.size - position)])

    def close(self) -> None:
        """This open() reads no more."""
        self._share.files.remove(self._readahead)

    def _prefetch(self, start: int, end: int) -> None:
        transfer = self._readahead.transfer
        while start < end:
            stop = min(end, (start // transfer + 1) * transfer)
            self._cache.prefetch(self._state.cached, start, stop - start)
            start = stop
