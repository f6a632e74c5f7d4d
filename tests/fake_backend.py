"""An `ImageBackend` in memory. ceph/test_image_backend.py holds it to the same contract as the real one."""

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from rbdfs.errors import BeyondEndError, RbdfsError, ReadError, StaleError
from rbdfs.image.backend import OnRead


@dataclass
class Aio:
    """One read that was started."""

    offset: int
    length: int
    complete: Callable[[], None]


@dataclass
class FakeBackend:
    """Completions come at trio's next turn, as the real ones; with `hold`, when `release` says so."""

    content: bytearray
    object_size: int = 1 << 12
    stripe_unit: int = 0
    stripe_count: int = 1
    hold: bool = False
    fail_with: int = 0
    write_version: int | None = 1
    closed: bool = False
    gone: bool = False
    is_immutable: bool = False
    revalidate_due: bool = True
    pool: int = 0
    has_map: bool = False
    extents_asked: int = 0
    aios: list[Aio] = field(default_factory=list)
    held: list[Aio] = field(default_factory=list)
    size: int = 0
    underway: int = 0

    def __post_init__(self) -> None:
        self.size = len(self.content)
        self.stripe_unit = self.stripe_unit or self.object_size

    @property
    def fetched_bytes(self) -> int:
        """All that was asked of the cluster so far."""
        return sum(aio.length for aio in self.aios)

    def start_read(self, offset: int, length: int, callback: OnRead) -> None:
        assert not self.closed, "a closed image was read"
        data: bytes | RbdfsError = bytes(self.content[offset : offset + length])
        if self.fail_with:
            data = ReadError(f"cannot read at {offset} (+{length})", self.fail_with)
        elif offset + length > len(self.content):
            data = BeyondEndError(f"cannot read at {offset} (+{length})")
        aio = Aio(offset, length, lambda: callback(data))
        self.aios.append(aio)
        if self.hold:
            self.held.append(aio)
        else:
            self.underway += 1
            trio.lowlevel.current_trio_token().run_sync_soon(self._complete, aio)

    def _complete(self, aio: Aio) -> None:
        self.underway -= 1
        aio.complete()

    def release(self, count: int | None = None) -> None:
        """Complete the oldest reads that are held back; all, if not told how many."""
        due, self.held = self.held[:count], self.held[len(self.held[:count]) :]
        for aio in due:
            aio.complete()

    @property
    def stale(self) -> StaleError | None:
        return StaleError("the image is gone") if self.gone else None

    def revalidate_soon(self) -> None:
        if self.stale is not None:
            raise self.stale

    async def revalidate(self) -> None:
        await self.refresh_size()

    async def verify(self) -> None:
        self.revalidate_soon()

    async def refresh_size(self) -> int:
        self.revalidate_soon()
        self.size = len(self.content)
        return self.size

    async def extents_window(self) -> int:
        return 16 * self.object_size

    async def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Objects with a byte that is not zero. Not for stripes."""
        self.extents_asked += 1
        if offset + length > len(self.content):
            raise BeyondEndError("it was shrunk")
        starts = range(offset - offset % self.object_size, offset + length, self.object_size)
        return [(start, self.object_size) for start in starts if any(self.content[start : start + self.object_size])]

    async def close(self) -> None:
        while self.underway:
            await trio.lowlevel.checkpoint()
        self.closed = True
