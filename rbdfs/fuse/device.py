"""The kernel's requests: READ, LSEEK and FORGET are answered here, by calls; everything else by pyfuse3.

    kernel ⇄ /dev/fuse ⇄ Device ⇄ socket pair ⇄ libfuse, pyfuse3 → operations.py

pyfuse3 binds no lseek, and resumes a task, starts a coroutine and takes a lock for each read. So it is not given the
kernel's device, but one end of a socket pair that it takes for one (libfuse opens a mount point named /dev/fd/N as a
device): each message on it is one request or one reply of the kernel's protocol.

A reply that does not fit into the socket is lost, since libfuse does not try again, and its request would wait for
ever. So a request is passed on only while the largest replies to all that wait for one fit.

What the kernel does (fs/fuse): it takes a reply to a request that was interrupted or answered before as ENOENT, holds
the inode's lock during a seek, and remembers ENOSYS, after which it never asks this mount again.
"""

import errno
import logging
import math
import os
import socket
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Final, Protocol

import trio

from rbdfs.errors import BeyondEndError, RbdfsError
from rbdfs.fuse import protocol
from rbdfs.fuse.pending import Pending, RecentTimeouts
from rbdfs.fuse.protocol import HEADER_BYTES, INIT, LSEEK, LSEEK_OUT, READ, REPLY, REQUEST
from rbdfs.fuse.requests import BUCKET_SECONDS, Requests
from rbdfs.fuse.trouble_log import TroubleLog
from rbdfs.image.backend import Buffer, OnRead, ReadResult
from rbdfs.image.holes import Kind
from rbdfs.image.open_image import OnSeek

log = logging.getLogger(__name__)

LIMITS: Final = protocol.Limits(max_background=4096, congestion_threshold=48, max_write=4096)
"""12 and 9 are the kernel's own for readahead, too few for large reads. Beyond the threshold it reads nothing ahead;
what somebody waits for is to come here, where its time is kept, and not to wait in the kernel for what came before.
Nothing is ever written, so the smallest max_write keeps the buffer for requests small."""

REQUEST_BYTES_MAX: Final = 128 << 10
"""The buffer for one request, and so the most that the kernel sends: it answers what is larger with an error of its
own, and puts no more FORGETs into one message than fit."""

LISTING_BYTES_MAX: Final = 64 << 10
"""What one READDIR may ask for: glibc asks for 32 KiB. One message carries it whatever the socket's limits are."""

RECEIVED_AT_ONCE: Final = 32
"""Requests taken before others have their turn."""

SOCKET_BYTES: Final = 8 << 20
"""Asked for as the socket's buffers; without root the kernel gives 416 KiB (net.core.wmem_max, twice)."""

_MESSAGE_ROOM: Final = 896
"""What a message takes in a socket's buffer beside twice its bytes, at most: the kernel adds 320 bytes, takes the next
power of two, and adds 256 (skb_shared_info and sk_buff; 894 is the most seen on Linux 6.18, for 193 bytes)."""

READ_AGAIN_SECONDS: Final = 1.0
"""How long the device is left alone after an error that the kernel has no reason to return: if it comes each time, it
costs one line in the log each time."""

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
"""The kernel's page cache reads whole pages, beyond the end of a file as well."""

_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h; Python does not name it

_GONE: Final = (errno.ENOENT, errno.ENODEV, errno.EBADF, errno.ECONNABORTED, errno.EPIPE)
"""What the kernel says to a reply that nobody waits for: interrupted, answered before, unmounted, closed."""

READ_NAME: Final = protocol.OPERATIONS[READ]
SEEK_NAME: Final = protocol.OPERATIONS[LSEEK]
"""What the log of troubles knows the two by that are answered here."""

CHECK_SECONDS: Final = 0.5
"""How often is looked for what has waited for too long, and for who was killed."""

_TO_BE_DONE: Final = (protocol.RELEASE, protocol.RELEASEDIR, INIT, protocol.DESTROY)
"""What has to be passed on, however late: nobody waits for it."""

_KINDS: Final = {os.SEEK_DATA: Kind.DATA, os.SEEK_HOLE: Kind.HOLE}


class OpenFile(Protocol):
    """What reads and seeks need of an open file; `OpenImage` has it."""

    def start_read(self, offset: int, length: int, callback: OnRead) -> None:
        """See `OpenImage.start_read`."""

    def start_seek(self, offset: int, kind: Kind, callback: OnSeek) -> None:
        """See `OpenImage.start_seek`."""


class Device:
    """Both sides of what pyfuse3 takes for /dev/fuse. All of it runs in the trio thread."""

    def __init__(
        self,
        kernel: int,
        files: Mapping[int, OpenFile],
        forget: Callable[[Iterable[tuple[int, int]]], None],
        invalidate: Callable[[int], None],
        seconds_until_end_known: Callable[[int, int], float | None],
        troubles: TroubleLog,
        *,
        direct_io: bool = False,
        answer_seconds: float = math.inf,
        cancel_request_of: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Take over the descriptor `kernel` of /dev/fuse, non-blocking; whoever opened it closes it, after `close`.

        `files` are the open files by handle. `forget` takes (inode, lookups) pairs, `invalidate` the inode of a file
        that the kernel believes to be longer than it is. `seconds_until_end_known(inode, end)` returns in how many
        seconds the kernel surely knows that the file ends there; None if it was not told. `troubles` takes all errors.
        `direct_io`: all files are opened with FOPEN_DIRECT_IO. `answer_seconds` is how long a request may wait here.
        Requests that pyfuse3 has are not answered here: `cancel_request_of(thread)` cancels that of a killed thread.
        """
        self._kernel = kernel
        self._files = files
        self._forget = forget
        self._invalidate = invalidate
        self._seconds_until_end_known = seconds_until_end_known
        self._troubles = troubles
        self.requests = Requests()
        self._read_latency = self.requests.latency[READ]
        self._direct = os.O_DIRECT if direct_io else 0
        self._request = bytearray(REQUEST_BYTES_MAX)
        self._reply = bytearray(REQUEST_BYTES_MAX)
        self._socket, self._pyfuse3 = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        for end in (self._socket, self._pyfuse3):
            _enlarge(end)
        self._room = min(end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for end in (self._socket, self._pyfuse3))
        self._pending = Pending(self.requests, answer_seconds)
        self._failed_seeks = RecentTimeouts()
        self._end_request_of = cancel_request_of
        self._passed: dict[int, tuple[int, int]] = {}  # by unique: opcode, room
        self._waiting: deque[tuple[int, int, int, bytes]] = deque()  # opcode, unique, room, message
        self.initialized = trio.Event()
        """Set when pyfuse3 has answered INIT: the mount is usable."""

    @property
    def mountpoint_for_pyfuse3(self) -> str:
        """What `pyfuse3.init` is to be given. From then on that end of the pair is libfuse's, which closes it."""
        return f"/dev/fd/{self._pyfuse3.detach()}"

    async def serve(self) -> None:
        """Answer requests until the file system is unmounted; nothing else ends it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_replies)
            nursery.start_soon(self._keep_time)
            while True:
                await trio.lowlevel.wait_readable(self._kernel)
                try:
                    if not self._receive():
                        break
                except OSError as error:
                    log.error("cannot read a request, the next try is in %g s: %s", READ_AGAIN_SECONDS, error)
                    await trio.sleep(READ_AGAIN_SECONDS)
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Answer nothing from now on; the kernel answers who waits when its device is closed."""
        self._kernel = -1
        self._socket.close()

    def _receive(self) -> bool:
        """Take the requests that are there. False at the end of the mount; raises other errors of the device."""
        request = self._request
        for _ in range(RECEIVED_AT_ONCE):
            try:
                length = os.readv(self._kernel, (request,))
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return False
                if error.errno in (errno.ENOENT, errno.EINTR):  # ENOENT: interrupted before it was read
                    return True
                raise
            if not length:
                return False
            _, opcode, unique, inode, thread, handle, offset, count, flags = REQUEST.unpack_from(request)
            try:
                if opcode == READ and length >= protocol.READ_BYTES and (file := self._files.get(handle)):
                    page_cache_bytes = 0 if (flags | self._direct) & os.O_DIRECT else count
                    self.requests.waiting[unique] = (monotonic(), READ, inode, offset, thread, page_cache_bytes)
                    if (
                        self._pending.failed_reads
                        and page_cache_bytes
                        and self._has_failed(unique, inode, offset, count)
                    ):
                        continue
                    file.start_read(offset, count, partial(self._answer_read, unique, inode, offset, page_cache_bytes))
                else:
                    self._dispatch(opcode, unique, inode, thread, length)
            except Exception as error:
                self._troubles.failed(inode, f"a request (opcode {opcode}, {length} bytes)", error)
                self._fail(unique, errno.EIO)
        return True

    def _dispatch(self, opcode: int, unique: int, inode: int, thread: int, length: int) -> None:
        """Do what a request asks for that is no READ; it is in the buffer."""
        request = self._request
        if length < HEADER_BYTES:
            log.error("a request of %d bytes is not one", length)
        elif opcode in (protocol.FORGET, protocol.BATCH_FORGET):
            self._forget(protocol.parse_forget(opcode, inode, request, length))
        elif opcode == protocol.INTERRUPT:
            self._interrupt(protocol.parse_interrupt(request, length))
        elif opcode in (READ, LSEEK):
            *_, handle, offset, whence, _ = REQUEST.unpack_from(request)
            self.requests.waiting[unique] = (monotonic(), opcode, inode, offset, thread, 0)
            file = self._files.get(handle)
            if length < (protocol.READ_BYTES if opcode == READ else protocol.LSEEK_BYTES):
                log.error("a request of %d bytes is cut off (opcode %d)", length, opcode)
                self._fail(unique, errno.EIO)
            elif file is None:
                self._fail(unique, errno.EBADF)
            elif whence not in _KINDS:
                self._fail(unique, errno.EINVAL)
            elif self._failed_seeks.has((inode, offset, whence), monotonic()):
                self._fail(unique, errno.ETIMEDOUT)
            else:
                file.start_seek(offset, _KINDS[whence], partial(self._finish_seek, unique, inode, offset, whence))
        else:
            self.requests.waiting[unique] = (monotonic(), opcode, inode, 0, thread, 0)
            protocol.clamp_reply(opcode, request, length, LISTING_BYTES_MAX)
            room = 2 * max(length, protocol.reply_bytes_max(opcode, request, length)) + _MESSAGE_ROOM
            self._waiting.append((opcode, unique, room, bytes(request[:length])))
            self._pass_requests()

    async def _keep_time(self) -> None:
        """Answer what has waited for too long, and what nobody waits for any more."""
        while True:
            await trio.sleep(CHECK_SECONDS)
            now = monotonic()
            self._pending.forget_failed(now)
            for unique, request in self._pending.due(now, self._passed):
                if request.opcode in _TO_BE_DONE:
                    continue
                name = protocol.OPERATIONS.get(request.opcode, f"a request (opcode {request.opcode})")
                what = f"{name} was not answered within {self._pending.seconds:g} s"
                if request.page_cache_bytes:
                    self._pending.fail_read(
                        request.inode, request.offset, request.offset + request.page_cache_bytes, now
                    )
                self._answer_error(unique, request.inode, name, RbdfsError(what, errno.ETIMEDOUT))
            self._end_killed()
            for unique in self._pending.killed_unheard(now, self._passed):
                self._fail(unique, errno.EINTR)

    def _interrupt(self, unique: int | None) -> None:
        """Somebody who waits has a signal pending. If it kills him he goes at once, else he waits on: programs do not
        expect that reading a file is interrupted."""
        if unique in self.requests.waiting:
            self._pending.interrupt(unique)
            self._end_killed()

    def _end_killed(self) -> None:
        for unique, thread in self._pending.killed():
            if unique in self._passed:
                self._end_request_of(thread)
            else:
                self._fail(unique, errno.EINTR)

    def _has_failed(self, unique: int, inode: int, offset: int, count: int) -> bool:
        """Answer what was just asked for in vain."""
        if not self._pending.has_failed(inode, offset, offset + count, monotonic()):
            return False
        self._fail(unique, errno.ETIMEDOUT)
        return True

    def notify(self, inode: int) -> None:
        """Have the kernel ask for the attributes of an inode before it uses them again. Never waits."""
        with suppress(OSError):  # ENOENT: it does not know the inode; else it is unmounted
            os.write(self._kernel, protocol.invalidate_attributes(inode))

    def _answer_read(
        self,
        unique: int,
        inode: int,
        offset: int,
        page_cache_bytes: int,
        result: ReadResult,
        operation: str = READ_NAME,
    ) -> None:
        """Answer a READ, with bytes or an error. The page cache asked for `page_cache_bytes`: 0 for direct I/O.

        The page cache takes what is missing for zeros (fuse_short_read) and shows them up to the end that it knows. So
        nothing may be missing but the rest of the file's last page, and that only if the kernel knows the file's end.
        """
        if unique not in self.requests.waiting:  # it comes too late, or whom it was for is gone
            return
        if isinstance(result, RbdfsError):
            if isinstance(result, BeyondEndError):
                self._invalidate(inode)
            elif result.errno == errno.ETIMEDOUT and page_cache_bytes:
                self._pending.fail_read(inode, offset, offset + page_cache_bytes, monotonic())
            self._answer_error(unique, inode, READ_NAME, result)
            return
        end = offset + len(result)
        if offset + page_cache_bytes > end:
            wait = (
                self._seconds_until_end_known(inode, end)
                if offset + page_cache_bytes <= -(-end // PAGE_BYTES) * PAGE_BYTES
                else None
            )
            if wait is None:
                self._invalidate(inode)
                what = f"a read at {offset} (+{page_cache_bytes}) goes beyond the end of a file that was shrunk"
                self._answer_error(unique, inode, READ_NAME, BeyondEndError(what, errno.EIO))
                return
            if wait:
                trio.lowlevel.spawn_system_task(
                    self._answer_later, wait, unique, inode, offset, page_cache_bytes, result
                )
                return
        try:
            os.writev(self._kernel, (REPLY.pack(REPLY.size + len(result), 0, unique), result))
        except OSError as error:
            self._not_taken(unique, error)
        else:
            if operation == READ_NAME and (waiting := self.requests.waiting.pop(unique, None)):
                waited = monotonic() - waiting[0]
                self._read_latency.buckets[bisect_left(BUCKET_SECONDS, waited)] += 1
                self._read_latency.seconds += waited
                self.requests.read_bytes += len(result)
            else:
                self.requests.end(unique, 0, monotonic())
        if self._troubles.are_open:
            self._troubles.worked(inode, operation)

    async def _answer_later(self, seconds: float, *answer: *tuple[int, int, int, int, Buffer]) -> None:
        await trio.sleep(seconds)
        self._answer_read(*answer)

    def _answer_error(self, unique: int, inode: int, operation: str, error: RbdfsError) -> None:
        self._troubles.failed(inode, operation, error)
        self._fail(unique, error.errno)

    def _finish_seek(self, unique: int, inode: int, offset: int, whence: int, result: int | RbdfsError | None) -> None:
        if unique not in self.requests.waiting:
            return
        if result is None:
            self._fail(unique, errno.ENXIO)
        elif isinstance(result, RbdfsError):
            if result.errno == errno.ETIMEDOUT:
                self._failed_seeks.add((inode, offset, whence), monotonic())
            self._answer_error(unique, inode, SEEK_NAME, result)
        elif offset <= result < 1 << 63:
            self._answer_read(unique, inode, 0, 0, LSEEK_OUT.pack(result), SEEK_NAME)
        else:  # an answer that does not advance makes cp loop for ever
            self._answer_error(unique, inode, SEEK_NAME, RbdfsError(f"a seek from {offset} has found {result}"))

    def _fail(self, unique: int, error: int) -> None:
        """Answer with an error; the kernel ignores it if the request is answered already."""
        if not 0 < error <= protocol.ERRNO_MAX or error == errno.ENOSYS:  # after ENOSYS the kernel never asks again
            error = errno.EIO
        self.requests.end(unique, error, monotonic())
        with suppress(OSError):
            os.write(self._kernel, REPLY.pack(REPLY.size, -error, unique))

    def _not_taken(self, unique: int, error: OSError) -> None:
        """The kernel has refused a reply."""
        if error.errno in _GONE:
            log.debug("a reply was not taken: %s", error)
            self.requests.end(unique, 0, monotonic())
        else:
            log.error("a reply was refused, the process that asked gets EIO: %s", error)
            self._fail(unique, errno.EIO)

    def _pass_requests(self) -> None:
        """Hand pyfuse3 what waits, the oldest first, while the replies have room."""
        while self._waiting:
            opcode, unique, room, message = self._waiting[0]
            if room > self._room and self._passed:
                return
            self._waiting.popleft()
            if unique not in self.requests.waiting:
                continue  # it was answered: it had waited for too long
            try:
                self._socket.send(message)
            except OSError as error:
                log.error("a request (opcode %d) could not be passed on: %s", opcode, error)
                self._fail(unique, errno.EIO)
                continue
            self._passed[unique] = opcode, room
            self._room -= room

    async def _pass_replies(self) -> None:
        """Hand the kernel what pyfuse3 answers."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            for _ in range(RECEIVED_AT_ONCE):
                try:
                    length = self._socket.recv_into(self._reply)
                except BlockingIOError:
                    break
                except OSError as error:
                    log.error("pyfuse3's replies end: %s", error)
                    return
                if not length:
                    log.debug("pyfuse3 has closed its end")
                    return
                self._pass_reply(self._reply[:length])
            self._pass_requests()

    def _pass_reply(self, reply: bytearray) -> None:
        if len(reply) < REPLY.size:
            log.error("a reply of %d bytes is not one", len(reply))
            return
        _, error, unique = REPLY.unpack_from(reply)
        self.requests.end(unique, -error, monotonic())
        opcode, room = self._passed.pop(unique, (0, 0))
        self._room += room
        if opcode == INIT:
            protocol.set_limits(reply, LIMITS)
        try:
            os.write(self._kernel, reply)
        except OSError as error:
            self._not_taken(unique, error)
        if opcode == INIT:
            self.initialized.set()


def _enlarge(end: socket.socket) -> None:
    """Give a socket as large a buffer as it may have."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SOCKET_BYTES)
    except OSError:  # no root, or an architecture with another number
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
