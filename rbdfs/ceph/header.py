"""What an image's header object holds, asked for without opening the image: all of it in one round trip.

Of HEAD the header's values are read as they are stored (src/cls/rbd/cls_rbd.h): one lookup for the OSD, where librbd
makes six calls of the object class `rbd`. For 2,000 images that saved a quarter of the CPU time here and half of the
OSD's. A snapshot is asked for by those calls; cls_rbd_client.cc encodes them so. An image of format 1 has its header in
the object's data (`rbd_obj_header_ondisk` in src/include/rbd_types.h), and fewer facts.
"""

import errno
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import rbd

from rbdfs.catalog import ImageRef, Namespace, Pool
from rbdfs.ceph import librados
from rbdfs.ceph.encoding import Reader
from rbdfs.ceph.errors import reason_of
from rbdfs.ceph.read_op import Call, ReadOperations, Reply, Request
from rbdfs.errors import RbdfsError

HEAD: Final = 2**64 - 2
"""The snapshot id of what is no snapshot (CEPH_NOSNAP)."""

GET_FEATURES: Final = Call(b"get_features", struct.pack("<QB", HEAD, 1))
"""The features of an image, asked by one who only reads."""

USER_SNAPSHOT: Final = 0
"""The namespace of a snapshot that a user made (`SNAPSHOT_NAMESPACE_TYPE_USER`)."""

FORMAT_1_TEXT: Final = b"<<< Rados Block Device Image >>>\n"
"""What a header of format 1 begins with."""

_KEYS: Final = (b"order", b"size", b"features", b"flags", b"modify_timestamp", b"parent")

_FORMAT_1: Final = struct.Struct("<76xB3xQ24x")
_FORMAT_1_BYTES: Final = _FORMAT_1.size
_SNAPSHOTS_A_REQUEST: Final = 64


def object_name(image_id: str) -> str:
    """The header object of an image of format 2."""
    return f"rbd_header.{image_id}"


def object_of(image: ImageRef) -> str:
    """The header object of an image of any format."""
    return f"{image.id}.rbd" if image.format == 1 else object_name(image.id)


def snapshot_id_of(image: ImageRef) -> int:
    """As Ceph has it, also of HEAD."""
    return HEAD if image.snapshot_id is None else image.snapshot_id


@dataclass(frozen=True, slots=True)
class Parent:
    """The snapshot that a clone was made of; the first `overlap` bytes of it show through."""

    image: ImageRef
    overlap: int


@dataclass(frozen=True, slots=True)
class Header:
    """Of an image, or of a snapshot of it. Sizes in bytes, times in nanoseconds since the epoch, 0 if there is none."""

    size: int
    object_size: int
    modified_ns: int
    """Of a snapshot, when it was made. Of an image of format 1, when its header last changed."""
    map_is_valid: bool = False
    """There is an object map, and it can be believed if it was loaded before this was asked."""
    parent: Parent | None = None
    """None also where it is not known; then the map is not valid either."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A snapshot, as the header has it."""

    id: int
    name: str
    is_users: bool
    """Made by a user: not by a group, for mirroring, or one that is kept in the trash for its clones."""
    created_ns: int
    """Nanoseconds since the epoch; 0 for one that was made before Ceph kept them (Mimic)."""


def request(ioctx: librados.Ioctx, image: ImageRef) -> Request:
    """What `decode` takes the reply to."""
    if image.format == 1:
        calls = [Call(b"snap_list")] if image.snapshot_id is not None else []
        return Request(ioctx, object_of(image), calls, stat=True, read_bytes=_FORMAT_1_BYTES)
    if image.snapshot_id is None:
        return Request(ioctx, object_name(image.id), keys=_KEYS)
    snapshot = struct.pack("<Q", image.snapshot_id)
    return Request(
        ioctx,
        object_name(image.id),
        (
            Call(b"get_size", snapshot),
            Call(b"snapshot_get", snapshot),
            Call(b"get_features", snapshot + b"\1"),
            Call(b"get_flags", snapshot),
            Call(b"parent_get"),
            Call(b"parent_overlap_get", snapshot),
        ),
    )


def decode(image: ImageRef, reply: Reply) -> Header:
    """Raises RbdfsError: ENOENT where the image or the snapshot is gone, EIO for what cannot be understood."""
    decoder = (
        _decode_format_1 if image.format == 1 else _decode_head if image.snapshot_id is None else _decode_snapshot_of
    )
    try:
        return decoder(image, reply)
    except struct.error as error:
        raise RbdfsError(f"cannot understand the header {object_of(image)}: {error}", errno.EIO) from error


def _decode_head(image: ImageRef, reply: Reply) -> Header:
    if reply.result < 0:
        raise RbdfsError(f"cannot read the header {object_of(image)}: {reason_of(-reply.result)}", -reply.result)
    order, size, features, flags, modified, parent = map(reply.values.get, _KEYS)
    if order is None or size is None or features is None:
        raise RbdfsError(f"the header {object_of(image)} is not complete", errno.ENOENT)
    return Header(
        size=Reader(size).u64(),
        object_size=1 << Reader(order).u8(),
        modified_ns=Reader(modified).time_ns() if modified else 0,  # made before Mimic
        map_is_valid=_map_is_valid(Reader(features).u64(), Reader(flags).u64() if flags else 0),
        parent=_decode_stored_parent(parent) if parent else None,
    )


def _decode_stored_parent(value: bytes) -> Parent | None:
    """A `cls_rbd_parent`, as clones store it; version 1 is from before Nautilus."""
    version, reader = value[0], Reader(value)
    reader.version()
    pool_id = reader.s64()
    namespace = reader.string() if version > 1 else ""
    parent = ImageRef(Namespace(Pool(pool_id, str(pool_id)), namespace), reader.string(), reader.u64())
    # HEAD has none where it was flattened and only its snapshots still are clones.
    overlap = reader.u64() if version == 1 or reader.u8() else 0
    return Parent(parent, overlap) if pool_id >= 0 and overlap else None


def _decode_snapshot_of(image: ImageRef, reply: Reply) -> Header:
    what = f"read the header {object_name(image.id)}"
    order, size = struct.unpack("<BQ", reply.answer(0, what))
    created_ns = decode_snapshot(reply.answer(1, what)).created_ns
    (features,) = struct.unpack_from("<Q", reply.answer(2, what))
    (flags,) = struct.unpack("<Q", reply.answer(3, what))
    (result, spec), (overlap_result, overlap) = reply.calls[4:]
    if result < 0 or overlap_result < 0:  # an OSD from before Nautilus does not know these calls
        return Header(size, 1 << order, created_ns)
    return Header(size, 1 << order, created_ns, _map_is_valid(features, flags), _decode_parent(spec, overlap))


def _map_is_valid(features: int, flags: int) -> bool:
    """Of an image that is being migrated, the source shows through, which no map says."""
    return bool(
        features & rbd.RBD_FEATURE_OBJECT_MAP
        and not features & rbd.RBD_FEATURE_MIGRATING
        and not flags & rbd.RBD_FLAG_OBJECT_MAP_INVALID
    )


def _decode_parent(spec: bytes, overlap: bytes) -> Parent | None:
    """A `cls::rbd::ParentImageSpec`, and an optional overlap, which only a clone has."""
    shown = Reader(overlap)
    if not shown.u8():
        return None
    reader = Reader(spec)
    reader.version()
    pool_id = reader.s64()
    namespace, image_id = reader.string(), reader.string()
    if pool_id < 0:
        return None
    parent = ImageRef(Namespace(Pool(pool_id, str(pool_id)), namespace), image_id, reader.u64())
    return Parent(parent, shown.u64())


def _decode_format_1(image: ImageRef, reply: Reply) -> Header:
    what = f"read the header {object_of(image)}"
    if reply.result < 0:
        raise RbdfsError(f"cannot {what}: {reason_of(-reply.result)}", -reply.result)
    order, size = _FORMAT_1.unpack(reply.data)
    if not reply.data.startswith(FORMAT_1_TEXT):
        raise RbdfsError(f"cannot {what}: it is none", errno.EIO)
    if image.snapshot_id is None:
        return Header(size, 1 << order, reply.modified_ns)
    for snapshot, snapshot_size in _decode_snapshots_of_format_1(reply.answer(0, what)):
        if snapshot.id == image.snapshot_id:
            return Header(snapshot_size, 1 << order, snapshot.created_ns)
    raise RbdfsError(f"{object_of(image)} has no snapshot {image.snapshot_id}", errno.ENOENT)


async def snapshots(operations: ReadOperations, ioctx: librados.Ioctx, image: ImageRef) -> list[Snapshot]:
    """All snapshots, the oldest first. Raises RbdfsError: ENOENT where the image is gone."""
    what = f"list the snapshots of {object_of(image)}"
    method = b"snap_list" if image.format == 1 else b"get_snapcontext"
    answer = (await operations.ask(Request(ioctx, object_of(image), [Call(method)]))).answer(0, what)
    if image.format == 1:
        return [snapshot for snapshot, _ in reversed(_decode_snapshots_of_format_1(answer))]
    reader = Reader(answer)
    reader.u64()  # the highest id that was ever given out
    calls = [Call(b"snapshot_get", struct.pack("<Q", reader.u64())) for _ in range(reader.u32())]
    calls.reverse()
    starts = range(0, len(calls), _SNAPSHOTS_A_REQUEST)
    replies = await operations.operate(
        [Request(ioctx, object_of(image), calls[start : start + _SNAPSHOTS_A_REQUEST]) for start in starts]
    )
    return list(_decode_snapshots(replies, what))


def _decode_snapshots(replies: Iterable[Reply], what: str) -> Iterable[Snapshot]:
    for reply in replies:
        if reply.result < 0:
            raise RbdfsError(f"cannot {what}: {reason_of(-reply.result)}", -reply.result)
        for number, (result, answer) in enumerate(reply.calls):
            if result != -errno.ENOENT:  # removed meanwhile
                yield decode_snapshot(answer if result >= 0 else reply.answer(number, what))


def decode_snapshot(answer: bytes) -> Snapshot:
    """A `cls::rbd::SnapshotInfo`."""
    reader = Reader(answer)
    reader.version()
    snapshot_id = reader.u64()
    end = reader.version()
    kind = reader.u32()
    reader.skip_to(end)
    name = reader.string()
    reader.u64()  # its size
    return Snapshot(snapshot_id, name, kind == USER_SNAPSHOT, reader.time_ns())


def _decode_snapshots_of_format_1(answer: bytes) -> list[tuple[Snapshot, int]]:
    """Each with its size, the newest first."""
    reader = Reader(answer)
    reader.u64()  # the highest id that was ever given out
    found = []
    for _ in range(reader.u32()):
        snapshot_id, size = reader.u64(), reader.u64()
        found.append((Snapshot(snapshot_id, reader.string(), is_users=True, created_ns=0), size))
    return found
