"""Decides what to read ahead. Pure policy: reads in, image ranges out; it fetches nothing and knows no time.

The kernel sends the reads of one sequential reader out of order (asynchronous page-cache readahead), so "sequential"
here means *near the front of a stream*, not `offset == next` (mountpoint-s3 issue 488). One
open file can carry several streams at once: a loop mount, `qemu-img convert`, threads that share a file descriptor.
"""

from collections.abc import Callable

from rbdfs.image.striper import MIB

STREAMS = 8
"""Streams that are told apart in one open file; `qemu-img convert` has 8 reads under way by default."""

FRONT_BYTES = 256 * 1024
"""New readers are told apart if their fronts lie in different parts of the image, each of this size."""

RANDOM_READS = 16
"""After this many reads in a row that are near no other, the reader is random."""

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
"""A read that waits longer shows latency that the window does not cover. Bandwidth or a busy CPU delay a read by some
milliseconds (2 cores, a local OSD: 1 to 8), and a larger window would not help."""


class Stream:
    """One reader's place in the image. All but `advances` in bytes."""

    __slots__ = ("advances", "ahead", "front", "read", "window")

    def __init__(self) -> None:
        self.front = 0
        """Where the reads so far end."""
        self.ahead = 0
        """Where the readahead so far ends."""
        self.read = 0
        self.advances = 0
        """Reads that moved the front."""
        self.window = 0
        """The window that `ahead` was computed with, once it has its full size."""


class Readahead:
    """The streams of one open file.

    `fetch_bytes` is the size of one aio: ranges end on multiples of it, or at the end of the image.
    """

    def __init__(self, fetch_bytes: int) -> None:
        self.fetch_bytes = fetch_bytes
        self.window = WINDOW_BYTES
        self.is_random = False
        """Whether the latest reads belonged to no stream."""
        self._alone = 0
        self._streams: list[Stream] = []  # sequential; the last one was read last
        self._fronts: dict[int, Stream] = {}  # of readers that may become sequential, by FRONT_BYTES; the oldest first

    @property
    def sequential_streams(self) -> int:
        """Streams that are read ahead."""
        return len(self._streams)

    def on_read(self, offset: int, length: int, size: int, limit: Callable[[], int]) -> tuple[int, int] | None:
        """Return the image range [start, end) to read ahead after this read, or None. Each range is returned once.

        `size` is the image's; `limit()` is how many bytes may lie ahead of a stream now. Less than `fetch_bytes` allows
        nothing.
        """
        end = offset + length
        skip = min(SKIP_READS * length, SKIP_BYTES_MAX)
        for stream in self._streams:
            front = stream.front
            if front - skip <= end and (offset <= front + skip or offset <= stream.ahead):
                break
        else:
            for piece in range((offset - skip) // FRONT_BYTES, (end + skip) // FRONT_BYTES + 1):
                found = self._fronts.get(piece)
                if found is not None and found.front - skip <= end and offset <= found.front + skip:
                    return self._on_second_read(piece, found, offset, length, size, limit)
            # A read near no other: maybe the first one of a sequential reader.
            self._alone += 1
            self.is_random = self._alone >= RANDOM_READS
            fronts = self._fronts
            stream = fronts.pop(next(iter(fronts))) if len(fronts) >= STREAMS else Stream()
            stream.front = end
            stream.read = length
            stream.advances = 1
            fronts[end // FRONT_BYTES] = stream
            return None
        if stream is not self._streams[-1]:
            self._streams.remove(stream)
            self._streams.append(stream)
        self._alone = 0
        self.is_random = False
        stream.read += length
        stream.front = max(stream.front, end)
        window = stream.window or min(self.window, max(self.fetch_bytes, GROWTH * stream.read))
        if stream.front + window <= stream.ahead or stream.ahead >= size:
            return None  # as most reads of a sequential reader: the window has not come to the next fetch
        return self._extend(stream, offset, size, limit)

    def _on_second_read(
        self, piece: int, stream: Stream, offset: int, length: int, size: int, limit: Callable[[], int]
    ) -> tuple[int, int] | None:
        """Handle a read near the front of a reader that is not known to be sequential."""
        end = offset + length
        self._alone = 0
        self.is_random = False
        del self._fronts[piece]
        stream.read += length
        if end > stream.front:
            stream.front = end
            stream.advances += 1
        if stream.advances < (TRIGGER_READS if stream.read >= TRIGGER_BYTES else TRIGGER_SMALL_READS):
            self._fronts[stream.front // FRONT_BYTES] = stream
            return None
        stream.ahead = stream.window = 0
        self._streams.append(stream)
        if len(self._streams) > STREAMS:
            del self._streams[0]
        return self._extend(stream, offset, size, limit)

    def _extend(self, stream: Stream, offset: int, size: int, limit: Callable[[], int]) -> tuple[int, int] | None:
        """Return what to read ahead of a sequential reader, without what was returned before."""
        full = min(self.window, limit())
        window = min(full, max(self.fetch_bytes, GROWTH * stream.read))
        if window < self.fetch_bytes:
            return None
        stream.window = full if window == full else 0
        start = max(stream.ahead, min(offset, stream.front))
        wanted = min(size, -(-(stream.front + window) // self.fetch_bytes) * self.fetch_bytes)
        if wanted <= start:
            return None
        stream.ahead = wanted
        return start, wanted

    def on_wait(self, seconds: float) -> None:
        """Widen the window if a sequential reader had to wait too long."""
        if seconds > STALL_SECONDS and self._streams:
            self.window = min(self.window * 3 // 2, WINDOW_BYTES_MAX)
