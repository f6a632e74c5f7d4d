"""Calls that block, made in worker threads, under every trio that rbdfs runs on."""

import inspect
import threading
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

import trio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# trio 0.23 gave the option a new name, and warns of the old one.
_OPTIONS = inspect.signature(trio.to_thread.run_sync).parameters
_ABANDON: dict[str, Any] = {"abandon_on_cancel" if "abandon_on_cancel" in _OPTIONS else "cancellable": True}

THREADS_A_LANE = 16
"""Calls at once for one pool: those that wait for a dead one leave the threads of all others free."""

_lanes: dict[Hashable, trio.CapacityLimiter] = {}
_calls = 0
_none_is_left = threading.Condition()


async def in_thread(function: Callable[[*Ts], T], *args: *Ts, lane: Hashable = None) -> T:
    """Call a blocking function that releases the GIL, as those of Ceph's bindings do, in a worker thread.

    A cancel abandons the thread: the call goes on, and its result is dropped. What a result must not be dropped of
    (an image that was opened) is called with `in_thread_to_its_end`. `lane` is the id of the pool that is waited for;
    without, it is the cluster, or this host.
    """
    call = partial(_counted, partial(function, *args))
    return await trio.to_thread.run_sync(call, limiter=_limiter(lane), **_ABANDON)


async def in_thread_of_its_own(
    function: Callable[[*Ts], T], *args: *Ts, limiter: trio.CapacityLimiter | None = None
) -> T:
    """As `in_thread`, of what uses nothing of Ceph's: when all ends, nobody waits for one that was abandoned.

    A write to a pipe whose reader stands still never ends. `limiter` is instead of trio's own.
    """
    return await trio.to_thread.run_sync(partial(function, *args), limiter=limiter, **_ABANDON)


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
    """Block until no call of `in_thread` is left, before what they use is taken from under them; False if one is."""
    with _none_is_left:
        return _none_is_left.wait_for(lambda: not _calls, seconds)


async def in_thread_to_its_end(function: Callable[[*Ts], T], *args: *Ts, lane: Hashable = None) -> T:
    """As `in_thread`, but a cancel waits for the call to end."""
    return await trio.to_thread.run_sync(partial(function, *args), limiter=_limiter(lane))


def forget_lanes(owner: object) -> None:
    """Of those lanes that are tuples, let go of the ones that begin with `owner`. Nothing runs in them any more."""
    for lane in [each for each in _lanes if isinstance(each, tuple) and each[0] is owner]:
        del _lanes[lane]


def _limiter(lane: Hashable) -> trio.CapacityLimiter | None:
    """None stands for trio's own, with 40 threads."""
    return None if lane is None else _lanes.setdefault(lane, trio.CapacityLimiter(THREADS_A_LANE))
