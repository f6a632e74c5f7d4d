"""What is counted of the kernel's requests: each once, with how long it took and how it ended."""

import errno

import pytest

from rbdfs.errors import ReadError
from rbdfs.fuse.protocol import GETXATTR, LSEEK, READ
from rbdfs.fuse.requests import BUCKET_SECONDS, Requests
from tests.fake_kernel import THREAD, Op, Setup, forgetting, interrupting, reading, seeking, serving, settled
from tests.in_trio import in_trio


def counts(setup: Setup) -> dict[int, int]:
    """How many requests have ended, by opcode."""
    latency = setup.device.requests.latency
    return {opcode: count for opcode, each in latency.items() if (count := sum(each.buckets))}


@in_trio
async def test_a_read_waits_until_it_is_answered_and_its_bytes_count() -> None:
    async with serving() as setup:
        requests = setup.device.requests
        unique = setup.kernel.ask(Op.READ, reading(4096, 1000), inode=7)
        await settled()
        assert [(unique, waiting[1:]) for unique, waiting in requests.waiting.items()] == [
            (unique, (READ, 7, 4096, THREAD, 1000))
        ]
        assert requests.oldest(5) == [requests.waiting[unique]]
        assert not counts(setup)
        setup.file.complete()
        assert not requests.waiting
        assert counts(setup) == {READ: 1}
        assert requests.read_bytes == 1000
        assert requests.latency[READ].seconds > 0
        assert not +requests.errors


@in_trio
async def test_a_read_that_fails_counts_as_an_error_and_not_its_bytes() -> None:
    async with serving() as setup:
        setup.kernel.ask(Op.READ, reading(0, 1000))
        await settled()
        setup.file.reads.pop().callback(ReadError("cannot read", errno.ETIMEDOUT))
        assert not setup.device.requests.waiting
        assert counts(setup) == {READ: 1}
        assert setup.device.requests.read_bytes == 0
        assert +setup.device.requests.errors == {(READ, errno.ETIMEDOUT): 1}


@in_trio
async def test_what_pyfuse3_answers_counts_with_its_errno() -> None:
    async with serving() as setup:
        wanted = setup.kernel.ask(Op.GETXATTR, b"\0" * 8 + b"user.x\0")
        await settled()
        setup.pyfuse3.take()
        assert list(setup.device.requests.waiting) == [wanted]
        setup.pyfuse3.reply(wanted, error=errno.ENODATA)
        await settled()
        assert not setup.device.requests.waiting
        assert counts(setup) == {GETXATTR: 1}
        assert +setup.device.requests.errors == {(GETXATTR, errno.ENODATA): 1}


@in_trio
async def test_a_seek_counts_no_bytes_and_its_enxio_does() -> None:
    async with serving() as setup:
        for result in (4096, None):
            setup.kernel.ask(Op.LSEEK, seeking(0, 3))
            await settled()
            setup.file.seeks.pop()[2](result)
        assert counts(setup) == {LSEEK: 2}
        assert setup.device.requests.read_bytes == 0
        assert +setup.device.requests.errors == {(LSEEK, errno.ENXIO): 1}


@in_trio
async def test_what_has_no_answer_is_not_waited_for() -> None:
    async with serving() as setup:
        setup.kernel.ask(Op.FORGET, forgetting(1))
        setup.kernel.ask(Op.INTERRUPT, interrupting(2))
        await settled()
        assert not setup.device.requests.waiting


@pytest.mark.parametrize("error", [errno.ENOENT, errno.EFAULT])
@in_trio
async def test_a_read_whose_answer_is_not_taken_waits_no_more(error: int) -> None:
    async with serving() as setup:
        setup.kernel.faults["writev"] = iter([error])
        setup.kernel.ask(Op.READ, reading(0, 1000))
        await settled()
        setup.file.complete()
        assert not setup.device.requests.waiting
        assert counts(setup) == {READ: 1}
        assert setup.device.requests.read_bytes == 0


def test_each_duration_is_in_its_bucket_and_a_second_end_is_none() -> None:
    requests = Requests()
    for unique, seconds in enumerate((0.0, *BUCKET_SECONDS, 1000.0)):
        requests.waiting[unique] = (50.0, READ, 1, 0, 2, 0)
        for _ in range(2):
            requests.end(unique, 0, 50.0 + seconds)
    buckets = requests.latency[READ].buckets
    assert sum(buckets) == len(BUCKET_SECONDS) + 2
    assert buckets[0] >= 1
    assert buckets[-1] == 1
    assert requests.latency[READ].seconds == pytest.approx(sum(BUCKET_SECONDS) + 1000.0)


def test_the_oldest_come_first() -> None:
    requests = Requests()
    for unique, began in enumerate((1.0, 2.0, 3.0)):
        requests.waiting[unique] = (began, READ, 1, 0, 2, 0)
    assert [began for began, *_ in requests.oldest(2)] == [1.0, 2.0]
