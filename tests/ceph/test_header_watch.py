"""The watch of an open image comes back by itself, whoever takes it away, and asks no more often than it says."""

import errno
import logging
from collections.abc import Callable

import pytest
import trio
import trio.testing

from rbdfs.ceph.image.header_watch import RENEW_SECONDS, HeaderWatch
from rbdfs.errors import RbdfsError
from rbdfs.spec import ImageSpec
from tests.cluster import Ceph, Mount, wait_until
from tests.in_trio import with_a_clock
from tests.mount.test_changes import WATCHING_CAPS, locked_out

Mounts = Callable[..., Mount]

SPEC = ImageSpec("rbd", "vm1")


class FakeWatch:
    """As `Watch`."""

    hangs = False

    async def give_back(self) -> None:
        """A watch that was lost cannot be given back."""
        if self.hangs:
            await trio.sleep_forever()
        raise RbdfsError("not connected", errno.ENOTCONN)


class FakeHeader:
    """Refuses watches by these exceptions, one each; then it gives them."""

    def __init__(self, *refusals: Exception) -> None:
        self.refusals = list(refusals)
        self.asked: list[float] = []
        self.given: list[FakeWatch] = []
        self.lose: Callable[[], None] | None = None

    async def take(self, on_lost: Callable[[], None]) -> FakeWatch:
        """As `Watch.take`."""
        self.asked.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if self.refusals:
            raise self.refusals.pop(0)
        self.lose = on_lost
        self.given.append(FakeWatch())
        return self.given[-1]


async def begin(header: FakeHeader) -> HeaderWatch:
    """A watch that is asked of `header`."""
    return await HeaderWatch.begin(SPEC, header.take)


async def until(condition: Callable[[], bool]) -> None:
    """Poll for what no event tells; fail if it does not come."""
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)


def shut_down() -> RbdfsError:
    """What a blocklisted client gets."""
    return RbdfsError("shut down", errno.ESHUTDOWN)


@with_a_clock
async def test_a_watch_that_is_lost_is_asked_for_at_once_and_then_every_second_until_it_is_back() -> None:
    header = FakeHeader()
    watch = await begin(header)
    assert watch.is_active
    assert header.lose is not None
    header.refusals = [shut_down(), shut_down()]
    began = trio.current_time()
    header.lose()
    await until(lambda: len(header.asked) == 4)
    await until(lambda: watch.is_active)
    waits = [asked - began for asked in header.asked[1:]]
    assert all(0 <= wait - at * RENEW_SECONDS < RENEW_SECONDS / 2 for at, wait in enumerate(waits)), waits
    await watch.aclose()


@with_a_clock
async def test_a_watch_that_is_lost_again_and_again_is_not_asked_for_without_a_pause() -> None:
    header = FakeHeader()
    watch = await begin(header)
    with trio.move_on_after(2.5 * RENEW_SECONDS):
        while True:
            assert header.lose is not None
            header.lose()
            await trio.sleep(0.01)
    assert len(header.asked) <= 4
    await watch.aclose()


@with_a_clock
async def test_what_the_key_may_not_watch_is_asked_for_once() -> None:
    header = FakeHeader(RbdfsError("not permitted", errno.EPERM))
    watch = await begin(header)
    await trio.sleep(1.5 * RENEW_SECONDS)
    assert len(header.asked) == 1
    assert not watch.is_active
    await watch.aclose()


@with_a_clock
async def test_after_the_connection_was_replaced_the_key_is_asked_once_more_whether_it_may() -> None:
    header = FakeHeader(RbdfsError("not permitted", errno.EPERM), RbdfsError("not permitted", errno.EPERM))
    watch = await begin(header)
    watch.take_again()
    await trio.sleep(1.5 * RENEW_SECONDS)
    assert len(header.asked) == 2
    watch.take_again()
    await until(lambda: watch.is_active)
    await watch.aclose()


@with_a_clock
async def test_a_watch_by_a_connection_that_was_replaced_is_given_back_but_not_waited_for() -> None:
    header = FakeHeader()
    watch = await begin(header)
    header.given[0].hangs = True
    watch.take_again()
    await until(lambda: watch.is_active)
    assert len(header.asked) == 2
    with trio.fail_after(RENEW_SECONDS / 2):
        await watch.aclose()


@with_a_clock
async def test_a_close_ends_the_asking_at_once() -> None:
    header = FakeHeader(*(shut_down() for _ in range(100)))
    watch = await begin(header)
    await until(lambda: len(header.asked) == 2)
    with trio.fail_after(RENEW_SECONDS / 2):
        await watch.aclose()
    await trio.sleep(1.2 * RENEW_SECONDS)
    assert len(header.asked) == 2


@with_a_clock
async def test_no_exception_ends_the_loop_for_everyone(caplog: pytest.LogCaptureFixture) -> None:
    header = FakeHeader()
    watch = await begin(header)
    header.refusals = [ZeroDivisionError("nobody expects this")]
    assert header.lose is not None
    with caplog.at_level(logging.ERROR):
        header.lose()
        await until(lambda: len(header.asked) == 3)
        await until(lambda: watch.is_active)
    assert "ZeroDivisionError" in caplog.text
    await watch.aclose()


def test_an_idle_file_is_watched_again_when_its_client_is_let_in_again(ceph: Ceph, mounts: Mounts) -> None:
    key = ceph.credentials(WATCHING_CAPS)
    mount = mounts(*key)
    mount.expect("WARNING")
    name = ceph.unique("idle")
    ceph.make_image(name, b"content")
    with mount.image(name).open("rb"):
        assert len(ceph.watchers(name)) == 1
        with locked_out(ceph, key):
            wait_until(lambda: ceph.watchers(name) == [], 60)
        wait_until(lambda: len(ceph.watchers(name)) == 1, 60)
    assert "the watch was lost" in mount.log
    wait_until(lambda: ceph.watchers(name) == [])
