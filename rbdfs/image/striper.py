"""How an image's bytes are laid out over its objects. Pure arithmetic, the same as Ceph's `Striper`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

MIB = 1 << 20

FETCH_BYTES_MAX = 4 * MIB
"""The largest aio of readahead: the default object size, and the size at which librbd
is fastest (FACTS: `rbd bench` reads 4 MiB ten at a time). Larger objects are read in parts of this size, so that
the first bytes do not wait for 32 MiB; smaller objects are read many in one aio."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of an image (Ceph's `file_layout_t`); all sizes in bytes.

    Without fancy striping the stripe unit is the object size and the stripe count is 1.
    """

    object_size: int
    stripe_unit: int
    stripe_count: int
    is_striped: bool = field(init=False, repr=False)
    """Whether objects interleave, so that an object is not one contiguous piece of the image."""

    def __post_init__(self) -> None:
        if min(self.object_size, self.stripe_unit, self.stripe_count) <= 0:
            raise ValueError(f"not a layout: {self}")
        if self.object_size % self.stripe_unit:
            raise ValueError(f"the stripe unit must divide the object size: {self}")
        object.__setattr__(self, "is_striped", self.stripe_count > 1 and self.stripe_unit < self.object_size)

    @classmethod
    def of_objects(cls, object_size: int) -> "Layout":
        """The layout without fancy striping."""
        return cls(object_size=object_size, stripe_unit=object_size, stripe_count=1)

    @property
    def fetch_bytes(self) -> int:
        """The size of one readahead aio in bytes: whole objects if they are small enough.

        A multiple of it is always on an object's or a stripe's edge.
        """
        grain = self.stripe_unit * self.stripe_count if self.is_striped else self.object_size
        if grain <= FETCH_BYTES_MAX:
            return FETCH_BYTES_MAX // grain * grain
        return FETCH_BYTES_MAX if self.stripe_unit % FETCH_BYTES_MAX == 0 else self.stripe_unit


class ObjectExtent(NamedTuple):
    """`length` bytes at `offset` in the object `object_no`, which are the image's bytes from `image_offset` on."""

    object_no: int
    offset: int
    length: int
    image_offset: int


def file_to_extents(layout: Layout, offset: int, length: int) -> list[ObjectExtent]:
    """Map `length` bytes at the image offset `offset` onto object extents, in image order.

    Ceph's `Striper::file_to_extents`, but for the order: extents of one object that touch in the object *and* in the
    image are one extent; those with a stripe of other objects between them stay apart.
    """
    extents = []
    end = offset + length
    if not layout.is_striped:
        object_size = layout.object_size
        while offset < end:
            object_no, object_offset = divmod(offset, object_size)
            part = min(object_size - object_offset, end - offset)
            extents.append(ObjectExtent(object_no, object_offset, part, offset))
            offset += part
        return extents

    unit, count = layout.stripe_unit, layout.stripe_count
    stripes_per_object = layout.object_size // unit
    while offset < end:
        block_no, block_offset = divmod(offset, unit)
        stripe_no, stripe_position = divmod(block_no, count)
        object_set, stripe_in_object = divmod(stripe_no, stripes_per_object)
        part = min(unit - block_offset, end - offset)
        object_no, object_offset = object_set * count + stripe_position, stripe_in_object * unit + block_offset
        extents.append(ObjectExtent(object_no, object_offset, part, offset))
        offset += part
    return extents


def extent_to_file(layout: Layout, object_no: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Map `length` bytes at `offset` in an object onto (image offset, length) pairs, in object order.

    The inverse of `file_to_extents`; Ceph's `Striper::extent_to_file`. The image may end before the extent does.
    """
    unit, count = layout.stripe_unit, layout.stripe_count
    if not layout.is_striped:
        yield object_no * layout.object_size + offset, length
        return
    stripes_per_object = layout.object_size // unit
    object_set, stripe_position = divmod(object_no, count)
    end = offset + length
    while offset < end:
        stripe_in_object, block_offset = divmod(offset, unit)
        part = min(unit - block_offset, end - offset)
        stripe_no = object_set * stripes_per_object + stripe_in_object
        yield (stripe_no * count + stripe_position) * unit + block_offset, part
        offset += part
