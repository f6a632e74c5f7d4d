"""What an image holds, by its object map: two bits for each object, in one object of its own.

A map is believed only where the image's flags do not call it invalid.
"""

import struct
from dataclasses import dataclass

from rbdfs.catalog import ImageRef

OBJECTS_A_BYTE = 4


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


def object_of(image: ImageRef) -> str:
    """The object that holds the map of an image of format 2, or of a snapshot of it."""
    name = f"rbd_object_map.{image.id}"
    return name if image.snapshot_id is None else f"{name}.{image.snapshot_id:016x}"
