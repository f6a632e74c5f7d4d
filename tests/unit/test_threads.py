"""Calls in threads that a cancel leaves behind."""

import threading

import trio

from rbdfs.threads import in_thread, wait_for_abandoned
from tests.in_trio import in_trio


@in_trio
async def test_a_call_that_a_cancel_left_behind_is_waited_for() -> None:
    begun, go = trio.Event(), threading.Event()

    def call() -> None:
        trio.from_thread.run_sync(begun.set)
        go.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, call)
        await begun.wait()
        nursery.cancel_scope.cancel()
    assert not wait_for_abandoned(0.01)
    go.set()
    assert wait_for_abandoned(30)
