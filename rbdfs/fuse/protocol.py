"""The few structures of the kernel's FUSE protocol (linux/fuse.h) that rbdfs reads and writes. Pure.

Integers are in the byte order of the machine. Each message is one request or one reply, and begins with its length.
"""

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

FORGET: Final = 2
READ: Final = 15
RELEASE: Final = 18
GETXATTR: Final = 22
LISTXATTR: Final = 23
INIT: Final = 26
READDIR: Final = 28
RELEASEDIR: Final = 29
INTERRUPT: Final = 36
DESTROY: Final = 38
IOCTL: Final = 39
BATCH_FORGET: Final = 42
READDIRPLUS: Final = 44
LSEEK: Final = 46

OPERATIONS: Final = {
    1: "lookup",
    3: "getattr",
    14: "open",
    READ: "read",
    17: "statfs",
    RELEASE: "release",
    GETXATTR: "getxattr",
    LISTXATTR: "listxattr",
    25: "flush",
    INIT: "init",
    27: "opendir",
    READDIR: "readdir",
    RELEASEDIR: "releasedir",
    READDIRPLUS: "readdir",
    LSEEK: "seek",
}
"""The names of the operations that are answered, in operations.py and for operators (enum fuse_opcode)."""

ERRNO_MAX: Final = 511
"""The kernel refuses a reply with a larger error, and the request would stay unanswered (fuse_dev_do_write)."""

HEADER_BYTES: Final = 40
"""The header of each request: fuse_in_header."""

READ_BYTES: Final = 80
LSEEK_BYTES: Final = 64
"""The size of a whole request of these kinds, with its header."""

REQUEST: Final = struct.Struct("=IIQQ8xI4xQQI12xI")
"""fuse_in_header (length, opcode, unique, inode, and after uid and gid the thread that asks) and fuse_read_in: handle,
offset, count of bytes, and the flags that the file is open with. fuse_lseek_in has its whence in place of the count. In
a shorter request, or one of another kind, only the header's fields are valid."""

REPLY: Final = struct.Struct("=IiQ")
"""fuse_out_header: length, 0 or a negated errno, unique."""

LSEEK_OUT: Final = struct.Struct("=Q")
"""fuse_lseek_out: the offset that was found."""

REPLY_BYTES_MAX: Final = 320
"""The largest reply without data whose size the request names: fuse_statx_out has 304."""

NOTIFY_INVAL_INODE: Final = 2
_NOTIFY_INVAL_INODE = struct.Struct("=IiQQqq")
_ATTRIBUTES_ALONE: Final = -1
"""An offset with which the kernel drops no page, and so takes no lock (fuse_reverse_inval_inode)."""

_INTERRUPT_IN = struct.Struct("=Q")
_FORGET_IN = struct.Struct("=Q")
_BATCH_FORGET_IN = struct.Struct("=I4x")
_FORGET_ONE = struct.Struct("=QQ")
_SIZE_AT = {
    READDIR: HEADER_BYTES + 16,
    READDIRPLUS: HEADER_BYTES + 16,
    GETXATTR: HEADER_BYTES,
    LISTXATTR: HEADER_BYTES,
    IOCTL: HEADER_BYTES + 28,
}
"""The place in a request of the size of its reply: fuse_read_in, fuse_getxattr_in, fuse_ioctl_in."""
_SIZE = struct.Struct("=I")

_PARALLEL_DIROPS: Final = 1 << 18
_FLAGS = struct.Struct("=I")
_FLAGS_AT = REPLY.size + 12
_MAX_BACKGROUND = struct.Struct("=HHI")
_MAX_BACKGROUND_AT = REPLY.size + 16


class Limits(NamedTuple):
    """The limits for the kernel in INIT's reply (fuse_init_out)."""

    max_background: int
    """Readahead requests and direct reads of libaio that the kernel has in flight at once."""
    congestion_threshold: int
    """The number of them from which on it reads nothing ahead."""
    max_write: int
    """Bytes of one WRITE; the kernel refuses a read of the device with a buffer that is too small for one."""


def set_limits(init_reply: bytearray, limits: Limits) -> None:
    """Set the limits in INIT's reply, unless it is an error or of a protocol before 7.13.

    Also allow many lookups and listings in a directory at once, which pyfuse3 does not ask for: else one slow name
    would delay all others.
    """
    if len(init_reply) >= _MAX_BACKGROUND_AT + _MAX_BACKGROUND.size:
        _MAX_BACKGROUND.pack_into(init_reply, _MAX_BACKGROUND_AT, *limits)
        (flags,) = _FLAGS.unpack_from(init_reply, _FLAGS_AT)
        _FLAGS.pack_into(init_reply, _FLAGS_AT, flags | _PARALLEL_DIROPS)


def parse_interrupt(request: bytes | bytearray, length: int) -> int | None:
    """Return the unique of the request that an INTERRUPT is about; None if it is cut off."""
    if length < HEADER_BYTES + _INTERRUPT_IN.size:
        return None
    return int(_INTERRUPT_IN.unpack_from(request, HEADER_BYTES)[0])


def invalidate_attributes(inode: int) -> bytes:
    """Return the message that makes the kernel drop an inode's attributes (fuse_notify_inval_inode_out)."""
    return _NOTIFY_INVAL_INODE.pack(_NOTIFY_INVAL_INODE.size, NOTIFY_INVAL_INODE, 0, inode, _ATTRIBUTES_ALONE, 0)


def reply_bytes_max(opcode: int, request: bytes | bytearray, length: int) -> int:
    """Return how many bytes the reply to a request can have."""
    at = _SIZE_AT.get(opcode)
    if at is None or length < at + _SIZE.size:
        return REPLY_BYTES_MAX
    return REPLY_BYTES_MAX + int(_SIZE.unpack_from(request, at)[0])


def clamp_reply(opcode: int, request: bytearray, length: int, most: int) -> None:
    """Limit what READDIR or READDIRPLUS asks for to `most` bytes; the kernel asks again for the rest."""
    if opcode in (READDIR, READDIRPLUS) and length >= _SIZE_AT[opcode] + _SIZE.size:
        (size,) = _SIZE.unpack_from(request, _SIZE_AT[opcode])
        _SIZE.pack_into(request, _SIZE_AT[opcode], min(size, most))


def parse_forget(opcode: int, inode: int, request: bytes | bytearray, length: int) -> Iterator[tuple[int, int]]:
    """Yield the (inode, lookups) of a FORGET or a BATCH_FORGET; if it is cut off, those that are whole."""
    if opcode == FORGET:
        if length >= HEADER_BYTES + _FORGET_IN.size:
            yield inode, _FORGET_IN.unpack_from(request, HEADER_BYTES)[0]
        return
    start = HEADER_BYTES + _BATCH_FORGET_IN.size
    if length >= start:
        (count,) = _BATCH_FORGET_IN.unpack_from(request, HEADER_BYTES)
        for at in range(start, min(start + count * _FORGET_ONE.size, length - _FORGET_ONE.size + 1), _FORGET_ONE.size):
            yield _FORGET_ONE.unpack_from(request, at)
