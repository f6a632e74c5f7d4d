"""A watch on an object, by librados's completions: no thread waits for an OSD.

Ceph's own binding blocks a thread for each call. If it could not give a watch back in time, it does so again when the
Python object is freed (`rados.Watch.__dealloc__`, 16.2), by a cookie that librados has already freed: mounts crashed
when the OSD came back.
"""

import itertools
from collections.abc import Callable
from ctypes import CFUNCTYPE, byref, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from functools import partial
from typing import Final

import trio

from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.aio import Future, Portal
from rbdfs.errors import RbdfsError

_CompleteCallback = CFUNCTYPE(None, c_void_p, c_void_p)
_NotifyCallback = CFUNCTYPE(None, c_void_p, c_uint64, c_uint64, c_uint64, c_void_p, c_size_t)
_ErrorCallback = CFUNCTYPE(None, c_void_p, c_uint64, c_int)

_bind = partial(librados.bind, librados.load("librados.so.2"))

_create_completion = _bind("rados_aio_create_completion2", c_int, c_void_p, _CompleteCallback, c_void_p)
_return_value = _bind("rados_aio_get_return_value", c_int, c_void_p)
_release = _bind("rados_aio_release", None, c_void_p)
_aio_watch = _bind(
    "rados_aio_watch2",
    c_int,
    *(c_void_p, c_char_p, c_void_p, c_void_p, _NotifyCallback, _ErrorCallback, c_uint32, c_void_p),
)
_aio_unwatch = _bind("rados_aio_unwatch", c_int, c_void_p, c_uint64, c_void_p)
_notify_ack = _bind("rados_notify_ack", c_int, c_void_p, c_char_p, c_uint64, c_uint64, c_char_p, c_int)

DEFAULT_TIMEOUT: Final = 0
"""The OSD drops the watch of a client that is gone after `osd_client_watch_timeout`, 30 s."""


class Watch:
    """A watch on an object. All in the trio thread."""

    def __init__(self, ioctx: librados.Ioctx, object_name: str, portal: Portal, on_lost: Callable[[], None]) -> None:
        """Use `take`."""
        self._ioctx = ioctx
        self._name = object_name.encode(errors="surrogateescape")
        self._portal = portal
        self._on_lost = on_lost
        self._number = next(_numbers)
        self._cookie = c_uint64()

    @classmethod
    async def take(
        cls, ioctx: librados.Ioctx, object_name: str, portal: Portal, on_lost: Callable[[], None]
    ) -> "Watch":
        """Watch an object. `on_lost` is called in the trio thread when the watch is lost, perhaps more than once.

        A cancel gives the watch back as soon as it is there. Raises RbdfsError.
        """
        watch = cls(ioctx, object_name, portal, on_lost)
        ioctx.lifetime.hold()  # until it is given back
        _watches[watch._number] = watch
        answer = watch._send(
            lambda completion: _aio_watch(
                ioctx.pointer,
                watch._name,
                completion,
                byref(watch._cookie),
                _on_notify,
                _on_error,
                DEFAULT_TIMEOUT,
                watch._number,
            )
        )
        try:
            await watch._taken(answer)
        except trio.Cancelled:
            trio.lowlevel.spawn_system_task(watch._give_back_when_taken, answer)
            raise
        return watch

    async def give_back(self) -> None:
        """End the watch. A cancel ends only the waiting. Raises RbdfsError; the watch is gone then, too."""
        del _watches[self._number]
        unwatch = self._send(lambda completion: _aio_unwatch(self._ioctx.pointer, self._cookie, completion))
        answer = Future[int]()
        trio.lowlevel.spawn_system_task(self._let_go, unwatch, answer)
        librados.check(await answer.get(), f"cannot end the watch on {self._name.decode(errors='replace')}")

    async def _let_go(self, unwatch: Future[int], answer: Future[int]) -> None:
        """Release the connection at the end of the watch, whether or not a task still waits for that."""
        result = await unwatch.get()
        self._ioctx.lifetime.release()
        answer.set(result)

    async def _taken(self, answer: Future[int]) -> None:
        result = await answer.get()
        if result < 0:
            del _watches[self._number]
            self._ioctx.lifetime.note(result)
            self._ioctx.lifetime.release()
        librados.check(result, f"cannot watch {self._name.decode(errors='replace')}")

    async def _give_back_when_taken(self, answer: Future[int]) -> None:
        try:
            await self._taken(answer)
            await self.give_back()
        except RbdfsError:
            pass  # there is no watch, or the cluster ends it

    def _send(self, start: Callable[[c_void_p], int]) -> Future[int]:
        """Start an operation with a completion, whose result is set in the future."""
        answer, number, completion = Future[int](), next(_numbers), c_void_p()
        _under_way[number] = partial(self._complete, answer)
        _create_completion(number, _on_complete, byref(completion))
        result = start(completion)
        if result < 0:
            _release(completion)
            _under_way.pop(number)
            answer.set(result)
        return answer

    def _complete(self, answer: Future[int], result: int) -> None:
        """Runs in a thread of librados."""
        self._portal.post(partial(answer.set, result))

    def acknowledge(self, notification: int, cookie: int) -> None:
        """Acknowledge a notification at once. Runs in a thread of librados."""
        _notify_ack(self._ioctx.pointer, self._name, notification, cookie, None, 0)

    def lose(self) -> None:
        """Runs in a thread of librados."""
        self._portal.post(self._on_lost)


# librados's threads are given numbers, not objects: a number of something that is gone does no harm.
_numbers = itertools.count(1)
_watches: dict[int, Watch] = {}
_under_way: dict[int, Callable[[int], None]] = {}


def _completed(completion: int, number: int) -> None:
    result = int(_return_value(completion))
    _release(completion)
    _under_way.pop(number)(result)


def _notified(number: int, notification: int, cookie: int, _notifier: int, _data: int, _length: int) -> None:
    if watch := _watches.get(number):
        watch.acknowledge(notification, cookie)


def _lost(number: int, _cookie: int, _error: int) -> None:
    if watch := _watches.get(number):
        watch.lose()


_on_complete = _CompleteCallback(_completed)
_on_notify = _NotifyCallback(_notified)
_on_error = _ErrorCallback(_lost)
