"""Where an open image holds data, and what has changed in it since a snapshot."""

from collections.abc import Awaitable, Callable

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.aio import LibrbdImage
from rbdfs.ceph.bindings.librbd import Diff
from rbdfs.ceph.bindings.lifetime import by_the_newest
from rbdfs.ceph.errors import translated
from rbdfs.ceph.image.reopening import ReopeningImage
from rbdfs.ceph.metadata.object_map import ObjectSet
from rbdfs.errors import BeyondEndError, RbdfsError
from rbdfs.threads import run_in_thread

FindObjects = Callable[[ImageRef], Awaitable[ObjectSet | None]]
"""Finds the objects of an image that hold data (`StatReader.objects`)."""

OBJECTS_ASKED_AT_ONCE = 256
"""For an image without a fast-diff map: SEEK_DATA waits for them, some 10 ms at 0.3 ms a round trip."""

OBJECTS_OF_A_MAP_AT_ONCE = 1 << 16
"""256 GiB with objects of 4 MiB: 2 ms, or 40 ms if every other object is a hole."""

ATTEMPTS = 4
"""How often the extents are asked again because the image was reopened during the question."""


class Extents:
    """Lists the extents of an image: by object maps if all of them are valid, else by `rbd_diff_iterate2`.

    For a striped image librbd asks the maps, and loads all of them for each call. Without maps librbd asks each object
    for its snapshots, ten at a time.
    """

    def __init__(self, image: ReopeningImage, find_objects: FindObjects) -> None:
        self._image = image
        self._find_objects = find_objects

    @property
    def has_map(self) -> bool:
        """Whether `find_objects` knows which objects hold data."""
        return self._image.opened.state.has_fast_diff and self._image.stripe_count == 1

    async def window(self) -> int:
        """How many bytes to ask `within` for at once, so that it takes milliseconds. Raises RbdfsError."""
        image = self._image
        await image.check()
        if self.has_map:
            return OBJECTS_OF_A_MAP_AT_ONCE * image.object_size
        if image.opened.state.has_fast_diff or image.opened.state.is_migrating:
            return max(image.size, 1)
        return OBJECTS_ASKED_AT_ONCE * image.object_size * image.stripe_count

    async def within(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Where a range holds data, as `ImageBackend.extents` has it, in whole objects. Raises RbdfsError."""
        image = self._image
        what = f"cannot ask where {image.spec} holds data"

        async def ask(handle: LibrbdImage) -> tuple[LibrbdImage, list[tuple[int, int]]]:
            return handle, await image.run_blocking(handle, handle.extents, offset, length)

        for _ in range(ATTEMPTS):
            handle = await image.current()
            if image.opened.state.is_migrating:  # librbd aborts the process over some sources (tracker 53786)
                return [(offset, length)]
            if self.has_map and (objects := await self._find_objects(image.image)):
                end = offset + length
                found = await run_in_thread(
                    _of_objects, objects, image.object_size, offset, end, abandon_on_cancel=True
                )
            else:
                with translated(f"ask where {image.spec} holds data"):
                    handle, found = await by_the_newest(image.current, ask)
            # What was removed is no hole. And the flags, which say whether the maps are valid, must be asked after the
            # maps were loaded.
            if await image.revalidator.stable_size() < offset + length:
                raise BeyondEndError(f"{what}: it was shrunk during the question")
            if handle is image.handle:
                return found
        raise RbdfsError(f"{what}: the image and its parents change all the time")

    async def changes(self, since: str | None, offset: int, length: int) -> list[Diff]:
        """Where a range may differ from an earlier snapshot, by its name, by offset. Raises RbdfsError.

        What shows through from ancestors does not count. Without `since`, all that was ever written counts, and that of
        ancestors too. Pieces do not overlap.
        """
        image = self._image
        if image.opened.state.is_migrating:  # as in `within`
            return [Diff(offset, length, exists=True)]
        return await image.run_blocking(image.handle, image.handle.changes, since, offset, length)


def _of_objects(objects: ObjectSet, object_size: int, start: int, end: int) -> list[tuple[int, int]]:
    """The objects in the bytes [start, end) that hold data, as (offset, length) pairs."""
    runs = objects.runs(start // object_size, -(-end // object_size))
    return [(first * object_size, (last - first) * object_size) for first, last in runs]
