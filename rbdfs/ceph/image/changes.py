"""What of an image differs between snapshots: at least that, to bring a copy of the earlier one up to date.

librbd asks each object for its snapshots, of which the OSD knows what was written in between. Its other way, by the
fast-diff maps (`--whole-object` of the rbd command), is not taken: after a roll back they miss what was rolled back
(seen with 16.2.15: the map of HEAD becomes that of the snapshot, with nothing marked as changed). That an object is
there is taken from them, as everywhere: what is there neither before nor after is not asked for.
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
"""Asked about before any of them is copied: some 0.1 s, at 1 ms for ten."""

GAP_OBJECTS: Final = 8
"""So many that need not be asked about cost less than to ask once more."""

GRAIN: Final = 4096
"""Bytes, of the grid to which changes are widened: what file systems allocate in, and direct writes come in."""

GAP_BYTES: Final = 32 << 10
"""Unchanged bytes between two changes: so many cost less than another read."""


@dataclass(frozen=True, slots=True)
class EarlierSnapshot:
    """What an image is compared with. librbd takes it by its name."""

    name: str
    state: ImageState
    ask_name: Callable[[], Awaitable[str]]
    """What the snapshot is called now."""

    async def confirm(self) -> None:
        """Raise RbdfsError if the snapshot was renamed or removed: the name may be another's now."""
        if await self.ask_name() != self.name:
            raise RbdfsError(f"snapshot {self.name} was renamed meanwhile")


class Changes:
    """What has changed since a snapshot, up to each of some later ones: the copy may hold parts of any of them."""

    def __init__(
        self,
        since: EarlierSnapshot,
        objects_before: ObjectSet | None,
        later: Sequence[tuple[CephImage, ObjectSet | None]],
        kept_bytes: int,
    ) -> None:
        """The sets are the objects that a snapshot may have, None if that is not known. Everything beyond `kept_bytes`
        has changed."""
        self._since = since
        self._later = [(image, either(objects_before, objects)) for image, objects in later]
        first = later[0][0]
        self._anew = [(kept_bytes, first.size)]
        """Also what shows through from another parent than before, or no more."""
        for image, _ in later:
            self._anew += shown_anew(since.state, image.state)
        self._object_size = first.object_size
        self.window = OBJECTS_AT_ONCE * first.object_size * first.stripe_count
        """Bytes, as many as should be asked about at once."""

    async def within(self, offset: int, length: int) -> Ranges:
        """What of a range may have changed, in order, on a grid of 4 KiB. Raises RbdfsError."""
        found: Ranges = [(max(start, offset), min(end, offset + length)) for start, end in self._anew]
        for image, objects in self._later:
            end = min(offset + length, image.size)
            for start, stop in await to_ask(objects, self._object_size, offset, end):
                if start < stop:
                    changed = await image.changes(self._since.name, start, stop - start)
                    found += [(each.offset, each.offset + each.length) for each in changed]
        return _on_the_grid(found, offset, offset + length)

    async def confirm(self) -> None:
        """All snapshots are still what they were when their objects were asked. Raises RbdfsError."""
        for image, _ in self._later:
            await image.refresh()
        await self._since.confirm()


def either(one: ObjectSet | None, other: ObjectSet | None) -> ObjectSet | None:
    """Objects that are in one of two sets."""
    return None if one is None or other is None else one.union(other)


async def to_ask(objects: ObjectSet | None, object_size: int, start: int, end: int) -> Ranges:
    """Of the bytes [start, end), those to ask the objects about: all if `objects` is not known."""
    if objects is None:
        return [(start, end)]
    return await run_in_thread(_with_small_gaps, objects, object_size, start, end, abandon_on_cancel=True)


def _with_small_gaps(objects: ObjectSet, object_size: int, start: int, end: int) -> Ranges:
    """The bytes of the objects of a set, and of small gaps between them."""
    runs = _joined(objects.runs(start // object_size, -(-end // object_size)), GAP_OBJECTS)
    return [(max(start, first * object_size), min(end, last * object_size)) for first, last in runs]


def _joined(ranges: Iterable[tuple[int, int]], gap: int) -> Ranges:
    """Ranges by their start, joined where they overlap or not more is between them than a gap."""
    found: Ranges = []
    for start, end in ranges:
        if found and start - found[-1][1] <= gap:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def shown_anew(before: ImageState, after: ImageState) -> Ranges:
    """Where another ancestor shows through than before, if any."""
    old, new = before.own.header.parent, after.own.header.parent
    if old == new:
        return []
    overlaps = sorted((_overlap(old), _overlap(new)))
    is_shrunk = old is not None and new is not None and old.image == new.image
    return [(overlaps[0] if is_shrunk else 0, overlaps[1])]


def _overlap(parent: Parent | None) -> int:
    return 0 if parent is None else parent.overlap


def _on_the_grid(ranges: Ranges, start: int, end: int) -> Ranges:
    """Ranges in any order, widened to the grid but not beyond [start, end), and joined over small gaps."""
    widened = (
        (max(start, first - first % GRAIN), min(end, -(-last // GRAIN) * GRAIN))
        for first, last in sorted(ranges)
        if first < last
    )
    return _joined(widened, GAP_BYTES)
