"""Requests that wait for an answer: for too long, or for a thread that is gone.

The kernel lets a thread wait for as long as it takes, also one that was killed: once a request was read from the device
it ends by its answer alone (fs/fuse/dev.c, request_wait_answer). So each has an answer in bounded time, and at once if
nobody is left to hear it.
"""

from collections.abc import Container, Hashable
from typing import Final, NamedTuple

from rbdfs.fuse.process import is_killed
from rbdfs.fuse.requests import Requests, WaitingRequest

RETRY_AFTER_SECONDS: Final = 1.0
"""How long what was not answered in time is not asked for again. The kernel repeats a read of the page cache that has
failed as readahead, page by page (filemap_read). And of lookups of one name, and of seeks in one file, it sends one at
a time (d_alloc_parallel, fuse_lseek): the tenth process would wait ten times as long."""


KILL_CHECK_AFTER_SECONDS: Final = 0.5
"""For how long a request has to wait before its thread is looked at."""

THREADS_CHECKED_AT_ONCE: Final = 100
"""Threads that are looked at in one go; each takes some 30 us."""


class _Range(NamedTuple):
    until: float
    start: int
    end: int


class RecentTimeouts:
    """What was not answered in time just now."""

    def __init__(self) -> None:
        self._until: dict[Hashable, float] = {}

    def add(self, request: Hashable, now: float) -> None:
        """What the request was is what tells it from others."""
        self._until = {request: until for request, until in self._until.items() if now < until}
        self._until[request] = now + RETRY_AFTER_SECONDS

    def has(self, request: Hashable, now: float) -> bool:
        """Whether the same was asked in vain."""
        return now < self._until.get(request, 0.0)


class Pending:
    """What waits for too long, what nobody waits for any more, and what has waited in vain a moment ago."""

    def __init__(self, requests: Requests, seconds: float) -> None:
        """`seconds` is how long a request may wait; math.inf if there is no limit."""
        self.seconds = seconds
        self.failed_reads: dict[int, list[_Range]] = {}
        """By inode."""
        self._requests = requests
        self._interrupted: set[int] = set()
        self._looked_at = 0

    def due(self, now: float, passed: Container[int]) -> list[tuple[int, WaitingRequest]]:
        """What has waited for too long: (unique, request). Of what is in `passed` somebody else keeps the time."""
        found = []
        for unique, request in self._requests.waiting.items():
            if now - request[0] < self.seconds:
                break
            if unique not in passed:
                found.append((unique, WaitingRequest(*request)))
        return found

    def interrupt(self, unique: int) -> None:
        """The kernel has said that the thread that waits for this answer has a signal pending. It says so once."""
        self._interrupted.add(unique)

    def killed(self) -> list[tuple[int, int]]:
        """Of what was interrupted, what nobody waits for any more: (unique, thread). Each time, until it is answered:
        pyfuse3 may not have begun with it."""
        waiting = self._requests.waiting
        self._interrupted &= waiting.keys()
        return [(unique, thread) for unique in self._interrupted if is_killed(thread := waiting[unique][4])]

    def killed_unheard(self, now: float, passed: Container[int]) -> list[int]:
        """The uniques of what has waited for a while and nobody waits for any more, of as many as there is time for.

        Of direct reads the kernel says no word (they go out as if by libaio, FUSE_ASYNC_DIO): so their threads are
        looked at, one after the other.
        """
        waiting: dict[int, list[int]] = {}
        for unique, (began, _, _, _, thread, _) in self._requests.waiting.items():
            if now - began < KILL_CHECK_AFTER_SECONDS:
                break
            if unique not in passed:
                waiting.setdefault(thread, []).append(unique)
        threads = sorted(waiting)
        start = self._looked_at if self._looked_at < len(threads) else 0
        self._looked_at = start + THREADS_CHECKED_AT_ONCE
        return [
            unique for thread in threads[start : self._looked_at] if is_killed(thread) for unique in waiting[thread]
        ]

    def fail_read(self, inode: int, start: int, end: int, now: float) -> None:
        """A read of the page cache, of the bytes [start, end), was not answered in time."""
        self.failed_reads.setdefault(inode, []).append(_Range(now + RETRY_AFTER_SECONDS, start, end))

    def has_failed(self, inode: int, start: int, end: int, now: float) -> bool:
        """Whether such a read was not answered in time just now."""
        return any(
            now < until and first <= start and end <= last for until, first, last in self.failed_reads.get(inode, ())
        )

    def forget_failed(self, now: float) -> None:
        """Let go of what failed too long ago."""
        for inode, ranges in list(self.failed_reads.items()):
            ranges[:] = [each for each in ranges if now < each.until]
            if not ranges:
                del self.failed_reads[inode]
