"""The bytes that were read: an LRU under a budget of bytes, and one fetch for all readers of the same bytes.

librbd's own path one level up: a read becomes object extents (`file_to_extents`); what the cache has of each object
is answered, the rest is fetched. librbd reads an image by image offsets, so missing extents that touch in the image,
in one object or over several, are fetched with one aio.

Everything here happens in the trio thread, without a lock and without an await.
"""

import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial

from rbdfs.errors import RbdfsError
from rbdfs.image.backend import OnRead, ReadResult
from rbdfs.image.cached_image import BEYOND_ANY_OFFSET, CachedImage, Fetch, Part
from rbdfs.image.gather import Gather
from rbdfs.image.striper import file_to_extents
from rbdfs.image.throttle import Throttle, Total

log = logging.getLogger(__name__)

MISS_ALIGNMENT = 4096
"""A miss is rounded out to multiples of this many bytes: the reader's page and BlueStore's checksum block, so that it
costs the OSD nothing more. It bounds what a random read fetches: the request and less than two of these."""

COPIES_IN_FLIGHT = 2
"""Bytes in flight are in memory twice: librados receives them into buffers of its own, librbd copies them into ours."""


@dataclass(slots=True)
class CacheCounts:
    """Counts for operators, and for tests, which count operations and not seconds."""

    hits: int = 0
    misses: int = 0
    copied_bytes: int = 0
    evictions: int = 0
    ahead_bytes: int = 0
    """Bytes asked for ahead of readers."""
    ahead_used_bytes: int = 0
    """Of these, bytes that a reader came to, in whole fetches."""
    ahead_wasted_bytes: int = 0
    """Of these, bytes that arrived and were dropped before a reader came, in whole fetches."""


class ObjectCache:
    """The bytes of all open images under one budget, which also counts what is in flight.

    With a `budget_bytes` of 0 it keeps nothing: each read is an aio of its own, and nothing is read ahead.
    """

    def __init__(self, budget_bytes: int, max_ops: int, max_bytes: int) -> None:
        """`max_ops` and `max_bytes` limit what is in flight to one pool; without a budget, the bytes to all pools."""
        self.budget_bytes = budget_bytes
        self._largest_fetch = budget_bytes // COPIES_IN_FLIGHT
        self._max_ops = max_ops
        self._max_bytes = max_bytes
        self.in_flight = Total(self._largest_fetch or max_bytes)
        """Bytes, to all pools."""
        self._throttles: dict[Hashable, Throttle] = {}
        self.counts = CacheCounts()
        self._complete: OrderedDict[Fetch, None] = OrderedDict()
        self._complete_bytes = 0

    def throttle(self, pool: Hashable) -> Throttle:
        """Return the limit for all images of one pool: if a pool does not answer, the others still have room."""
        if pool not in self._throttles:
            self._throttles[pool] = Throttle(self._max_ops, self._max_bytes, self.in_flight)
        return self._throttles[pool]

    @property
    def reads_in_flight(self) -> int:
        """Reads that the cluster has not answered yet."""
        return sum(throttle.ops for throttle in self._throttles.values())

    @property
    def reads_queued(self) -> int:
        """Reads that wait for others to end first."""
        return sum(throttle.queued for throttle in self._throttles.values())

    @property
    def cached_bytes(self) -> int:
        """Bytes that image data takes in memory, cached or in flight. At most the budget."""
        return self._complete_bytes + COPIES_IN_FLIGHT * self.in_flight.bytes

    def start_read(self, image: CachedImage, offset: int, length: int, callback: OnRead, *, keep: bool = True) -> None:
        """Read exactly `length` bytes at the image offset `offset`, without a copy if one fetch has them all.

        `callback` is called once: from here if the bytes are cached, else when they have arrived. It gets the error of
        a fetch that failed; the next read tries again. The range must lie inside the image. Without `keep`, the cache
        does not keep what it has to fetch.
        """
        layout = image.layout
        parts = None
        object_no, position = divmod(offset, layout.object_size)
        if layout.is_striped:
            parts = self._cached_parts(image, offset, length)
        elif cached := image.objects.get(object_no):
            start, end, fetch, fetch_offset = cached[bisect_right(cached, (position, BEYOND_ANY_OFFSET)) - 1]
            if start <= position and position + length <= end:  # as most hits: all in one fetch
                self.counts.hits += 1
                if fetch.is_readahead:
                    self._count_use(fetch)
                start = fetch_offset + position - start
                if fetch.data is not None:
                    self._complete.move_to_end(fetch)
                    callback(memoryview(fetch.data)[start : start + length])
                else:
                    image.throttle.promote(fetch)
                    fetch.waiters.append((callback, start, start + length))
                return
            parts = self._cached_parts(image, offset, length)
        if parts is not None:
            self.counts.hits += 1
            self._answer(parts, callback)
            return
        self.counts.misses += 1
        if keep and length <= self._largest_fetch:
            self._fetch_missing(image, offset, length, callback)
        else:
            image.throttle.submit((image, offset, length, callback), length, self._start_uncached, urgent=True)

    def _answer(self, parts: list[Part], callback: OnRead) -> None:
        """Answer from fetches, as soon as all of them are complete."""
        if len(parts) > 1:
            self.counts.copied_bytes += sum(end - start for _, start, end in parts)
            callbacks = Gather(len(parts), callback).callbacks
        else:
            callbacks = [callback]
        for (fetch, start, end), each in zip(parts, callbacks, strict=True):
            if fetch.data is not None:
                each(memoryview(fetch.data)[start:end])
            else:
                fetch.waiters.append((each, start, end))

    def prefetch(self, image: CachedImage, offset: int, length: int) -> None:
        """Fetch the missing parts of a range, after all reads that somebody waits for. It must lie inside the image."""
        if length <= self._largest_fetch:
            for start, end in image.missing(offset, length):
                self._submit(Fetch(image, start, end - start, is_readahead=True), urgent=False)
                self.counts.ahead_bytes += end - start

    def _count_use(self, fetch: Fetch) -> None:
        """Note that a reader has come to what was read ahead."""
        fetch.is_readahead = False
        self.counts.ahead_used_bytes += fetch.length

    def cancel(self, image: CachedImage) -> None:
        """Drop queued fetches of an image that nobody waits for. Call it before its backend is closed."""
        for fetch in image.fetches():
            if fetch.data is None and not fetch.waiters and image.throttle.cancel(fetch):
                self._drop(fetch)

    def forget(self, image: CachedImage) -> None:
        """Drop all of an image. Readers that wait for a fetch of it still get the bytes."""
        self.cancel(image)
        for fetch in image.fetches():
            self._drop(fetch)

    def _cached_parts(self, image: CachedImage, offset: int, length: int) -> list[Part] | None:
        """Return the fetches that have a range, each with the part to take; None if a byte of it is in no fetch."""
        parts = []
        for extent in file_to_extents(image.layout, offset, length):
            position, end = extent.offset, extent.offset + extent.length
            cached = image.objects.get(extent.object_no, [])
            index = bisect_right(cached, (position, BEYOND_ANY_OFFSET)) - 1
            while position < end:
                if not 0 <= index < len(cached) or not cached[index][0] <= position < cached[index][1]:
                    return None
                start, extent_end, fetch, fetch_offset = cached[index]
                part_end = min(end, extent_end)
                if fetch.is_readahead:
                    self._count_use(fetch)
                parts.append(Part(fetch, fetch_offset + position - start, fetch_offset + part_end - start))
                if fetch.data is not None:
                    self._complete.move_to_end(fetch)
                else:
                    image.throttle.promote(fetch)
                position = part_end
                index += 1
        return parts

    def _fetch_missing(self, image: CachedImage, offset: int, length: int, callback: OnRead) -> None:
        """Fetch the missing parts of a range, and answer from these and from what is cached."""
        start = offset - offset % MISS_ALIGNMENT
        end = min(image.backend.size, -(-(offset + length) // MISS_ALIGNMENT) * MISS_ALIGNMENT)
        if end - start > self._largest_fetch or end < offset + length:
            start, end = offset, offset + length
        object_size = image.layout.object_size
        if (
            not image.layout.is_striped
            and start // object_size not in image.objects
            and start % object_size + end - start <= object_size
        ):
            gaps = [(start, end)]  # inside one object, of which nothing is cached
        else:
            gaps = image.missing(start, end - start)
        if gaps == [(start, end)]:
            fetch = Fetch(image, start, end - start)
            fetch.waiters.append((callback, offset - start, offset - start + length))
            self._submit(fetch, urgent=True)
            return
        for gap_start, gap_end in gaps:
            self._submit(Fetch(image, gap_start, gap_end - gap_start), urgent=True)
        parts = self._cached_parts(image, offset, length)
        if parts is not None:
            self._answer(parts, callback)
        else:  # to make room for a part, a budget hardly larger than this read has dropped another
            image.throttle.submit((image, offset, length, callback), length, self._start_uncached, urgent=True)

    def _submit(self, fetch: Fetch, *, urgent: bool) -> None:
        """Fetch bytes of which none is cached. Other readers find the fetch from now on."""
        image, offset, length = fetch.image, fetch.offset, fetch.length
        layout = image.layout
        object_no, position = divmod(offset, layout.object_size)
        if not layout.is_striped and position + length <= layout.object_size and object_no not in image.objects:
            fetch.is_indexed = True
            image.objects[object_no] = [(position, position + length, fetch, 0)]
            fetch.objects = (object_no,)
        else:
            image.add(fetch)
        image.throttle.submit(fetch, length, self._start, urgent=urgent)

    def _start(self, fetch: Fetch) -> None:
        if self._complete_bytes + self.in_flight.bytes + self.in_flight.peak_bytes > self.budget_bytes:
            self._make_room()
        try:
            fetch.image.backend.start_read(fetch.offset, fetch.length, partial(self._finish, fetch))
        except Exception as error:
            self._finish(fetch, _unexpected(error))

    def _start_uncached(self, request: tuple[CachedImage, int, int, OnRead]) -> None:
        image, offset, length, callback = request
        if self._complete_bytes + self.in_flight.bytes + self.in_flight.peak_bytes > self.budget_bytes:
            self._make_room()
        try:
            image.backend.start_read(offset, length, partial(self._finish_uncached, image, length, callback))
        except Exception as error:
            self._finish_uncached(image, length, callback, _unexpected(error))

    def _finish_uncached(self, image: CachedImage, length: int, callback: OnRead, result: ReadResult) -> None:
        try:
            callback(result)
        except Exception:
            log.exception("a read could not be answered")
        image.throttle.done(length)

    def _make_room(self) -> None:
        """Evict fetches to make room for a read that was just started."""
        # librados's copies count with their peak: the memory that it frees lies between what it still has, and our
        # buffers do not fit in. (With a budget of 256 MiB, four `cp`s at once took 440 to 500 MB
        # when only those in flight were counted, 310 to 390 so.)
        room = self.budget_bytes - self.in_flight.bytes - self.in_flight.peak_bytes
        while self._complete and self._complete_bytes > room:
            self._drop(next(iter(self._complete)))
            self.counts.evictions += 1

    def _finish(self, fetch: Fetch, result: ReadResult) -> None:
        """Answer all readers of a fetch that has ended, even if one of them raises."""
        waiters, fetch.waiters = fetch.waiters, []
        if isinstance(result, RbdfsError):
            self._drop(fetch)
        else:
            fetch.data = result
            if fetch.is_indexed:
                self._complete[fetch] = None
                self._complete_bytes += fetch.length
            elif fetch.is_readahead:
                self.counts.ahead_wasted_bytes += fetch.length
        for callback, start, end in waiters:
            try:
                callback(result if isinstance(result, RbdfsError) else memoryview(result)[start:end])
            except Exception:
                log.exception("a read could not be answered")
        fetch.image.throttle.done(fetch.length)

    def _drop(self, fetch: Fetch) -> None:
        """Take a fetch out of the cache. Readers that wait for it still get the bytes."""
        if not fetch.is_indexed:
            return
        fetch.image.remove(fetch)
        if fetch in self._complete:
            del self._complete[fetch]
            self._complete_bytes -= fetch.length
            if fetch.is_readahead:
                self.counts.ahead_wasted_bytes += fetch.length


def _unexpected(error: Exception) -> RbdfsError:
    """Return the error for the readers of a read that could not be started."""
    log.error("a read could not be started", exc_info=error)
    return RbdfsError(f"unexpected {type(error).__name__}: {error}")
