"""Images that stay open in librbd after their close: which of them the next open() gets, and when the others go."""

import logging
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
import trio
import trio.testing

from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.ceph.bindings.aio import LibrbdImage, Portal
from rbdfs.ceph.bindings.librados import Ioctx
from rbdfs.ceph.bindings.librbd import ImageInfo
from rbdfs.ceph.image.handle_cache import CACHED_AT_MOST, CACHED_SECONDS, HandleCache, Opened
from rbdfs.ceph.image.image_state import ImageState, Layer, Locker
from rbdfs.ceph.metadata.header import Header
from rbdfs.errors import RbdfsError
from tests.fake_recovery import lifetime
from tests.in_trio import in_trio

NOBODY: frozenset[Locker] = frozenset()
INFO = ImageInfo(1 << 30, 1 << 22, 1 << 22, 1)


class FakeHandle(LibrbdImage):
    """An image that is open; it can be told to take its time to close, or to fail at it."""

    def __init__(self, ioctx: Ioctx) -> None:
        self.info = lambda: INFO
        self.starts = 0
        self.closed = False
        self.may_close = trio.Event()
        self.may_close.set()
        self.error: RbdfsError | None = None
        self.lifetime = ioctx.lifetime

    def start(self) -> None:
        self.starts += 1

    async def wait_until_idle(self) -> None:
        """It always is."""

    async def aclose(self) -> None:
        assert not self.closed, "closed twice"
        await self.may_close.wait()
        self.closed = True
        if self.error is not None:
            raise self.error


class Librbd:
    """Opens fakes, and remembers them."""

    def __init__(self) -> None:
        self.ioctx = ioctx()
        self.handles = HandleCache(lambda _: self.ioctx, self.open)
        self.opened: list[FakeHandle] = []

    def open(self, ioctx: Ioctx, _: ImageRef) -> FakeHandle:
        """Called in a thread."""
        self.opened.append(FakeHandle(ioctx))
        return self.opened[-1]

    async def reopen(self, name: str, state: ImageState) -> Opened:
        """As an open() of an image."""
        return await self.handles.open(image(name), state, self.handles.take(image(name)))

    async def open_and_close(self, name: str, state: ImageState | None = None) -> FakeHandle:
        """As an open() and the last close() of an image."""
        opened = await self.reopen(name, state or state_of(layer(name)))
        await self.handles.release(image(name), opened)
        assert isinstance(opened.handle, FakeHandle)
        return opened.handle


def ioctx() -> Ioctx:
    """A pool, by a connection of its own."""
    return cast(Ioctx, SimpleNamespace(lifetime=lifetime(), lane=None))


def image(name: str, snapshot_id: int | None = None) -> ImageRef:
    """The HEAD of some image, or a snapshot of it."""
    return ImageRef(Namespace(Pool(1, "rbd")), name, snapshot_id)


def layer(name: str, version: int = 1, *, snapshot_id: int | None = None, lockers: frozenset[Locker] = NOBODY) -> Layer:
    """What a header says."""
    return Layer(image(name, snapshot_id), Header(1 << 30, 1 << 22, 0), version, lockers, 0)


def state_of(*layers: Layer) -> ImageState:
    """What the headers of an image and of its ancestors say."""
    return ImageState(layers)


def with_a_clock(test: Callable[[trio.testing.MockClock], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run an async test whose time passes when it says so."""

    def run() -> None:
        clock = trio.testing.MockClock()
        trio.run(test, clock, clock=clock)

    return run


@in_trio
async def test_an_image_that_is_opened_again_in_time_is_still_open() -> None:
    librbd = Librbd()
    first = await librbd.open_and_close("a")
    assert await librbd.open_and_close("a") is first
    assert (len(librbd.opened), first.starts, first.closed) == (1, 1, False)
    assert await librbd.open_and_close("b") is not first
    await librbd.handles.aclose()
    assert all(handle.closed for handle in librbd.opened)


@in_trio
async def test_an_image_is_opened_again_if_its_header_or_that_of_an_ancestor_has_changed() -> None:
    librbd = Librbd()
    states = [
        state_of(layer("a", 1)),
        state_of(layer("a", 2)),
        state_of(layer("a", 2), layer("parent", 1, snapshot_id=1)),
        state_of(layer("a", 2), layer("parent", 2, snapshot_id=1)),
        state_of(layer("a", 2), layer("parent", 2, snapshot_id=2)),
        state_of(layer("a", 2), layer("other", 2, snapshot_id=2)),
    ]
    for state in states:
        handles = [await librbd.open_and_close("a", state) for _ in range(2)]
        assert handles[0] is handles[1] is librbd.opened[-1]
    assert len(librbd.opened) == len(states)
    await librbd.handles.aclose()
    assert all(handle.closed for handle in librbd.opened)


@in_trio
async def test_what_nothing_is_known_of_is_closed_at_once() -> None:
    librbd = Librbd()
    assert (await librbd.open_and_close("a", state_of(layer("a", 0)))).closed
    assert (await librbd.open_and_close("a", state_of(layer("a"), layer("parent", 0, snapshot_id=1)))).closed


@in_trio
async def test_a_snapshot_that_may_be_being_filled_is_closed_at_once() -> None:
    librbd = Librbd()
    locked = layer("a", snapshot_id=1, lockers=frozenset([Locker(4, "auto 5")]))
    assert (await librbd.open_and_close("a", state_of(locked))).closed
    assert (await librbd.open_and_close("b", state_of(layer("b"), locked))).closed
    opened = await librbd.reopen("a", state_of(locked))
    await librbd.handles.release(image("a"), opened._replace(is_immutable=True))
    assert await librbd.open_and_close("a", state_of(locked)) is opened.handle
    await librbd.handles.aclose()


@in_trio
async def test_of_two_that_are_the_same_one_is_kept() -> None:
    librbd = Librbd()
    opened = [await librbd.reopen("a", state_of(layer("a"))) for _ in range(2)]
    for each in opened:
        await librbd.handles.release(image("a"), each)
    assert [handle.closed for handle in librbd.opened] == [False, True]
    await librbd.handles.aclose()
    assert [handle.closed for handle in librbd.opened] == [True, True]


@in_trio
async def test_of_many_the_first_that_was_closed_goes_first() -> None:
    librbd = Librbd()
    for number in range(CACHED_AT_MOST):
        await librbd.open_and_close(f"{number}")
    await librbd.open_and_close("0")
    assert not any(handle.closed for handle in librbd.opened)
    await librbd.open_and_close("one more")
    assert [handle.closed for handle in librbd.opened] == [False, True] + [False] * (CACHED_AT_MOST - 1)
    await librbd.handles.aclose()


@with_a_clock
async def test_each_is_closed_when_its_time_has_come(clock: trio.testing.MockClock) -> None:
    librbd = Librbd()
    for pause in (0, CACHED_SECONDS / 2):
        clock.jump(pause)
        await librbd.open_and_close(f"{pause}")
    first, second = librbd.opened
    clock.jump(CACHED_SECONDS / 2)
    await trio.testing.wait_all_tasks_blocked()
    assert (first.closed, second.closed) == (True, False)
    assert await librbd.open_and_close(f"{CACHED_SECONDS / 2}") is second  # and is kept as long again
    clock.jump(CACHED_SECONDS / 2)
    await trio.testing.wait_all_tasks_blocked()
    assert not second.closed
    clock.jump(CACHED_SECONDS / 2)
    await trio.testing.wait_all_tasks_blocked()
    assert second.closed
    third = await librbd.open_and_close("later")  # also after none was left
    clock.jump(CACHED_SECONDS)
    await trio.testing.wait_all_tasks_blocked()
    assert third.closed


@with_a_clock
async def test_the_end_waits_for_what_is_being_closed(clock: trio.testing.MockClock) -> None:
    librbd = Librbd()
    slow = await librbd.open_and_close("slow")
    slow.may_close = trio.Event()
    clock.jump(CACHED_SECONDS)
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
    expected = (
        "rbdfs.ceph.image.handle_cache",
        logging.WARNING,
        "image a of rbd could not be closed in good order: cannot close",
    )
    assert caplog.record_tuples == [expected]


class HeldHandle:
    """Counts who holds it."""

    def __init__(self) -> None:
        self.held = 0
        self.lane = id(self)

    def hold(self) -> None:
        self.held += 1

    def release(self) -> None:
        self.held -= 1
        assert self.held >= 0


@in_trio
async def test_a_question_that_is_given_up_lets_go_of_the_image_once_whether_its_thread_has_begun_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rbdfs.threads.THREADS_A_LANE", 1)
    portal, handle, has_begun, may_end = Portal(), HeldHandle(), threading.Event(), threading.Event()

    def block() -> None:
        has_begun.set()
        may_end.wait()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(partial(portal.run_holding, handle, block, lane=handle.lane))
            await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(has_begun.wait)
            assert handle.held == 2
            nursery.cancel_scope.cancel()
        assert handle.held == 1
        may_end.set()
        while handle.held:  # noqa: ASYNC110
            await trio.sleep(0.01)


@in_trio
async def test_an_image_that_is_open_when_nobody_waits_for_it_any_more_is_closed() -> None:
    librbd = Librbd()
    go = threading.Event()
    open_at_once = librbd.open
    librbd.handles = HandleCache(lambda _: librbd.ioctx, lambda ioctx, ref: (go.wait(20), open_at_once(ioctx, ref))[1])
    with trio.move_on_after(0.05) as scope:
        await librbd.handles.open(image("late"), state_of(layer("late")))
    assert scope.cancelled_caught
    go.set()
    await librbd.handles.aclose()
    [handle] = librbd.opened
    assert handle.closed


@in_trio
async def test_what_is_kept_by_a_connection_that_was_replaced_is_closed_and_opened_by_the_new_one() -> None:
    librbd = Librbd()
    first = await librbd.open_and_close("a")
    kept = await librbd.open_and_close("b")
    old, librbd.ioctx = librbd.ioctx, ioctx()
    old.lifetime.end()
    second = await librbd.open_and_close("a")
    assert second.lifetime is librbd.ioctx.lifetime
    await librbd.handles.aclose()
    assert first.closed
    assert kept.closed
    with trio.fail_after(20):
        await old.lifetime.unused()


@in_trio
async def test_what_hangs_by_a_connection_that_is_replaced_is_opened_by_the_new_one_and_closed_later() -> None:
    librbd = Librbd()
    old, new, go, open_at_once = librbd.ioctx, ioctx(), threading.Event(), librbd.open

    def hang_by_the_old(by: Ioctx, ref: ImageRef) -> FakeHandle:
        if by is old:
            go.wait(20)
        return open_at_once(by, ref)

    librbd.handles = HandleCache(lambda _: new if old.lifetime.is_over else old, hang_by_the_old)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(librbd.open_and_close, "a")
            await trio.testing.wait_all_tasks_blocked()
            old.lifetime.end()
        assert [handle.lifetime for handle in librbd.opened] == [new.lifetime]
        go.set()
        await librbd.handles.aclose()
        assert [handle.lifetime for handle in librbd.opened] == [new.lifetime, old.lifetime]
        assert all(handle.closed for handle in librbd.opened)
        await old.lifetime.unused()


@in_trio
async def test_a_task_that_waits_for_an_idle_image_goes_on_waiting_if_it_is_held_again_before_the_task_is_woken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rbdfs.ceph.bindings.librbd.open_image", lambda *_, **__: MagicMock(reads_in_flight=0))
    handle = LibrbdImage(ioctx(), image("a"))
    idle: list[int] = []

    async def wait(number: int) -> None:
        await handle.wait_until_idle()
        idle.append(number)

    handle.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, 1)
        nursery.start_soon(wait, 2)
        await trio.testing.wait_all_tasks_blocked()
        handle.release()
        handle.hold()
        await trio.testing.wait_all_tasks_blocked()
        assert idle == []
        handle.release()
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(idle) == [1, 2]
    handle.close_unused()
