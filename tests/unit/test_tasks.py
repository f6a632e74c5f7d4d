"""Work that no cancel cuts short."""

import pytest
import trio
import trio.testing

from rbdfs.tasks import BackgroundTasks
from tests.in_trio import in_trio


class Work:
    """Ends when it may, and remembers what became of it."""

    def __init__(self) -> None:
        self.may_end = trio.Event()
        self.ended = 0
        self.dropped: list[str] = []

    async def run(self) -> str:
        """Takes its time."""
        await self.may_end.wait()
        self.ended += 1
        return "result"

    async def drop(self, result: str) -> None:
        """What nobody wants."""
        self.dropped.append(result)


@in_trio
async def test_the_waiting_task_gets_the_result_or_the_error() -> None:
    background, work = BackgroundTasks(), Work()
    work.may_end.set()
    assert await background.run(work.run, work.drop) == "result"

    async def fail() -> None:
        raise KeyError("wrong")

    with pytest.raises(KeyError):
        await background.run(fail)
    await background.wait()
    assert work.dropped == []


@in_trio
async def test_a_cancel_ends_only_the_waiting_and_a_result_that_nobody_waits_for_is_dropped_at_the_end() -> None:
    background, work = BackgroundTasks(), Work()
    with trio.move_on_after(0.01) as scope:
        await background.run(work.run, work.drop)
    assert scope.cancelled_caught
    assert work.ended == 0
    work.may_end.set()
    await background.wait()
    assert (work.ended, work.dropped) == (1, ["result"])


@in_trio
async def test_what_ends_at_the_moment_of_the_cancel_is_dropped_too() -> None:
    background, work = BackgroundTasks(), Work()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(background.run, work.run, work.drop)
        await trio.testing.wait_all_tasks_blocked()
        work.may_end.set()
        nursery.cancel_scope.cancel()
    await background.wait()
    assert (work.ended, work.dropped) == (1, ["result"])


@in_trio
async def test_both_the_end_and_the_cancel_that_comes_after_it_leave_nothing_behind() -> None:
    background, work = BackgroundTasks(), Work()
    work.may_end.set()
    with trio.CancelScope() as scope:
        scope.cancel()
        await background.run(work.run, work.drop)
    await background.wait()
    assert (work.ended, work.dropped) == (1, ["result"])
