"""The kernel's structures: read as linux/fuse.h has them, whatever was cut off and whatever lies behind a message."""

import ctypes
import re
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbdfs.fuse import protocol
from tests import fake_kernel
from tests.fake_kernel import (
    FORGET_IN,
    GETXATTR_IN,
    IN_HEADER,
    INIT_FLAGS,
    INIT_OUT,
    IOCTL_IN,
    LSEEK_IN,
    OUT_HEADER,
    PARALLEL_DIROPS,
    READ_IN,
    THREAD,
    Op,
    controlling,
    forgetting,
    forgetting_all,
    getting,
    init_reply,
    message,
)

FUSE_H = Path("/usr/include/linux/fuse.h")
C_TYPES = {f"{sign}int{bits}_t": getattr(ctypes, f"c_{sign}int{bits}") for sign in ("", "u") for bits in (16, 32, 64)}
OPCODES = [name for name in Op.__members__ if hasattr(protocol, name)]

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
LOOKUPS = st.lists(st.tuples(U64, U64), max_size=20)
REST = st.binary(max_size=64)
"""What an earlier request has left in the buffer."""


def c_structure(name: str) -> type[ctypes.Structure]:
    """A structure of the system's linux/fuse.h."""
    text = re.sub(r"/\*.*?\*/", "", FUSE_H.read_text(), flags=re.DOTALL)
    found = re.search(rf"^struct {name} {{\n(.*?)^}};", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    fields = []
    for kind, field, count in re.findall(r"(\w+)\s+(\w+)(?:\[(\d+)\])?;", found[1]):
        one = C_TYPES.get(kind) or c_structure(kind)
        fields.append((field, one * int(count) if count else one))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


def struct_bytes(name: str, **values: int) -> bytes:
    """A structure of the system's linux/fuse.h with these fields, the others 0."""
    return bytes(c_structure(name)(**values))


needs_fuse_h = pytest.mark.skipif(not FUSE_H.exists(), reason="linux-libc-dev is not installed")


@needs_fuse_h
@pytest.mark.parametrize("name", OPCODES)
def test_operations_have_the_numbers_of_fuse_h(name: str) -> None:
    found = re.search(rf"\bFUSE_{name}\s*= (\d+),", FUSE_H.read_text())
    assert found is not None
    assert getattr(protocol, name) == Op[name] == int(found[1])


@needs_fuse_h
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("fuse_in_header", IN_HEADER),
        ("fuse_out_header", OUT_HEADER),
        ("fuse_read_in", READ_IN),
        ("fuse_lseek_in", LSEEK_IN),
        ("fuse_forget_in", FORGET_IN),
        ("fuse_batch_forget_in", fake_kernel.BATCH_FORGET_IN),
        ("fuse_forget_one", fake_kernel.FORGET_ONE),
        ("fuse_getxattr_in", GETXATTR_IN),
        ("fuse_ioctl_in", IOCTL_IN),
        ("fuse_interrupt_in", fake_kernel.INTERRUPT_IN),
        ("fuse_init_out", INIT_OUT),
    ],
)
def test_the_structures_that_the_tests_write_have_the_sizes_of_fuse_h(name: str, ours: struct.Struct) -> None:
    assert ctypes.sizeof(c_structure(name)) == ours.size


@needs_fuse_h
def test_a_request_of_the_systems_fuse_h_is_understood() -> None:
    header = struct_bytes("fuse_in_header", len=80, opcode=15, unique=3, nodeid=4, uid=5, gid=6, pid=7)
    read = header + struct_bytes("fuse_read_in", fh=8, offset=9, size=10, read_flags=11, lock_owner=12, flags=13)
    assert protocol.REQUEST.unpack_from(read) == (80, 15, 3, 4, 7, 8, 9, 10, 13)
    lseek = header + struct_bytes("fuse_lseek_in", fh=8, offset=9, whence=3)
    assert protocol.REQUEST.unpack_from(lseek + bytes(16))[:8] == (80, 15, 3, 4, 7, 8, 9, 3)
    for opcode, body in (
        (protocol.GETXATTR, struct_bytes("fuse_getxattr_in", size=1000)),
        (protocol.LISTXATTR, struct_bytes("fuse_getxattr_in", size=1000)),
        (protocol.READDIR, struct_bytes("fuse_read_in", size=1000)),
        (protocol.READDIRPLUS, struct_bytes("fuse_read_in", size=1000)),
        (protocol.IOCTL, struct_bytes("fuse_ioctl_in", in_size=5, out_size=1000)),
    ):
        request = header + body
        assert protocol.reply_bytes_max(opcode, request, len(request)) == protocol.REPLY_BYTES_MAX + 1000


@needs_fuse_h
@pytest.mark.parametrize("name", ["entry_out", "attr_out", "open_out", "statfs_out", "init_out", "lk_out", "poll_out"])
def test_a_reply_without_data_is_not_larger_than_is_reckoned_with(name: str) -> None:
    size = ctypes.sizeof(c_structure(f"fuse_{name}"))
    assert OUT_HEADER.size + size <= protocol.REPLY_BYTES_MAX


@given(U64, U64, U64, U32, REST)
def test_a_read_is_unpacked_in_one_go(unique: int, handle: int, offset: int, count: int, rest: bytes) -> None:
    body = READ_IN.pack(handle, offset, count, 1, 2, 3, 0)
    request = message(protocol.READ, unique, body, inode=5)
    assert len(request) == protocol.READ_BYTES
    fields = len(request), protocol.READ, unique, 5, THREAD, handle, offset, count, 3
    assert protocol.REQUEST.unpack_from(request + rest) == fields


@given(U64, U64, U64, U32)
def test_a_seek_is_unpacked_in_one_go(unique: int, handle: int, offset: int, whence: int) -> None:
    request = message(protocol.LSEEK, unique, LSEEK_IN.pack(handle, offset, whence, 0), inode=5)
    assert len(request) == protocol.LSEEK_BYTES
    fields = len(request), protocol.LSEEK, unique, 5, THREAD, handle, offset, whence
    assert protocol.REQUEST.unpack_from(request + bytes(16))[:8] == fields  # the device has a larger buffer


@given(st.integers(0, protocol.ERRNO_MAX), U64)
def test_a_reply_has_the_kernels_header(error: int, unique: int) -> None:
    assert protocol.REPLY.pack(16, -error, unique) == OUT_HEADER.pack(16, -error, unique)
    assert protocol.LSEEK_OUT.pack(unique) == struct.pack("=Q", unique)


@given(U64, U64, REST, st.integers(0, IN_HEADER.size + FORGET_IN.size))
def test_a_forget_is_whole_or_nothing(inode: int, lookups: int, rest: bytes, length: int) -> None:
    request = message(protocol.FORGET, 2, forgetting(lookups), inode)
    expected = [(inode, lookups)] if length == len(request) else []
    assert list(protocol.parse_forget(protocol.FORGET, inode, request + rest, length)) == expected


@given(LOOKUPS, st.data(), REST)
def test_of_a_batch_that_is_cut_off_what_is_whole_is_forgotten(
    lookups: list[tuple[int, int]], data: st.DataObject, rest: bytes
) -> None:
    request = message(protocol.BATCH_FORGET, 2, forgetting_all(lookups), inode=0)
    length = data.draw(st.integers(0, len(request)))
    whole = max(0, length - IN_HEADER.size - 8) // 16
    assert list(protocol.parse_forget(protocol.BATCH_FORGET, 0, request + rest, length)) == lookups[:whole]


@given(LOOKUPS, U32)
def test_a_batch_holds_no_more_than_it_says_and_no_more_than_it_has(lookups: list[tuple[int, int]], count: int) -> None:
    request = bytearray(message(protocol.BATCH_FORGET, 2, forgetting_all(lookups), inode=0))
    struct.pack_into("=I", request, IN_HEADER.size, count)
    assert list(protocol.parse_forget(protocol.BATCH_FORGET, 0, request, len(request))) == lookups[:count]


def reading(size: int) -> bytes:
    """The body of a READDIR."""
    return READ_IN.pack(1, 0, size, 0, 0, 0, 0)


SIZED: dict[int, tuple[Callable[[int], bytes], int]] = {
    protocol.READDIR: (reading, 20),
    protocol.READDIRPLUS: (reading, 20),
    protocol.GETXATTR: (getting, 4),
    protocol.LISTXATTR: (lambda size: GETXATTR_IN.pack(size, 0), 4),
    protocol.IOCTL: (partial(controlling, 4), 32),
}
"""How to write the body of a request that says how much its reply may carry, and up to where the body must be whole."""


@given(st.sampled_from(sorted(SIZED)), U32, st.data())
def test_a_reply_carries_as_much_as_its_request_says(opcode: int, size: int, data: st.DataObject) -> None:
    write, needed = SIZED[opcode]
    request = message(opcode, 2, write(size))
    length = data.draw(st.integers(0, len(request)))
    carried = size if length >= IN_HEADER.size + needed else 0
    assert protocol.reply_bytes_max(opcode, request, length) == protocol.REPLY_BYTES_MAX + carried


@given(U32.filter(lambda opcode: opcode not in SIZED), st.binary(max_size=200))
def test_other_replies_have_a_fixed_room(opcode: int, body: bytes) -> None:
    request = message(opcode, 2, body)
    assert protocol.reply_bytes_max(opcode, request, len(request)) == protocol.REPLY_BYTES_MAX


@given(st.sampled_from([*SIZED, protocol.READ, 1, 4096]), U32, U32, st.data())
def test_only_listings_are_clamped_and_nothing_else_of_them_changes(
    opcode: int, size: int, most: int, data: st.DataObject
) -> None:
    request = message(opcode, 2, READ_IN.pack(1, 7, size, 8, 9, 10, 0))
    length = data.draw(st.integers(0, len(request)))
    is_clamped = opcode in (protocol.READDIR, protocol.READDIRPLUS) and length >= IN_HEADER.size + 20
    expected = message(opcode, 2, READ_IN.pack(1, 7, min(size, most), 8, 9, 10, 0)) if is_clamped else request
    buffer = bytearray(request)
    protocol.clamp_reply(opcode, buffer, length, most)
    assert buffer == expected


LIMITS = protocol.Limits(max_background=64, congestion_threshold=48, max_write=4096)


def test_the_limits_of_an_init_reply_are_amended_and_nothing_else() -> None:
    buffer = bytearray(OUT_HEADER.pack(80, 0, 2) + init_reply(12, 9, 1 << 20))
    protocol.set_limits(buffer, LIMITS)
    assert buffer == OUT_HEADER.pack(80, 0, 2) + init_reply(64, 48, 4096, INIT_FLAGS | PARALLEL_DIROPS)


@needs_fuse_h
def test_parallel_lookups_have_the_flag_of_fuse_h() -> None:
    assert re.search(r"#define FUSE_PARALLEL_DIROPS\s+\(1 << 18\)", FUSE_H.read_text())
    assert c_structure("fuse_init_out").flags.offset == 12


@needs_fuse_h
def test_a_notice_of_old_attributes_is_as_fuse_h_has_it() -> None:
    assert re.search(rf"FUSE_NOTIFY_INVAL_INODE = {protocol.NOTIFY_INVAL_INODE},", FUSE_H.read_text())
    header = struct_bytes("fuse_out_header", len=40, error=protocol.NOTIFY_INVAL_INODE)
    body = struct_bytes("fuse_notify_inval_inode_out", ino=7, off=-1)
    assert protocol.invalidate_attributes(7) == header + body


@given(st.binary(max_size=120))
def test_an_init_reply_of_any_length_keeps_it(reply: bytes) -> None:
    buffer = bytearray(reply)
    protocol.set_limits(buffer, LIMITS)
    if len(reply) < 40:
        assert buffer == reply
    else:
        (flags,) = struct.unpack_from("=I", reply, 28)
        amended = struct.pack("=IHHI", flags | PARALLEL_DIROPS, *LIMITS)
        assert buffer == reply[:28] + amended + reply[40:]
