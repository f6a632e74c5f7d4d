"""What an image holds, by its object map, without opening it: two bits for each object, in one object.

A map is believed only where the image's flags do not call it invalid. Through a clone its parent shows, and through
that one its own: then the maps are laid over one another.
"""

import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass

import rados
import rbd

from rbdfs.ceph import header
from rbdfs.ceph.aio import Handover, execute
from rbdfs.errors import RbdfsError

OBJECTS_A_BYTE = 4
_OVERHEAD_BYTES = 1024  # of an encoded map: its header and checksum, and room for what later versions add


@dataclass(frozen=True, slots=True)
class ObjectSet:
    """Objects that hold data: two bits for each, of which the lower one counts, from the high end of `slots` pairs."""

    bits: int
    slots: int

    @property
    def count(self) -> int:
        """How many objects hold data."""
        return self.bits.bit_count()

    def over(self, parent: "ObjectSet", objects: int) -> "ObjectSet":
        """This set, with the first `objects` of a parent's showing through."""
        shown = parent.bits >> 2 * max(0, parent.slots - objects)
        return ObjectSet(self.bits | shown << 2 * (self.slots - min(parent.slots, objects)), self.slots)


def decode(encoded: bytes) -> ObjectSet:
    """An encoded object map (`ceph::BitVector<2>`): all objects that it does not call nonexistent (0).

    That is the length of a header (32 bits), the header, which ends with the count of objects (64 bits), and two bits
    for each object from the high end of each byte; a checksum may follow.
    """
    (header_bytes,) = struct.unpack_from("<I", encoded)
    start = 4 + header_bytes
    (objects,) = struct.unpack_from("<Q", encoded, start - 8)
    length = -(-objects // OBJECTS_A_BYTE)
    states = int.from_bytes(encoded[start : start + length], "big")
    lower_bits = int.from_bytes(b"\x55" * length, "big")
    return ObjectSet((states | states >> 1) & lower_bits, length * OBJECTS_A_BYTE)


@dataclass(frozen=True, slots=True)
class MappedImage:
    """An image whose map is asked for, or a snapshot of one; sizes in bytes."""

    pool_id: int
    namespace: str
    id: str
    size: int
    object_size: int
    snapshot_id: int = header.HEAD


async def held_objects(
    handover: Handover, ioctx_of: Callable[[int, str], rados.Ioctx], image: MappedImage
) -> ObjectSet | None:
    """The objects that hold data, the parents' included as it shows through.

    None where that cannot be known without looking at each object. Raises RbdfsError: ENOENT where the image is gone.
    """
    ioctx = ioctx_of(image.pool_id, image.namespace)
    objects = await _own_objects(handover, ioctx, image)
    if objects is None:
        return None
    try:
        parent = await header.get_parent(handover, ioctx, image.id, image.snapshot_id)
        if parent is None:
            return objects
        size, object_size = await header.get_size(
            handover, ioctx_of(parent.pool_id, ""), parent.image_id, parent.snapshot_id
        )
        mapped = MappedImage(parent.pool_id, "", parent.image_id, size, object_size, parent.snapshot_id)
        below = await held_objects(handover, ioctx_of, mapped) if object_size == image.object_size else None
    except RbdfsError:  # a parent that the key may not read, or that is in another namespace
        return None
    return None if below is None else objects.over(below, -(-parent.overlap // object_size))


async def _own_objects(handover: Handover, ioctx: rados.Ioctx, image: MappedImage) -> ObjectSet | None:
    features = await header.get_features(handover, ioctx, image.id, image.snapshot_id)
    if not features & rbd.RBD_FEATURE_OBJECT_MAP or features & rbd.RBD_FEATURE_MIGRATING:
        return None
    encoded = await _load(handover, ioctx, image)
    # The flags come last: a map that became invalid while it was loaded must not be believed.
    flags = await header.get_flags(handover, ioctx, image.id, image.snapshot_id)
    return None if encoded is None or flags & rbd.RBD_FLAG_OBJECT_MAP_INVALID else decode(encoded)


async def _load(handover: Handover, ioctx: rados.Ioctx, image: MappedImage) -> bytes | None:
    """The encoded map; None where there is none."""
    name = f"rbd_object_map.{image.id}"
    if image.snapshot_id != header.HEAD:
        name += f".{image.snapshot_id:016x}"
    answer_bytes = image.size // image.object_size // OBJECTS_A_BYTE + _OVERHEAD_BYTES
    try:
        return await execute(handover, ioctx, name, "rbd", "object_map_load", answer_bytes=answer_bytes)
    except RbdfsError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
