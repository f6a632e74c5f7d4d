"""Several questions to one object in one message: librados's read operations, which Ceph's Python bindings lack.

To stat an image is to ask its header half a dozen things; as calls of their own they are as many round trips. Many
operations go out at once, and one task waits for all of them: `operate` is what makes `ls -l` of thousands of images
fast. What completes comes over the thread boundary as `aio` describes it.
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
"""To one pool, so that a listing of a large one leaves its OSDs time for reads."""

MANY: Final = 8
"""So many operations at once are worth a thread that waits for them."""

_FAILOK: Final = 2  # LIBRADOS_OP_FLAG_FAILOK: what comes after a call that fails is done all the same


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
    """Which of its omap's values to tell."""
    stat: bool = False
    read_bytes: int = 0
    """How much of its data to read at most, from the beginning."""


class Reply(NamedTuple):
    """What it answered. Where `result` is negative, an errno, there is nothing else: ENOENT where it is not there."""

    result: int
    calls: Sequence[tuple[int, bytes]] = ()
    """Of each call its result, a negative errno if it failed, and its answer."""
    values: Mapping[bytes, bytes] = MappingProxyType({})
    """Of the keys that it has."""
    modified_ns: int = 0
    """When the object was last written to, to the second, in nanoseconds since the epoch."""
    data: bytes = b""
    version: int = 0
    """The object's, which moves with each write to it."""

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
    """One message, and where librados writes the answers to it."""

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
        """Off it goes. Below 0, an errno, it did not."""
        _create_completion(argument, callback or _NO_CALLBACK, byref(self.completion))
        if self.request.ioctx.lifetime.is_over:  # and perhaps closed
            return -errno.ESHUTDOWN
        name = self.request.object_name.encode(errors="surrogateescape")
        return int(_operate(self._handle, self.request.ioctx.pointer, self.completion, name, 0))

    def finish(self, result: int | None = None) -> Reply:
        """When it has completed, or was not sent (then `result` says why): the answers, out of librados's memory."""
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
    """As C takes them: pointers, how many, lengths."""
    return (c_char_p * len(keys))(*keys), len(keys), (c_size_t * len(keys))(*map(len, keys))


def _take_values(iterator: c_void_p, result: int) -> Mapping[bytes, bytes]:
    """What an iterator yields. Of an operation that timed out it points nowhere (C_OmapIter was never called)."""
    key, value, key_length, value_length = c_void_p(), c_void_p(), c_size_t(), c_size_t()
    results = byref(key), byref(value), byref(key_length), byref(value_length)
    values = {}
    while result >= 0 and _next_value(iterator, *results) == 0 and key.value:
        values[ctypes.string_at(key, key_length.value)] = ctypes.string_at(value, value_length.value)
    _end_values(iterator)
    return values


_under_way: dict[int, Callable[[], None]] = {}
"""What to call when an operation has completed, by the number that librados gives back; holds on to the operation."""
_numbers = itertools.count(1)


def _completed(_completion: int, number: int) -> None:
    """In a thread of librados: hand over, and leave."""
    _under_way.pop(number)()


# Of the module, not of whoever sends: librados calls it for as long as it owes an answer, and returns through it.
_on_complete = _Callback(_completed)


class ReadOperations:
    """Sends read operations; to be made, and used, in the trio thread."""

    def __init__(self, portal: Portal, ioctx_of: Callable[[Namespace], librados.Ioctx]) -> None:
        """`ioctx_of` gives one of the connection of now; it raises RbdfsError."""
        self._portal = portal
        self._ioctx_of = ioctx_of
        self._in_flight: Counter[Hashable] = Counter()
        """By the lane of the ioctx."""
        self._some_ended = trio.Event()

    async def operate(self, requests: Sequence[Request]) -> Sequence[Reply]:
        """All at once; the replies are in the order of the requests. Never raises.

        A cancel abandons what is under way. No more than OPERATIONS_AT_ONCE are in flight to the pool of the first, of
        this and other calls. If the connection is replaced meanwhile, all is asked again by the new one.
        """
        replies: Sequence[Reply] = []
        for _ in range(ATTEMPTS if requests else 0):
            try:
                requests = [self._by_the_newest(request) for request in requests]
            except RbdfsError as error:  # the pool was removed meanwhile
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
        """As `operate`, by the connection of the requests alone. What that refuses is ESHUTDOWN."""
        lane = requests[0].ioctx.lane
        while (waiting := self._in_flight[lane]) and waiting + len(requests) > OPERATIONS_AT_ONCE:
            await self._some_ended.wait()
        if len(requests) < MANY:
            return [await reply.get() for reply in [self._send_one(request) for request in requests]]
        return await self._send_many(requests)

    async def ask(self, request: Request) -> Reply:
        """One operation alone."""
        return (await self.operate((request,)))[0]

    def _send_one(self, request: Request) -> Future[Reply]:
        """Answered by a callback: no thread has to wait for it."""
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
        """A thread waits for all of them: a callback each would have the GIL change hands each time."""
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

        # Not in this task: a cancel would let go of the memory that librados is writing to.
        trio.lowlevel.spawn_system_task(partial(run_in_thread, wait, abandon_on_cancel=True, lane=ioctx.lane))
        return await answer.get()

    def _begin(self, ioctx: librados.Ioctx, count: int) -> None:
        ioctx.lifetime.hold()
        self._in_flight[ioctx.lane] += count

    def _ended(self, ioctx: librados.Ioctx, count: int, last: Reply) -> None:
        ioctx.lifetime.note(last.result)
        ioctx.lifetime.release()
        self._in_flight[ioctx.lane] -= count
        if not self._in_flight[ioctx.lane]:
            del self._in_flight[ioctx.lane]
        self._some_ended.set()
        self._some_ended = trio.Event()
