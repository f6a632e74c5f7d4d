"""What was read of objects: a byte-budgeted LRU, and one fetch for all who wait for the same bytes.

librbd's own path one level up: a read becomes object extents (`file_to_extents`); what the cache holds of each object
is answered, the rest is fetched. librbd reads an image by image offsets, so missing extents that touch in the image,
in one object or over several, are fetched with one aio.

Everything here happens in the trio thread, so there is no lock; between a look at the cache and the act that relies on
it there is no await.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import trio

from rbdfs.errors import RbdfsError
from rbdfs.image.held_blocks import HeldBlocks
from rbdfs.image.source import Data, ImageSource, ReadResult, view
from rbdfs.image.striper import Layout, file_to_extents
from rbdfs.image.throttle import Throttle

MISS_ALIGNMENT = 4096
"""A miss is rounded out to multiples of this many bytes: the reader's page and BlueStore's checksum block, so that it
costs the OSD nothing more. It bounds what a random read fetches: the request and less than two of these."""

COPIES_IN_FLIGHT = 2
"""What is in flight is in memory twice where librbd copies it: librados receives it into buffers of its own, librbd
copies it into ours. Where librados's buffers are taken over, the second copy stands for the gaps between them in the
heap: with one, a mount with a budget of 256 MiB peaked at 422 MB under all kinds of readers, with two at 338."""

_BEYOND_ANY_OFFSET = 1 << 63


class Fetch:
    """One aio: queued, in flight or landed. The unit of single flight, of the LRU and of the budget."""

    __slots__ = ("data", "error", "image", "length", "listed", "objects", "offset", "waiters")

    def __init__(self, image: "CachedImage", offset: int, length: int) -> None:
        self.image = image
        self.offset = offset
        self.length = length
        self.objects: list[int] = []
        self.listed = False
        self.data: Data | None = None
        self.error: RbdfsError | None = None
        self.waiters: list[Callable[[Fetch], None]] = []

    def land(self, result: ReadResult) -> None:
        """The aio has ended: tell all who wait."""
        if isinstance(result, RbdfsError):
            self.error = result
        else:
            self.data = result
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter(self)


class Span(NamedTuple):
    """The bytes data[start:end]."""

    data: Data
    start: int
    end: int


Done = Callable[[Span | RbdfsError], None]


class Piece(NamedTuple):
    """The bytes [start, end) of an object are in `fetch`, from `fetch_offset` on."""

    start: int
    end: int
    fetch: Fetch
    fetch_offset: int


class CachedImage:
    """What the cache holds of one image as it was at one time: object number → its pieces, in order, never overlapping.

    A HEAD that may have been written since gets a new one, so that nothing of the old can answer (close-to-open).
    """

    __slots__ = ("held", "layout", "objects", "source")

    def __init__(self, source: ImageSource, layout: Layout, held: HeldBlocks | None = None) -> None:
        self.source = source
        self.layout = layout
        self.objects: dict[int, list[Piece]] = {}
        self.held = held

    def fetches(self) -> set[Fetch]:
        """All that was asked for and is not evicted."""
        return {piece.fetch for pieces in self.objects.values() for piece in pieces}

    def held_blocks(self) -> HeldBlocks:
        """What is held, kept up to date from now on."""
        if self.held is None:
            self.held = HeldBlocks()
            for fetch in self.fetches():
                self.held.add(fetch.offset, fetch.length)
        return self.held


@dataclass(slots=True)
class CacheCounts:
    """What was done so far; for the log, and for tests, which count operations and not seconds."""

    hits: int = 0
    misses: int = 0
    aios: int = 0
    fetched_bytes: int = 0
    copied_bytes: int = 0
    evictions: int = 0


class ObjectCache:
    """The bytes of all open images, under one budget; what is in flight counts.

    With a `budget_bytes` of 0 nothing is kept: each read is an aio of its own, and nothing is read ahead.
    """

    def __init__(self, budget_bytes: int, throttle: Throttle) -> None:
        self.budget_bytes = budget_bytes
        self._largest_fetch = budget_bytes // COPIES_IN_FLIGHT
        if budget_bytes:
            throttle.max_bytes = min(throttle.max_bytes, self._largest_fetch)
        self.counts = CacheCounts()
        self._throttle = throttle
        self._landed: OrderedDict[Fetch, None] = OrderedDict()
        self._landed_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes that image data takes in memory, read or being read. At most the budget."""
        return self._landed_bytes + COPIES_IN_FLIGHT * self._throttle.bytes

    def begin_read(self, image: CachedImage, offset: int, length: int, done: Done) -> None:
        """Exactly `length` bytes at the image offset `offset`; what one fetch holds is not copied.

        `done` is called once: from here for what is held, else when it has landed. It gets the error of a fetch that
        failed; the next read tries anew. The range must lie inside the image.
        """
        parts = self._held(image, offset, length)
        if parts is not None:
            self.counts.hits += 1
        else:
            self.counts.misses += 1
            parts = self._fetch_missing(image, offset, length)
        if len(parts) == 1:
            fetch, start, end = parts[0]
            if fetch.data is not None:
                done(Span(fetch.data, start, end))
            else:
                fetch.waiters.append(partial(_pass_on, done, start, end))
        else:
            self.counts.copied_bytes += length
            _Gathering(parts, done).begin()

    async def read(self, image: CachedImage, offset: int, length: int) -> memoryview:
        """As `begin_read`, for a task. Raises the error. A cancel leaves the aio to finish."""
        landed = trio.Event()
        results: list[Span | RbdfsError] = []

        def done(result: Span | RbdfsError) -> None:
            results.append(result)
            landed.set()

        self.begin_read(image, offset, length, done)
        if not results:
            await landed.wait()
        result = results[0]
        if isinstance(result, RbdfsError):
            raise result
        return view(result.data)[result.start : result.end]

    def prefetch(self, image: CachedImage, offset: int, length: int) -> None:
        """Start to fetch what is missing of a range, behind all that is waited for. It must lie inside the image."""
        if length <= self._largest_fetch:
            for start, end in _missing(image, offset, length):
                self._submit(image, start, end, urgent=False)

    def withdraw(self, image: CachedImage) -> None:
        """Ask for nothing more of an image: what is queued and nobody waits for is dropped. To be called before its
        source is closed."""
        for fetch in image.fetches():
            if fetch.data is None and not fetch.waiters and self._throttle.withdraw(fetch):
                self._unlist(fetch)

    def forget(self, image: CachedImage) -> None:
        """Keep nothing of an image. Who waits for a fetch of it still gets the bytes."""
        self.withdraw(image)
        for fetch in image.fetches():
            self._unlist(fetch)

    def _held(self, image: CachedImage, offset: int, length: int) -> list[tuple[Fetch, int, int]] | None:
        """The fetches that hold a range, each with the part to take; None if a byte of it is not asked for yet."""
        parts = []
        for extent in file_to_extents(image.layout, offset, length):
            position, end = extent.offset, extent.offset + extent.length
            pieces = image.objects.get(extent.object_no, [])
            index = bisect_right(pieces, (position, _BEYOND_ANY_OFFSET)) - 1
            while position < end:
                if not 0 <= index < len(pieces) or not pieces[index].start <= position < pieces[index].end:
                    return None
                start, piece_end, fetch, fetch_offset = pieces[index]
                part_end = min(end, piece_end)
                parts.append((fetch, fetch_offset + position - start, fetch_offset + part_end - start))
                if fetch.data is not None:
                    self._landed.move_to_end(fetch)
                else:
                    self._throttle.hurry(fetch)
                position = part_end
                index += 1
        return parts

    def _fetch_missing(self, image: CachedImage, offset: int, length: int) -> list[tuple[Fetch, int, int]]:
        """As `_held`, after asking for what is missing."""
        start = offset - offset % MISS_ALIGNMENT
        end = min(image.source.size, -(-(offset + length) // MISS_ALIGNMENT) * MISS_ALIGNMENT)
        end = max(end, offset + length)
        if end - start <= self._largest_fetch:
            gaps = _missing(image, start, end - start)
            fetches = [self._submit(image, gap_start, gap_end, urgent=True) for gap_start, gap_end in gaps]
            if gaps == [(start, end)]:
                return [(fetches[0], offset - start, offset - start + length)]
            # To make room for a part, a budget hardly larger than this read may have dropped another.
            if parts := self._held(image, offset, length):
                return parts
        return [(self._submit(image, offset, offset + length, urgent=True, listed=False), 0, length)]

    def _submit(self, image: CachedImage, start: int, end: int, *, urgent: bool, listed: bool = True) -> Fetch:
        """Ask for the image's bytes [start, end), of which none is listed; `listed` lets others find it."""
        fetch = Fetch(image, start, end - start)
        if listed:
            self._list(fetch)
        self._throttle.submit(fetch, fetch.length, partial(self._start, fetch), urgent=urgent)
        return fetch

    def _start(self, fetch: Fetch) -> None:
        # librados's copies count as many as they ever were at once: the memory that it gives back lies between what it
        # still has, and buffers of ours do not fit in. (With a budget of 256 MiB, four `cp`s at once took 440 to 500 MB
        # when only those in flight were counted, 310 to 390 so.)
        room = self.budget_bytes - self._throttle.bytes - self._throttle.peak_bytes
        while self._landed and self._landed_bytes > room:
            self._unlist(next(iter(self._landed)))
            self.counts.evictions += 1
        self.counts.aios += 1
        self.counts.fetched_bytes += fetch.length
        fetch.image.source.aio_read(fetch.offset, fetch.length, partial(self._land, fetch))

    def _land(self, fetch: Fetch, result: ReadResult) -> None:
        fetch.land(result)
        if fetch.error is not None:
            self._unlist(fetch)
        elif fetch.listed:
            self._landed[fetch] = None
            self._landed_bytes += fetch.length
        self._throttle.done(fetch.length)

    def _list(self, fetch: Fetch) -> None:
        fetch.listed = True
        if fetch.image.held is not None:
            fetch.image.held.add(fetch.offset, fetch.length)
        for extent in file_to_extents(fetch.image.layout, fetch.offset, fetch.length):
            pieces = fetch.image.objects.setdefault(extent.object_no, [])
            piece = Piece(extent.offset, extent.offset + extent.length, fetch, extent.image_offset - fetch.offset)
            pieces.insert(bisect_right(pieces, piece[:2]), piece)
            fetch.objects.append(extent.object_no)

    def _unlist(self, fetch: Fetch) -> None:
        if not fetch.listed:
            return
        fetch.listed = False
        if fetch.image.held is not None:
            fetch.image.held.remove(fetch.offset, fetch.length)
        for object_no in set(fetch.objects):
            pieces = fetch.image.objects.pop(object_no, [])
            if left := [piece for piece in pieces if piece.fetch is not fetch]:
                fetch.image.objects[object_no] = left
        if fetch in self._landed:
            del self._landed[fetch]
            self._landed_bytes -= fetch.length


def _pass_on(done: Done, start: int, end: int, fetch: Fetch) -> None:
    """One fetch that holds all of a read has landed."""
    done(Span(fetch.data, start, end) if fetch.data is not None else fetch.error or _no_result())


def _no_result() -> RbdfsError:
    raise AssertionError("a fetch landed with neither bytes nor error")


class _Gathering:
    """A read whose bytes come of several fetches."""

    def __init__(self, parts: list[tuple[Fetch, int, int]], done: Done) -> None:
        self._parts = parts
        self._done = done
        self._awaited = {fetch for fetch, _, _ in parts if fetch.data is None}

    def begin(self) -> None:
        if not self._awaited:
            self._finish()
        for fetch in self._awaited:
            fetch.waiters.append(self._landed)

    def _landed(self, fetch: Fetch) -> None:
        self._awaited.discard(fetch)
        if not self._awaited:
            self._finish()

    def _finish(self) -> None:
        views = []
        for fetch, start, end in self._parts:
            if fetch.data is None:
                self._done(fetch.error or _no_result())
                return
            views.append(view(fetch.data)[start:end])
        joined = b"".join(views)
        self._done(Span(joined, 0, len(joined)))


def _missing(image: CachedImage, offset: int, length: int) -> list[tuple[int, int]]:
    """The image ranges [start, end) that nobody has asked for yet; ranges that touch come as one."""
    missing = []
    missing_from = missing_to = offset
    for extent in file_to_extents(image.layout, offset, length):
        to_image = extent.image_offset - extent.offset
        extent_end = extent.offset + extent.length
        position = extent.offset
        pieces = image.objects.get(extent.object_no, [])
        first = max(0, bisect_right(pieces, (position, _BEYOND_ANY_OFFSET)) - 1)
        for piece in pieces[first:]:
            if piece.start >= extent_end:
                break
            if piece.end <= position:
                continue
            if position < piece.start:
                missing_to = piece.start + to_image
            if missing_from < missing_to:
                missing.append((missing_from, missing_to))
            position = piece.end
            missing_from = missing_to = position + to_image
        if position < extent_end:
            missing_to = extent_end + to_image
    if missing_from < missing_to:
        missing.append((missing_from, missing_to))
    return missing
