"""What was not answered in time a moment ago, so that it is not asked for again at once. Pure.

The kernel repeats a read of the page cache that has failed as readahead, page by page (filemap_read). It sends lookups
of one name, and seeks in one file, one at a time (d_alloc_parallel, fuse_lseek): the tenth process would wait ten times
as long.
"""

from collections.abc import Hashable
from typing import Final, NamedTuple

RETRY_AFTER_SECONDS: Final = 1.0
"""How long a request is refused after it was not answered in time."""


class RecentTimeouts:
    """Requests of any kind, by what tells them from others."""

    def __init__(self) -> None:
        self._until: dict[Hashable, float] = {}

    def add(self, request: Hashable, now: float) -> None:
        """Note that a request was not answered in time."""
        self._until = {request: until for request, until in self._until.items() if now < until}
        self._until[request] = now + RETRY_AFTER_SECONDS

    def has(self, request: Hashable, now: float) -> bool:
        """Return whether the same request was not answered in time just now."""
        return now < self._until.get(request, 0.0)


class _Range(NamedTuple):
    until: float
    start: int
    end: int


class TimedOutReads:
    """Reads of the page cache, by the bytes that they asked for."""

    def __init__(self) -> None:
        self.ranges: dict[int, list[_Range]] = {}
        """By inode."""

    def add(self, inode: int, start: int, end: int, now: float) -> None:
        """Note that a read of the bytes [start, end) was not answered in time."""
        self.ranges.setdefault(inode, []).append(_Range(now + RETRY_AFTER_SECONDS, start, end))

    def has(self, inode: int, start: int, end: int, now: float) -> bool:
        """Return whether a read of all these bytes was not answered in time just now."""
        return any(now < until and first <= start and end <= last for until, first, last in self.ranges.get(inode, ()))

    def forget_old(self, now: float) -> None:
        """Drop reads that may be tried again."""
        for inode, ranges in list(self.ranges.items()):
            ranges[:] = [each for each in ranges if now < each.until]
            if not ranges:
                del self.ranges[inode]
