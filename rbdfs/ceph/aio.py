"""The one thread boundary: what librados and librbd do in threads of their own → the task in trio that waits for it.

Ceph's callbacks run in Ceph's threads, which take the GIL for it. So a callback does one thing: it hands over what it
got and leaves. A batch of completions costs one wake-up of the trio thread, not one each.
"""

import errno
import inspect
import logging
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar, TypeVarTuple

import rados
import trio

from rbdfs.ceph.errors import translated
from rbdfs.errors import RbdfsError

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# trio 0.23 gave the option a new name, and warns of the old one.
_OPTIONS = inspect.signature(trio.to_thread.run_sync).parameters
_ABANDON: dict[str, Any] = {"abandon_on_cancel" if "abandon_on_cancel" in _OPTIONS else "cancellable": True}


async def in_thread(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """Call a blocking function of Ceph's bindings (they release the GIL) in a worker thread.

    A cancel abandons the thread: the call goes on, and its result is dropped. What a result must not be dropped of
    (an image that was opened) is called with `in_thread_to_its_end`.
    """
    return await trio.to_thread.run_sync(partial(function, *args), **_ABANDON)


async def in_thread_to_its_end(function: Callable[[*Ts], T], *args: *Ts) -> T:
    """As `in_thread`, but a cancel waits for the call to end."""
    return await trio.to_thread.run_sync(partial(function, *args))


class Handover:
    """Carries calls from any thread into the trio thread, in order."""

    def __init__(self) -> None:
        """To be made in the trio thread that is to be called."""
        self._token = trio.lowlevel.current_trio_token()
        self._arrived: deque[Callable[[], None]] = deque()
        self._woken = False

    def post(self, delivery: Callable[[], None]) -> None:
        """Have `delivery` called in the trio thread. For any thread; returns at once, never raises."""
        self._arrived.append(delivery)
        # If this reads a flag that _deliver is about to clear, _deliver has not looked at the queue yet.
        if not self._woken:
            self._woken = True
            try:
                self._token.run_sync_soon(self._deliver)
            except trio.RunFinishedError:
                log.debug("a completion arrived after the end")

    def _deliver(self) -> None:
        self._woken = False
        while self._arrived:
            try:
                self._arrived.popleft()()
            except Exception:
                log.exception("a completion could not be delivered")


class Answer(Generic[T]):
    """The one result that a task waits for."""

    def __init__(self) -> None:
        self._event = trio.Event()
        self._values: list[T] = []

    def give(self, value: T) -> None:
        """In the trio thread, once."""
        self._values.append(value)
        self._event.set()

    async def get(self) -> T:
        """A cancel abandons what was asked for: its result is dropped."""
        await self._event.wait()
        return self._values[0]


async def execute(
    handover: Handover, ioctx: rados.Ioctx, object_name: str, object_class: str, method: str, argument: bytes = b""
) -> bytes:
    """Call a method of an object class on its object (`rados_aio_exec`): the bytes of its answer.

    Raises RbdfsError with the method's errno: ENOENT where the object is not there, EPERM where the key may not.
    """
    answer: Answer[tuple[int, bytes | None]] = Answer()

    def arrived(completion: rados.Completion, data: bytes | None) -> None:
        handover.post(partial(answer.give, (completion.get_return_value(), data)))

    with translated(f"call {object_class}.{method} on {object_name}"):
        ioctx.aio_execute(object_name, object_class, method, argument, oncomplete=arrived)
    result, data = await answer.get()
    if result < 0 or data is None:
        reason = os.strerror(-result)
        raise RbdfsError(f"cannot call {object_class}.{method} on {object_name}: {reason}", -result or errno.EIO)
    return data
