"""Both neighbours of a `Device`, played over socket pairs: the kernel, and pyfuse3. No mount, no root.

The structures are written by their definitions in linux/fuse.h, not by rbdfs/fuse/protocol.py, which they test.
"""

import errno
import itertools
import math
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import NamedTuple
from unittest import mock

import trio
import trio.testing

from rbdfs.fuse.device import Device, OpenFile
from rbdfs.fuse.trouble_log import TroubleLog
from rbdfs.fuse.troubles import Troubles
from rbdfs.image.backend import OnRead
from rbdfs.image.holes import Kind
from rbdfs.image.open_image import OnSeek


class Op(IntEnum):
    """Some of enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    READ = 15
    RELEASE = 18
    GETXATTR = 22
    LISTXATTR = 23
    INIT = 26
    READDIR = 28
    INTERRUPT = 36
    IOCTL = 39
    BATCH_FORGET = 42
    READDIRPLUS = 44
    LSEEK = 46


WITHOUT_ANSWER = (Op.FORGET, Op.INTERRUPT, Op.BATCH_FORGET)

IN_HEADER = struct.Struct("=IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER = struct.Struct("=IiQ")  # len, error, unique
READ_IN = struct.Struct("=QQIIQII")  # fh, offset, size, read_flags, lock_owner, flags, padding
LSEEK_IN = struct.Struct("=QQII")  # fh, offset, whence, padding
GETXATTR_IN = struct.Struct("=II")  # size, padding
IOCTL_IN = struct.Struct("=QIIQII")  # fh, flags, cmd, arg, in_size, out_size
FORGET_IN = struct.Struct("=Q")  # nlookup
BATCH_FORGET_IN = struct.Struct("=II")  # count, dummy
FORGET_ONE = struct.Struct("=QQ")  # nodeid, nlookup
INTERRUPT_IN = struct.Struct("=Q")  # unique
INIT_OUT = struct.Struct("=IIIIHHIIHHI28s")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, ..."""

THREAD = (1 << 22) + 4711
"""Who asks for everything: no real thread, since Linux's numbers end before."""

LOOKED_UP = bytes(128)
"""What stands for a fuse_entry_out."""

_SIZE_AT: dict[int, int] = {Op.GETXATTR: 0, Op.READDIRPLUS: 16, Op.IOCTL: 28}
"""Where in its body a request says how much its reply may carry."""

MESSAGE_BYTES_MAX = 2 << 20
ASKED_AT_ONCE = 32
"""Requests that the socket to the device holds without root, with room to spare."""

settled = trio.testing.wait_all_tasks_blocked
"""Returns when the device has done all that it can do now."""


def message(opcode: int, unique: int, body: bytes = b"", inode: int = 1) -> bytes:
    """A request as the kernel sends it."""
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, inode, 1000, 1000, THREAD, 0, 0) + body


def reading(offset: int, length: int, handle: int = 1, *, flags: int = 0) -> bytes:
    """The body of a READ; READDIR and READDIRPLUS have the same. `flags` are those of the open file."""
    return READ_IN.pack(handle, offset, length, 0, 0xFEED, flags, 0)


def seeking(offset: int, whence: int, handle: int = 1) -> bytes:
    """The body of an LSEEK."""
    return LSEEK_IN.pack(handle, offset, whence, 0)


def forgetting(lookups: int) -> bytes:
    """The body of a FORGET."""
    return FORGET_IN.pack(lookups)


def forgetting_all(lookups: Iterable[tuple[int, int]]) -> bytes:
    """The body of a BATCH_FORGET, of (inode, lookups)."""
    ones = [FORGET_ONE.pack(*each) for each in lookups]
    return BATCH_FORGET_IN.pack(len(ones), 0) + b"".join(ones)


def getting(length: int) -> bytes:
    """The body of a GETXATTR, which asks for so many bytes."""
    return GETXATTR_IN.pack(length, 0) + b"user.rbd.id\0"


def controlling(sent: int, length: int = 0) -> bytes:
    """The body of an IOCTL, which sends so many bytes and asks for so many."""
    return IOCTL_IN.pack(1, 0, 2, 3, sent, length) + bytes(sent)


def interrupting(unique: int) -> bytes:
    """The body of an INTERRUPT."""
    return INTERRUPT_IN.pack(unique)


NOTIFY_CODE_MAX = 9
INIT_FLAGS = 0xABCDEF
PARALLEL_DIROPS = 1 << 18


def init_reply(max_background: int, congestion_threshold: int, max_write: int, flags: int = INIT_FLAGS) -> bytes:
    """The data of a reply to INIT."""
    limits = max_background, congestion_threshold, max_write
    return INIT_OUT.pack(7, 38, 131072, flags, *limits, 1, 256, 3, 4, b"\5" * 28)


class Answer(NamedTuple):
    """A reply, as whoever asked gets it."""

    error: int
    """An errno, or 0."""
    data: bytes


class Request(NamedTuple):
    """A request, as pyfuse3 gets it."""

    opcode: int
    unique: int
    body: bytes


class Kernel:
    """Asks, and takes the first reply to each request; /dev/fuse is a socket that knows whose replies it takes."""

    def __init__(self) -> None:
        self._end, self._device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._end, self._device):
            end.setblocking(False)
        self._uniques = itertools.count(2, 2)
        self._waiting: set[int] = set()
        self.answers: dict[int, Answer] = {}
        """By unique."""
        self.refused: list[int] = []
        """The uniques of replies that nobody waits for; the device got ENOENT."""
        self.notified: list[tuple[int, bytes]] = []
        """What the device has said unasked: a code, and data."""
        self.invalid: list[bytes] = []
        """Replies that were none; the device got EINVAL, and `serving` ends with an error."""
        self.faults: dict[str, Iterator[int]] = {}
        """What is in store for a system call, by its name: an errno, or 0 for one call that works."""

    @property
    def descriptor(self) -> int:
        """What stands for /dev/fuse."""
        return self._device.fileno()

    @contextmanager
    def system_calls(self) -> Iterator[None]:
        """While in there, they do on /dev/fuse what they do on a real one."""
        with ExitStack() as stack:
            for name in ("readv", "write", "writev"):
                stack.enter_context(mock.patch.object(os, name, partial(self._call, name, getattr(os, name))))
            yield

    def _call(self, name: str, function: Callable[..., int], descriptor: int, *arguments: object) -> int:
        if descriptor != self.descriptor:
            return function(descriptor, *arguments)
        error = next(self.faults.get(name, iter(())), 0)
        if not error:
            result = function(descriptor, *arguments)
            error = 0 if name == "readv" else self._take(self._end.recv(MESSAGE_BYTES_MAX))
        if error:
            raise OSError(error, os.strerror(error))
        return result

    def _take(self, reply: bytes) -> int:
        """As fuse_dev_do_write; returns its error."""
        length, error, unique = OUT_HEADER.unpack_from(reply)
        if length == len(reply) and not unique and 0 < error < NOTIFY_CODE_MAX:
            self.notified.append((error, reply[OUT_HEADER.size :]))
            return 0
        if length != len(reply) or not -512 < error <= 0 or (error and length > OUT_HEADER.size):
            self.invalid.append(reply)
            return errno.EINVAL
        if unique not in self._waiting:
            self.refused.append(unique)
            return errno.ENOENT
        self._waiting.remove(unique)
        self.answers[unique] = Answer(-error, reply[OUT_HEADER.size :])
        return 0

    def ask(self, opcode: int, body: bytes = b"", inode: int = 1) -> int:
        """Send a request. Returns its unique."""
        unique = next(self._uniques)
        if opcode not in WITHOUT_ANSWER:
            self._waiting.add(unique)
        self._end.send(message(opcode, unique, body, inode))
        return unique

    def send(self, data: bytes) -> None:
        """Send what is no request."""
        self._end.send(data)

    async def answer_to(self, opcode: int, body: bytes = b"") -> Answer:
        """Ask, and take the reply that comes without further ado."""
        unique = self.ask(opcode, body)
        await settled()
        return self.answers[unique]

    async def ask_many(self, requests: Iterable[tuple[int, bytes]]) -> list[int]:
        """Send requests, (opcode, body), a few at a time. Returns their uniques."""
        uniques: list[int] = []
        for opcode, body in requests:
            uniques.append(self.ask(opcode, body))
            if len(uniques) % ASKED_AT_ONCE == 0:
                await settled()
        await settled()
        return uniques

    def close(self) -> None:
        """Both ends."""
        self._end.close()
        self._device.close()


class Pyfuse3:
    """pyfuse3's end of a device, and libfuse's: a reply that does not fit raises BlockingIOError, and would be lost."""

    def __init__(self, device: Device) -> None:
        folder, _, number = device.mountpoint_for_pyfuse3.rpartition("/")
        assert folder == "/dev/fd"
        self._end = socket.socket(fileno=int(number))
        self._end.setblocking(False)

    def take(self) -> list[Request]:
        """The requests that are there."""
        requests = []
        with suppress(BlockingIOError):
            while True:
                data = self._end.recv(MESSAGE_BYTES_MAX)
                length, opcode, unique, *_ = IN_HEADER.unpack_from(data)
                assert length == len(data)
                requests.append(Request(opcode, unique, data[IN_HEADER.size :]))
        return requests

    def reply(self, unique: int, data: bytes = b"", error: int = 0) -> None:
        """Answer a request."""
        self.send(OUT_HEADER.pack(OUT_HEADER.size + len(data), -error, unique) + data)

    def send(self, data: bytes) -> None:
        """Send what may be no reply."""
        self._end.send(data)

    async def answer_all(self) -> list[list[int]]:
        """Take all that is there, and only then answer, with as much as each request allows, until nothing comes any
        more. Returns the uniques, by rounds."""
        rounds = []
        while requests := self.take():
            for opcode, unique, body in requests:
                at = _SIZE_AT.get(opcode)
                self.reply(unique, LOOKED_UP if at is None else bytes(struct.unpack_from("=I", body, at)[0]))
            rounds.append([request.unique for request in requests])
            await settled()
        return rounds

    def close(self) -> None:
        """As at its end."""
        self._end.close()


class Read(NamedTuple):
    """A read that was started."""

    offset: int
    length: int
    callback: OnRead


class FakeFile:
    """An open file whose reads and seeks wait until the test answers them."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.content = random.Random(size).randbytes(size)
        self.reads: list[Read] = []
        self.seeks: list[tuple[int, Kind, OnSeek]] = []

    def start_read(self, offset: int, length: int, callback: OnRead) -> None:
        self.reads.append(Read(offset, length, callback))

    def start_seek(self, offset: int, kind: Kind, callback: OnSeek) -> None:
        self.seeks.append((offset, kind, callback))

    def complete(self, number: int = 0) -> None:
        """Answer one of the reads that wait."""
        offset, length, callback = self.reads.pop(number)
        callback(memoryview(self.content)[offset : offset + length])


@dataclass
class Setup:
    """A device that serves, and who is around it."""

    kernel: Kernel
    device: Device
    pyfuse3: Pyfuse3
    file: FakeFile = field(default_factory=FakeFile)
    """Open with the handle 1."""
    forgotten: list[tuple[int, int]] = field(default_factory=list)
    """What the device has reported of FORGETs."""
    invalidated: list[int] = field(default_factory=list)
    """Inodes of files that the kernel believes to be longer than they are."""
    seconds_until_end_known: float | None = 0.0
    """In how many seconds the kernel knows where files end; None if it was not told."""
    ended: trio.Event = field(default_factory=trio.Event)
    """Set when `Device.serve` has returned."""


@contextmanager
def by_the_clock_of_trio() -> Iterator[None]:
    """The device takes its time from trio, whose clock a test can let jump."""
    with ExitStack() as stack:
        for module in ("deadlines", "device", "relay", "replies"):
            stack.enter_context(mock.patch(f"rbdfs.fuse.{module}.monotonic", trio.current_time))
        yield


@asynccontextmanager
async def serving(
    files: Mapping[int, OpenFile] | None = None,
    forget: Callable[[Iterable[tuple[int, int]]], None] | None = None,
    answer_seconds: float = math.inf,
    cancel_request_of: Callable[[int], None] = lambda _: None,
) -> AsyncIterator[Setup]:
    """A device that serves until the end of the block."""
    kernel = Kernel()
    file, forgotten, invalidated = FakeFile(), list[tuple[int, int]](), list[int]()
    forget, files = forget or forgotten.extend, {1: file} if files is None else files
    troubles = TroubleLog(Troubles(), lambda _inode: None)
    device = Device(
        kernel.descriptor,
        files,
        forget,
        invalidated.append,
        lambda _inode, _end: setup.seconds_until_end_known,
        troubles,
        answer_seconds=answer_seconds,
        cancel_request_of=cancel_request_of,
    )
    setup = Setup(kernel, device, Pyfuse3(device), file, forgotten, invalidated)

    async def serve() -> None:
        await device.serve()
        setup.ended.set()

    try:
        with kernel.system_calls(), by_the_clock_of_trio():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                yield setup
                nursery.cancel_scope.cancel()
        assert not kernel.invalid
        assert not set(kernel.answers) & set(device.requests.waiting)
    finally:
        device.close()
        setup.pyfuse3.close()
        kernel.close()
