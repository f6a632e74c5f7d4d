"""The device under load: many requests, of all sizes, answered late and in any order."""

import errno
import itertools
import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from rbdfs.fuse import relay
from tests.fake_kernel import (
    Answer,
    Op,
    Setup,
    controlling,
    forgetting,
    getting,
    interrupting,
    reading,
    seeking,
    serving,
    settled,
)
from tests.in_trio import in_trio

KIB = 1024


@contextmanager
def socket_of(nbytes: int = 212_992) -> Iterator[None]:
    """A socket with a buffer of that size (the kernel takes it twice), as by net.core.wmem_max for a user without root:
    by default the kernel's default."""
    with mock.patch.multiple(relay, _SO_SNDBUFFORCE=-1, SOCKET_BYTES=nbytes):
        yield


@in_trio
async def test_a_thousand_reads_are_answered_in_any_order() -> None:
    async with serving() as setup:
        offsets = random.Random(1).sample(range(1 << 20), 1000)
        uniques = await setup.kernel.ask_many((Op.READ, reading(offset, 100)) for offset in offsets)
        assert not setup.kernel.answers
        random.Random(2).shuffle(setup.file.reads)
        while setup.file.reads:
            setup.file.complete()
        content = setup.file.content
        expected = {unique: (0, content[at : at + 100]) for unique, at in zip(uniques, offsets, strict=True)}
        assert setup.kernel.answers == expected
        assert not setup.kernel.refused


def a_mix_of_requests(count: int) -> list[tuple[int, bytes]]:
    """Such as have the largest replies, among small ones, and of sizes that a socket has the most room for."""
    kinds = [
        (Op.LOOKUP, b"a" * 255 + b"\0"),
        (Op.GETATTR, bytes(16)),
        *((Op.GETXATTR, getting(size)) for size in (0, 689, 1713, 4096, 64 * KIB)),
        (Op.READDIRPLUS, reading(0, 1 << 20)),
        *((Op.IOCTL, controlling(size)) for size in (0, 633, 1657)),
    ]
    return random.Random(3).choices(kinds, k=count)


@pytest.mark.parametrize(
    "requests",
    [
        pytest.param(a_mix_of_requests(5000), id="a mix"),
        pytest.param([(Op.LOOKUP, b"name\0")] * 5000, id="small"),
        pytest.param([(Op.READDIRPLUS, reading(0, 1 << 20))] * 50, id="listings"),
        pytest.param([(Op.IOCTL, controlling(633))] * 1000, id="ioctls of 705 bytes"),
        pytest.param([(Op.GETXATTR, getting(689))] * 1000, id="replies of 705 bytes"),
    ],
)
@socket_of()
@in_trio
async def test_no_reply_is_lost_and_the_order_is_kept_while_pyfuse3_is_slow(requests: list[tuple[int, bytes]]) -> None:
    async with serving() as setup:
        uniques = await setup.kernel.ask_many(requests)
        assert not setup.kernel.answers
        rounds = await setup.pyfuse3.answer_all()
        assert list(itertools.chain(*rounds)) == uniques
        assert len(rounds) <= 2 * len(uniques) / len(rounds[0]) + 1  # the room is given back each time
        assert list(setup.kernel.answers) == uniques
        assert {answer.error for answer in setup.kernel.answers.values()} == {0}
        assert not setup.kernel.refused


@socket_of()
@in_trio
async def test_reads_are_answered_while_pyfuse3_hangs() -> None:
    async with serving() as setup:
        await setup.kernel.ask_many([(Op.LOOKUP, b"name\0")] * 2000)
        assert await setup.kernel.answer_to(Op.READ, reading(0, 10, 99)) == (errno.EBADF, b"")


@socket_of(4096)
@in_trio
async def test_a_request_that_no_socket_holds_is_answered_with_an_error() -> None:
    async with serving() as setup:
        assert await setup.kernel.answer_to(Op.IOCTL, bytes(16 * KIB)) == (errno.EIO, b"")
        unique = setup.kernel.ask(Op.LOOKUP, b"name\0")
        await settled()
        assert await setup.pyfuse3.answer_all() == [[unique]]


class Model:
    """What a run of random actions must lead to."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.expected: dict[int, Answer] = {}
        self.forgotten: list[tuple[int, int]] = []
        self.passed: list[int] = []

    def act(self, kind: str, number: int) -> None:
        """One action. `number` is whatever it needs one for."""
        kernel, file = self.setup.kernel, self.setup.file
        if kind == "read":
            length = number % 3000
            answer = Answer(0, file.content[number : number + length])
            self.expected[kernel.ask(Op.READ, reading(number, length))] = answer
        elif kind == "read a bad handle":
            self.expected[kernel.ask(Op.READ, reading(number, 10, 2 + number))] = Answer(errno.EBADF, b"")
        elif kind == "seek":
            answer = Answer(0, struct.pack("=Q", number + 1))
            self.expected[kernel.ask(Op.LSEEK, seeking(number, os.SEEK_DATA))] = answer
        elif kind == "ask pyfuse3":
            self.expected[kernel.ask(Op.GETXATTR, getting(number))] = Answer(0, bytes(number))
        elif kind == "forget":
            kernel.ask(Op.FORGET, forgetting(number), inode=number)
            self.forgotten.append((number, number))
        elif kind == "interrupt":
            kernel.ask(Op.INTERRUPT, interrupting(number))
        elif kind == "complete a read" and file.reads:
            file.complete(number % len(file.reads))
        elif kind == "complete a seek" and file.seeks:
            offset, _, callback = file.seeks.pop(number % len(file.seeks))
            callback(offset + 1)
        elif kind == "let pyfuse3 answer":
            self.passed += [request.unique for request in self.setup.pyfuse3.take()]
            if self.passed:
                unique = self.passed.pop(number % len(self.passed))
                self.setup.pyfuse3.reply(unique, self.expected[unique].data)

    async def finish(self) -> None:
        """Have everything answered that still waits."""
        await settled()
        while len(self.setup.kernel.answers) < len(self.expected):
            for _ in range(10):
                for kind in ("complete a read", "complete a seek", "let pyfuse3 answer"):
                    self.act(kind, 0)
            await settled()


ACTIONS = [
    *("read", "read a bad handle", "seek", "ask pyfuse3", "forget", "interrupt"),
    *("complete a read", "complete a seek", "let pyfuse3 answer", "settle"),
]


@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 64 * KIB)), max_size=60))
def test_each_request_gets_its_own_answer_once_in_whatever_order(actions: list[tuple[str, int]]) -> None:
    async def test() -> None:
        async with serving() as setup:
            model = Model(setup)
            for kind, number in actions:
                if kind == "settle":
                    await settled()
                else:
                    model.act(kind, number)
            with trio.fail_after(20):
                await model.finish()
            assert setup.kernel.answers == model.expected
            assert setup.forgotten == model.forgotten
            assert not setup.kernel.refused

    with socket_of():
        trio.run(test)
