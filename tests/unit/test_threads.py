"""Calls in threads that a cancel leaves behind."""

import threading
from functools import partial

import trio

from rbdfs.threads import run_in_thread, wait_for_abandoned
from tests.in_trio import in_trio


@in_trio
async def test_a_call_that_a_cancel_left_behind_is_waited_for() -> None:
    begun, go = trio.Event(), threading.Event()

    def call() -> None:
        trio.from_thread.run_sync(begun.set)
        go.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_in_thread, call, abandon_on_cancel=True, lane="a pool"))
        await begun.wait()
        nursery.cancel_scope.cancel()
    assert not wait_for_abandoned(0.01)
    go.set()
    assert wait_for_abandoned(30)
