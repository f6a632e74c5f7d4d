"""The facts that an image's header object holds, asked for without opening the image: one round trip each.

The methods are those of Ceph's object class `rbd` (src/cls/rbd/cls_rbd.cc); cls_rbd_client.cc encodes them so.
"""

import errno
import struct

import rados
import rbd

from rbdfs.ceph.aio import Handover, execute
from rbdfs.errors import RbdfsError

_HEAD = struct.pack("<Q", 2**64 - 2)  # CEPH_NOSNAP
_NANOSECONDS = 10**9


def encode_string(text: str) -> bytes:
    """A string as Ceph encodes it: 32 bits of length, then the bytes."""
    data = text.encode(errors="surrogateescape")
    return struct.pack("<I", len(data)) + data


def decode_string(data: bytes) -> str:
    """The string that stands at the start of `data`."""
    (length,) = struct.unpack_from("<I", data)
    return data[4 : 4 + length].decode(errors="surrogateescape")


def object_name(image_id: str) -> str:
    """The header object of an image of format 2."""
    return f"rbd_header.{image_id}"


async def get_size(handover: Handover, ioctx: rados.Ioctx, image_id: str) -> tuple[int, int]:
    """The HEAD's size and the object size, in bytes. Raises RbdfsError: ENOENT where the image is gone."""
    answer = await execute(handover, ioctx, object_name(image_id), "rbd", "get_size", _HEAD)
    order, size = struct.unpack("<BQ", answer)
    return size, 1 << order


async def get_modify_timestamp(handover: Handover, ioctx: rados.Ioctx, image_id: str) -> int:
    """Nanoseconds since the epoch; 0 for an image made before Ceph kept them (Mimic)."""
    try:
        answer = await execute(handover, ioctx, object_name(image_id), "rbd", "get_modify_timestamp")
    except RbdfsError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return 0
        raise
    seconds, nanoseconds = struct.unpack("<II", answer)
    return int(seconds) * _NANOSECONDS + int(nanoseconds)


async def is_clone(handover: Handover, ioctx: rados.Ioctx, image_id: str) -> bool:
    """Whether the HEAD has a parent, whose data shows through."""
    answer = await execute(handover, ioctx, object_name(image_id), "rbd", "get_parent", _HEAD)
    (pool_id,) = struct.unpack_from("<q", answer)
    return bool(pool_id >= 0)


async def used_objects(handover: Handover, ioctx: rados.Ioctx, image_id: str, objects: int) -> int | None:
    """How many of the HEAD's `objects` objects hold data, by its object map; None where there is no valid one."""
    flags = await execute(handover, ioctx, object_name(image_id), "rbd", "get_flags", _HEAD)
    if int.from_bytes(flags, "little") & rbd.RBD_FLAG_OBJECT_MAP_INVALID:
        return None
    try:
        answer = await execute(
            handover,
            ioctx,
            f"rbd_object_map.{image_id}",
            "rbd",
            "object_map_load",
            answer_bytes=objects // 4 + _MAP_OVERHEAD,
        )
    except RbdfsError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return count_objects(answer)


_MAP_OVERHEAD = 1024  # the header, the checksum, and room for what later versions add


def count_objects(encoded: bytes) -> int:
    """How many objects an encoded object map (`ceph::BitVector<2>`) does not call nonexistent.

    Encoded it is the length of a header (32 bits), the header, which ends with the count of objects (64 bits), and two
    bits an object (0 for OBJECT_NONEXISTENT) from the high end of each byte; a checksum may follow.
    """
    (header_bytes,) = struct.unpack_from("<I", encoded)
    (objects,) = struct.unpack_from("<Q", encoded, 4 + header_bytes - 8)
    start = 4 + header_bytes
    bits = int.from_bytes(encoded[start : start + (objects + 3) // 4], "big")
    low_bits = int.from_bytes(b"\x55" * ((objects + 3) // 4), "big")
    return ((bits | bits >> 1) & low_bits).bit_count()
