"""Two FUSE operations past pyfuse3: lseek, which it does not bind, and read, which it is slow for.

pyfuse3 leaves libfuse's slot for lseek empty, and the kernel then treats every file as solid data. For each read it
resumes a task of its own, starts a coroutine and hands a lock on; a read that is a look into the cache, or the start of
an aio, needs none of that. The C library built from lowlevel.c fills both slots. For that the dynamic linker must find
it before it binds pyfuse3 to libfuse, that is, before pyfuse3 is imported: `rbdfs/fuse/__init__.py` sees to it.
Without the library (no compiler or no libfuse3-dev when rbdfs was installed) pyfuse3 serves the reads, all else works
too, and files look solid. Scattered reads can be answered without Python, see shortcut.py.

What the kernel does (fs/fuse/file.c: fuse_file_llseek, fuse_lseek): only SEEK_DATA and SEEK_HOLE come here, also with
an offset past the end of the file. It holds the inode's lock meanwhile, so that seeks in one file come one at a time.
ENOSYS it remembers, and never asks this mount again.
"""

import ctypes
import errno
import importlib.util
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TypeVar

import trio

from rbdfs.errors import RbdfsError
from rbdfs.image.source import Data

log = logging.getLogger(__name__)

LseekHandler = Callable[[int, int, int, int], Awaitable[int]]
"""(inode, fh, offset, whence) → where the next data or hole begins, at or after `offset`; both in bytes of the file.

`whence` is os.SEEK_DATA or os.SEEK_HOLE, and the end of the file counts as a hole. Raises RbdfsError or FUSEError with
the errno for the caller: ENXIO for an offset at or past the end, and for SEEK_DATA after the last data. A caller that
waits cannot be killed: answer in bounded time.
"""


class Nursery(Protocol):
    """Where requests run: a trio nursery, of which only this is used."""

    def start_soon(self, async_fn: Callable[..., Awaitable[object]], /, *args: object, name: object = None) -> None: ...


_OFFSET_MAX: Final = 2**63 - 1  # loff_t
_ERRNO_MAX: Final = 511  # the kernel takes no error beyond it (fs/fuse/dev.c: fuse_dev_do_write)

_RECEIVED_AT_ONCE: Final = 32  # then others have their turn

_OnLseek = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64, ctypes.c_int)
_READ = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64, ctypes.c_size_t)
_OnRead = ctypes.CFUNCTYPE(None, *_READ)
_OnArrived = ctypes.CFUNCTYPE(None, *_READ, ctypes.c_int64, ctypes.c_void_p)
_Function = TypeVar("_Function", bound=Callable[..., object])


def _load_library() -> ctypes.PyDLL | None:
    """The C library, put in front of libfuse for whatever is loaded from now on; None where it was not built.

    A PyDLL keeps the GIL in calls: a reply is one short write to /dev/fuse, not worth changing hands for.
    """
    spec = importlib.util.find_spec("rbdfs.fuse._lowlevel")  # built like an extension module, never imported as one
    if spec is None or spec.origin is None:
        return None
    loaded = ctypes.PyDLL(spec.origin, mode=ctypes.RTLD_GLOBAL)
    loaded.rbdfs_sessions.argtypes = []
    loaded.rbdfs_on_lseek.argtypes = [_OnLseek]
    loaded.rbdfs_on_lseek.restype = None
    loaded.rbdfs_on_read.argtypes = [_OnRead, _OnArrived]
    loaded.rbdfs_on_read.restype = None
    loaded.rbdfs_begin_receiving.argtypes = []
    loaded.rbdfs_end_receiving.argtypes = []
    loaded.rbdfs_end_receiving.restype = None
    loaded.rbdfs_receive.argtypes = []
    loaded.rbdfs_reply_lseek.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.rbdfs_reply_read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    loaded.rbdfs_reply_error.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return loaded


library: Final = _load_library()

import pyfuse3  # noqa: E402  (after the library, or pyfuse3 would be bound past it)


def lseek_unavailable() -> str | None:
    """Why files look solid, as a sentence; None if SEEK_DATA and SEEK_HOLE can work. Ask after `pyfuse3.init`."""
    if library is None:
        return "rbdfs was installed without its C library; install gcc and libfuse3-dev, then reinstall rbdfs"
    if not library.rbdfs_sessions():
        return "rbdfs's C library did not get between pyfuse3 and libfuse; was pyfuse3 imported before rbdfs.fuse?"
    return None


@contextmanager
def serve_lseek(handler: LseekHandler, nursery: Nursery) -> Iterator[None]:
    """Answer seeks by `handler`: enter after `pyfuse3.init`, run `pyfuse3.main` inside, leave before `pyfuse3.close`.

    Each request is a task in `nursery`, beside those that pyfuse3 serves and not counted in its `max_tasks`. An error
    that is neither RbdfsError nor FUSEError is logged with its traceback and answered EIO. What is cancelled, or still
    waits when the context ends, is answered ECONNABORTED, as the kernel answers requests that an unmount cuts off.
    Nothing is sent after the end of the context. Where seeks cannot be served, says so in the log, once, and does
    nothing.
    """
    reason = lseek_unavailable()
    if library is None or reason is not None:
        log.warning("holes look like data, so sparse images are copied in full: %s", reason)
        yield
        return
    requests = _Requests(library, handler, nursery)
    callback = _OnLseek(requests.begin)
    library.rbdfs_on_lseek(callback)
    try:
        yield
    finally:
        library.rbdfs_on_lseek(_OnLseek())
        requests.abort()


def _not_interrupted(function: _Function) -> _Function:
    """trio's enable_ki_protection, typed for every trio: Ctrl-C here would lose a request, and itself."""
    protected: _Function = trio.lowlevel.enable_ki_protection(function)
    return protected


class _Requests:
    """The seeks that wait for an answer. Each is answered once: by whoever takes it out of `_waiting`."""

    def __init__(self, library: ctypes.PyDLL, handler: LseekHandler, nursery: Nursery) -> None:
        self._library = library
        self._handler = handler
        self._nursery = nursery
        self._waiting: dict[int, trio.CancelScope] = {}  # by the address of libfuse's request

    @_not_interrupted
    def begin(self, request: int, inode: int, fh: int, offset: int, whence: int) -> None:
        """Called by libfuse, in the trio thread, with the GIL; must neither block nor raise."""
        self._waiting[request] = trio.CancelScope()
        try:
            name = f"lseek in inode {inode}"
            self._nursery.start_soon(self._answer, request, inode, fh, offset, whence, name=name)
        except RuntimeError:  # the nursery is closed: the mount is being taken down
            self._send(request, -errno.ECONNABORTED)

    def abort(self) -> None:
        """Answer all that wait, and cancel their handlers."""
        for request, scope in list(self._waiting.items()):
            self._send(request, -errno.ECONNABORTED)
            scope.cancel()

    async def _answer(self, request: int, inode: int, fh: int, offset: int, whence: int) -> None:
        scope = self._waiting.get(request)
        if scope is None:  # aborted before it began
            return
        with scope:
            try:
                found = await self._handler(inode, fh, offset, whence)
                if not offset <= found <= _OFFSET_MAX:  # an answer that does not advance makes cp loop for ever
                    raise ValueError(f"the handler answered {found}")
            except (RbdfsError, pyfuse3.FUSEError) as error:
                self._send(request, -_answerable(error.errno))
            except Exception:
                log.exception("inode %d: lseek(%d, %d) failed unexpectedly", inode, offset, whence)
                self._send(request, -errno.EIO)
            except BaseException:  # Cancelled, KeyboardInterrupt
                self._send(request, -errno.ECONNABORTED)
                raise
            else:
                self._send(request, found)

    @_not_interrupted
    def _send(self, request: int, answer: int) -> None:
        """Answer with an offset, or with a negated errno."""
        if self._waiting.pop(request, None) is None:
            return
        if answer < 0:
            status = self._library.rbdfs_reply_error(request, -answer)
        else:
            status = self._library.rbdfs_reply_lseek(request, answer)
        _note(status)


def _answerable(error: int) -> int:
    """`error` as the kernel takes it; EIO for what is no errno, and for ENOSYS, which would turn seeks off for good."""
    return error if 0 < error <= _ERRNO_MAX and error != errno.ENOSYS else errno.EIO


class ReadRequest:
    """A read() of the kernel that waits for its answer: for `reply` or `fail`, once, from the trio thread."""

    __slots__ = ("_reads", "address", "handle", "length", "offset")

    def __init__(self, reads: "_Reads", address: int, handle: int, offset: int, length: int) -> None:
        self._reads = reads
        self.address = address  # of libfuse's request, which is gone when it is answered: another may be there then
        self.handle = handle
        self.offset = offset
        self.length = length

    def reply(self, data: Data, start: int, end: int) -> None:
        """Answer with data[start:end]; it goes to the kernel without a copy."""
        self._reads.send(self, data, start, end - start)

    def fail(self, errno_: int) -> None:
        """Answer with an error."""
        self._reads.send_error(self, errno_)

    def serve(self, read: Callable[[int, int, int], Awaitable[bytes | bytearray | memoryview]]) -> None:
        """Answer by a task: with what `read(handle, offset, length)` returns, or with the error that it raises."""
        self._reads.spawn(self, read)

    def spawn(self, async_fn: Callable[..., Awaitable[object]], *args: object) -> None:
        """Have something done beside the reads, as long as they are served."""
        self._reads.nursery.start_soon(async_fn, *args)

    async def answer(self, read: Callable[[int, int, int], Awaitable[bytes | bytearray | memoryview]]) -> None:
        try:
            data = bytes(await read(self.handle, self.offset, self.length))
        except pyfuse3.FUSEError as error:
            self.fail(_answerable(error.errno))
        except Exception:
            log.exception("a read failed unexpectedly")
            self.fail(errno.EIO)
        except BaseException:  # Cancelled, KeyboardInterrupt
            self.fail(errno.ECONNABORTED)
            raise
        else:
            self.reply(data, 0, len(data))


ReadHandler = Callable[[ReadRequest], None]
"""Answers a read at once, or keeps it to answer it later. Called in the trio thread; must neither block nor raise."""

ArrivedHandler = Callable[[ReadRequest, int, bytes], None]
"""The same for a read by a shortcut (shortcut.py) that could not be answered there: with the cluster's result, a count
of bytes or a negative errno, and the bytes."""


@contextmanager
def serve_reads(handler: ReadHandler, on_arrived: ArrivedHandler, nursery: Nursery) -> Iterator[None]:
    """Hand reads to the handlers and not to pyfuse3: enter and leave as `serve_lseek`, and the same happens to those
    that wait.

    Reads are no tasks, and not counted in pyfuse3's `max_tasks`. Without the C library pyfuse3 serves them.
    """
    if library is None or lseek_unavailable() is not None:
        yield
        return
    reads = _Reads(library, handler, on_arrived, nursery)
    callbacks = _OnRead(reads.begin), _OnArrived(reads.arrived)
    library.rbdfs_on_read(*callbacks)
    requests = library.rbdfs_begin_receiving()
    if requests >= 0:
        nursery.start_soon(reads.receive, requests)
    try:
        yield
    finally:
        library.rbdfs_end_receiving()
        library.rbdfs_on_read(_OnRead(), _OnArrived())
        reads.abort()


class _Reads:
    """The reads that wait for an answer; each gets the first that is given."""

    def __init__(
        self, library: ctypes.PyDLL, handler: ReadHandler, on_arrived: ArrivedHandler, nursery: Nursery
    ) -> None:
        self.nursery = nursery
        self._receive = library.rbdfs_receive
        self._reply = library.rbdfs_reply_read
        self._reply_error = library.rbdfs_reply_error
        self._handler = handler
        self._on_arrived = on_arrived
        self._waiting: set[ReadRequest] = set()

    async def receive(self, requests: int) -> None:
        """Take requests until the session ends."""
        while True:
            await trio.lowlevel.wait_readable(requests)
            for _ in range(_RECEIVED_AT_ONCE):
                received = self._receive()
                if received < 0:
                    return
                # A single reader has nothing more to ask while it waits, nor the moment after it was answered.
                if received == 0 or len(self._waiting) <= 1:
                    break

    @_not_interrupted
    def begin(self, address: int, inode: int, handle: int, offset: int, length: int) -> None:
        """Called by libfuse, in the trio thread, with the GIL."""
        self._take(ReadRequest(self, address, handle, offset, length), inode, self._handler)

    @_not_interrupted
    def arrived(self, address: int, inode: int, handle: int, offset: int, length: int, result: int, data: int) -> None:
        """The same for what has arrived from librbd but could not be answered there."""
        content = ctypes.string_at(data, max(result, 0))
        request = ReadRequest(self, address, handle, offset, length)
        self._take(request, inode, lambda request: self._on_arrived(request, result, content))

    def _take(self, request: ReadRequest, inode: int, handler: ReadHandler) -> None:
        self._waiting.add(request)
        try:
            handler(request)
        except Exception:
            log.exception("inode %d: a read at %d failed unexpectedly", inode, request.offset)
            request.fail(errno.EIO)

    def spawn(
        self,
        request: ReadRequest,
        read: Callable[[int, int, int], Awaitable[bytes | bytearray | memoryview]],
    ) -> None:
        """See `ReadRequest.serve`."""
        try:
            self.nursery.start_soon(request.answer, read, name=f"read at {request.offset}")
        except RuntimeError:  # the nursery is closed: the mount is being taken down
            request.fail(errno.ECONNABORTED)

    def abort(self) -> None:
        """Answer all that wait."""
        for request in list(self._waiting):
            request.fail(errno.ECONNABORTED)

    def send(self, request: ReadRequest, data: Data, start: int, length: int) -> None:
        """Answer with bytes, what was not answered yet."""
        if request in self._waiting:
            self._waiting.remove(request)
            _note(self._reply(request.address, data, start, length))

    def send_error(self, request: ReadRequest, errno_: int) -> None:
        """Answer with an error, what was not answered yet."""
        if request in self._waiting:
            self._waiting.remove(request)
            _note(self._reply_error(request.address, errno_))


def _note(status: int) -> None:
    """What the kernel said to a reply."""
    if status:  # the caller is gone, or the mount is
        log.debug("a reply was not taken: %s", os.strerror(-status))
