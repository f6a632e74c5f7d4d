"""Several questions to one object in one message: librados's read operations, which Ceph's Python bindings lack.

To stat an image is to ask its header half a dozen things; as calls of their own they are as many round trips. Many
operations go out at once, and one task waits for all of them: `operate` is what makes `ls -l` of thousands of images
fast. The completions come over the thread boundary as `aio` describes it, by callbacks.
"""

import ctypes
import errno
import itertools
from collections.abc import Callable, Sequence
from ctypes import CFUNCTYPE, POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint64, c_void_p
from functools import partial
from typing import Any, Final, NamedTuple

import trio

from rbdfs.ceph import librbd
from rbdfs.ceph.aio import Handover
from rbdfs.ceph.errors import reason_of
from rbdfs.errors import RbdfsError

OPERATIONS_AT_ONCE: Final = 512
"""Beyond 1,024, less what image reads have in flight, librados blocks the caller, here with the GIL held."""

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
_short = ctypes.PyDLL("librados.so.2")  # none of these waits for the cluster; see librbd.py for why they keep the GIL


def _bind(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = _short[name]
    function.restype, function.argtypes = result, arguments
    return function


_create_read_op = _bind("rados_create_read_op", c_void_p)
_release_read_op = _bind("rados_release_read_op", None, c_void_p)
_exec = _bind(
    "rados_read_op_exec", None, *(c_void_p, c_char_p, c_char_p, c_char_p, c_size_t, c_void_p, c_void_p, c_void_p)
)
_stat = _bind("rados_read_op_stat", None, *(c_void_p, c_void_p, c_void_p, c_void_p))
_read = _bind("rados_read_op_read", None, *(c_void_p, c_uint64, c_size_t, c_void_p, c_void_p, c_void_p))
_set_flags = _bind("rados_read_op_set_flags", None, c_void_p, c_int)
_create_completion = _bind("rados_aio_create_completion2", c_int, c_void_p, _Callback, POINTER(c_void_p))
_operate = _bind("rados_aio_read_op_operate", c_int, c_void_p, c_void_p, c_void_p, c_char_p, c_int)
_return_value = _bind("rados_aio_get_return_value", c_int, c_void_p)
_release = _bind("rados_aio_release", None, c_void_p)
_buffer_free = _bind("rados_buffer_free", None, c_void_p)


class Call(NamedTuple):
    """A method of an object class, and its encoded argument."""

    method: bytes
    argument: bytes = b""
    object_class: bytes = b"rbd"


class Request(NamedTuple):
    """What to ask one object."""

    ioctx: librbd.Ioctx
    object_name: str
    calls: Sequence[Call] = ()
    stat: bool = False
    read_bytes: int = 0
    """How much of its data to read at most, from the beginning."""


class Reply(NamedTuple):
    """What it answered. Where `result` is negative, an errno, there is nothing else: ENOENT where it is not there."""

    result: int
    calls: Sequence[tuple[int, bytes]] = ()
    """Of each call its result, a negative errno if it failed, and its answer."""
    modified_ns: int = 0
    """When the object was last written to, to the second, in nanoseconds since the epoch."""
    data: bytes = b""

    def answer(self, number: int, what: str) -> bytes:
        """The answer of a call. Raises RbdfsError with its errno, or with that of the whole operation."""
        result, answer = self.calls[number] if self.result >= 0 else (self.result, b"")
        if result < 0:
            raise RbdfsError(f"cannot {what}: {reason_of(-result)}", -result)
        return answer


class _Operation:
    """One message under way, and where librados writes its answers."""

    def __init__(self, number: int, request: Request, deliver: Callable[[int, Reply], None]) -> None:
        self.request = request
        self.handle = _create_read_op()
        self.result = 0
        self._number = number
        self._deliver = deliver
        self._calls = (_CallResult * len(request.calls))()
        self._stat = _StatResult()
        self._read = _ReadResult()
        self._data = ctypes.create_string_buffer(request.read_bytes) if request.read_bytes else None
        place = ctypes.addressof(self._calls)
        for method, argument, object_class in request.calls:
            _exec(
                self.handle,
                object_class,
                method,
                argument,
                len(argument),
                place + _DATA,
                place + _LENGTH,
                place + _RESULT,
            )
            _set_flags(self.handle, _FAILOK)
            place += _SIZE
        if request.stat:
            start = ctypes.addressof(self._stat)
            offsets = (_StatResult.size.offset, _StatResult.seconds.offset, _StatResult.result.offset)
            _stat(self.handle, *(start + offset for offset in offsets))
        if self._data is not None:
            start = ctypes.addressof(self._read)
            length, result = start + _ReadResult.length.offset, start + _ReadResult.result.offset
            _read(self.handle, 0, request.read_bytes, self._data, length, result)

    def finish(self) -> None:
        """In the trio thread: take librados's answers out of its memory, and deliver them."""
        _release_read_op(self.handle)
        calls = []
        for each in self._calls:
            calls.append((each.result, ctypes.string_at(each.data, each.length) if each.data else b""))
            if each.data:
                _buffer_free(each.data)
        data = self._data.raw[: self._read.length] if self._data is not None else b""
        self._deliver(self._number, Reply(self.result, calls, self._stat.seconds * 10**9, data))


_NO_REPLY: Final = Reply(-errno.EIO)
_under_way: dict[int, _Operation] = {}
"""By the number that librados gives back; holds on to the memory that it writes into."""
_numbers = itertools.count(1)


class ReadOperations:
    """Sends read operations; to be made, and used, in the trio thread."""

    def __init__(self, handover: Handover) -> None:
        self._handover = handover
        self._in_flight = 0
        self._one_ended = trio.Event()
        self._arrived = _Callback(self._on_complete)

    async def operate(self, requests: Sequence[Request]) -> Sequence[Reply]:
        """All at once, OPERATIONS_AT_ONCE at most; the replies are in the order of the requests. Never raises.

        A cancel abandons what is under way.
        """
        while self._in_flight and self._in_flight + len(requests) > OPERATIONS_AT_ONCE:
            await self._one_ended.wait()
        replies: list[Reply] = [_NO_REPLY] * len(requests)
        left = len(requests)
        done = trio.Event()

        def deliver(number: int, reply: Reply) -> None:
            nonlocal left
            replies[number] = reply
            left -= 1
            if not left:
                done.set()

        for number, request in enumerate(requests):
            self._send(_Operation(number, request, deliver))
        if requests:
            await done.wait()
        return replies

    async def ask(self, request: Request) -> Reply:
        """One operation alone."""
        return (await self.operate((request,)))[0]

    def _send(self, operation: _Operation) -> None:
        number = next(_numbers)
        _under_way[number] = operation
        self._in_flight += 1
        completion = c_void_p()
        _create_completion(number, self._arrived, byref(completion))
        request = operation.request
        name = request.object_name.encode(errors="surrogateescape")
        result = _operate(operation.handle, request.ioctx.pointer, completion, name, 0)
        if result < 0:
            _release(completion)
            operation.result = result
            self._handover.post(partial(self._end, number))

    def _on_complete(self, completion: int, number: int) -> None:
        """In a thread of librados: hand over, and leave."""
        _under_way[number].result = _return_value(completion)
        _release(completion)
        self._handover.post(partial(self._end, number))

    def _end(self, number: int) -> None:
        self._in_flight -= 1
        self._one_ended.set()
        self._one_ended = trio.Event()
        _under_way.pop(number).finish()
