"""The facts that an image's header object holds, asked for without opening the image: one round trip each.

The methods are those of Ceph's object class `rbd` (src/cls/rbd/cls_rbd.cc); cls_rbd_client.cc encodes them so.
"""

import errno
import struct
from typing import NamedTuple

import rados

from rbdfs.ceph.aio import Handover, execute
from rbdfs.errors import RbdfsError

HEAD = 2**64 - 2
"""The snapshot id of what is no snapshot (CEPH_NOSNAP)."""

USER_SNAPSHOT = 0
"""The namespace of a snapshot that a user made (`SNAPSHOT_NAMESPACE_TYPE_USER`)."""

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


async def get_size(handover: Handover, ioctx: rados.Ioctx, image_id: str, snapshot_id: int = HEAD) -> tuple[int, int]:
    """The size and the object size, in bytes. Raises RbdfsError: ENOENT where the image is gone."""
    argument = struct.pack("<Q", snapshot_id)
    answer = await execute(handover, ioctx, object_name(image_id), "rbd", "get_size", argument)
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


async def get_features(handover: Handover, ioctx: rados.Ioctx, image_id: str, snapshot_id: int) -> int:
    """The features, as `rbd.RBD_FEATURE_*`."""
    argument = struct.pack("<QB", snapshot_id, 1)
    answer = await execute(handover, ioctx, object_name(image_id), "rbd", "get_features", argument)
    return int.from_bytes(answer[:8], "little")


async def get_flags(handover: Handover, ioctx: rados.Ioctx, image_id: str, snapshot_id: int) -> int:
    """What of an image is not to be believed, as `rbd.RBD_FLAG_*`."""
    argument = struct.pack("<Q", snapshot_id)
    answer = await execute(handover, ioctx, object_name(image_id), "rbd", "get_flags", argument)
    return int.from_bytes(answer, "little")


class Snapshot(NamedTuple):
    """A snapshot, as the header has it."""

    id: int
    name: str
    is_users: bool
    """Made by a user: not by a group, for mirroring, or one that is kept in the trash for its clones."""
    created_ns: int
    """Nanoseconds since the epoch; 0 for one that was made before Ceph kept them (Mimic)."""


async def get_snapshot_ids(handover: Handover, ioctx: rados.Ioctx, image_id: str) -> list[int]:
    """All snapshots, the newest first. Raises RbdfsError: ENOENT where the image is gone."""
    answer = await execute(handover, ioctx, object_name(image_id), "rbd", "get_snapcontext")
    (count,) = struct.unpack_from("<I", answer, 8)  # after the highest id that was ever given out
    return list(struct.unpack_from(f"<{count}Q", answer, 12))


async def get_snapshot(handover: Handover, ioctx: rados.Ioctx, image_id: str, snapshot_id: int) -> Snapshot:
    """One snapshot. Raises RbdfsError: ENOENT where there is none."""
    argument = struct.pack("<Q", snapshot_id)
    return decode_snapshot(await execute(handover, ioctx, object_name(image_id), "rbd", "snapshot_get", argument))


def decode_snapshot(data: bytes) -> Snapshot:
    """A `cls::rbd::SnapshotInfo`: id, namespace (of which only the type counts here), name, size, timestamp."""
    snapshot_id, namespace_bytes, kind = struct.unpack_from("<6xQ2xII", data)
    position = 6 + 8 + 6 + namespace_bytes
    name = decode_string(data[position:])
    position += 4 + len(name.encode(errors="surrogateescape")) + 8
    seconds, nanoseconds = struct.unpack_from("<II", data, position)
    return Snapshot(snapshot_id, name, kind == USER_SNAPSHOT, seconds * _NANOSECONDS + nanoseconds)


class Parent(NamedTuple):
    """The snapshot that a clone was made of; the first `overlap` bytes of it show through."""

    pool_id: int
    image_id: str
    snapshot_id: int
    overlap: int


async def get_parent(handover: Handover, ioctx: rados.Ioctx, image_id: str, snapshot_id: int) -> Parent | None:
    """None for what is no clone. Raises RbdfsError, also for a parent in another namespace (EXDEV)."""
    argument = struct.pack("<Q", snapshot_id)
    answer = await execute(handover, ioctx, object_name(image_id), "rbd", "get_parent", argument)
    (pool_id,) = struct.unpack_from("<q", answer)
    parent_id = decode_string(answer[8:])
    parent_snapshot, overlap = struct.unpack_from("<QQ", answer, 8 + 4 + len(parent_id))
    return Parent(pool_id, parent_id, parent_snapshot, overlap) if pool_id >= 0 else None
