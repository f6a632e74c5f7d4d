"""Passes on requests to pyfuse3, and its replies to the kernel.

    Device → Relay ⇄ socket pair ⇄ libfuse, pyfuse3 → operations.py

pyfuse3 takes its end of the socket pair for /dev/fuse (libfuse opens a mount point named /dev/fd/N as a device): each
message on it is one request or one reply of the kernel's protocol.

A reply that does not fit into the socket is lost, since libfuse does not try again, and its request would wait for
ever. So a request is passed on only while the largest replies to all that wait for one fit.
"""

import errno
import logging
import socket
from collections import deque
from time import monotonic
from typing import Final

import trio

from rbdfs.fuse import protocol
from rbdfs.fuse.protocol import INIT, REPLY
from rbdfs.fuse.replies import Replies
from rbdfs.fuse.requests import Requests

log = logging.getLogger(__name__)

LIMITS: Final = protocol.Limits(max_background=4096, congestion_threshold=48, max_write=4096)
"""12 and 9 are the kernel's own for readahead, too few for large reads. Beyond the threshold it reads nothing ahead;
requests that somebody waits for should come here, where their time is kept, and not wait in the kernel for earlier
ones. Nothing is ever written, so the smallest max_write keeps the buffer for requests small."""

REPLY_BUFFER_BYTES: Final = 128 << 10
"""The buffer for one reply: more than a listing or an extended attribute takes."""

LISTING_BYTES_MAX: Final = 64 << 10
"""What one READDIR may ask for: glibc asks for 32 KiB. One message carries it whatever the socket's limits are."""

REPLIES_AT_ONCE: Final = 32
"""Replies to pass on before others have their turn."""

SOCKET_BYTES: Final = 8 << 20
"""Asked for as the socket's buffers; without root the kernel gives 416 KiB (net.core.wmem_max, twice)."""

_MESSAGE_ROOM: Final = 896
"""What a message takes in a socket's buffer beside twice its bytes, at most: the kernel adds 320 bytes, takes the next
power of two, and adds 256 (skb_shared_info and sk_buff; 894 is the most seen on Linux 6.18, for 193 bytes)."""

_SO_SNDBUFFORCE: Final = 32  # asm-generic/socket.h; Python does not name it


class Relay:
    """Our end of the socket pair. All of it runs in the trio thread."""

    def __init__(self, requests: Requests, replies: Replies) -> None:
        self._requests = requests
        self._replies = replies
        self._reply = bytearray(REPLY_BUFFER_BYTES)
        self._socket, self._pyfuse3 = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        for end in (self._socket, self._pyfuse3):
            _enlarge(end)
        self._room = min(end.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for end in (self._socket, self._pyfuse3))
        self._queue: deque[tuple[int, int, int, bytes]] = deque()  # opcode, unique, room, message
        self.sent: dict[int, tuple[int, int]] = {}
        """What pyfuse3 has not answered yet, by unique: opcode, room."""
        self.initialized = trio.Event()
        """Set when pyfuse3 has answered INIT: the mount is usable."""

    @property
    def mountpoint_for_pyfuse3(self) -> str:
        """What to give `pyfuse3.init`. From then on that end of the pair is libfuse's, which closes it."""
        return f"/dev/fd/{self._pyfuse3.detach()}"

    def close(self) -> None:
        """Pass on nothing from now on."""
        self._socket.close()

    def forward(self, opcode: int, unique: int, request: bytearray, length: int) -> None:
        """Pass on a request, `length` bytes of the buffer `request`, as soon as its reply has room."""
        protocol.clamp_reply(opcode, request, length, LISTING_BYTES_MAX)
        room = 2 * max(length, protocol.reply_bytes_max(opcode, request, length)) + _MESSAGE_ROOM
        self._queue.append((opcode, unique, room, bytes(request[:length])))
        self._send_queued()

    def _send_queued(self) -> None:
        """Pass on what is queued, the oldest first, while the replies have room."""
        while self._queue:
            opcode, unique, room, message = self._queue[0]
            if room > self._room and self.sent:
                return
            self._queue.popleft()
            if unique not in self._requests.waiting:
                continue  # it was answered: it had waited for too long
            try:
                self._socket.send(message)
            except OSError as error:
                log.error("a request (opcode %d) could not be passed on: %s", opcode, error)
                self._replies.fail(unique, errno.EIO)
                continue
            self.sent[unique] = opcode, room
            self._room -= room

    async def pass_replies(self) -> None:
        """Pass on pyfuse3's replies to the kernel, until pyfuse3 ends."""
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            for _ in range(REPLIES_AT_ONCE):
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
            self._send_queued()

    def _pass_reply(self, reply: bytearray) -> None:
        if len(reply) < REPLY.size:
            log.error("a reply of %d bytes is too short", len(reply))
            return
        _, error, unique = REPLY.unpack_from(reply)
        self._requests.end(unique, -error, monotonic())
        opcode, room = self.sent.pop(unique, (0, 0))
        self._room += room
        if opcode == INIT:
            protocol.set_limits(reply, LIMITS)
        self._replies.send(unique, reply)
        if opcode == INIT:
            self.initialized.set()


def _enlarge(end: socket.socket) -> None:
    """Give a socket as large a buffer as it may have."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SOCKET_BYTES)
    except OSError:  # no root, or an architecture with another number
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
