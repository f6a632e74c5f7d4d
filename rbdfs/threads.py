"""Run blocking calls in worker threads, under every trio that rbdfs supports."""

import inspect
import threading
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# trio 0.23 gave the option a new name, and warns about the old one.
_OPTIONS = inspect.signature(trio.to_thread.run_sync).parameters
_ABANDON = "abandon_on_cancel" if "abandon_on_cancel" in _OPTIONS else "cancellable"

THREADS_A_LANE = 16
"""Calls at once for one pool: those that wait for a dead pool leave the threads of all others free."""

_lanes: dict[Hashable, trio.CapacityLimiter] = {}
_calls = 0
_none_is_left = threading.Condition()


async def run_in_thread(
    function: Callable[[*Ts], T],
    *args: *Ts,
    abandon_on_cancel: bool = False,
    lane: Hashable = None,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """Call a blocking function that releases the GIL in a worker thread.

    A cancel waits for the call to end. With `abandon_on_cancel` it does not: the call goes on, and its result is lost.
    Do not use that if the result must not be lost, such as an image that was just opened.

    `lane` is for calls that use the cluster: what they wait for there, such as the id of a pool. Each lane has its own
    threads, and `wait_for_abandoned` waits for the calls in lanes. Calls without a lane use trio's own threads, or
    those of `limiter`; nobody waits for them once they are abandoned: a write to a pipe without a reader never ends.
    """
    call = partial(function, *args)
    if lane is not None:
        limiter = _lanes.setdefault(lane, trio.CapacityLimiter(THREADS_A_LANE))
        if abandon_on_cancel:
            call = partial(_counted, call)
    options: dict[str, Any] = {_ABANDON: abandon_on_cancel}
    return await trio.to_thread.run_sync(call, limiter=limiter, **options)


def _counted(call: Callable[[], T]) -> T:
    global _calls  # noqa: PLW0603  (a process has one set of threads)
    with _none_is_left:
        _calls += 1
    try:
        return call()
    finally:
        with _none_is_left:
            _calls -= 1
            _none_is_left.notify_all()


def wait_for_abandoned(seconds: float) -> bool:
    """Block until no call that a cancel abandons runs in any lane; False if one still runs.

    Call it before closing the connections that these calls use.
    """
    with _none_is_left:
        return _none_is_left.wait_for(lambda: not _calls, seconds)


def forget_lanes(owner: object) -> None:
    """Forget the lanes that are tuples and begin with `owner`. Nothing may run in them any more."""
    for lane in [each for each in _lanes if isinstance(each, tuple) and each[0] is owner]:
        del _lanes[lane]
