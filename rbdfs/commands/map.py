"""`rbdfs map`: where an image's bytes are: extents → objects → placement groups → OSDs."""

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from rbdfs.ceph.allocation import Allocation
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.ceph.placement import NO_OSD
from rbdfs.commands.allocation_bar import draw_bar, legend
from rbdfs.commands.formatting import format_bytes, json_lines
from rbdfs.commands.image_command import ImageCommand
from rbdfs.errors import UsageError
from rbdfs.image.holes import HoleMap, Kind
from rbdfs.image.striper import Layout, ObjectExtent, file_to_extents
from rbdfs.spec import ImageSpec

ROWS = 100
"""Rows to print for a person; the rest is counted."""

DATA, HOLE, PARENT = "data", "hole", "parent"


@dataclass(frozen=True, slots=True)
class MapOptions:
    """The options of `rbdfs map`. Offset and length are bytes of the image; without a length, to its end."""

    cluster: ClusterOptions
    image: str
    offset: int
    length: int | None
    as_json: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A range of the image in one object, or a hole over several objects, without their names."""

    offset: int
    length: int
    kind: str
    object_no: int | None = None
    object: str | None = None
    object_offset: int | None = None
    pg: str | None = None
    osds: Sequence[int] | None = None
    """The acting set, as `Cluster.placements` returns it."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """An image, and the rows of the range that was asked for."""

    spec: ImageSpec
    data_pool: str
    allocation: Allocation
    start: int
    end: int
    """Bytes of the image."""
    rows: Sequence[Row]
    rows_left_out: int


def map_image(options: MapOptions) -> int:
    """Print it. Returns the exit status; each failure is a line on stderr. Raises UsageError."""
    return _Map(options).run()


class _Map(ImageCommand):
    def __init__(self, options: MapOptions) -> None:
        super().__init__(options.cluster, options.image)
        self._options = options

    async def work(self) -> None:
        options = self._options
        image = await self.find()
        found = await self.cluster.allocation(image, options.offset, options.length)
        if options.offset and options.offset >= found.size:
            raise UsageError(f"{self.spec} ends at {found.size}, before --offset {options.offset}")
        end = found.size if options.length is None else min(found.size, options.offset + options.length)
        rows = list(_rows(found, options.offset, end))
        left_out = 0 if options.as_json else max(0, len(rows) - ROWS)
        rows = rows[: len(rows) - left_out]
        names = {row.object for row in rows if row.object is not None}
        placed = await self.cluster.placements(found.data_pool_id, self.spec.namespace, names)
        rows = [row if row.object is None else _placed(row, placed[row.object]) for row in rows]
        data_pool = await self.cluster.pool_name(found.data_pool_id)
        mapped = Mapped(self.spec, data_pool, found, options.offset, end, rows, left_out)
        self.lines = _as_json(mapped) if options.as_json else _as_table(mapped)


def _placed(row: Row, place: tuple[str, Sequence[int]]) -> Row:
    pg, osds = place
    return replace(row, pg=pg, osds=osds)


def _rows(found: Allocation, start: int, end: int) -> Iterator[Row]:
    layout = Layout(found.object_size, found.stripe_unit, found.stripe_count)
    for first, last, kind in _segments(found, start, end):
        extents = file_to_extents(layout, first, last - first) if kind != HOLE or _is_small(layout, first, last) else []
        if kind == HOLE and len(extents) != 1:
            yield Row(first, last - first, HOLE)
        else:
            yield from (_row(found, kind, extent) for extent in extents)


def _is_small(layout: Layout, start: int, end: int) -> bool:
    """Whether a range may fit in one object."""
    return end - start <= layout.object_size


def _row(found: Allocation, kind: str, extent: ObjectExtent) -> Row:
    number, offset, length, image_offset = extent
    return Row(image_offset, length, kind, number, found.object_name(number), offset)


def _segments(found: Allocation, start: int, end: int) -> Iterator[tuple[int, int, str]]:
    """The (start, end, kind) pieces of a range, in order."""
    own, shown = HoleMap(found.size), HoleMap(found.size)
    own.learn(start, end, found.own)
    shown.learn(start, end, found.shown)
    while start < end:
        mine, seen = own.at(start), shown.at(start)
        stop = min(mine.end, seen.end, end)
        kind = DATA if mine.kind is Kind.DATA else PARENT if seen.kind is Kind.DATA else HOLE
        yield start, stop, kind
        start = stop


def _as_json(found: Mapped) -> Iterator[str]:
    facts = found.allocation
    head = {
        "image": str(found.spec),
        "size": facts.size,
        "object_size": facts.object_size,
        "stripe_unit": facts.stripe_unit,
        "stripe_count": facts.stripe_count,
        "object_prefix": facts.object_prefix,
        "data_pool": found.data_pool,
        "parent": facts.parent or None,
    }
    return json_lines(head, "extents", [asdict(row) for row in found.rows])


def _as_table(found: Mapped) -> Iterator[str]:
    facts, encoding = found.allocation, sys.stdout.encoding
    striped = (
        f", striped by {format_bytes(facts.stripe_unit)} over {facts.stripe_count}" if facts.stripe_count > 1 else ""
    )
    yield (
        f"{found.spec}: {format_bytes(facts.size)} in objects of {format_bytes(facts.object_size)}{striped}, "
        f"{facts.object_prefix}.* in pool {found.data_pool}"
    )
    if facts.parent:
        yield f"a clone of {facts.parent}"
    width = shutil.get_terminal_size().columns
    cells, cell_bytes = draw_bar(found.start, found.end, facts.object_size, facts.own, facts.shown, width, encoding)
    yield cells
    yield legend(encoding, format_bytes(cell_bytes))
    yield ""
    yield from _columns(found.rows)
    if found.rows_left_out:
        yield f"and {found.rows_left_out} more: choose with --offset and --length, or take --json"


def _columns(rows: Iterable[Row]) -> Iterator[str]:
    head = ("OFFSET", "LENGTH", "WHAT", "OBJECT", "NAME", "AT", "PG", "OSDS")
    lines = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    right = (True, True, False, True, False, True, False, False)
    for line in lines:
        cells = (
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        )
        yield "  ".join(cells).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    where = (row.object_no, row.object, row.object_offset, row.pg)
    osds = "" if row.osds is None else ",".join("none" if osd == NO_OSD else str(osd) for osd in row.osds)
    return (
        str(row.offset),
        str(row.length),
        row.kind,
        *("" if cell is None else str(cell) for cell in where),
        osds,
    )
