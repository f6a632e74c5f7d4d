"""`rbdfs diff`: what has changed in an image, as `rbd diff` lists it, with a picture of where."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace

import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.librbd import Diff
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.ceph.image.diff import ImageDiff
from rbdfs.commands.allocation_bar import Picture, legend
from rbdfs.commands.resolve import connect_for, find, tell, with_pool
from rbdfs.commands.shutdown import SIGNALLED, exit_at_the_latest, until_signalled
from rbdfs.commands.units import in_units
from rbdfs.errors import RbdfsError, TargetError, UsageError
from rbdfs.image.striper import Layout, extent_to_file, file_to_extents
from rbdfs.spec import ImageSpec
from rbdfs.threads import run_in_thread

STDOUT = 1
FAILED = 1

KINDS = ("changed data", "changed to zeros", "unchanged")


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """What `rbdfs diff` was asked for."""

    cluster: ClusterOptions
    image: str
    """An image spec, as the rbd command takes it."""
    from_snapshot: str | None = None
    """None is the beginning of time."""
    whole_objects: bool = False
    as_json: bool = False


def diff(options: DiffOptions) -> int:
    """Print it. The exit status; every failure has been told in one line by then. Raises UsageError."""
    spec = ImageSpec.parse(options.image, default_pool="")
    if options.from_snapshot == "":
        raise UsageError("--from-snap takes the name of a snapshot")
    return trio.run(_Diff(options, spec).run)


class _Diff:
    """The composition root: wires the parts, and takes them apart in reverse."""

    def __init__(self, options: DiffOptions, spec: ImageSpec) -> None:
        self._options = options
        self._spec = spec
        self._cluster: Cluster | None = None
        self._source: CephImage | None = None
        self._failure = ""
        self._status = 0

    async def run(self) -> int:
        """The exit status."""
        await until_signalled(self._work, self._end)
        return self._status

    async def _end(self, signalled: signal.Signals | None) -> None:
        if signalled:
            self._status, self._failure = SIGNALLED + signalled, f"stopped by {signalled.name}"
        if self._failure:
            tell(self._failure)
        with exit_at_the_latest(self._status):
            if self._source is not None:
                await self._source.close()
            if self._cluster is not None:
                await self._cluster.aclose()

    async def _work(self) -> None:
        """Raises nothing that is understood."""
        try:
            self._cluster = cluster = await connect_for(self._options.cluster, self._spec)
            self._spec = with_pool(cluster, self._spec)
            image = await find(cluster, self._spec)
            since = await self._since(cluster, image)
            self._source = source = await cluster.open_image(self._spec, image)
            if source.state.is_migrating:
                raise RbdfsError(f"{self._spec} is being migrated: its source may hold what has changed; try later")
            found = await cluster.diff(since, source)
            for start, end in found.unlisted:
                if start < end:
                    tell(
                        f"warning: another parent, or less of it, shows through than at {self._options.from_snapshot}: "
                        f"bytes {start} to {end} may have changed without being listed (nor does rbd diff list them)"
                    )
            await self._print(found, source)
        except RbdfsError as error:
            self._failure, self._status = str(error), FAILED
        except BrokenPipeError:  # who read it is gone
            self._status = FAILED

    async def _since(self, cluster: Cluster, image: ImageRef) -> ImageRef | None:
        name = self._options.from_snapshot
        if name is None:
            return None
        since = await find(cluster, replace(self._spec, snapshot=name))
        if image.snapshot_id is not None and (since.snapshot_id or 0) > image.snapshot_id:
            raise RbdfsError(f"--from-snap {name} is later than {self._spec}")
        return since

    async def _print(self, found: ImageDiff, source: CephImage) -> None:
        layout = Layout(source.object_size, source.stripe_unit, source.stripe_count)
        shown = _Json() if self._options.as_json else _Table(self._spec, self._options.from_snapshot, source, layout)
        await _write(shown.head())
        async with aclosing(found.extents()) as batches:
            async for extents in batches:
                rows = whole_objects(layout, source.size, extents) if self._options.whole_objects else extents
                await _write(shown.rows(rows))
        await _write(shown.tail())


class _Json:
    """As `rbd diff --format json`, a line for each."""

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
    """The columns of `rbd diff`, with what is compared before, and a picture and the totals after."""

    def __init__(self, spec: ImageSpec, since: str | None, source: CephImage, layout: Layout) -> None:
        self._layout = layout
        self._width = max(len("Offset"), len(str(source.size)))
        what = "since it was made" if since is None else f"since {replace(spec, snapshot=since)}"
        self._head = f"{spec}, {in_units(source.size)} in objects of {in_units(source.object_size)}: changes {what}\n"
        self._picture = Picture(0, source.size, source.object_size, shutil.get_terminal_size().columns)
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
        self._picture.add(offset, length, is_data=exists)
        self._bytes[exists] += length
        object_set = offset // (self._layout.object_size * self._layout.stripe_count)
        if object_set != self._set:
            self._set, self._of_set = object_set, set()
        before = len(self._of_set)
        self._of_set.update(extent.object_no for extent in file_to_extents(self._layout, offset, length))
        self._objects += len(self._of_set) - before

    def tail(self) -> Iterator[str]:
        encoding, data, zeros = sys.stdout.encoding, self._bytes[True], self._bytes[False]
        yield f"{self._picture.draw(encoding)}\n{legend(encoding, in_units(self._picture.cell_bytes), KINDS)}\n"
        yield (
            f"{data + zeros} bytes in {self._objects} objects: {data} data ({in_units(data)}), "
            f"{zeros} zero ({in_units(zeros)})\n"
        )


def whole_objects(layout: Layout, size: int, extents: Iterable[Diff]) -> Iterator[Diff]:
    """All of each object that has a change, up to the image's size, in order; it is zero if all its changes are.

    The extents are in order and hold whole object sets; so does what is returned.
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
    """To standard output, whose reader may be slow. Raises BrokenPipeError, TargetError."""
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
