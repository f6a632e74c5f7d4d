"""The kernel's requests: READ, LSEEK and FORGET are answered here, by calls; everything else by pyfuse3.

    kernel ⇄ /dev/fuse ⇄ Device ⇄ Relay ⇄ pyfuse3 → operations.py

pyfuse3 binds no lseek, and resumes a task, starts a coroutine and takes a lock for each read. So it does not get the
kernel's device, but what relay.py passes on.

What the kernel does (fs/fuse): it takes a reply to a request that was interrupted or answered before as ENOENT, holds
the inode's lock during a seek, and remembers ENOSYS, after which it never asks this mount again.
"""

import errno
import logging
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from time import monotonic
from typing import Final, Protocol

import trio

from rbdfs.errors import BeyondEndError, RbdfsError
from rbdfs.fuse import protocol
from rbdfs.fuse.deadlines import Deadlines
from rbdfs.fuse.protocol import HEADER_BYTES, LSEEK, LSEEK_OUT, READ, REPLY, REQUEST
from rbdfs.fuse.relay import Relay
from rbdfs.fuse.replies import Replies
from rbdfs.fuse.requests import BUCKET_SECONDS, Requests
from rbdfs.fuse.timeouts import RecentTimeouts, TimedOutReads
from rbdfs.fuse.trouble_log import TroubleLog
from rbdfs.image.backend import Buffer, OnRead, ReadResult
from rbdfs.image.holes import Kind
from rbdfs.image.open_image import OnSeek

log = logging.getLogger(__name__)

REQUEST_BYTES_MAX: Final = 128 << 10
"""The buffer for one request, and so the most that the kernel sends: it answers what is larger with an error of its
own, and puts no more FORGETs into one message than fit."""

REQUESTS_AT_ONCE: Final = 32
"""Requests to take before others have their turn."""

READ_AGAIN_SECONDS: Final = 1.0
"""How long the device is left alone after an error that the kernel has no reason to return: if it comes each time, it
costs one line in the log each time."""

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
"""The kernel's page cache reads whole pages, beyond the end of a file as well."""

READ_NAME: Final = protocol.OPERATIONS[READ]
SEEK_NAME: Final = protocol.OPERATIONS[LSEEK]
"""The names of the two in the log of troubles."""

_KINDS: Final = {os.SEEK_DATA: Kind.DATA, os.SEEK_HOLE: Kind.HOLE}


class OpenFile(Protocol):
    """What reads and seeks need of an open file; `OpenImage` has it."""

    def start_read(self, offset: int, length: int, callback: OnRead) -> None: ...

    def start_seek(self, offset: int, kind: Kind, callback: OnSeek) -> None: ...


class Device:
    """The kernel's device. All of it runs in the trio thread."""

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
        seconds the kernel surely knows that the file ends there; None if it has a later end. `troubles` takes all
        errors. `direct_io`: all files are opened with FOPEN_DIRECT_IO. `answer_seconds` is how long a request may wait
        here. Requests that pyfuse3 has are not answered here: `cancel_request_of(thread)` cancels that of a killed
        thread.
        """
        self._files = files
        self._forget = forget
        self._invalidate = invalidate
        self._seconds_until_end_known = seconds_until_end_known
        self._troubles = troubles
        self._direct = os.O_DIRECT if direct_io else 0
        self._request = bytearray(REQUEST_BYTES_MAX)
        self.requests = Requests()
        self._read_latency = self.requests.latency[READ]
        self._replies = Replies(kernel, self.requests, troubles)
        self._relay = Relay(self.requests, self._replies)
        self._timed_out_reads = TimedOutReads()
        self._timed_out_seeks = RecentTimeouts()
        self._deadlines = Deadlines(
            self.requests, self._replies, self._relay.sent, self._timed_out_reads, answer_seconds, cancel_request_of
        )
        self.notify = self._replies.notify
        self.initialized = self._relay.initialized

    @property
    def mountpoint_for_pyfuse3(self) -> str:
        """What to give `pyfuse3.init`, once."""
        return self._relay.mountpoint_for_pyfuse3

    async def serve(self) -> None:
        """Answer requests until the file system is unmounted; nothing else ends it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._relay.pass_replies)
            nursery.start_soon(self._deadlines.keep)
            while True:
                await trio.lowlevel.wait_readable(self._replies.kernel)
                try:
                    if not self._receive():
                        break
                except OSError as error:
                    log.error("cannot read a request, the next try is in %g s: %s", READ_AGAIN_SECONDS, error)
                    await trio.sleep(READ_AGAIN_SECONDS)
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Answer nothing from now on; the kernel answers what waits when its device is closed."""
        self._replies.kernel = -1
        self._relay.close()

    def _receive(self) -> bool:
        """Take the requests that are there. False at the end of the mount; raises other errors of the device."""
        request = self._request
        for _ in range(REQUESTS_AT_ONCE):
            try:
                length = os.readv(self._replies.kernel, (request,))
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
                        self._timed_out_reads.ranges
                        and page_cache_bytes
                        and self._timed_out_reads.has(inode, offset, offset + count, monotonic())
                    ):
                        self._replies.fail(unique, errno.ETIMEDOUT)
                        continue
                    file.start_read(offset, count, partial(self._answer_read, unique, inode, offset, page_cache_bytes))
                else:
                    self._dispatch(opcode, unique, inode, thread, length)
            except Exception as error:
                self._troubles.failed(inode, f"a request (opcode {opcode}, {length} bytes)", error)
                self._replies.fail(unique, errno.EIO)
        return True

    def _dispatch(self, opcode: int, unique: int, inode: int, thread: int, length: int) -> None:
        """Do what the request in the buffer asks for, which is not a READ of an open file."""
        request = self._request
        if length < HEADER_BYTES:
            log.error("a request of %d bytes is too short", length)
        elif opcode in (protocol.FORGET, protocol.BATCH_FORGET):
            self._forget(protocol.parse_forget(opcode, inode, request, length))
        elif opcode == protocol.INTERRUPT:
            self._deadlines.interrupt(protocol.parse_interrupt(request, length))
        elif opcode in (READ, LSEEK):
            *_, handle, offset, whence, _ = REQUEST.unpack_from(request)
            self.requests.waiting[unique] = (monotonic(), opcode, inode, offset, thread, 0)
            file = self._files.get(handle)
            if length < (protocol.READ_BYTES if opcode == READ else protocol.LSEEK_BYTES):
                log.error("a request of %d bytes is cut off (opcode %d)", length, opcode)
                self._replies.fail(unique, errno.EIO)
            elif file is None:
                self._replies.fail(unique, errno.EBADF)
            elif whence not in _KINDS:
                self._replies.fail(unique, errno.EINVAL)
            elif self._timed_out_seeks.has((inode, offset, whence), monotonic()):
                self._replies.fail(unique, errno.ETIMEDOUT)
            else:
                file.start_seek(offset, _KINDS[whence], partial(self._answer_seek, unique, inode, offset, whence))
        else:
            self.requests.waiting[unique] = (monotonic(), opcode, inode, 0, thread, 0)
            self._relay.forward(opcode, unique, request, length)

    def _answer_read(self, unique: int, inode: int, offset: int, page_cache_bytes: int, result: ReadResult) -> None:
        """Answer a READ, with bytes or an error. The page cache asked for `page_cache_bytes`: 0 for direct I/O.

        The page cache takes what is missing for zeros (fuse_short_read) and shows them up to the end that it knows. So
        nothing may be missing but the rest of the file's last page, and that only if the kernel knows the file's end.
        """
        if unique not in self.requests.waiting:  # it comes too late, or the thread that asked is gone
            return
        if isinstance(result, RbdfsError):
            if isinstance(result, BeyondEndError):
                self._invalidate(inode)
            elif result.errno == errno.ETIMEDOUT and page_cache_bytes:
                self._timed_out_reads.add(inode, offset, offset + page_cache_bytes, monotonic())
            self._replies.fail_with(unique, inode, READ_NAME, result)
            return
        end, wanted_end = offset + len(result), offset + page_cache_bytes
        if wanted_end > end:
            is_last_page = wanted_end <= -(-end // PAGE_BYTES) * PAGE_BYTES
            wait = self._seconds_until_end_known(inode, end) if is_last_page else None
            if wait is None:
                self._invalidate(inode)
                what = f"a read at {offset} (+{page_cache_bytes}) goes beyond the end of a file that was shrunk"
                self._replies.fail_with(unique, inode, READ_NAME, BeyondEndError(what, errno.EIO))
                return
            if wait:
                trio.lowlevel.spawn_system_task(
                    self._answer_later, wait, unique, inode, offset, page_cache_bytes, result
                )
                return
        try:
            os.writev(self._replies.kernel, (REPLY.pack(REPLY.size + len(result), 0, unique), result))
        except OSError as error:
            self._replies.refused(unique, error)
        else:
            waited = monotonic() - self.requests.waiting.pop(unique)[0]
            self._read_latency.buckets[bisect_left(BUCKET_SECONDS, waited)] += 1
            self._read_latency.seconds += waited
            self.requests.read_bytes += len(result)
        if self._troubles.are_open:
            self._troubles.worked(inode, READ_NAME)

    async def _answer_later(self, seconds: float, *answer: *tuple[int, int, int, int, Buffer]) -> None:
        await trio.sleep(seconds)
        self._answer_read(*answer)

    def _answer_seek(self, unique: int, inode: int, offset: int, whence: int, result: int | RbdfsError | None) -> None:
        if unique not in self.requests.waiting:
            return
        if result is None:
            self._replies.fail(unique, errno.ENXIO)
        elif isinstance(result, RbdfsError):
            if result.errno == errno.ETIMEDOUT:
                self._timed_out_seeks.add((inode, offset, whence), monotonic())
            self._replies.fail_with(unique, inode, SEEK_NAME, result)
        elif offset <= result < 1 << 63:
            self._replies.send_data(unique, LSEEK_OUT.pack(result))
            if self._troubles.are_open:
                self._troubles.worked(inode, SEEK_NAME)
        else:  # an answer that does not advance makes cp loop for ever
            error = RbdfsError(f"a seek from {offset} has found {result}")
            self._replies.fail_with(unique, inode, SEEK_NAME, error)
