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
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Final, Protocol

import trio

from rbdfs.errors import RbdfsError
from rbdfs.fuse import protocol
from rbdfs.fuse.protocol import HEADER_BYTES, LSEEK, LSEEK_OUT, READ, REPLY, REQUEST
from rbdfs.image.backend import OnRead, ReadResult
from rbdfs.image.holes import Kind
from rbdfs.image.open_image import OnSeek

log = logging.getLogger(__name__)

LIMITS: Final = protocol.Limits(max_background=64, congestion_threshold=48, max_write=4096)
"""12 and 9 are the kernel's own for readahead, too few for large reads. Nothing is ever written, so the smallest
max_write keeps the buffer for requests small."""

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

_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h; Python does not name it

_GONE: Final = (errno.ENOENT, errno.ENODEV, errno.EBADF, errno.ECONNABORTED, errno.EPIPE)
"""What the kernel says to a reply that nobody waits for: interrupted, answered before, unmounted, closed."""

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
    ) -> None:
        """`kernel` is the descriptor of /dev/fuse, non-blocking; whoever opened it closes it, after `close`. `files`
        are the open files by their handles; `forget` is told (inode, lookups)."""
        self._kernel = kernel
        self._files = files
        self._forget = forget
        self._request = bytearray(REQUEST_BYTES_MAX)
        self._reply = bytearray(REQUEST_BYTES_MAX)
        self._socket, self._pyfuse3 = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        for end in (self._socket, self._pyfuse3):
            _enlarge(end)
        self._room = min(end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for end in (self._socket, self._pyfuse3))
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
            _, opcode, unique, inode, handle, offset, count = REQUEST.unpack_from(request)
            try:
                if opcode == READ and length >= protocol.READ_BYTES and (file := self._files.get(handle)):
                    file.start_read(offset, count, partial(self._answer, unique))
                else:
                    self._dispatch(opcode, unique, inode, length)
            except Exception:
                log.exception("a request (opcode %d, %d bytes) failed unexpectedly", opcode, length)
                self._fail(unique, errno.EIO)
        return True

    def _dispatch(self, opcode: int, unique: int, inode: int, length: int) -> None:
        """Do what a request asks for that is no READ; it is in the buffer."""
        request = self._request
        if length < HEADER_BYTES:
            log.error("a request of %d bytes is not one", length)
        elif opcode in (protocol.FORGET, protocol.BATCH_FORGET):
            self._forget(protocol.forgotten(opcode, inode, request, length))
        elif opcode == protocol.INTERRUPT:
            pass  # every request has its answer in bounded time anyway
        elif opcode in (READ, LSEEK):
            *_, handle, offset, whence = REQUEST.unpack_from(request)
            file = self._files.get(handle)
            if length < (protocol.READ_BYTES if opcode == READ else protocol.LSEEK_BYTES):
                log.error("a request of %d bytes is cut off (opcode %d)", length, opcode)
                self._fail(unique, errno.EIO)
            elif file is None:
                self._fail(unique, errno.EBADF)
            elif whence not in _KINDS:
                self._fail(unique, errno.EINVAL)
            else:
                file.start_seek(offset, _KINDS[whence], partial(self._finish_seek, unique, offset))
        else:
            protocol.clamp_reply(opcode, request, length, LISTING_BYTES_MAX)
            room = 2 * max(length, protocol.reply_bytes_max(opcode, request, length)) + _MESSAGE_ROOM
            self._waiting.append((opcode, unique, room, bytes(request[:length])))
            self._pass_requests()

    def _answer(self, unique: int, result: ReadResult) -> None:
        """Answer a READ or an LSEEK, with bytes or an error."""
        if isinstance(result, RbdfsError):
            log.error("%s", result)
            self._fail(unique, result.errno)
            return
        try:
            os.writev(self._kernel, (REPLY.pack(REPLY.size + len(result), 0, unique), result))
        except OSError as error:
            self._not_taken(unique, error)

    def _finish_seek(self, unique: int, offset: int, result: int | RbdfsError | None) -> None:
        if result is None:
            self._fail(unique, errno.ENXIO)
        elif isinstance(result, RbdfsError):
            self._answer(unique, result)
        elif offset <= result < 1 << 63:
            self._answer(unique, LSEEK_OUT.pack(result))
        else:  # an answer that does not advance makes cp loop for ever
            self._answer(unique, RbdfsError(f"a seek from {offset} has found {result}"))

    def _fail(self, unique: int, error: int) -> None:
        """Answer with an error; the kernel ignores it if the request is answered already."""
        if not 0 < error <= protocol.ERRNO_MAX or error == errno.ENOSYS:  # after ENOSYS the kernel never asks again
            error = errno.EIO
        with suppress(OSError):
            os.write(self._kernel, REPLY.pack(REPLY.size, -error, unique))

    def _not_taken(self, unique: int, error: OSError) -> None:
        """The kernel has refused a reply."""
        if error.errno in _GONE:
            log.debug("a reply was not taken: %s", error)
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
        _, _, unique = REPLY.unpack_from(reply)
        opcode, room = self._passed.pop(unique, (0, 0))
        self._room += room
        if opcode == protocol.INIT:
            protocol.set_limits(reply, LIMITS)
        try:
            os.write(self._kernel, reply)
        except OSError as error:
            self._not_taken(unique, error)
        if opcode == protocol.INIT:
            self.initialized.set()


def _enlarge(end: socket.socket) -> None:
    """Give a socket as large a buffer as it may have."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SOCKET_BYTES)
    except OSError:  # no root, or an architecture with another number
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
