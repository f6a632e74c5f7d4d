"""A callback that raises, which none should, harms nobody but its own reader."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.ceph.bindings.aio import Portal
from rbdfs.errors import RbdfsError, StaleError
from rbdfs.image.backend import OnRead, ReadResult
from rbdfs.image.cache import ObjectCache
from rbdfs.image.cached_image import CachedImage
from rbdfs.image.holes import Kind
from rbdfs.image.open_image import OpenImage, OpenState, ReadaheadShare
from rbdfs.image.striper import Layout
from tests.fake_backend import FakeBackend
from tests.in_trio import in_trio, read

KIB = 1024
OBJECT = 16 * KIB
IMAGE = ImageRef(Namespace(Pool(1, "rbd")), "abc")


def explode(result: object) -> None:
    """A callback with a fault in it."""
    raise ZeroDivisionError("nobody expects this")


@contextmanager
def told_in_the_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The fault is in the log, with its traceback."""
    caplog.clear()
    yield
    assert "ZeroDivisionError: nobody expects this" in caplog.text


class Setup:
    """An open image over a cache, with one read in flight at a time."""

    def __init__(self, backend: FakeBackend | None = None, budget: int = 1 << 22, max_ops: int = 1) -> None:
        self.backend = backend or FakeBackend(bytearray(range(256)) * 4096, object_size=OBJECT)
        self.cache = ObjectCache(budget, max_ops, 1 << 30)
        self.throttle = self.cache.throttle(None)
        self.image = CachedImage(self.backend, Layout(OBJECT, OBJECT, 1), self.throttle)
        self.results: list[ReadResult] = []
        self.open = OpenImage(OpenState(IMAGE, self.backend, self.image), self.cache, ReadaheadShare(0))

    def start_read(self, offset: int, callback: OnRead) -> None:
        """A page."""
        self.cache.start_read(self.image, offset, 4 * KIB, callback)


@pytest.mark.parametrize("fail_with", [0, 5], ids=["bytes", "error"])
@in_trio
async def test_readers_of_the_same_fetch_and_those_queued_behind_it_are_answered(
    caplog: pytest.LogCaptureFixture, fail_with: int
) -> None:
    setup = Setup()
    setup.backend.hold, setup.backend.fail_with = True, fail_with
    setup.start_read(0, explode)
    setup.start_read(0, setup.results.append)
    setup.start_read(OBJECT, setup.results.append)
    with told_in_the_log(caplog):
        setup.backend.release()
    setup.backend.release()
    assert len(setup.results) == 2
    assert all(isinstance(result, RbdfsError) == bool(fail_with) for result in setup.results)
    assert (setup.throttle.ops, setup.throttle.bytes) == (0, 0)


@in_trio
async def test_readers_without_a_cache_are_answered_too(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup(budget=0)
    setup.backend.hold = True
    setup.start_read(0, explode)
    setup.start_read(OBJECT, setup.results.append)
    with told_in_the_log(caplog):
        setup.backend.release()
    setup.backend.release()
    assert len(setup.results) == 1
    assert (setup.throttle.ops, setup.throttle.bytes) == (0, 0)


class Unstartable(FakeBackend):
    """A backend with a fault in it, from its second read on."""

    def start_read(self, offset: int, length: int, callback: OnRead) -> None:
        if self.aios:
            raise ZeroDivisionError("nobody expects this")
        super().start_read(offset, length, callback)


@pytest.mark.parametrize("budget", [1 << 22, 0], ids=["cache", "no cache"])
@in_trio
async def test_a_read_that_cannot_be_started_is_an_error_for_its_reader(
    caplog: pytest.LogCaptureFixture, budget: int
) -> None:
    setup = Setup(Unstartable(bytearray(1 << 20), object_size=OBJECT, hold=True), budget)
    for number in range(4):
        setup.start_read(number * OBJECT, setup.results.append)
    with told_in_the_log(caplog):
        setup.backend.release()
    assert [isinstance(result, RbdfsError) for result in setup.results] == [False, True, True, True]
    assert (setup.throttle.ops, setup.throttle.bytes) == (0, 0)


class ClosedLater(FakeBackend):
    """As an image of Ceph that is closed while fetches wait: each fails at once."""

    def start_read(self, offset: int, length: int, callback: OnRead) -> None:
        if self.closed:
            callback(StaleError("it was closed"))
        else:
            super().start_read(offset, length, callback)


@pytest.mark.parametrize("budget", [1 << 26, 0], ids=["cache", "no cache"])
@in_trio
async def test_thousands_that_wait_for_an_image_that_was_closed_all_get_an_error(budget: int) -> None:
    setup = Setup(ClosedLater(bytearray(1 << 20), object_size=OBJECT, hold=True), budget)
    layout = Layout(OBJECT, OBJECT, 1)
    for _ in range(3000):
        image = CachedImage(setup.backend, layout, setup.throttle)
        setup.cache.start_read(image, 0, 4 * KIB, setup.results.append)
    setup.backend.closed = True
    setup.backend.release()
    assert [isinstance(result, StaleError) for result in setup.results] == [False] + [True] * 2999
    assert (setup.throttle.ops, setup.throttle.bytes) == (0, 0)


@in_trio
async def test_reads_and_seeks_that_go_on_in_a_task_do_not_end_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup()
    past_the_end = len(setup.backend.content) + 1
    with told_in_the_log(caplog):
        setup.open.start_read(past_the_end, 4 * KIB, explode)
        await trio.testing.wait_all_tasks_blocked()
    with told_in_the_log(caplog):
        setup.open.start_seek(past_the_end, Kind.DATA, explode)
        await trio.testing.wait_all_tasks_blocked()
    assert bytes(await read(setup.open, 0, 4 * KIB)) == setup.backend.content[: 4 * KIB]


@in_trio
async def test_what_comes_over_the_thread_boundary_after_it_is_delivered(caplog: pytest.LogCaptureFixture) -> None:
    portal, delivered = Portal(), trio.Event()

    def post() -> None:
        portal.post(lambda: explode(None))
        portal.post(delivered.set)

    with told_in_the_log(caplog), trio.fail_after(60):
        await trio.to_thread.run_sync(post)
        await delivered.wait()
