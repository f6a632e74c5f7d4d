"""The snapshots of images by name, cached while the version of the image's header stays the same.

A program that looks up each of ten thousand snapshots by name then only asks for that version each time.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from rbdfs.catalog import ImageRef, Namespace
from rbdfs.ceph.bindings import librados
from rbdfs.ceph.bindings.read_op import ReadOperations, Request
from rbdfs.ceph.metadata import header
from rbdfs.ceph.metadata.versioned import VersionedCache

CACHED_FROM: Final = 16
"""Snapshots of one image. To ask for fewer costs no more than to ask for the version."""

CACHED_AT_MOST: Final = 100_000
"""Snapshots of all images; each takes some 500 bytes."""


class SnapshotReader:
    """Asks for the snapshots of images."""

    def __init__(self, operations: ReadOperations, ioctx_of: Callable[[Namespace], librados.Ioctx]) -> None:
        self._operations = operations
        self._ioctx_of = ioctx_of
        self._cache: VersionedCache[ImageRef, dict[str, ImageRef]] = VersionedCache(CACHED_AT_MOST)

    async def by_name(self, image: ImageRef) -> dict[str, ImageRef]:
        """The users' snapshots of a HEAD, the oldest first. Do not change the dict. Raises RbdfsError."""
        ioctx = self._ioctx_of(image.namespace)
        if (cached := self._cache.get(image)) is not None:
            reply = await self._operations.ask(Request(ioctx, header.object_of(image), stat=True))
            if reply.result >= 0 and reply.version == cached.version:
                return cached.value
        version, found = await header.snapshots(self._operations, ioctx, image)
        by_name = {each.name: replace(image, snapshot_id=each.id) for each in found if each.is_users}
        if CACHED_FROM <= len(by_name) <= CACHED_AT_MOST:
            self._cache.put(image, version, by_name, len(by_name))
        else:
            self._cache.drop(image)
        return by_name
