"""The device between the kernel and pyfuse3: each request is answered once, whatever either of them does."""

import errno
import itertools
import logging
import os
import struct
from collections.abc import Iterable

import pytest
import trio
import trio.testing

from rbdfs.errors import BeyondEndError, ReadError, StaleError
from rbdfs.fuse import relay
from rbdfs.fuse.deadlines import CHECK_SECONDS, KILL_CHECK_AFTER_SECONDS
from rbdfs.fuse.timeouts import RETRY_AFTER_SECONDS
from rbdfs.image.backend import OnRead
from rbdfs.image.holes import Kind
from rbdfs.image.open_image import OnSeek
from tests.fake_kernel import (
    INIT_FLAGS,
    LOOKED_UP,
    PARALLEL_DIROPS,
    THREAD,
    WITHOUT_ANSWER,
    Answer,
    FakeFile,
    Op,
    forgetting,
    forgetting_all,
    getting,
    init_reply,
    interrupting,
    message,
    reading,
    seeking,
    serving,
    settled,
)
from tests.in_trio import in_trio, with_a_clock

KIB = 1024


def found(offset: int) -> Answer:
    """What a seek is answered with."""
    return Answer(0, struct.pack("=Q", offset))


# What is answered here, and what is passed on.


@pytest.mark.parametrize("opcode", [*range(53), 4096, 2**31])
@in_trio
async def test_each_operation_is_answered_here_or_by_pyfuse3(opcode: int) -> None:
    async with serving() as setup:
        unique = setup.kernel.ask(opcode, bytes(200), inode=7)
        await settled()
        passed = setup.pyfuse3.take()
        if opcode in WITHOUT_ANSWER:
            assert not passed
            assert not setup.kernel.answers
        elif opcode in (Op.READ, Op.LSEEK):
            assert not passed
            assert setup.kernel.answers == {unique: Answer(errno.EBADF, b"")}
        else:
            assert passed == [(opcode, unique, bytes(200))]
            setup.pyfuse3.reply(unique, b"answer" * 10)
            await settled()
            assert set(setup.kernel.answers) == {unique}
        assert not setup.kernel.refused
        assert not setup.ended.is_set()


@in_trio
async def test_an_error_of_pyfuse3_is_passed_on() -> None:
    async with serving() as setup:
        unique = setup.kernel.ask(Op.LOOKUP, b"name\0")
        await settled()
        setup.pyfuse3.reply(unique, error=errno.ENOENT)
        await settled()
        assert setup.kernel.answers == {unique: Answer(errno.ENOENT, b"")}


@in_trio
async def test_a_read_is_answered_with_the_bytes_of_its_file() -> None:
    async with serving() as setup:
        unique = setup.kernel.ask(Op.READ, reading(4096, 128 * KIB))
        await settled()
        setup.file.complete()
        assert setup.kernel.answers[unique] == (0, setup.file.content[4096 : 132 * KIB])


@pytest.mark.parametrize("flags", [0, os.O_DIRECT | os.O_NOATIME], ids=["page cache", "direct"])
@pytest.mark.parametrize(
    ("size", "offset", "length", "is_whole"),
    [
        (100_000, 0, 4096, True),
        (100_000, 98_304, 4096, True),  # the last page
        (100_000, 65_536, 36_864, True),  # to the end of the last page
        (98_304, 65_536, 32_768, True),
        (98_304, 65_536, 36_864, False),  # a page beyond
        (100_000, 65_536, 40_960, False),
        (100_000, 102_400, 4096, False),
        (0, 0, 4096, False),
    ],
)
@in_trio
async def test_a_read_of_the_page_cache_is_short_on_the_last_page_alone(
    size: int, offset: int, length: int, flags: int, *, is_whole: bool
) -> None:
    async with serving() as setup:
        setup.file.content = setup.file.content[:size]
        unique = setup.kernel.ask(Op.READ, reading(offset, length, flags=flags), inode=7)
        await settled()
        setup.file.complete()
        if flags or is_whole:
            assert setup.kernel.answers[unique] == (0, setup.file.content[offset : offset + length])
            assert setup.invalidated == []
        else:
            assert setup.kernel.answers[unique] == (errno.EIO, b"")
            assert setup.invalidated == [7]


@in_trio
async def test_a_read_that_ends_before_the_end_that_the_kernel_knows_is_an_error() -> None:
    async with serving() as setup:
        setup.file.content = setup.file.content[:100_000]
        setup.seconds_until_end_known = None
        unique = setup.kernel.ask(Op.READ, reading(98_304, 4096), inode=7)
        await settled()
        setup.file.complete()
        assert setup.kernel.answers[unique] == (errno.EIO, b"")
        assert setup.invalidated == [7]


@with_a_clock
async def test_a_read_that_ends_at_a_new_size_is_answered_when_the_kernel_knows_that_size() -> None:
    async with serving() as setup:
        setup.file.content = setup.file.content[:100_000]
        setup.seconds_until_end_known = 0.05
        unique = setup.kernel.ask(Op.READ, reading(98_304, 4096), inode=7)
        await settled()
        setup.file.complete()
        setup.seconds_until_end_known = 0.0
        assert unique not in setup.kernel.answers
        with trio.fail_after(5):
            while unique not in setup.kernel.answers:  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert setup.kernel.answers[unique] == (0, setup.file.content[98_304:100_000])
        assert setup.invalidated == []


@in_trio
async def test_a_read_that_finds_the_file_shrunk_makes_the_kernel_forget_its_size() -> None:
    async with serving() as setup:
        unique = setup.kernel.ask(Op.READ, reading(0, 4096), inode=7)
        await settled()
        setup.file.reads.pop().callback(BeyondEndError("shrunk", errno.EIO))
        assert setup.kernel.answers[unique] == (errno.EIO, b"")
        assert setup.invalidated == [7]


@in_trio
async def test_the_kernel_gets_a_notice_of_old_attributes_and_may_know_nothing_of_them() -> None:
    async with serving() as setup:
        setup.device.notify(7)
        assert setup.kernel.notified == [(2, struct.pack("=Qqq", 7, -1, 0))]
        setup.kernel.faults["write"] = iter([errno.ENOENT, errno.ENODEV])
        setup.device.notify(8)
        setup.device.notify(9)
        assert len(setup.kernel.notified) == 1


@pytest.mark.parametrize(("opcode", "body"), [(Op.READ, reading(0, 10, 99)), (Op.LSEEK, seeking(0, os.SEEK_DATA, 99))])
@in_trio
async def test_an_unknown_handle_is_ebadf(opcode: int, body: bytes) -> None:
    async with serving() as setup:
        assert await setup.kernel.answer_to(opcode, body) == (errno.EBADF, b"")


@pytest.mark.parametrize("whence", [os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, 5, 2**32 - 1])
@in_trio
async def test_only_data_and_holes_are_sought_here(whence: int) -> None:
    async with serving() as setup:
        assert await setup.kernel.answer_to(Op.LSEEK, seeking(0, whence)) == (errno.EINVAL, b"")


@pytest.mark.parametrize(
    ("result", "answer"),
    [
        (5, found(5)),
        (2**63 - 1, found(2**63 - 1)),
        (4, Answer(errno.EIO, b"")),  # before the offset: cp would loop for ever
        (2**63, Answer(errno.EIO, b"")),
        (None, Answer(errno.ENXIO, b"")),
        (StaleError("gone"), Answer(errno.EIO, b"")),
        (ReadError("denied", errno.EACCES), Answer(errno.EACCES, b"")),
        (ReadError("no such call", errno.ENOSYS), Answer(errno.EIO, b"")),  # the kernel would never ask again
        (ReadError("none", 0), Answer(errno.EIO, b"")),
        (ReadError("too much", 4096), Answer(errno.EIO, b"")),
    ],
)
@in_trio
async def test_a_seek_is_answered_with_an_offset_or_an_error(result: int | ReadError | None, answer: Answer) -> None:
    async with serving() as setup:
        unique = setup.kernel.ask(Op.LSEEK, seeking(5, os.SEEK_HOLE))
        await settled()
        ((offset, kind, callback),) = setup.file.seeks
        assert (offset, kind) == (5, Kind.HOLE)
        callback(result)
        assert setup.kernel.answers == {unique: answer}


@pytest.mark.parametrize(
    ("number", "answered"),
    [
        (errno.ENOENT, errno.ENOENT),
        (511, 511),
        *((number, errno.EIO) for number in (-5, 0, errno.ENOSYS, 512, 4096, 2**40)),
    ],
)
@in_trio
async def test_an_error_that_the_kernel_would_not_take_is_eio(number: int, answered: int) -> None:
    async with serving() as setup:
        unique = setup.kernel.ask(Op.READ, reading(0, 10))
        await settled()
        setup.file.reads[0].callback(ReadError("cannot read", number))
        assert setup.kernel.answers == {unique: Answer(answered, b"")}


# What is cut off, or longer than it should be.


@pytest.mark.parametrize(("opcode", "body"), [(Op.READ, reading(0, 10)), (Op.LSEEK, seeking(0, os.SEEK_DATA))])
@in_trio
async def test_of_a_request_that_is_cut_off_nothing_is_made_up(opcode: int, body: bytes) -> None:
    async with serving() as setup:
        whole = message(opcode, 0xABC, body)
        for length in range(1, len(whole)):
            full = setup.kernel.ask(opcode, body)  # the buffer holds a whole request of the kind
            await settled()
            setup.kernel.send(whole[:length])
            await settled()
            assert len(setup.file.reads) + len(setup.file.seeks) == length
            assert setup.kernel.refused == [0xABC] * max(0, length - 39)
            assert full not in setup.kernel.answers
        assert not setup.pyfuse3.take()


@in_trio
async def test_what_lies_behind_a_request_is_ignored() -> None:
    async with serving() as setup:
        for tail in (1, 1000, 200 * KIB):
            setup.kernel.ask(Op.READ, reading(5, 10) + b"\1" * tail)
            await settled()
        setup.kernel.ask(Op.LSEEK, seeking(5, os.SEEK_DATA) + bytes(100))
        await settled()
        assert [(read.offset, read.length) for read in setup.file.reads] == [(5, 10)] * 3
        assert len(setup.file.seeks) == 1


@in_trio
async def test_a_listing_of_1_mib_is_clamped() -> None:
    async with serving() as setup:
        for opcode in (Op.READDIR, Op.READDIRPLUS):
            setup.kernel.ask(opcode, reading(3, 1 << 20))
            setup.kernel.ask(opcode, reading(3, 4096))
        await settled()
        bodies = [request.body for request in setup.pyfuse3.take()]
        assert bodies == [reading(3, 64 * KIB), reading(3, 4096)] * 2


# FORGET and INTERRUPT, which have no answer.


@pytest.mark.parametrize("count", [1, 258, 8000])
@in_trio
async def test_each_inode_is_forgotten_once(count: int) -> None:
    lookups = [(inode, inode % 7) for inode in range(1, count + 1)]
    async with serving() as setup:
        setup.kernel.ask(Op.BATCH_FORGET, forgetting_all(lookups))
        setup.kernel.ask(Op.FORGET, forgetting(3), inode=2**63)
        await settled()
        assert setup.forgotten == [*lookups, (2**63, 3)]
        assert not setup.pyfuse3.take()
        assert not setup.kernel.refused


@in_trio
async def test_an_interrupt_goes_no_further_and_its_read_is_answered() -> None:
    async with serving() as setup:
        setup.kernel.ask(Op.INTERRUPT, interrupting(4))
        unique = setup.kernel.ask(Op.READ, reading(0, 10))
        setup.kernel.ask(Op.INTERRUPT, interrupting(unique))
        await settled()
        assert unique == 4
        assert not setup.kernel.answers
        setup.file.complete()
        setup.kernel.ask(Op.INTERRUPT, interrupting(unique))
        await settled()
        assert list(setup.kernel.answers) == [unique]
        assert not setup.pyfuse3.take()


# Each in time.


@with_a_clock
async def test_what_is_not_answered_in_time_times_out_and_a_late_answer_is_dropped() -> None:
    async with serving(answer_seconds=0.1) as setup:
        read, seek = setup.kernel.ask(Op.READ, reading(0, 10)), setup.kernel.ask(Op.LSEEK, seeking(0, os.SEEK_DATA))
        await trio.sleep(0.1 + 2 * CHECK_SECONDS)
        assert setup.kernel.answers == {read: (errno.ETIMEDOUT, b""), seek: (errno.ETIMEDOUT, b"")}
        again = setup.kernel.ask(Op.READ, reading(0, 10))  # by the kernel, page by page
        await settled()
        assert setup.kernel.answers[again] == (errno.ETIMEDOUT, b"")
        setup.file.complete()
        setup.file.seeks[0][2](0)
        assert not setup.kernel.refused


@with_a_clock
async def test_what_waits_for_room_times_out_and_is_not_passed_on_but_releases_are() -> None:
    async with serving(answer_seconds=0.1) as setup:
        await setup.kernel.ask_many([(Op.GETXATTR, getting(64 * KIB))] * 2000)
        released = setup.kernel.ask(Op.RELEASE)
        await settled()
        passed = setup.pyfuse3.take()
        assert 0 < len(passed) < 2000
        await trio.sleep(0.1 + 2 * CHECK_SECONDS)
        assert len(setup.kernel.answers) == 2000 - len(passed)
        assert {error for error, _ in setup.kernel.answers.values()} == {errno.ETIMEDOUT}
        for request in passed:
            setup.pyfuse3.reply(request.unique)
        await settled()
        assert [request.unique for request in setup.pyfuse3.take()] == [released]


@with_a_clock
async def test_what_the_page_cache_asked_for_in_vain_is_not_asked_for_again_at_once_but_then_it_is() -> None:
    async with serving() as setup:
        failed = setup.kernel.ask(Op.READ, reading(4096, 8192))
        await settled()
        setup.file.reads.pop().callback(ReadError("no answer", errno.ETIMEDOUT))
        page, beside = (setup.kernel.ask(Op.READ, reading(offset, 4096)) for offset in (8192, 12288))
        direct = setup.kernel.ask(Op.READ, reading(8192, 4096, flags=os.O_DIRECT))
        other = setup.kernel.ask(Op.READ, reading(8192, 4096), inode=2)
        await settled()
        assert setup.kernel.answers == dict.fromkeys((failed, page), (errno.ETIMEDOUT, b""))
        assert len(setup.file.reads) == len((beside, direct, other))
        await trio.sleep(RETRY_AFTER_SECONDS)
        again = setup.kernel.ask(Op.READ, reading(8192, 4096))
        await settled()
        assert again not in setup.kernel.answers
        assert len(setup.file.reads) == len((beside, direct, other, again))


@with_a_clock
async def test_a_read_whose_thread_was_killed_ends_at_once_or_when_that_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed = set[int]()
    monkeypatch.setattr("rbdfs.fuse.deadlines.is_killed", killed.__contains__)
    ended = list[int]()
    async with serving(cancel_request_of=ended.append) as setup:
        read, unheard = setup.kernel.ask(Op.READ, reading(0, 10)), setup.kernel.ask(Op.READ, reading(10, 10))
        passed = setup.kernel.ask(Op.GETATTR)
        for unique in (read, passed):
            setup.kernel.ask(Op.INTERRUPT, interrupting(unique))
        await settled()
        assert not setup.kernel.answers
        killed.add(THREAD)
        await trio.sleep(KILL_CHECK_AFTER_SECONDS + 2 * CHECK_SECONDS)
        assert setup.kernel.answers == dict.fromkeys((read, unheard), (errno.EINTR, b""))
        assert set(ended) == {THREAD}
        before = len(ended)
        await trio.sleep(2 * CHECK_SECONDS)
        assert len(ended) > before  # pyfuse3 may not have begun with it
        setup.pyfuse3.reply(passed, error=errno.EINTR)
        await settled()
        before = len(ended)
        await trio.sleep(2 * CHECK_SECONDS)
        assert len(ended) == before
        at_once = setup.kernel.ask(Op.READ, reading(0, 10))
        setup.kernel.ask(Op.INTERRUPT, interrupting(at_once))
        await settled()
        assert setup.kernel.answers[at_once] == (errno.EINTR, b"")


# Exactly one answer.


class RaisingFile(FakeFile):
    """An open file with a bug."""

    def start_read(self, offset: int, length: int, callback: OnRead) -> None:
        """Wait to answer, and raise."""
        super().start_read(offset, length, callback)
        raise ZeroDivisionError

    def start_seek(self, offset: int, kind: Kind, callback: OnSeek) -> None:
        """Wait to answer, and raise."""
        super().start_seek(offset, kind, callback)
        raise ZeroDivisionError


@in_trio
async def test_a_request_whose_file_raises_gets_one_answer_also_if_another_comes_late() -> None:
    file = RaisingFile()
    async with serving({1: file}) as setup:
        read = setup.kernel.ask(Op.READ, reading(0, 10))
        seek = setup.kernel.ask(Op.LSEEK, seeking(0, os.SEEK_DATA))
        await settled()
        file.complete()
        await settled()
        assert setup.kernel.answers == dict.fromkeys((read, seek), Answer(errno.EIO, b""))
        assert await setup.kernel.answer_to(Op.READ, reading(0, 10, 99)) == (errno.EBADF, b"")


@in_trio
async def test_a_forget_that_fails_does_not_end_the_mount() -> None:
    def forget(lookups: Iterable[tuple[int, int]]) -> None:
        raise ZeroDivisionError

    async with serving(forget=forget) as setup:
        setup.kernel.ask(Op.FORGET, forgetting(3))
        assert await setup.kernel.answer_to(Op.READ, reading(0, 10, 99)) == (errno.EBADF, b"")


@in_trio
async def test_a_read_that_is_answered_twice_costs_no_other_its_answer() -> None:
    async with serving() as setup:
        first, second = setup.kernel.ask(Op.READ, reading(0, 10)), setup.kernel.ask(Op.READ, reading(10, 10))
        await settled()
        callback = setup.file.reads[0].callback
        for result in (b"a" * 10, b"b" * 10, ReadError("late")):
            callback(result)
        setup.file.complete(1)
        assert setup.kernel.answers == {first: (0, b"a" * 10), second: (0, setup.file.content[10:20])}
        assert not setup.kernel.refused


@in_trio
async def test_what_comes_after_the_close_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as setup:
        await setup.kernel.ask_many([(Op.READ, reading(0, 10))] * 2 + [(Op.LSEEK, seeking(0, os.SEEK_DATA))])
        setup.kernel.faults["readv"] = iter([errno.ENODEV])
        setup.kernel.ask(Op.GETATTR)
        await setup.ended.wait()
        setup.device.close()
        setup.file.complete()
        setup.file.reads[0].callback(StaleError("gone"))
        setup.file.seeks[0][2](0)
        assert not setup.kernel.answers
    assert [record.getMessage() for record in caplog.records if record.levelno > logging.INFO] == ["gone"]


# Garbage of pyfuse3, and its end.


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0",
        b"\xff" * 15,
        message(Op.GETATTR, 999),
        bytes(16),
        struct.pack("=IiQ", 16, -5, 2**64 - 1),
        bytes(150 * KIB),
    ],
    ids=["1 byte", "15 bytes", "a request", "zeros", "an unknown unique", "more than the buffer"],
)
@in_trio
async def test_garbage_of_pyfuse3_costs_no_request_its_answer(garbage: bytes) -> None:
    async with serving() as setup:
        for _ in range(2):
            unique = setup.kernel.ask(Op.LOOKUP, b"name\0")
            await settled()
            setup.pyfuse3.send(garbage)
            setup.pyfuse3.reply(unique, LOOKED_UP)
            await settled()
            assert setup.kernel.answers.pop(unique) == (0, LOOKED_UP)
        setup.kernel.invalid.clear()


@in_trio
async def test_without_pyfuse3_reads_are_answered_and_the_rest_fails() -> None:
    async with serving() as setup:
        unique = setup.kernel.ask(Op.READ, reading(0, 10))
        await settled()
        setup.pyfuse3.close()
        assert await setup.kernel.answer_to(Op.LOOKUP, b"name\0") == (errno.EIO, b"")
        setup.file.complete()
        await settled()
        assert setup.kernel.answers[unique] == (0, setup.file.content[:10])
        assert not setup.ended.is_set()


# INIT.


@in_trio
async def test_the_mount_is_usable_once_the_amended_reply_to_init_is_with_the_kernel() -> None:
    async with serving() as setup:
        unique = setup.kernel.ask(Op.INIT, bytes(64))
        await settled()
        assert [request.opcode for request in setup.pyfuse3.take()] == [Op.INIT]
        assert not setup.device.initialized.is_set()
        setup.pyfuse3.reply(unique, init_reply(12, 9, 1 << 20))
        await setup.device.initialized.wait()
        limits = relay.LIMITS
        assert limits.congestion_threshold < limits.max_background
        assert setup.kernel.answers == {unique: (0, init_reply(*limits, INIT_FLAGS | PARALLEL_DIROPS))}


# The system calls on /dev/fuse fail.


@in_trio
async def test_the_end_of_the_mount_ends_serving_under_load() -> None:
    async with serving() as setup:
        await setup.kernel.ask_many([(Op.READ, reading(0, 10)), (Op.LOOKUP, b"name\0")] * 200)
        setup.kernel.faults["readv"] = iter([0] * 10 + [errno.ENODEV])
        for _ in range(20):
            setup.kernel.ask(Op.READ, reading(0, 10))
        with trio.fail_after(10):
            await setup.ended.wait()
        assert len(setup.file.reads) == 210
        setup.file.complete()


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EINTR])
@in_trio
async def test_a_request_that_was_taken_back_holds_nobody_up(number: int, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as setup:
        setup.kernel.faults["readv"] = iter([number] * 5)
        assert await setup.kernel.answer_to(Op.READ, reading(0, 10, 99)) == (errno.EBADF, b"")
        assert not caplog.records


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.ENOMEM])
def test_no_other_error_ends_serving(number: int) -> None:
    async def test() -> None:
        async with serving() as setup:
            setup.kernel.faults["readv"] = iter([number] * 5)
            unique = setup.kernel.ask(Op.READ, reading(0, 10, 99))
            await trio.sleep(60)
            assert setup.kernel.answers == {unique: Answer(errno.EBADF, b"")}
            assert not setup.ended.is_set()

    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_device_that_cannot_be_read_is_tried_now_and_then() -> None:
    async def test() -> None:
        tries = itertools.count()
        async with serving() as setup:
            setup.kernel.faults["readv"] = (errno.EINVAL if number < 1000 else errno.ENODEV for number in tries)
            setup.kernel.ask(Op.READ, reading(0, 10))
            await trio.sleep(60)
            assert 10 <= next(tries) <= 600

    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize("gone", [errno.ENOENT, errno.ENODEV, errno.ECONNABORTED, errno.EPIPE])
@in_trio
async def test_a_reply_that_nobody_waits_for_is_no_error(gone: int, caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as setup:
        await setup.kernel.ask_many(
            [(Op.READ, reading(0, 10)), (Op.LSEEK, seeking(0, os.SEEK_DATA)), (Op.LOOKUP, b"name\0")]
        )
        setup.kernel.faults = {name: iter([gone] * 2) for name in ("write", "writev")}
        setup.file.complete()
        setup.file.seeks[0][2](0)
        await setup.pyfuse3.answer_all()
        assert not setup.kernel.answers
        assert not [record for record in caplog.records if record.levelno > logging.INFO]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.ENOMEM])
@in_trio
async def test_a_reply_that_the_kernel_refuses_becomes_an_error(number: int) -> None:
    async with serving() as setup:
        requests = [(Op.READ, reading(0, 10)), (Op.LSEEK, seeking(0, os.SEEK_DATA)), (Op.LOOKUP, b"name\0")]
        uniques = await setup.kernel.ask_many(requests)
        setup.kernel.faults = {"writev": iter([number] * 2), "write": iter([0, 0, number])}
        setup.file.complete()
        setup.file.seeks[0][2](0)
        await setup.pyfuse3.answer_all()
        assert setup.kernel.answers == dict.fromkeys(uniques, Answer(errno.EIO, b""))
