"""The cache: what it asks of the cluster, what it keeps, and that its bytes are always the image's."""

import errno
import random
from functools import partial

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from rbdfs.errors import ReadError
from rbdfs.image.cache import MISS_ALIGNMENT, ObjectCache
from rbdfs.image.cached_image import CachedImage
from rbdfs.image.striper import Layout
from tests.fake_backend import FakeBackend
from tests.in_trio import answer, in_trio

KIB = 1024


class Setup:
    """A cache over one image."""

    def __init__(self, size: int = 256 * KIB, budget: int = 1 << 20, backend: FakeBackend | None = None) -> None:
        content = bytearray(random.Random(size).randbytes(size))
        self.backend = backend or FakeBackend(content, object_size=16 * KIB)
        self.cache = ObjectCache(budget, 64, 1 << 30)
        self.throttle = self.cache.throttle(None)
        layout = Layout(self.backend.object_size, self.backend.stripe_unit, self.backend.stripe_count)
        self.image = CachedImage(self.backend, layout, self.throttle)

    async def check(self, offset: int, length: int) -> None:
        data = await answer(partial(self.cache.start_read, self.image, offset, length))
        assert bytes(data) == self.backend.content[offset : offset + length]


@in_trio
async def test_a_second_read_asks_nothing_of_the_cluster_and_copies_nothing() -> None:
    setup = Setup()
    await setup.check(0, 8 * KIB)
    data = await answer(partial(setup.cache.start_read, setup.image, 4 * KIB, 4 * KIB))
    assert isinstance(data, memoryview)
    assert len(setup.backend.aios) == 1
    assert setup.cache.counts.copied_bytes == 0


@in_trio
async def test_two_readers_of_one_object_cause_one_aio() -> None:
    setup = Setup()
    setup.backend.hold = True
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(setup.check, 0, 16 * KIB)
        await trio.testing.wait_all_tasks_blocked()
        assert len(setup.backend.aios) == 1
        setup.backend.release()


@in_trio
async def test_a_reader_waits_for_what_is_read_ahead_already() -> None:
    setup = Setup()
    setup.backend.hold = True
    setup.cache.prefetch(setup.image, 0, 64 * KIB)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.check, 20 * KIB, 8 * KIB)
        await trio.testing.wait_all_tasks_blocked()
        setup.backend.release()
    assert [(aio.offset, aio.length) for aio in setup.backend.aios] == [(0, 64 * KIB)]


@in_trio
async def test_extents_that_touch_are_one_aio_also_over_objects() -> None:
    setup = Setup()
    await setup.check(8 * KIB, 40 * KIB)
    assert [(aio.offset, aio.length) for aio in setup.backend.aios] == [(8 * KIB, 40 * KIB)]


@in_trio
async def test_only_what_is_missing_is_fetched() -> None:
    setup = Setup()
    await setup.check(16 * KIB, 4 * KIB)
    await setup.check(28 * KIB, 8 * KIB)
    await setup.check(8 * KIB, 40 * KIB)
    assert [(aio.offset // KIB, aio.length // KIB) for aio in setup.backend.aios[2:]] == [(8, 8), (20, 8), (36, 12)]


@in_trio
async def test_a_small_random_read_fetches_no_more_than_the_blocks_that_it_touches() -> None:
    setup = Setup()
    await setup.check(10 * KIB + 1, 4 * KIB)
    assert [(aio.offset, aio.length) for aio in setup.backend.aios] == [(8 * KIB, 2 * MISS_ALIGNMENT)]


@in_trio
async def test_a_miss_is_not_rounded_out_beyond_the_end_of_the_image() -> None:
    setup = Setup(size=10 * KIB + 7)
    await setup.check(10 * KIB, 7)
    assert [(aio.offset, aio.length) for aio in setup.backend.aios] == [(8 * KIB, 2 * KIB + 7)]


@in_trio
async def test_the_budget_holds_and_the_longest_unused_goes_first() -> None:
    setup = Setup(budget=80 * KIB)
    for offset in range(0, 64 * KIB, 16 * KIB):
        await setup.check(offset, 16 * KIB)
    await setup.check(0, 16 * KIB)
    await setup.check(64 * KIB, 16 * KIB)
    assert setup.cache.cached_bytes == 64 * KIB
    assert setup.cache.counts.evictions == 1
    asked = len(setup.backend.aios)
    await setup.check(0, 16 * KIB)
    assert len(setup.backend.aios) == asked
    await setup.check(16 * KIB, 16 * KIB)
    assert len(setup.backend.aios) == asked + 1


@in_trio
async def test_what_is_in_flight_counts_towards_the_budget() -> None:
    setup = Setup(budget=64 * KIB)
    setup.backend.hold = True
    for offset in range(0, 256 * KIB, 16 * KIB):
        setup.cache.prefetch(setup.image, offset, 16 * KIB)
    assert len(setup.backend.held) == 2
    while setup.backend.held:
        assert setup.cache.cached_bytes <= 64 * KIB
        setup.backend.release(1)
    assert len(setup.backend.aios) == 16


@in_trio
async def test_without_a_budget_nothing_is_kept() -> None:
    setup = Setup(budget=0)
    setup.cache.prefetch(setup.image, 0, 16 * KIB)
    await setup.check(100, 200)
    await setup.check(100, 200)
    assert [(aio.offset, aio.length) for aio in setup.backend.aios] == [(100, 200)] * 2
    assert setup.cache.cached_bytes == 0


@in_trio
async def test_a_read_larger_than_the_budget_is_still_whole() -> None:
    setup = Setup(budget=8 * KIB)
    await setup.check(0, 8 * KIB)
    await setup.check(4 * KIB, 100 * KIB)


@in_trio
async def test_an_error_reaches_all_waiting_readers_and_the_next_read_tries_again() -> None:
    setup = Setup()
    setup.backend.fail_with = errno.EIO
    failed = []

    async def reader() -> None:
        with pytest.raises(ReadError) as caught:
            await answer(partial(setup.cache.start_read, setup.image, 0, 4 * KIB))
        failed.append(caught.value.errno)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        nursery.start_soon(reader)
    assert failed == [errno.EIO] * 2
    assert len(setup.backend.aios) == 1
    assert setup.cache.cached_bytes == 0
    setup.backend.fail_with = 0
    await setup.check(0, 4 * KIB)


@in_trio
async def test_a_cancelled_reader_leaves_the_aio_to_finish_for_the_next() -> None:
    setup = Setup()
    setup.backend.hold = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.check, 0, 4 * KIB)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    setup.backend.release()
    await setup.check(0, 4 * KIB)
    assert len(setup.backend.aios) == 1


@in_trio
async def test_a_fetch_that_is_forgotten_answers_no_more_but_still_reaches_its_waiting_readers() -> None:
    setup = Setup()
    await setup.check(0, 16 * KIB)
    setup.backend.hold = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(setup.check, 32 * KIB, 16 * KIB)
        await trio.testing.wait_all_tasks_blocked()
        setup.cache.forget(setup.image)
        setup.backend.release()
    assert setup.cache.cached_bytes == 0
    setup.backend.hold = False
    await setup.check(0, 16 * KIB)
    assert len(setup.backend.aios) == 3


@in_trio
async def test_readahead_that_waits_is_dropped_with_its_image() -> None:
    setup = Setup(budget=64 * KIB)
    setup.backend.hold = True
    for offset in range(0, 128 * KIB, 16 * KIB):
        setup.cache.prefetch(setup.image, offset, 16 * KIB)
    setup.cache.forget(setup.image)
    setup.backend.release()
    assert len(setup.backend.aios) == 2
    assert setup.cache.cached_bytes == 0


READS = st.lists(st.tuples(st.booleans(), st.integers(0, 99_999), st.integers(1, 30_000)), max_size=40)
LAYOUTS = st.sampled_from([(4 * KIB, 4 * KIB, 1), (32 * KIB, 32 * KIB, 1), (16 * KIB, 4 * KIB, 3), (16 * KIB, 512, 2)])


@settings(max_examples=200, deadline=None)
@given(READS, LAYOUTS, st.sampled_from([0, 16 * KIB, 64 * KIB, 1 << 20]))
def test_any_reads_and_readahead_give_the_bytes_of_the_image(
    reads: list[tuple[bool, int, int]], layout: tuple[int, int, int], budget: int
) -> None:
    content = bytearray(random.Random(1).randbytes(100_000))
    backend = FakeBackend(content, object_size=layout[0], stripe_unit=layout[1], stripe_count=layout[2])
    setup = Setup(budget=budget, backend=backend)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            for ahead, offset, wanted in reads:
                length = min(wanted, len(content) - offset)
                if ahead:
                    setup.cache.prefetch(setup.image, offset, length)
                else:
                    nursery.start_soon(setup.check, offset, length)
                    await trio.lowlevel.checkpoint()

    trio.run(run)
    assert setup.cache.cached_bytes <= max(budget, 0)


# What was read ahead: used, or wasted.


def ahead(setup: Setup) -> tuple[int, int, int]:
    """Bytes asked for ahead of readers, what of them was used, and what was wasted; in KiB."""
    counts = setup.cache.counts
    return counts.ahead_bytes // KIB, counts.ahead_used_bytes // KIB, counts.ahead_wasted_bytes // KIB


@in_trio
async def test_what_was_read_ahead_is_used_once_a_reader_comes_to_it() -> None:
    setup = Setup()
    setup.cache.prefetch(setup.image, 0, 16 * KIB)
    setup.cache.prefetch(setup.image, 16 * KIB, 16 * KIB)
    await trio.testing.wait_all_tasks_blocked()
    assert ahead(setup) == (32, 0, 0)
    for _ in range(2):
        await setup.check(4 * KIB, 4 * KIB)
    assert ahead(setup) == (32, 16, 0)
    await setup.check(12 * KIB, 8 * KIB)  # in both
    assert ahead(setup) == (32, 32, 0)
    setup.cache.forget(setup.image)
    assert ahead(setup) == (32, 32, 0)


@pytest.mark.parametrize("is_in_flight", [True, False])
@in_trio
async def test_what_was_read_ahead_for_nobody_is_wasted(*, is_in_flight: bool) -> None:
    setup = Setup()
    setup.backend.hold = is_in_flight
    setup.cache.prefetch(setup.image, 0, 16 * KIB)
    await trio.testing.wait_all_tasks_blocked()
    setup.cache.forget(setup.image)
    if is_in_flight:
        assert ahead(setup) == (16, 0, 0)
        setup.backend.release()
        await trio.testing.wait_all_tasks_blocked()
    assert ahead(setup) == (16, 0, 16)


@in_trio
async def test_what_was_read_ahead_and_evicted_is_wasted() -> None:
    setup = Setup(budget=32 * KIB)
    setup.cache.prefetch(setup.image, 0, 16 * KIB)
    await trio.testing.wait_all_tasks_blocked()
    for offset in range(64 * KIB, 128 * KIB, 8 * KIB):
        await setup.check(offset, 8 * KIB)
    assert ahead(setup) == (16, 0, 16)


@in_trio
async def test_what_could_not_be_read_ahead_is_neither_used_nor_wasted() -> None:
    setup = Setup()
    setup.backend.fail_with = errno.ETIMEDOUT
    setup.cache.prefetch(setup.image, 0, 16 * KIB)
    await trio.testing.wait_all_tasks_blocked()
    assert ahead(setup) == (16, 0, 0)
