"""What the cache has of one image: fetches, and which bytes of which object each of them has."""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from rbdfs.image.backend import Buffer, ImageBackend, OnRead
from rbdfs.image.striper import Layout, file_to_extents
from rbdfs.image.throttle import Throttle

BEYOND_ANY_OFFSET = 1 << 63
"""With `bisect_right`: after all that begins at an offset."""


class Fetch:
    """One aio: queued, in flight or complete. The unit of single flight, of the LRU and of the budget."""

    __slots__ = ("data", "image", "is_indexed", "is_readahead", "length", "objects", "offset", "waiters")

    def __init__(self, image: "CachedImage", offset: int, length: int, *, is_readahead: bool = False) -> None:
        self.image = image
        self.offset = offset
        self.length = length
        self.objects: Sequence[int] = ()
        self.is_indexed = False
        """Whether readers find it in the image's objects."""
        self.is_readahead = is_readahead
        """Whether it was read ahead, and nobody has read any of it yet."""
        self.data: Buffer | None = None
        self.waiters: list[tuple[OnRead, int, int]] = []
        """Readers that wait for a part of the data: callback, start, end."""


CachedExtent = tuple[int, int, Fetch, int]
"""The bytes [start, end) of an object are in a fetch, from an offset in its data on: (start, end, fetch, offset)."""


class Part(NamedTuple):
    """The bytes [start, end) of a fetch's data."""

    fetch: Fetch
    start: int
    end: int


class CachedImage:
    """What the cache has of one image as it was at one time: object number → its extents, in order, never overlapping.

    A HEAD that may have been written since gets a new one, so that nothing of the old can answer (close-to-open).
    """

    __slots__ = ("backend", "layout", "objects", "throttle")

    def __init__(self, backend: ImageBackend, layout: Layout, throttle: Throttle) -> None:
        self.backend = backend
        self.layout = layout
        self.throttle = throttle
        self.objects: dict[int, list[CachedExtent]] = {}

    def fetches(self) -> set[Fetch]:
        """Return all fetches that are not evicted."""
        return {fetch for extents in self.objects.values() for _, _, fetch, _ in extents}

    def add(self, fetch: Fetch) -> None:
        """Enter a fetch in the objects that it reads. None of its bytes may be in another."""
        fetch.is_indexed = True
        objects = fetch.objects = []
        for extent in file_to_extents(self.layout, fetch.offset, fetch.length):
            cached = self.objects.setdefault(extent.object_no, [])
            start, end = extent.offset, extent.offset + extent.length
            cached.insert(bisect_right(cached, (start, end)), (start, end, fetch, extent.image_offset - fetch.offset))
            objects.append(extent.object_no)

    def remove(self, fetch: Fetch) -> None:
        """Take a fetch out of the objects. Readers that wait for it still get the bytes."""
        fetch.is_indexed = False
        for object_no in set(fetch.objects):
            cached = self.objects.pop(object_no, [])
            if left := [extent for extent in cached if extent[2] is not fetch]:
                self.objects[object_no] = left

    def missing(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Return the image ranges [start, end) that nobody has asked for yet; ranges that touch are one."""
        missing = []
        missing_from = missing_to = offset
        for extent in file_to_extents(self.layout, offset, length):
            to_image = extent.image_offset - extent.offset
            extent_end = extent.offset + extent.length
            position = extent.offset
            cached = self.objects.get(extent.object_no, [])
            first = max(0, bisect_right(cached, (position, BEYOND_ANY_OFFSET)) - 1)
            for start, end, _, _ in cached[first:]:
                if start >= extent_end:
                    break
                if end <= position:
                    continue
                if position < start:
                    missing_to = start + to_image
                if missing_from < missing_to:
                    missing.append((missing_from, missing_to))
                position = end
                missing_from = missing_to = position + to_image
            if position < extent_end:
                missing_to = extent_end + to_image
        if missing_from < missing_to:
            missing.append((missing_from, missing_to))
        return missing
