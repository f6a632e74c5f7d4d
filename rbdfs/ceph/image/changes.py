"""Where an image may differ between snapshots, to bring a copy of the earlier one up to date.

librbd asks each object for its snapshots: the OSD knows what was written between them. We do not use its other way, by
the fast-diff maps (`--whole-object` of the rbd command): after a rollback they miss what was rolled back (seen with
16.2.15: the map of HEAD becomes that of the snapshot, with nothing marked as changed). We only use the maps to skip
objects that exist neither before nor after.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.ceph.image.image_state import ImageState
from rbdfs.ceph.metadata.header import Parent
from rbdfs.ceph.metadata.object_map import ObjectSet
from rbdfs.errors import RbdfsError
from rbdfs.threads import run_in_thread

Ranges = list[tuple[int, int]]
"""(start, end) pairs of image offsets."""

OBJECTS_AT_ONCE: Final = 1024
"""How many are asked before any of them is copied: about 0.1 s, at 1 ms for ten."""

GAP_OBJECTS: Final = 8
"""To ask about so many objects in vain costs less than another question."""

GRAIN: Final = 4096
"""Bytes of the grid to which changes are widened: the block of file systems and of direct writes."""

GAP_BYTES: Final = 32 << 10
"""To copy so many unchanged bytes between two changes costs less than another read."""


@dataclass(frozen=True, slots=True)
class EarlierSnapshot:
    """The snapshot that an image is compared with. librbd finds it by its name."""

    name: str
    state: ImageState
    ask_name: Callable[[], Awaitable[str]]
    """Asks for the present name of the snapshot."""

    async def confirm(self) -> None:
        """Raise RbdfsError if the snapshot was renamed or removed: the name may be another's now."""
        if await self.ask_name() != self.name:
            raise RbdfsError(f"snapshot {self.name} was renamed during the comparison")


class Changes:
    """What has changed since a snapshot, up to each of several later ones: the copy may hold parts of any of them."""

    def __init__(
        self,
        since: EarlierSnapshot,
        objects_before: ObjectSet | None,
        later: Sequence[tuple[CephImage, ObjectSet | None]],
        kept_bytes: int,
    ) -> None:
        """The sets are the objects that a snapshot may have, None if that is not known. Everything beyond `kept_bytes`
        counts as changed."""
        self._since = since
        self._later = [(image, either(objects_before, objects)) for image, objects in later]
        first = later[0][0]
        self._always = [(kept_bytes, first.size)]
        """Ranges that count as changed without a question: also where another ancestor shows through than before."""
        for image, _ in later:
            self._always += reparented(since.state, image.state)
        self._object_size = first.object_size
        self.window = OBJECTS_AT_ONCE * first.object_size * first.stripe_count
        """How many bytes to ask about at once."""

    async def within(self, offset: int, length: int) -> Ranges:
        """Where a range may have changed, in order, on a grid of 4 KiB. Raises RbdfsError."""
        found: Ranges = [(max(start, offset), min(end, offset + length)) for start, end in self._always]
        for image, objects in self._later:
            end = min(offset + length, image.size)
            for start, stop in await to_ask(objects, self._object_size, offset, end):
                if start < stop:
                    changed = await image.changes(self._since.name, start, stop - start)
                    found += [(each.offset, each.offset + each.length) for each in changed]
        return _on_the_grid(found, offset, offset + length)

    async def confirm(self) -> None:
        """Raise RbdfsError unless all snapshots are still what they were when their objects were asked."""
        for image, _ in self._later:
            await image.refresh_size()
        await self._since.confirm()


def either(one: ObjectSet | None, other: ObjectSet | None) -> ObjectSet | None:
    """The objects of two sets; None if one of them is not known."""
    return None if one is None or other is None else one.union(other)


async def to_ask(objects: ObjectSet | None, object_size: int, start: int, end: int) -> Ranges:
    """The ranges in the bytes [start, end) whose objects must be asked: everything if `objects` is not known."""
    if objects is None:
        return [(start, end)]
    return await run_in_thread(_with_small_gaps, objects, object_size, start, end, abandon_on_cancel=True)


def _with_small_gaps(objects: ObjectSet, object_size: int, start: int, end: int) -> Ranges:
    """The bytes of the objects of a set, and of small gaps between them."""
    runs = _joined(objects.runs(start // object_size, -(-end // object_size)), GAP_OBJECTS)
    return [(max(start, first * object_size), min(end, last * object_size)) for first, last in runs]


def _joined(ranges: Iterable[tuple[int, int]], gap: int) -> Ranges:
    """Join ranges, which are in order, that overlap or have at most `gap` between them."""
    found: Ranges = []
    for start, end in ranges:
        if found and start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def reparented(before: ImageState, after: ImageState) -> Ranges:
    """Where another ancestor shows through than before."""
    old, new = before.own.header.parent, after.own.header.parent
    if old == new:
        return []
    overlaps = sorted((_overlap(old), _overlap(new)))
    is_shrunk = old is not None and new is not None and old.image == new.image
    return [(overlaps[0] if is_shrunk else 0, overlaps[1])]


def _overlap(parent: Parent | None) -> int:
    return 0 if parent is None else parent.overlap


def _on_the_grid(ranges: Ranges, start: int, end: int) -> Ranges:
    """Widen ranges to the grid, within [start, end), and join them over small gaps."""
    widened = (
        (max(start, first - first % GRAIN), min(end, -(-last // GRAIN) * GRAIN))
        for first, last in sorted(ranges)
        if first < last
    )
    return _joined(widened, GAP_BYTES)
