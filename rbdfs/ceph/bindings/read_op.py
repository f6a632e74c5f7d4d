"""Read operations of librados, which Ceph's Python bindings lack: several questions to one object in one message.

To stat an image, its header is asked half a dozen questions, which would be as many round trips. `operate` sends many
operations at once, and one task waits for all of them: that makes `ls -l` of thousands of images fast. Completions come
over the thread boundary as aio.py describes.
"""

import ctypes
import errno
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Final, NamedTuple

import trio

from rbdfs.catalog import Namespace
from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.aio import Future, Portal
from rbdfs.ceph.bindings.encoding import NANOSECONDS
from rbdfs.ceph.bindings.lifetime import ATTEMPTS
from rbdfs.errors import RbdfsError
from rbdfs.threads import run_in_thread

OPERATIONS_AT_ONCE: Final = 512
"""For one pool, so that a listing of a large pool leaves its OSDs time for reads."""

MANY: Final = 8
"""From this count of operations on, one thread waits for all of them."""

_FAILOK: Final = 2  # LIBRADOS_OP_FLAG_FAILOK: a call that fails does not stop those after it


class _CallResult(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("length", c_size_t), ("result", c_int))


class _StatResult(ctypes.Structure):
    _fields_ = (("size", c_uint64), ("seconds", c_int64), ("result", c_int))


class _ReadResult(ctypes.Structure):
    _fields_ = (("length", c_size_t), ("result", c_int))


_DATA, _LENGTH, _RESULT = (getattr(_CallResult, name).offset for name in ("data", "length", "result"))
_SIZE: Final = ctypes.sizeof(_CallResult)

_Callback = CFUNCTYPE(None, c_void_p, c_void_p)
_NO_CALLBACK: Final = _Callback()
# None of these waits for the cluster; see librbd.py for why they keep the GIL.
_bind = partial(librados.bind, librados.load("librados.so.2", ctypes.PyDLL))

_create_read_op = _bind("rados_create_read_op", c_void_p)
_release_read_op = _bind("rados_release_read_op", None, c_void_p)
_exec = _bind(
    "rados_read_op_exec", None, *(c_void_p, c_char_p, c_char_p, c_char_p, c_size_t, c_void_p, c_void_p, c_void_p)
)
_stat = _bind("rados_read_op_stat", None, *(c_void_p, c_void_p, c_void_p, c_void_p))
_read = _bind("rados_read_op_read", None, *(c_void_p, c_uint64, c_size_t, c_void_p, c_void_p, c_void_p))
_get_values = _bind(
    "rados_read_op_omap_get_vals_by_keys2", None, *(c_void_p, c_void_p, c_size_t, c_void_p, c_void_p, c_void_p)
)
_next_value = _bind("rados_omap_get_next2", c_int, *(c_void_p, c_void_p, c_void_p, c_void_p, c_void_p))
_end_values = _bind("rados_omap_get_end", None, c_void_p)
_set_flags = _bind("rados_read_op_set_flags", None, c_void_p, c_int)
_create_completion = _bind("rados_aio_create_completion2", c_int, c_void_p, _Callback, POINTER(c_void_p))
_operate = _bind("rados_aio_read_op_operate", c_int, c_void_p, c_void_p, c_void_p, c_char_p, c_int)
_return_value = _bind("rados_aio_get_return_value", c_int, c_void_p)
_version = _bind("rados_aio_get_version", c_uint64, c_void_p)
_release = _bind("rados_aio_release", None, c_void_p)
_is_complete = _bind("rados_aio_is_complete", c_int, c_void_p)
_buffer_free = _bind("rados_buffer_free", None, c_void_p)

_wait_for_complete = librados.bind(librados.load("librados.so.2"), "rados_aio_wait_for_complete", c_int, c_void_p)


class Call(NamedTuple):
    """A method of an object class, and its encoded argument."""

    method: bytes
    argument: bytes = b""
    object_class: bytes = b"rbd"


class Request(NamedTuple):
    """What to ask one object."""

    ioctx: librados.Ioctx
    object_name: str
    calls: Sequence[Call] = ()
    keys: tuple[bytes, ...] = ()
    """Keys of its omap whose values to return."""
    stat: bool = False
    read_bytes: int = 0
    """How many bytes of its data to read at most, from the beginning."""


class Reply(NamedTuple):
    """An object's answer. If `result` is negative, an errno, there is nothing else: ENOENT if there is no object."""

    result: int
    calls: Sequence[tuple[int, bytes]] = ()
    """For each call its result, a negative errno if it failed, and its answer."""
    values: Mapping[bytes, bytes] = MappingProxyType({})
    """Of those keys that the object has."""
    modified_ns: int = 0
    """When the object was last written to, to the second, in nanoseconds since the epoch."""
    data: bytes = b""
    version: int = 0
    """The version of the object, which changes with each write to it."""

    def check(self, what: str) -> None:
        """Raise RbdfsError (`cannot <what>: <reason>`) if the whole operation failed."""
        librados.check(self.result, f"cannot {what}")

    def answer(self, number: int, what: str) -> bytes:
        """The answer of a call. Raises RbdfsError with its errno, or with that of the whole operation."""
        self.check(what)
        result, answer = self.calls[number]
        librados.check(result, f"cannot {what}")
        return answer


class _Operation:
    """One message, and the memory where librados writes the answers."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.completion = c_void_p()
        self._handle = _create_read_op()
        self._calls = (_CallResult * len(request.calls))()
        self._stat = _StatResult()
        self._read = _ReadResult()
        self._data = ctypes.create_string_buffer(request.read_bytes) if request.read_bytes else None
        handle, place = self._handle, ctypes.addressof(self._calls)
        for method, argument, object_class in request.calls:
            results = place + _DATA, place + _LENGTH, place + _RESULT
            _exec(handle, object_class, method, argument, len(argument), *results)
            _set_flags(handle, _FAILOK)
            place += _SIZE
        self._values = c_void_p()
        if request.keys:
            _get_values(handle, *_as_arrays(request.keys), byref(self._values), None)
        if request.stat:
            start = ctypes.addressof(self._stat)
            offsets = (_StatResult.size.offset, _StatResult.seconds.offset, _StatResult.result.offset)
            _stat(handle, *(start + offset for offset in offsets))
        if self._data is not None:
            start = ctypes.addressof(self._read)
            length, result = start + _ReadResult.length.offset, start + _ReadResult.result.offset
            _read(handle, 0, request.read_bytes, self._data, length, result)

    def send(self, callback: Callable[..., None] | None, argument: int | None) -> int:
        """Send it. Returns a negative errno if it was not sent."""
        _create_completion(argument, callback or _NO_CALLBACK, byref(self.completion))
        if self.request.ioctx.lifetime.is_over:  # its ioctx may be closed
            return -errno.ESHUTDOWN
        name = self.request.object_name.encode(errors="surrogateescape")
        return int(_operate(self._handle, self.request.ioctx.pointer, self.completion, name, 0))

    def finish(self, result: int | None = None) -> Reply:
        """Copy the answers out of librados's memory, and free that. `result` is why it was not sent, if it was not."""
        if result is None:
            result = _return_value(self.completion)
        version = _version(self.completion)
        _release(self.completion)
        _release_read_op(self._handle)
        calls = []
        for each in self._calls:
            calls.append((each.result, ctypes.string_at(each.data, each.length) if each.data else b""))
            if each.data:
                _buffer_free(each.data)
        data = self._data.raw[: self._read.length] if self._data is not None else b""
        values = _take_values(self._values, result) if self.request.keys else {}
        return Reply(result, calls, values, self._stat.seconds * NANOSECONDS, data, version)


@lru_cache
def _as_arrays(keys: tuple[bytes, ...]) -> tuple[object, int, object]:
    """For C: pointers, count, lengths."""
    return (c_char_p * len(keys))(*keys), len(keys), (c_size_t * len(keys))(*map(len, keys))


def _take_values(iterator: c_void_p, result: int) -> Mapping[bytes, bytes]:
    """The pairs of an iterator. After a timeout it points nowhere (C_OmapIter was never called)."""
    key, value, key_length, value_length = c_void_p(), c_void_p(), c_size_t(), c_size_t()
    results = byref(key), byref(value), byref(key_length), byref(value_length)
    values = {}
    while result >= 0 and _next_value(iterator, *results) == 0 and key.value:
        values[ctypes.string_at(key, key_length.value)] = ctypes.string_at(value, value_length.value)
    _end_values(iterator)
    return values


_under_way: dict[int, Callable[[], None]] = {}
"""What to call when an operation has completed, by the number that librados passes back; keeps the operation alive."""
_numbers = itertools.count(1)


def _completed(_completion: int, number: int) -> None:
    """Runs in a thread of librados: hand over, and return."""
    _under_way.pop(number)()


# It belongs to the module, not to an object: librados may call it, and return through it, after its sender is gone.
_on_complete = _Callback(_completed)


class ReadOperations:
    """Sends read operations. All in the trio thread."""

    def __init__(self, portal: Portal, ioctx_of: Callable[[Namespace], librados.Ioctx]) -> None:
        """`ioctx_of` gives an ioctx of the present connection; it raises RbdfsError."""
        self._portal = portal
        self._ioctx_of = ioctx_of
        self.in_flight: Counter[Hashable] = Counter()
        """Count of operations, by the lane of the ioctx."""
        self._some_ended = trio.Event()

    async def operate(self, requests: Sequence[Request]) -> Sequence[Reply]:
        """Send all at once; the replies are in the order of the requests. Never raises.

        A cancel ends only the waiting. All calls together have at most OPERATIONS_AT_ONCE in flight to a pool; the pool
        of the first request counts. If the connection is replaced, all are sent again by the new one.
        """
        replies: Sequence[Reply] = []
        for _ in range(ATTEMPTS if requests else 0):
            try:
                requests = [self._by_the_newest(request) for request in requests]
            except RbdfsError as error:  # the pool was removed
                return [Reply(-error.errno)] * len(requests)
            lifetime = requests[0].ioctx.lifetime
            replies = []
            with lifetime.patience(), lifetime.until_over():
                replies = await self.operate_once(requests)
            refused = any(reply.result == -errno.ESHUTDOWN for reply in replies)
            if replies and not (refused and await lifetime.is_over_after(errno.ESHUTDOWN)):
                break
        return replies or [Reply(-errno.ESHUTDOWN)] * len(requests)

    def _by_the_newest(self, request: Request) -> Request:
        ioctx = request.ioctx
        return request._replace(ioctx=self._ioctx_of(ioctx.namespace)) if ioctx.lifetime.is_over else request

    async def operate_once(self, requests: Sequence[Request]) -> Sequence[Reply]:
        """As `operate`, only by the connection of the requests. If that is over, the result is ESHUTDOWN."""
        lane = requests[0].ioctx.lane
        while (waiting := self.in_flight[lane]) and waiting + len(requests) > OPERATIONS_AT_ONCE:
            await self._some_ended.wait()
        if len(requests) < MANY:
            return [await reply.get() for reply in [self._send_one(request) for request in requests]]
        return await self._send_many(requests)

    async def ask(self, request: Request) -> Reply:
        """Send one request."""
        return (await self.operate((request,)))[0]

    def _send_one(self, request: Request) -> Future[Reply]:
        """Send a request that a callback answers, so that no thread waits for it."""
        operation, answer, number = _Operation(request), Future[Reply](), next(_numbers)
        ioctx = request.ioctx
        self._begin(ioctx, 1)

        def end(result: int | None = None) -> None:
            reply = operation.finish(result)
            self._ended(ioctx, 1, reply)
            answer.set(reply)

        _under_way[number] = partial(self._portal.post, end)
        result = operation.send(_on_complete, number)
        if result < 0:
            del _under_way[number]
            end(result)
        return answer

    async def _send_many(self, requests: Sequence[Request]) -> Sequence[Reply]:
        """Send requests that one thread waits for: with a callback for each, the GIL would change hands each time."""
        operations = [_Operation(request) for request in requests]
        ioctx = requests[0].ioctx
        self._begin(ioctx, len(operations))
        results = [operation.send(None, None) for operation in operations]
        answer = Future[Sequence[Reply]]()

        def end() -> None:
            finished = zip(operations, results, strict=True)
            replies = [each.finish(result if result < 0 else None) for each, result in finished]
            self._ended(ioctx, len(operations), replies[-1])
            answer.set(replies)

        def wait() -> None:
            for operation, result in zip(operations, results, strict=True):
                if result >= 0 and not _is_complete(operation.completion):
                    _wait_for_complete(operation.completion)
            self._portal.post(end)

        # Not in this task: a cancel would free the memory that librados writes to.
        trio.lowlevel.spawn_system_task(partial(run_in_thread, wait, abandon_on_cancel=True, lane=ioctx.lane))
        return await answer.get()

    def _begin(self, ioctx: librados.Ioctx, count: int) -> None:
        ioctx.lifetime.hold()
        self.in_flight[ioctx.lane] += count

    def _ended(self, ioctx: librados.Ioctx, count: int, last: Reply) -> None:
        ioctx.lifetime.note(last.result)
        ioctx.lifetime.release()
        self.in_flight[ioctx.lane] -= count
        if not self.in_flight[ioctx.lane]:
            del self.in_flight[ioctx.lane]
        self._some_ended.set()
        self._some_ended = trio.Event()
