"""The names of an image's objects, and which of its bytes are its own, its parent's, or holes."""

import contextlib
from dataclasses import dataclass

import rados
import rbd

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.aio import open_in_librbd
from rbdfs.ceph.errors import translated

Ranges = list[tuple[int, int]]
"""(image offset, length) pairs."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """An image or snapshot as it is now. Sizes in bytes."""

    size: int
    object_size: int
    stripe_unit: int
    stripe_count: int
    object_prefix: str
    object_digits: int
    """Hexadecimal digits of the object number in an object's name."""
    data_pool_id: int
    parent: str
    """As an image spec; empty if the image is no clone."""
    own: Ranges
    """What the image holds itself, in whole objects."""
    shown: Ranges
    """`own` and what its parent holds; everything for an image in migration, because its source may hold the rest."""

    def object_name(self, number: int) -> str:
        """The name of an object in the data pool."""
        return f"{self.object_prefix}.{number:0{self.object_digits}x}"


def allocation(ioctx: rados.Ioctx, image: ImageRef, offset: int, length: int | None) -> Allocation:
    """The allocation of a range of an image; without `length`, to its end. Blocks. Raises RbdfsError.

    The image is opened read-only: otherwise librbd takes the exclusive lock to list extents.
    """
    with translated(f"ask where image {image.id} is stored"), open_in_librbd(ioctx, image) as opened:
        stat = opened.stat()
        length = max(0, min(stat["size"] - offset, stat["size"] if length is None else length))
        own = _ranges(opened, offset, length, include_parent=False)
        parent, shown = "", own
        if opened.features() & rbd.RBD_FEATURE_MIGRATING:
            shown = [(offset, length)]  # librbd aborts the process over some sources (tracker 53786)
        with contextlib.suppress(rbd.ImageNotFound):
            spec = opened.get_parent_image_spec()
            namespace = f"{spec['pool_namespace']}/" if spec["pool_namespace"] else ""
            parent = f"{spec['pool_name']}/{namespace}{spec['image_name']}@{spec['snap_name']}"
            shown = _ranges(opened, offset, length, include_parent=True)
        return Allocation(
            size=stat["size"],
            object_size=1 << stat["order"],
            stripe_unit=opened.stripe_unit(),
            stripe_count=opened.stripe_count(),
            object_prefix=stat["block_name_prefix"],
            object_digits=12 if image.format == 1 else 16,
            data_pool_id=opened.data_pool_id(),
            parent=parent,
            own=own,
            shown=shown,
        )


def _ranges(image: rbd.Image, offset: int, length: int, *, include_parent: bool) -> Ranges:
    found: Ranges = []
    if length:
        image.diff_iterate(
            offset, length, None, lambda start, count, _exists: found.append((start, count)), include_parent, True
        )
    return found
