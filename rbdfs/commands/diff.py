"""`rbdfs diff`: what has changed in an image, as `rbd diff` lists it, with a bar that shows where."""

import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.librbd import Diff
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.ceph.image.diff import ImageDiff
from rbdfs.commands.allocation_bar import AllocationBar, legend
from rbdfs.commands.formatting import format_bytes
from rbdfs.commands.image_command import FAILED, ImageCommand, print_stderr
from rbdfs.commands.resolve import resolve
from rbdfs.errors import RbdfsError, TargetError, UsageError
from rbdfs.image.striper import Layout, extent_to_file, file_to_extents
from rbdfs.spec import ImageSpec
from rbdfs.threads import run_in_thread

STDOUT = 1

KINDS = ("changed data", "changed to zeros", "unchanged")


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """The options of `rbdfs diff`."""

    cluster: ClusterOptions
    image: str
    """An image spec, as the rbd command takes it."""
    from_snapshot: str | None = None
    """None is the creation of the image."""
    whole_objects: bool = False
    as_json: bool = False


def diff(options: DiffOptions) -> int:
    """Print what has changed. Returns the exit status; each failure is a line on stderr. Raises UsageError."""
    command = _Diff(options)
    if options.from_snapshot == "":
        raise UsageError("--from-snap takes the name of a snapshot")
    return command.run()


class _Diff(ImageCommand):
    def __init__(self, options: DiffOptions) -> None:
        super().__init__(options.cluster, options.image)
        self._options = options

    async def work(self) -> None:
        image = await self.find()
        since = await self._since(image)
        source = await self.open(image)
        if source.state.is_migrating:
            raise RbdfsError(f"{self.spec} is being migrated: its source may hold some of the changes; try later")
        found = await self.cluster.diff(since, source)
        for start, end in found.unlisted:
            if start < end:
                print_stderr(
                    f"warning: another parent, or less of it, shows through than at {self._options.from_snapshot}: "
                    f"bytes {start} to {end} may have changed without being listed (rbd diff does not list them either)"
                )
        try:
            await self._print(found, source)
        except BrokenPipeError:  # the reader is gone
            self.status = FAILED

    async def _since(self, image: ImageRef) -> ImageRef | None:
        name = self._options.from_snapshot
        if name is None:
            return None
        since = await resolve(self.cluster, replace(self.spec, snapshot=name))
        if image.snapshot_id is not None and (since.snapshot_id or 0) > image.snapshot_id:
            raise RbdfsError(f"--from-snap {name} is later than {self.spec}")
        return since

    async def _print(self, found: ImageDiff, source: CephImage) -> None:
        layout = Layout(source.object_size, source.stripe_unit, source.stripe_count)
        shown = _Json() if self._options.as_json else _Table(self.spec, self._options.from_snapshot, source, layout)
        await _write(shown.head())
        async with aclosing(found.extents()) as batches:
            async for extents in batches:
                rows = whole_objects(layout, source.size, extents) if self._options.whole_objects else extents
                await _write(shown.rows(rows))
        await _write(shown.tail())


class _Json:
    """The list of `rbd diff --format json`, one extent a line."""

    def __init__(self) -> None:
        self._is_first = True

    def head(self) -> Iterator[str]:
        yield "["

    def rows(self, rows: Iterable[Diff]) -> Iterator[str]:
        for offset, length, exists in rows:
            extent = json.dumps({"offset": offset, "length": length, "exists": "true" if exists else "false"})
            yield ("\n" if self._is_first else ",\n") + extent
            self._is_first = False

    def tail(self) -> Iterator[str]:
        yield "\n]\n"


class _Table:
    """The columns of `rbd diff`; before them what is compared, after them a bar and the totals."""

    def __init__(self, spec: ImageSpec, since: str | None, source: CephImage, layout: Layout) -> None:
        self._layout = layout
        self._width = max(len("Offset"), len(str(source.size)))
        what = "since its creation" if since is None else f"since {replace(spec, snapshot=since)}"
        self._head = (
            f"{spec}, {format_bytes(source.size)} in objects of {format_bytes(source.object_size)}: changes {what}\n"
        )
        self._bar = AllocationBar(0, source.size, source.object_size, shutil.get_terminal_size().columns)
        self._bytes = {True: 0, False: 0}
        self._objects = 0
        self._set = -1
        self._of_set: set[int] = set()

    def head(self) -> Iterator[str]:
        yield self._head

    def rows(self, rows: Iterable[Diff]) -> Iterator[str]:
        width = self._width
        for row in rows:
            if not any(self._bytes.values()):
                yield f"{'Offset':<{width}}  {'Length':<{width}}  Type\n"
            self._count(row)
            yield f"{row.offset:<{width}}  {row.length:<{width}}  {'data' if row.exists else 'zero'}\n"

    def _count(self, row: Diff) -> None:
        offset, length, exists = row
        self._bar.add(offset, length, is_data=exists)
        self._bytes[exists] += length
        object_set = offset // (self._layout.object_size * self._layout.stripe_count)
        if object_set != self._set:
            self._set, self._of_set = object_set, set()
        before = len(self._of_set)
        self._of_set.update(extent.object_no for extent in file_to_extents(self._layout, offset, length))
        self._objects += len(self._of_set) - before

    def tail(self) -> Iterator[str]:
        encoding, data, zeros = sys.stdout.encoding, self._bytes[True], self._bytes[False]
        yield f"{self._bar.draw(encoding)}\n{legend(encoding, format_bytes(self._bar.cell_bytes), KINDS)}\n"
        yield (
            f"{data + zeros} bytes in {self._objects} objects: {data} data ({format_bytes(data)}), "
            f"{zeros} zero ({format_bytes(zeros)})\n"
        )


def whole_objects(layout: Layout, size: int, extents: Iterable[Diff]) -> Iterator[Diff]:
    """Each object that has a change, as extents in order, up to the image's size; zero if all its changes are.

    `extents` are in order and hold whole object sets; so does the result.
    """
    period = layout.object_size * layout.stripe_count
    number, touched = 0, dict[int, bool]()
    for extent in extents:
        if extent.offset // period != number:
            yield from _all_of(layout, size, touched)
            number, touched = extent.offset // period, {}
        for part in file_to_extents(layout, extent.offset, extent.length):
            touched[part.object_no] = touched.get(part.object_no, False) or extent.exists
    yield from _all_of(layout, size, touched)


def _all_of(layout: Layout, size: int, touched: dict[int, bool]) -> list[Diff]:
    return sorted(
        Diff(offset, min(length, size - offset), exists)
        for number, exists in touched.items()
        for offset, length in extent_to_file(layout, number, 0, layout.object_size)
        if offset < size
    )


async def _write(pieces: Iterable[str]) -> None:
    """Write to standard output, whose reader may be slow. Raises BrokenPipeError, TargetError."""
    text = "".join(pieces).encode(sys.stdout.encoding, "surrogateescape")
    if text:
        await run_in_thread(_write_all, text, abandon_on_cancel=True)


def _write_all(text: bytes) -> None:
    rest = memoryview(text)
    try:
        while rest:
            rest = rest[os.write(STDOUT, rest) :]
    except BrokenPipeError:
        raise
    except OSError as error:
        raise TargetError(f"cannot write to standard output: {error.strerror}", error.errno) from error
