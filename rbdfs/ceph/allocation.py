"""What an image's objects are called, and which of its bytes are its own, its parent's, or nobody's."""

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
    """Of the object number, in hexadecimal, in an object's name."""
    data_pool_id: int
    parent: str
    """As an image spec; empty for what is no clone."""
    own: Ranges
    """What it holds itself, in whole objects."""
    shown: Ranges
    """That, and what its parent holds; of an image in migration all, for its source may hold the rest."""

    def object_name(self, number: int) -> str:
        """What an object is called in the data pool."""
        return f"{self.object_prefix}.{number:0{self.object_digits}x}"


def allocation(ioctx: rados.Ioctx, image: ImageRef, offset: int, length: int | None) -> Allocation:
    """Of a range of an image; to its end without a length. Blocks. Raises RbdfsError.

    By an image that is open read-only: to list extents librbd takes the exclusive lock of one that is not.
    """
    with translated(f"ask where image {image.id} lies"), open_in_librbd(ioctx, image) as opened:
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
