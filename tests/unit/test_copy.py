"""One image from end to end: every byte, in any order or in order, and no more in memory than it takes."""

import errno
import hashlib
import threading
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from rbdfs.errors import ReadError, StaleError, TargetError
from rbdfs.export.copy import COMPLETED_AT_ONCE, WRITES_AT_ONCE, Copy, CopyOptions
from rbdfs.export.target import Target
from rbdfs.image.backend import Buffer
from tests.cluster import MIB, random_bytes
from tests.fake_backend import FakeBackend
from tests.in_trio import in_trio

HOLED = random_bytes(9 * MIB) + bytes(7 * MIB) + random_bytes(5 * MIB, seed=2) + bytes(3 * MIB) + b"end"


@dataclass
class MemoryTarget(Target):
    """A `Target` in memory."""

    size: int
    in_order: bool = False
    is_blank: bool = True
    fail_at: int = -1
    content: bytearray = field(default_factory=bytearray)
    written: list[tuple[int, int]] = field(default_factory=list)
    skipped: list[tuple[int, int]] = field(default_factory=list)
    holds: dict[tuple[int, int], bytes | None] = field(default_factory=dict)
    may_go_on: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.content = bytearray(0 if self.in_order else self.size)
        self.may_go_on.set()

    def may_hold(self, offset: int, length: int) -> bool:
        return (offset, length) in self.holds

    def verified(self, offset: int, length: int) -> Buffer | None:
        return self.holds[offset, length]

    def write(self, offset: int, data: Buffer) -> None:
        assert self.may_go_on.wait(20)
        if offset <= self.fail_at < offset + len(data):
            raise TargetError(f"cannot write at {offset}", errno.ENOSPC)
        if self.in_order:
            assert offset == len(self.content)
        self.content[offset : offset + len(data)] = data
        self.written.append((offset, len(data)))

    def skip(self, offset: int, length: int) -> None:
        if self.in_order:
            assert offset == len(self.content)
            self.content += bytes(length)
        self.skipped.append((offset, length))


def source_of(content: bytes, object_size: int = MIB) -> FakeBackend:
    """An image with this content."""
    return FakeBackend(bytearray(content), object_size)


@pytest.mark.parametrize("object_size", [1 << 16, MIB, 8 * MIB])
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("concurrency", [1, 10])
@in_trio
async def test_every_byte_arrives_in_its_place(object_size: int, in_order: bool, concurrency: int) -> None:
    source, target = source_of(HOLED, object_size), MemoryTarget(len(HOLED), in_order)
    digest = hashlib.sha256()
    copy = Copy(source, target, CopyOptions(concurrency), digest)
    await copy.run()
    assert bytes(target.content) == HOLED
    assert digest.digest() == hashlib.sha256(HOLED).digest()
    assert copy.done_below == copy.size
    assert copy.copied_bytes == copy.data_bytes == source.fetched_bytes
    assert copy.unknown_bytes == 0


@in_trio
async def test_holes_are_neither_read_nor_written() -> None:
    source, target = source_of(HOLED), MemoryTarget(len(HOLED))
    await Copy(source, target, CopyOptions(10)).run()
    for offset, length in [(aio.offset, aio.length) for aio in source.aios] + target.written:
        assert any(HOLED[offset : offset + length])
    assert source.fetched_bytes == sum(length for _, length in target.written) == 14 * MIB + 3
    assert not target.skipped


@in_trio
async def test_a_target_that_is_not_blank_is_given_the_holes_too() -> None:
    source, target = source_of(HOLED), MemoryTarget(len(HOLED), is_blank=False)
    await Copy(source, target, CopyOptions(10)).run()
    assert sum(length for _, length in target.skipped) == 10 * MIB


@in_trio
async def test_no_more_reads_are_in_flight_than_were_asked_for() -> None:
    source, target = source_of(HOLED), MemoryTarget(len(HOLED))
    source.hold = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Copy(source, target, CopyOptions(2)).run)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(source.held) == 2
        source.release(1)
        while len(source.aios) < 3:
            await trio.lowlevel.checkpoint()
        assert len(source.held) == 2
        source.hold = False
        source.release()
    assert bytes(target.content) == HOLED


@pytest.mark.parametrize("in_order", [False, True])
@in_trio
async def test_a_target_that_takes_nothing_holds_up_the_reads(in_order: bool) -> None:
    content = random_bytes(4 * MIB) * 15
    source, target = source_of(content, 4 * MIB), MemoryTarget(len(content), in_order)
    target.may_go_on.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Copy(source, target, CopyOptions(5)).run)
        while source.underway or not source.aios:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(source.aios) == 5 + (COMPLETED_AT_ONCE if in_order else WRITES_AT_ONCE + 1)
        target.may_go_on.set()
    assert bytes(target.content) == content


@pytest.mark.parametrize("in_order", [False, True])
@in_trio
async def test_a_read_that_fails_ends_the_copy_with_its_error(in_order: bool) -> None:
    source, target = source_of(HOLED), MemoryTarget(len(HOLED), in_order)
    source.fail_with = errno.EIO
    with pytest.raises(ReadError):
        await Copy(source, target, CopyOptions(3)).run()
    assert not target.written


@pytest.mark.parametrize("in_order", [False, True])
@in_trio
async def test_a_write_that_fails_ends_the_copy_and_the_error_says_how_far_it_was(in_order: bool) -> None:
    source, target = source_of(HOLED), MemoryTarget(len(HOLED), in_order, fail_at=5 * MIB)
    copy = Copy(source, target, CopyOptions(3))
    with pytest.raises(TargetError) as raised:
        await copy.run()
    assert raised.value.errno == errno.ENOSPC
    assert copy.done_below <= 4 * MIB
    assert bytes(target.content[: copy.done_below]) == HOLED[: copy.done_below]


@in_trio
async def test_an_image_that_is_removed_or_shrunk_during_the_copy_is_an_error() -> None:
    source, target = source_of(HOLED), MemoryTarget(len(HOLED))
    source.gone = True
    with pytest.raises(StaleError, match="gone"):
        await Copy(source, target, CopyOptions(3)).run()
    source = source_of(HOLED[: 24 * MIB] + bytes(8 * MIB))
    copy = Copy(source, MemoryTarget(source.size), CopyOptions(3))
    del source.content[24 * MIB :]
    with pytest.raises(StaleError, match="was shrunk"):
        await copy.run()
    source = source_of(HOLED)
    copy = Copy(source, target, CopyOptions(3))
    del source.content[4 * MIB :]
    with pytest.raises(StaleError, match="was shrunk"):
        await copy.run()


@in_trio
async def test_what_an_earlier_copy_holds_is_not_read_but_what_is_wrong_of_it_is() -> None:
    source, target = source_of(HOLED), MemoryTarget(len(HOLED))
    target.content[:] = HOLED
    target.holds = {(0, 4 * MIB): HOLED[: 4 * MIB], (4 * MIB, 4 * MIB): None}
    target.content[4 * MIB : 8 * MIB] = b"x" * (4 * MIB)
    digest = hashlib.sha256()
    copy = Copy(source, target, CopyOptions(3), digest)
    await copy.run()
    assert bytes(target.content) == HOLED
    assert digest.digest() == hashlib.sha256(HOLED).digest()
    assert min(aio.offset for aio in source.aios) == 4 * MIB
    assert copy.copied_bytes == copy.data_bytes


def test_the_rate_is_kept_by_waiting_before_each_read() -> None:
    source, target = source_of(HOLED), MemoryTarget(len(HOLED))
    clock = trio.testing.MockClock(autojump_threshold=0.05)

    async def run() -> float:
        began = trio.current_time()
        await Copy(source, target, CopyOptions(10, bytes_per_second=MIB)).run()
        return trio.current_time() - began

    seconds = trio.run(run, clock=clock)
    assert bytes(target.content) == HOLED
    assert 10 <= seconds <= 15


@in_trio
async def test_a_copy_that_is_cancelled_leaves_what_lands_later_alone() -> None:
    source, target = source_of(HOLED), MemoryTarget(len(HOLED))
    source.hold = True
    with trio.move_on_after(0.01):
        await Copy(source, target, CopyOptions(3)).run()
    started = len(source.aios)
    source.release()
    await trio.testing.wait_all_tasks_blocked(0.01)
    assert len(source.aios) == started
    assert not target.written
