"""The facts that an image's header object holds, asked for without opening the image: one round trip each.

The methods are those of Ceph's object class `rbd` (src/cls/rbd/cls_rbd.cc); cls_rbd_client.cc encodes them so.
"""

import errno
import struct

import rados

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
