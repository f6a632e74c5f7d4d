"""What the kernel waits for, how long its requests have taken, and how they have failed. Pure."""

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
    """A request without an answer yet. Made as a plain tuple where reads come: that costs half as much."""

    began: float
    """In the time of time.monotonic()."""
    opcode: int
    inode: int
    offset: int
    """In the image, of a read or a seek."""
    thread: int
    """Who asks, by the id that /proc has; 0 if it is in a namespace that we do not see, or nobody waits."""
    page_cache_bytes: int = 0
    """Bytes that the page cache asks for from the offset on."""


class Latency:
    """How long the requests of one kind have taken."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BUCKET_SECONDS) + 1)
        """How many were in each; the last one has no bound."""
        self.seconds = 0.0
        """All of them together."""


class Requests:
    """Kept by the device, which counts reads that succeed by itself: a call for each would cost more than the count."""

    def __init__(self) -> None:
        self.waiting: dict[int, WaitingRequest | tuple[float, int, int, int, int, int]] = {}
        """By the kernel's number for it, the oldest first."""
        self.latency: defaultdict[int, Latency] = defaultdict(Latency)
        """By opcode; those that failed are counted, too."""
        self.read_bytes = 0
        self.errors = Counter({(READ, errno.EIO): 0, (READ, errno.ETIMEDOUT): 0})
        """By opcode and errno. A series that begins with its first error would hide that one from rate()."""

    def end(self, unique: int, error: int, now: float) -> None:
        """A request has its answer; `error` is an errno, or 0. Nothing happens if it had one before."""
        if (waiting := self.waiting.pop(unique, None)) is not None:
            began, opcode, *_ = waiting
            latency = self.latency[opcode]
            latency.buckets[bisect_left(BUCKET_SECONDS, now - began)] += 1
            latency.seconds += now - began
            if error:
                self.errors[opcode, error] += 1

    def oldest(self, count: int) -> list[WaitingRequest]:
        """Those that wait for the longest, the oldest first."""
        return [WaitingRequest(*each) for each in islice(self.waiting.values(), count)]
