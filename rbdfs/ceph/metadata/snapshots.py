"""The snapshots of images by name, kept for as long as the image's header says that they are the same.

Of ten thousand snapshots each is looked up by its name: each time the cluster is asked for the header's version alone.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.read_op import ReadOperations, Request
from rbdfs.ceph.metadata import header
from rbdfs.ceph.metadata.versioned import VersionedCache

KEPT_FROM: Final = 16
"""Snapshots of one image. Fewer cost no more than to ask whether they are the same."""

KEPT_AT_MOST: Final = 100_000
"""Snapshots of all images; each takes some 500 bytes."""


class SnapshotReader:
    """Asks for the snapshots of images."""

    def __init__(self, operations: ReadOperations, ioctx_of: Callable[[Namespace], librados.Ioctx]) -> None:
        self._operations = operations
        self._ioctx_of = ioctx_of
        self._known: VersionedCache[ImageRef, dict[str, ImageRef]] = VersionedCache(KEPT_AT_MOST)

    async def by_name(self, image: ImageRef) -> dict[str, ImageRef]:
        """The user's snapshots of a HEAD, the oldest first; not to be changed. Raises RbdfsError."""
        ioctx = self._ioctx_of(image.namespace)
        if (known := self._known.get(image)) is not None:
            reply = await self._operations.ask(Request(ioctx, header.object_of(image), stat=True))
            if reply.result >= 0 and reply.version == known.version:
                return known.value
        version, found = await header.snapshots(self._operations, ioctx, image)
        by_name = {each.name: replace(image, snapshot_id=each.id) for each in found if each.is_users}
        if KEPT_FROM <= len(by_name) <= KEPT_AT_MOST:
            self._known.keep(image, version, by_name, len(by_name))
        else:
            self._known.drop(image)
        return by_name
