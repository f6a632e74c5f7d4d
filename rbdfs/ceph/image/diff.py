"""What has changed in an image since a snapshot, or since it was made: the extents of `rbd diff`, exactly.

The objects are asked; changes.py says why. An object that is in no object map of any snapshot in between never existed,
so it cannot have changed, and is not asked.
"""

import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Final

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.librbd import Diff
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.ceph.image.changes import EarlierSnapshot, Ranges, either, reparented, to_ask
from rbdfs.ceph.image.extents import OBJECTS_OF_A_MAP_AT_ONCE, FindObjects
from rbdfs.ceph.metadata.object_map import ObjectSet
from rbdfs.errors import RbdfsError, StaleError

log = logging.getLogger(__name__)

OBJECTS_AT_ONCE: Final = 256
"""How many are asked before any of their extents is returned."""


class ImageDiff:
    """The changes up to an image or snapshot that is open."""

    def __init__(
        self,
        image: CephImage,
        since: EarlierSnapshot | None,
        objects: ObjectSet | None,
    ) -> None:
        """Without `since`, all that was ever written counts. `objects` are those that were there at any time since,
        None if that is not known."""
        self._image = image
        self._since = since
        self._size = image.size
        self.unlisted: Ranges = [] if since is None else reparented(since.state, image.state)
        """Where another ancestor shows through than before: librbd does not list it."""
        period = image.object_size * image.stripe_count
        self._window = max(1, OBJECTS_AT_ONCE // image.stripe_count) * period
        self._objects = objects
        parent = image.state.own.header.parent
        if since is None and parent is not None:
            # librbd lists all of the parent's extents for each call (`DiffIterate::execute`).
            self._window = max(self._window, -(-parent.overlap // period) * period)
            self._objects = None

    async def extents(self) -> AsyncGenerator[Sequence[Diff], None]:
        """The extents in order, in batches of whole object sets. Raises RbdfsError."""
        window, object_size, objects = self._window, self._image.object_size, self._objects
        name = None if self._since is None else self._since.name
        step = self._size if objects is None else OBJECTS_OF_A_MAP_AT_ONCE * object_size
        for position in range(0, self._size, max(1, step)):
            end = min(position + step, self._size)
            for first, last in await to_ask(objects, object_size, position, end):
                start = first
                while start < last:
                    stop = min(last, start - start % window + window)
                    yield await self._image.changes(name, start, stop - start)
                    start = stop
        await self._confirm()

    async def _confirm(self) -> None:
        """Raise RbdfsError unless image and snapshots are still what they were when their objects were asked."""
        size = await self._image.refresh_size()
        if size < self._size:
            raise StaleError(f"the image was shrunk from {self._size} to {size} bytes during the comparison")
        if self._since is not None:
            await self._since.confirm()


async def objects_ever(
    find_objects: FindObjects, since: ImageRef | None, image: ImageRef, snapshot_ids: Sequence[int]
) -> ObjectSet | None:
    """The objects that an image had at any time from the snapshot `since` to `image`; None if that is not known.

    `snapshot_ids` are all snapshots of the image, not only those of users. Raises RbdfsError.
    """
    found = await find_objects(image)
    first = 0 if since is None else since.snapshot_id or 0
    for each in snapshot_ids:
        if found is None:
            break
        if first <= each and (image.snapshot_id is None or each < image.snapshot_id):
            try:
                found = either(found, await find_objects(replace(image, snapshot_id=each)))
            except RbdfsError as error:
                log.debug("the objects of snapshot %s of image %s are not known: %s", each, image.id, error)
                found = None
    return found
