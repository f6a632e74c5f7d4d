"""Copy one image from its first byte to its last: many reads at a time, holes neither read nor written.

It reads from the `ImageBackend`, not through the object cache: a copy reads each byte once, so the cache would only
take memory and time.
"""

import math
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from rbdfs.errors import BeyondEndError, RbdfsError, StaleError
from rbdfs.export.target import Target
from rbdfs.image.backend import Buffer, ImageBackend, ReadResult
from rbdfs.image.extents import assume_data, learn_window
from rbdfs.image.holes import HoleMap, Kind, Segment
from rbdfs.image.striper import MIB, Layout
from rbdfs.image.throttle import Throttle
from rbdfs.threads import run_in_thread

WRITES_AT_ONCE = 3
"""Writes in flight to a target that takes them in any order; more did not make a disk faster."""

COMPLETED_AT_ONCE = 8
"""Pieces that may wait for their turn at a target that takes them in order, while others are read: with 3, on a busy
machine, no read was in flight while a write began and ended (2 cores: 7% of the time)."""

WINDOWS_AHEAD = 1
"""Answers about holes to ask for before they are needed: without a fast-diff map each takes many requests."""

HOLE_STEP = 64 * MIB
"""Bytes of a hole that one call digests or skips, so that a cancel need not wait for all of it. A step costs some
0.1 ms."""

_ZEROS = bytes(MIB)


class Changes(Protocol):
    """Which ranges of an image to copy: those that may differ from the target."""

    window: int
    """Bytes to ask about at once."""

    async def within(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The part of a range to copy: (start, end) pairs in order. Raises RbdfsError."""


class Digest(Protocol):
    """A hash object of hashlib."""

    def update(self, data: Buffer, /) -> None: ...


@dataclass(frozen=True, slots=True)
class CopyOptions:
    """How many reads, and how fast."""

    concurrency: int
    """Reads in flight, each of at most 4 MiB (`Layout.fetch_bytes`)."""
    bytes_per_second: int | None = None
    """Bytes to read from the cluster per second; None is no limit."""


class Piece:
    """A part of the image that holds data, read by one aio."""

    __slots__ = ("completed", "data", "length", "offset", "uses")

    def __init__(self, offset: int, length: int, uses: int) -> None:
        self.offset = offset
        self.length = length
        self.data: Buffer = b""
        self.completed = trio.Event()
        self.uses = uses
        """How many uses are left: one to write it, one to digest it."""


class Copy:
    """One copy and its progress."""

    def __init__(
        self,
        source: ImageBackend,
        target: Target,
        options: CopyOptions,
        digest: Digest | None = None,
        changes: Changes | None = None,
    ) -> None:
        """Copies all, or only the `changes`: then without a digest, and to a target that takes any order."""
        self.size = source.size
        self.data_bytes = 0
        """Bytes of data found so far."""
        self.unknown_bytes = self.size
        """Bytes not yet known to be data or holes."""
        self.changed_bytes = 0
        """Bytes to copy found so far, holes included."""
        self.copied_bytes = 0
        """Bytes of data copied so far, including those that an earlier copy left."""
        self._source = source
        self._target = target
        self._digest = digest
        self._changes = changes
        self._transfer = Layout(source.object_size, source.stripe_unit, source.stripe_count).fetch_bytes
        self._has_order = target.in_order or digest is not None
        self._reads = Throttle(options.concurrency, options.concurrency * self._transfer)
        self._writes = trio.Semaphore(WRITES_AT_ONCE)
        self._buffer_count = options.concurrency + (COMPLETED_AT_ONCE if target.in_order else WRITES_AT_ONCE + 1)
        self._buffers = trio.Semaphore(self._buffer_count)
        self._seconds_per_byte = 1 / options.bytes_per_second if options.bytes_per_second else 0.0
        self._next_read = -math.inf
        self._started = 0
        self._used_in_order = 0
        self._underway: dict[int, Piece] = {}
        self._to_write: deque[Piece] = deque()
        self._writers = 0
        self._nursery: trio.Nursery | None = None
        self._failure: RbdfsError | None = None

    @property
    def done_below(self) -> int:
        """The image offset below which all is copied."""
        return self._used_in_order if self._target.in_order else next(iter(self._underway), self._started)

    async def run(self) -> None:
        """Copy. Raises the first error of source or target; `ImageBackend.close` then waits for the reads in flight."""
        ask, asked = trio.open_memory_channel[list[Segment]](WINDOWS_AHEAD)
        line_up, lined_up = trio.open_memory_channel[Piece | Segment](math.inf)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._start_soon(partial(self._find_data, ask))
                self._start_soon(partial(self._start_all, asked, line_up))
                if self._has_order:
                    self._start_soon(partial(self._use_in_order, lined_up))
        finally:
            self._nursery = None
        if self._failure is not None and not isinstance(self._failure, BeyondEndError):
            raise self._failure
        size = await self._source.refresh_size()  # raises if the image is gone: then what we read may be zeros
        if size < self.size:
            raise StaleError(f"the image was shrunk from {self.size} to {size} bytes while it was copied")
        if self._failure is not None:
            raise self._failure

    def _start_soon(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run in the nursery, if it is still open. The first error ends the copy."""
        if self._nursery is not None:
            self._nursery.start_soon(self._guarded, work)

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Record the error: the nursery might wrap one that leaves it."""
        try:
            await work()
        except RbdfsError as error:
            self._fail(error)
        except trio.Cancelled:
            self._nursery = None  # reads that complete from now on are dropped
            raise

    def _fail(self, error: RbdfsError) -> None:
        if self._nursery is not None and self._failure is None:
            self._failure = error
            self._nursery.cancel_scope.cancel()

    async def _find_data(self, ask: "trio.MemorySendChannel[list[Segment]]") -> None:
        async with ask:
            position = 0
            while position < self.size:
                end, segments = await self._segments(position)
                self.data_bytes += sum(stop - start for start, stop, kind in segments if kind is Kind.DATA)
                self.changed_bytes += sum(stop - start for start, stop, _ in segments)
                self.unknown_bytes -= end - position
                position = end
                if segments:
                    await ask.send(segments)

    async def _segments(self, position: int) -> tuple[int, list[Segment]]:
        """The data and holes to copy from `position` on, and where they end: as far as it is cheap to ask at once.

        If the question fails, all is data.
        """
        holes = HoleMap(self.size)
        changes = self._changes
        try:
            if changes is None:
                end = await learn_window(holes, self._source, position)
                ranges = [(position, end)]
            else:
                end = min(position - position % changes.window + changes.window, self.size)
                ranges = await changes.within(position, end - position)
                if ranges:
                    start, stop = ranges[0][0], ranges[-1][1]
                    holes.learn(start, stop, await self._source.extents(start, stop - start))
        except (BeyondEndError, StaleError):
            raise
        except RbdfsError as error:
            if changes is not None:
                raise  # running the update again is faster than reading the whole image
            end = self.size
            ranges = [(position, end)]
            assume_data(holes, position, error)
        return end, [part for start, stop in ranges for part in holes.between(start, stop)]

    async def _start_all(
        self, asked: "trio.MemoryReceiveChannel[list[Segment]]", line_up: "trio.MemorySendChannel[Piece | Segment]"
    ) -> None:
        async with line_up:
            async for segments in asked:
                for segment in segments:
                    if segment.kind is Kind.HOLE:
                        await self._skip(segment, line_up)
                    else:
                        await self._start(segment, line_up)
        for _ in range(self._buffer_count):  # once all are back, nothing is in flight
            await self._buffers.acquire()

    async def _skip(self, hole: Segment, line_up: "trio.MemorySendChannel[Piece | Segment]") -> None:
        if self._has_order:
            line_up.send_nowait(hole)
        if not self._target.in_order and not self._target.is_blank:
            for start in range(hole.start, hole.end, HOLE_STEP):
                await run_in_thread(self._target.skip, start, min(HOLE_STEP, hole.end - start))
        self._started = hole.end

    async def _start(self, data: Segment, line_up: "trio.MemorySendChannel[Piece | Segment]") -> None:
        start, end, _ = data
        while start < end:
            stop = min(end, (start // self._transfer + 1) * self._transfer)
            await self._buffers.acquire()
            piece = Piece(start, stop - start, int(not self._target.in_order) + int(self._has_order))
            self._underway[start] = piece
            start = self._started = stop
            if self._has_order:
                line_up.send_nowait(piece)
            if self._target.may_hold(piece.offset, piece.length):
                self._start_soon(partial(self._take_verified, piece))
            else:
                await self._read(piece)

    async def _take_verified(self, piece: Piece) -> None:
        """Use the bytes of an earlier copy if they are right, else read the piece."""
        async with self._writes:
            data = await run_in_thread(self._target.verified, piece.offset, piece.length)
        if data is None:
            await self._read(piece)
        else:
            piece.data = data
            piece.completed.set()
            self._used(piece)

    async def _read(self, piece: Piece) -> None:
        if self._seconds_per_byte:
            self._next_read = max(self._next_read, trio.current_time())
            due, self._next_read = self._next_read, self._next_read + piece.length * self._seconds_per_byte
            await trio.sleep_until(due)
        self._reads.submit(piece, piece.length, self._start_read, urgent=True)

    def _start_read(self, piece: Piece) -> None:
        self._source.start_read(piece.offset, piece.length, partial(self._complete, piece))

    def _complete(self, piece: Piece, result: ReadResult) -> None:
        if self._nursery is None:
            return
        if isinstance(result, RbdfsError):
            self._fail(result)
            return
        self._reads.done(piece.length)  # which starts the next
        piece.data = result
        piece.completed.set()
        if not self._target.in_order:
            self._to_write.append(piece)
            if self._writers < WRITES_AT_ONCE:
                self._writers += 1
                self._start_soon(self._write_completed)

    async def _write_completed(self) -> None:
        """Write the pieces that wait, small ones together: a thread for each would take longer than the write."""
        while self._to_write:
            pieces = [self._to_write.popleft()]
            length = pieces[0].length
            while self._to_write and length + self._to_write[0].length <= self._transfer:
                pieces.append(self._to_write.popleft())
                length += pieces[-1].length
            async with self._writes:
                await run_in_thread(self._write_all, pieces)
            for piece in pieces:
                self._used(piece)
        self._writers -= 1

    def _write_all(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            self._target.write(piece.offset, piece.data)

    async def _use_in_order(self, lined_up: "trio.MemoryReceiveChannel[Piece | Segment]") -> None:
        following: Piece | Segment | None = None
        while True:
            try:
                part = following or await lined_up.receive()
            except trio.EndOfChannel:
                return
            following = None
            if isinstance(part, Segment):
                await self._use_hole(part)
                continue
            await part.completed.wait()
            completed = [part]  # and all that follow it: a thread for each takes 1.5 times as long
            with suppress(trio.WouldBlock, trio.EndOfChannel):
                while True:
                    following = lined_up.receive_nowait()
                    if isinstance(following, Segment) or not following.completed.is_set():
                        break
                    completed.append(following)
                    following = None
            # A cancel abandons the call: the reader of a pipe may never read on.
            await run_in_thread(self._digest_and_write, completed, abandon_on_cancel=True)
            for piece in completed:
                self._used(piece)

    async def _use_hole(self, hole: Segment) -> None:
        for start in range(hole.start, hole.end, HOLE_STEP):
            stop = min(start + HOLE_STEP, hole.end)
            await run_in_thread(self._skip_in_order, start, stop - start, abandon_on_cancel=True)
            self._used_in_order = stop

    def _skip_in_order(self, offset: int, length: int) -> None:
        if self._digest is not None:
            for start in range(0, length, len(_ZEROS)):
                self._digest.update(_ZEROS[: length - start])
        if self._target.in_order:
            self._target.skip(offset, length)

    def _digest_and_write(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if self._digest is not None:
                self._digest.update(piece.data)
            if self._target.in_order:
                self._target.write(piece.offset, piece.data)
            self._used_in_order = piece.offset + piece.length

    def _used(self, piece: Piece) -> None:
        piece.uses -= 1
        if piece.uses:
            return
        del self._underway[piece.offset]
        self.copied_bytes += piece.length
        piece.data = b""
        self._buffers.release()
