"""The requests that wait for an answer, and counts of those that had one: durations, bytes, errors. Pure."""

import errno
from bisect import bisect_left
from collections import Counter, defaultdict
from itertools import islice
from typing import Final, NamedTuple

from rbdfs.fuse.protocol import READ

BUCKET_SECONDS: Final = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 120.0)
"""Upper bounds of the buckets: a read from the cache is in the first, one of an OSD in the middle; the last is the
default of --osd-timeout."""


class WaitingRequest(NamedTuple):
    """A request without an answer yet. For reads it is a plain tuple, which costs half as much."""

    began: float
    """As time.monotonic() has it."""
    opcode: int
    inode: int
    offset: int
    """The image offset of a read or a seek."""
    thread: int
    """The thread that asks, as in /proc; 0 if it is in a namespace that we do not see, or if none waits."""
    page_cache_bytes: int = 0
    """Bytes from the offset on that are for the page cache."""


class Latency:
    """The durations of the requests of one kind."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKET_SECONDS) + 1)
        """Requests in each bucket; the last bucket has no bound."""
        self.seconds = 0.0
        """The sum."""


class Requests:
    """All requests of a mount. The device counts successful reads itself: a call for each would cost more."""

    def __init__(self) -> None:
        self.waiting: dict[int, WaitingRequest | tuple[float, int, int, int, int, int]] = {}
        """By unique, the kernel's number, the oldest first."""
        self.latency: defaultdict[int, Latency] = defaultdict(Latency)
        """By opcode, with those that failed."""
        self.read_bytes = 0
        self.errors = Counter({(READ, errno.EIO): 0, (READ, errno.ETIMEDOUT): 0})
        """By opcode and errno. Some begin at 0: Prometheus's rate() does not see the first count of a new series."""

    def end(self, unique: int, error: int, now: float) -> None:
        """Count a request that has its answer; `error` is an errno, or 0. Nothing happens if it had one before."""
        if (waiting := self.waiting.pop(unique, None)) is not None:
            began, opcode, *_ = waiting
            latency = self.latency[opcode]
            latency.buckets[bisect_left(BUCKET_SECONDS, now - began)] += 1
            latency.seconds += now - began
            if error:
                self.errors[opcode, error] += 1

    def oldest(self, count: int) -> list[WaitingRequest]:
        """Return the requests that have waited longest, the oldest first."""
        return [WaitingRequest(*each) for each in islice(self.waiting.values(), count)]
