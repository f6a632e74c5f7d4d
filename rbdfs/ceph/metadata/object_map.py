"""The object map of an image: which objects hold data, in two bits for each, stored in one object.

A map is used only if the image's flags do not call it invalid.
"""

import re
from dataclasses import dataclass

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.encoding import Reader

OBJECTS_A_BYTE = 4

_ALL_HELD = 0b01010101
_ALIKE_OR_MIXED = re.compile(rb"\x55+|[^\0\x55]", re.DOTALL)
"""A run of bytes whose objects all hold data, or one byte of which some do; never a byte of holes only."""

_HEADER_VERSION = 1


@dataclass(frozen=True, slots=True)
class ObjectSet:
    """The objects that hold data: the lower bit of each pair, the first object at the high end of `slots` pairs.

    There is a slot for each object of the image.
    """

    bits: int
    slots: int

    @property
    def count(self) -> int:
        """How many objects hold data."""
        return self.bits.bit_count()

    def runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """The objects in [first, last) that hold data, as ranges [start, end) that do not touch."""
        last = min(last, self.slots)
        count = last - first
        if count <= 0:
            return []
        length = -(-count // OBJECTS_A_BYTE)
        window = self.bits >> 2 * (self.slots - last) & (1 << 2 * count) - 1
        states = (window << 2 * (length * OBJECTS_A_BYTE - count)).to_bytes(length, "big")
        found: list[tuple[int, int]] = []
        for match in _ALIKE_OR_MIXED.finditer(states):
            if match[0][0] == _ALL_HELD:
                pieces = [(match.start() * OBJECTS_A_BYTE, match.end() * OBJECTS_A_BYTE)]
            else:
                at = match.start() * OBJECTS_A_BYTE
                pieces = [
                    (at + number, at + number + 1)
                    for number in range(OBJECTS_A_BYTE)
                    if match[0][0] >> (6 - 2 * number) & 1
                ]
            for start, end in pieces:
                touches = found and found[-1][1] == first + start
                begin = found.pop()[0] if touches else first + start
                found.append((begin, min(first + end, last)))
        return found

    def union(self, other: "ObjectSet") -> "ObjectSet":
        """The objects of both."""
        slots = max(self.slots, other.slots)
        return ObjectSet(self.bits << 2 * (slots - self.slots) | other.bits << 2 * (slots - other.slots), slots)

    def over(self, parent: "ObjectSet", objects: int) -> "ObjectSet":
        """This set with the first `objects` of a parent showing through. This set has a slot for each of them."""
        shown = parent.bits >> 2 * max(0, parent.slots - objects)
        return ObjectSet(self.bits | shown << 2 * (self.slots - min(parent.slots, objects)), self.slots)


def decode(encoded: bytes) -> ObjectSet:
    """Decode an object map (`ceph::BitVector<2>`): all objects count that it does not call nonexistent (0).

    The encoding is the length of a header (32 bits), the header, and two bits for each object from the high end of each
    byte; a checksum may follow. The header (`BitVector::decode_header`) is a versioned structure with the count of
    objects (64 bits). Raises MalformedError.
    """
    reader = Reader(encoded)
    _, header = Reader(reader.bytes()).structure(_HEADER_VERSION)
    objects = header.u64()
    length = -(-objects // OBJECTS_A_BYTE)
    states = int.from_bytes(reader.raw(length), "big") >> 2 * (length * OBJECTS_A_BYTE - objects)
    lower_bits = int.from_bytes(b"\x55" * length, "big")
    return ObjectSet((states | states >> 1) & lower_bits, objects)


def object_of(image: ImageRef) -> str:
    """The object that holds the map of an image of format 2, or of a snapshot of it."""
    name = f"rbd_object_map.{image.id}"
    return name if image.snapshot_id is None else f"{name}.{image.snapshot_id:016x}"
