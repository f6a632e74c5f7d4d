"""Images that stay open in librbd after their close: which of them the next open() gets, and when the others go."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import trio
import trio.testing

from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.ceph.aio import LibrbdImage
from rbdfs.ceph.handles import KEPT_AT_MOST, KEPT_SECONDS, Handles
from rbdfs.ceph.librbd import ImageInfo
from rbdfs.errors import RbdfsError
from tests.in_trio import in_trio

INFO = ImageInfo(1 << 30, 22, 1 << 22, 1, 61, 0, "rbd_data.1")


class FakeHandle(LibrbdImage):
    """An image that is open; it can be told to take its time to close, or to fail at it."""

    def __init__(self) -> None:
        self.info = lambda: INFO
        self.starts = 0
        self.closed = False
        self.may_close = trio.Event()
        self.may_close.set()
        self.error: RbdfsError | None = None

    def start(self) -> None:
        """See `LibrbdImage.start`."""
        self.starts += 1

    async def aclose(self) -> None:
        """See `LibrbdImage.aclose`."""
        assert not self.closed, "closed twice"
        await self.may_close.wait()
        self.closed = True
        if self.error is not None:
            raise self.error


class Librbd:
    """Opens fakes, and remembers them."""

    def __init__(self) -> None:
        self.handles = Handles(self.open)
        self.opened: list[FakeHandle] = []

    def open(self, _: ImageRef) -> FakeHandle:
        """Called in a thread."""
        self.opened.append(FakeHandle())
        return self.opened[-1]

    async def open_and_close(self, name: str, version: int | None = 1) -> FakeHandle:
        """As an open() and the last close() of an image."""
        opened = await self.handles.open(image(name), version)
        await self.handles.close_later(image(name), opened)
        assert isinstance(opened.handle, FakeHandle)
        return opened.handle


def image(name: str) -> ImageRef:
    """The HEAD of some image."""
    return ImageRef(Namespace(Pool(1, "rbd")), name)


def with_a_clock(test: Callable[[trio.testing.MockClock], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run an async test whose time passes when it says so."""

    def run() -> None:
        clock = trio.testing.MockClock()
        trio.run(test, clock, clock=clock)

    return run


@in_trio
async def test_who_opens_an_image_again_in_time_gets_what_is_open() -> None:
    librbd = Librbd()
    first = await librbd.open_and_close("a")
    assert await librbd.open_and_close("a") is first
    assert (len(librbd.opened), first.starts, first.closed) == (1, 1, False)
    assert await librbd.open_and_close("b") is not first
    await librbd.handles.aclose()
    assert all(handle.closed for handle in librbd.opened)


@in_trio
async def test_an_image_whose_header_has_changed_is_opened_anew() -> None:
    librbd = Librbd()
    first = await librbd.open_and_close("a", 1)
    second = await librbd.open_and_close("a", 2)
    assert first.closed
    assert second is not first
    assert await librbd.open_and_close("a", None) is not second
    assert second.closed
    await librbd.handles.aclose()


@in_trio
async def test_what_has_no_version_is_closed_at_once() -> None:
    librbd = Librbd()
    assert (await librbd.open_and_close("a", None)).closed


@in_trio
async def test_of_two_that_are_the_same_one_is_kept() -> None:
    librbd = Librbd()
    first = await librbd.handles.open(image("a"), 1)
    second = await librbd.handles.open(image("a"), 1)
    await librbd.handles.close_later(image("a"), first)
    await librbd.handles.close_later(image("a"), second)
    assert [handle.closed for handle in librbd.opened] == [False, True]
    await librbd.handles.aclose()
    assert [handle.closed for handle in librbd.opened] == [True, True]


@in_trio
async def test_of_many_the_first_that_was_closed_goes_first() -> None:
    librbd = Librbd()
    for number in range(KEPT_AT_MOST):
        await librbd.open_and_close(f"{number}")
    await librbd.open_and_close("0")
    assert not any(handle.closed for handle in librbd.opened)
    await librbd.open_and_close("one more")
    assert [handle.closed for handle in librbd.opened] == [False, True] + [False] * (KEPT_AT_MOST - 1)
    await librbd.handles.aclose()


@with_a_clock
async def test_each_is_closed_when_its_time_has_come(clock: trio.testing.MockClock) -> None:
    librbd = Librbd()
    for pause in (0, KEPT_SECONDS / 2):
        clock.jump(pause)
        await librbd.open_and_close(f"{pause}")
    first, second = librbd.opened
    clock.jump(KEPT_SECONDS / 2)
    await trio.testing.wait_all_tasks_blocked()
    assert (first.closed, second.closed) == (True, False)
    assert await librbd.open_and_close(f"{KEPT_SECONDS / 2}") is second  # and is kept as long again
    clock.jump(KEPT_SECONDS / 2)
    await trio.testing.wait_all_tasks_blocked()
    assert not second.closed
    clock.jump(KEPT_SECONDS / 2)
    await trio.testing.wait_all_tasks_blocked()
    assert second.closed
    third = await librbd.open_and_close("later")  # also after none was left
    clock.jump(KEPT_SECONDS)
    await trio.testing.wait_all_tasks_blocked()
    assert third.closed


@with_a_clock
async def test_the_end_waits_for_what_is_being_closed(clock: trio.testing.MockClock) -> None:
    librbd = Librbd()
    slow = await librbd.open_and_close("slow")
    slow.may_close = trio.Event()
    clock.jump(KEPT_SECONDS)
    await librbd.open_and_close("other")
    await trio.testing.wait_all_tasks_blocked()
    assert not slow.closed
    ended = trio.Event()

    async def end() -> None:
        await librbd.handles.aclose()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end)
        await trio.testing.wait_all_tasks_blocked()
        waited = not ended.is_set()
        slow.may_close.set()
    assert waited
    assert all(handle.closed for handle in librbd.opened)


@in_trio
async def test_an_error_at_the_close_is_a_line_in_the_log_that_names_the_image(
    caplog: pytest.LogCaptureFixture,
) -> None:
    librbd = Librbd()
    handle = await librbd.open_and_close("a")
    handle.error = RbdfsError("cannot close")
    await librbd.handles.aclose()
    assert handle.closed
    expected = ("rbdfs.ceph.handles", logging.WARNING, "image a of rbd could not be closed in good order: cannot close")
    assert caplog.record_tuples == [expected]
