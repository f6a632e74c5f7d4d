"""When Python searches for garbage in a mount: a full search holds every reader up."""

import gc
import weakref
from collections.abc import Iterator

import pytest
import trio

from rbdfs.commands.mount import COLLECT_SECONDS, collect_garbage
from tests.in_trio import with_a_clock


class Knot:
    """Refers to itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    """As it was, afterwards."""
    thresholds = gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    gc.unfreeze()


def old_garbage() -> "weakref.ref[Knot]":
    """What only a full search finds."""
    knot = Knot()
    for _ in range(2):
        gc.collect(1)
    return weakref.ref(knot)


@with_a_clock
async def test_all_objects_are_searched_by_the_clock_and_not_for_each_listing() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect_garbage)
        await trio.sleep(1)
        garbage = old_garbage()
        listing = [[number] for number in range(1_000_000)]
        assert garbage() is not None
        await trio.sleep(COLLECT_SECONDS)
        assert garbage() is None
        assert len(listing) == 1_000_000
        nursery.cancel_scope.cancel()


@with_a_clock
async def test_what_was_imported_is_not_searched() -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect_garbage)
        await trio.sleep(1)
        assert gc.get_freeze_count() > 10_000
        nursery.cancel_scope.cancel()
