"""What to read ahead. Pure policy: reads in, image ranges out; it fetches nothing and knows no time.

The kernel sends the reads of one sequential reader out of order (asynchronous page-cache readahead), so "sequential"
here means *near the front of a stream*, not `offset == next` (mountpoint-s3 issue 488 tells what comes of that). One
open file can carry several streams at once: a loop mount, `qemu-img convert`, threads that share a file descriptor.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rbdfs.image.striper import MIB

STREAMS = 8
"""Streams that are told apart in one open file; `qemu-img convert` has 8 reads under way by default."""

SKIP_READS = 8
"""How far from its front a read still belongs to a stream, in lengths of that read: 128 KiB requests come in another
order by about that many. Near is relative, so that small random reads in a small image are not taken for a stream."""

SKIP_BYTES_MAX = 4 * MIB
"""The limit of that distance: four of the largest requests that the kernel sends (1 MiB)."""

TRIGGER_READS = 2
TRIGGER_BYTES = 64 * 1024
TRIGGER_SMALL_READS = 4
"""Reads that must have moved a stream's front before it is read ahead: two, if they were 64 KiB together, else four.
librbd waits for ten (`rbd_readahead_trigger_requests`), which a `cp` of many small images would never reach."""

GROWTH = 4
"""A window is this many times what its stream has read so far, until it is at its largest: a short sequential read
does not cost much more than it takes, a long one is at full speed after a few MiB."""

WINDOW_BYTES = 48 * MIB
"""The full window at first: a little more than `rbd export` keeps in flight (10 objects of 4 MiB), since the object
that the reader is in belongs to it."""

WINDOW_BYTES_MAX = 512 * MIB
"""As far as latency can widen the window: 5 GB/s at 100 ms. The cache's budget ends it sooner as a rule."""

STALL_SECONDS = 0.02
"""A read that waits longer tells of latency that the window does not cover; one that the cluster's bandwidth or a busy
CPU holds up waits some milliseconds (2 cores, a local OSD: 1 to 8), and a larger window would not help it."""


SCATTERED_READS = 16
"""So many reads in a row, none of them near another, are a random reader's."""


@dataclass(slots=True)
class Stream:
    """One reader's place in the image. All but `advances` in bytes."""

    front: int
    ahead: int
    read: int = 0
    advances: int = 0

    @property
    def is_sequential(self) -> bool:
        """Whether the reads so far moved forward often enough to read ahead for them."""
        enough = TRIGGER_READS if self.read >= TRIGGER_BYTES else TRIGGER_SMALL_READS
        return self.advances >= enough

    def advance(self, offset: int, end: int) -> None:
        """Take note of a read of [offset, end). Only one that moves the front counts as a step forward."""
        self.read += end - offset
        if end > self.front:
            self.front = end
            self.advances += 1


class Readahead:
    """The streams of one open file.

    `transfer` is what one aio carries: ranges that are returned end on multiples of it, or at the image's end.
    """

    def __init__(self, transfer: int) -> None:
        self.transfer = transfer
        self.window = WINDOW_BYTES
        self._alone = 0
        self._streams: list[Stream] = []

    @property
    def sequential_streams(self) -> int:
        """How many streams are read ahead for."""
        return sum(stream.is_sequential for stream in self._streams)

    @property
    def is_scattered(self) -> bool:
        """Whether the latest reads belonged to no stream."""
        return self._alone >= SCATTERED_READS

    def on_read(self, offset: int, length: int, size: int, limit: Callable[[], int]) -> tuple[int, int] | None:
        """The image range [start, end) to read ahead because of this read, or None. A range is returned once.

        `size` is the image's; `limit()` is how many bytes may lie ahead of a stream now. Less
        than one transfer allows nothing.
        """
        end = offset + length
        stream = self._stream_of(offset, end)
        stream.advance(offset, end)
        if not stream.is_sequential:
            return None
        window = min(self.window, limit(), max(self.transfer, GROWTH * stream.read))
        if window < self.transfer:
            return None
        start = max(stream.ahead, min(offset, stream.front))
        wanted = min(size, -(-(stream.front + window) // self.transfer) * self.transfer)
        if wanted <= start:
            return None
        stream.ahead = wanted
        return start, wanted

    def on_wait(self, seconds: float) -> None:
        """A read had to wait for this long: a larger window from now on, if a sequential reader was stalled."""
        if seconds > STALL_SECONDS and self.sequential_streams:
            self.window = min(self.window * 3 // 2, WINDOW_BYTES_MAX)

    def _stream_of(self, offset: int, end: int) -> Stream:
        """The stream that a read belongs to, as the last of the list: its first one was not read for longest."""
        skip = min(SKIP_READS * (end - offset), SKIP_BYTES_MAX)
        for index, stream in enumerate(self._streams):
            front = stream.front
            if front - skip <= end and (offset <= front + skip or offset <= stream.ahead):
                self._streams.append(self._streams.pop(index))
                self._alone = 0
                return stream
        if len(self._streams) == STREAMS:
            del self._streams[0]
        self._alone += 1
        stream = Stream(front=offset, ahead=0)
        self._streams.append(stream)
        return stream
