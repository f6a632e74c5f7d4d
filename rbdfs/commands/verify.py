"""`rbdfs verify`: compare a file or block device with an image, byte by byte."""

import json
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.malloc import use_one_heap
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.commands.progress import load_bar, show_progress
from rbdfs.commands.resolve import connect_for, find, tell, tell_of_writers, with_pool
from rbdfs.commands.shutdown import SIGNALLED, exit_at_the_latest, until_signalled
from rbdfs.commands.units import in_units
from rbdfs.errors import LabelError, RbdfsError
from rbdfs.export.compared_file import ComparedFile
from rbdfs.export.copy import Copy, CopyOptions
from rbdfs.export.journal import origin_of
from rbdfs.export.label import Copied, Label
from rbdfs.spec import ImageSpec
from rbdfs.threads import run_in_thread

SAME, DIFFERS, FAILED = 0, 1, 1

LINES = 100
"""Ranges that a person reads; the rest is counted."""


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What `rbdfs verify` was asked for."""

    cluster: ClusterOptions
    image: str
    """An image spec, as the rbd command takes it."""
    path: Path
    concurrency: int | None = None
    """Reads in flight; None is what `rbd_concurrent_management_ops` says."""
    bytes_per_second: int | None = None
    progress: bool = True
    as_json: bool = False


def verify(options: VerifyOptions) -> int:
    """Compare. The exit status; every failure has been told in one line by then. Raises UsageError."""
    spec = ImageSpec.parse(options.image, default_pool="")
    if options.progress:
        load_bar()
    use_one_heap()
    command = _Verify(options, spec)
    status = trio.run(command.run)
    for line in command.told:  # who reads it may be slow, or gone
        print(line)
    return status


class _Verify:
    """The composition root: wires the parts, and takes them apart in reverse."""

    def __init__(self, options: VerifyOptions, spec: ImageSpec) -> None:
        self.told: Sequence[str] = ()
        """What is to be printed."""
        self._options = options
        self._spec = spec
        self._cluster: Cluster | None = None
        self._source: CephImage | None = None
        self._target: ComparedFile | None = None
        self._copy: Copy | None = None
        self._is_mixture = False
        self._failure: RbdfsError | None = None
        self._began = 0.0
        self._status = FAILED

    async def run(self) -> int:
        """The exit status."""
        self._began = trio.current_time()
        await until_signalled(self._work, self._end)
        return self._status

    async def _work(self) -> None:
        """Raises nothing that is understood: `self._failure` has it."""
        try:
            await self._compare(*await self._prepare())
        except RbdfsError as error:
            self._failure = error

    async def _prepare(self) -> tuple[Cluster, CephImage, ComparedFile]:
        self._cluster = cluster = await connect_for(self._options.cluster, self._spec)
        self._spec = with_pool(cluster, self._spec)
        image = await find(cluster, self._spec)
        if image.snapshot_id is None:
            await tell_of_writers(cluster, self._spec, image, "verify")
        self._source = source = await cluster.open_image(self._spec, image)
        self._target = target = await run_in_thread(ComparedFile, self._options.path, source.size)
        try:
            label = await run_in_thread(target.read_label)
        except LabelError as error:
            tell(f"{error}: that it is a copy is not taken for granted, and all of it is compared")
        else:
            self._is_mixture = label is not None and bool(label.towards)
            if label is not None and (said := _said_of(label, target.path, cluster.fsid, image)):
                tell(said)
        return cluster, source, target

    async def _compare(self, cluster: Cluster, source: CephImage, target: ComparedFile) -> None:
        concurrency = self._options.concurrency or int(cluster.setting("rbd_concurrent_management_ops"))
        self._copy = copy = Copy(source, target, CopyOptions(concurrency, self._options.bytes_per_second))
        async with trio.open_nursery() as nursery:
            if self._options.progress:
                nursery.start_soon(show_progress, copy, str(self._spec))
            try:
                await copy.run()
            except RbdfsError as error:
                self._failure = error
            nursery.cancel_scope.cancel()

    async def _end(self, signalled: signal.Signals | None) -> None:
        if signalled:
            self._status = SIGNALLED + signalled
            self._tell_failure(f"stopped by {signalled.name}")
        elif self._failure is not None:
            self._tell_failure(str(self._failure))
        elif self._source is not None and self._target is not None and self._copy is not None:
            differs = self._target.found.total_bytes > 0 or not self._target.has_size
            self._status = DIFFERS if differs or self._is_mixture else SAME
            self.told = list(self._tell(self._source, self._target, self._copy))
        with exit_at_the_latest(self._status):
            if self._target is not None:
                self._target.close()
            if self._source is not None:
                await self._source.close()
            if self._cluster is not None:
                await self._cluster.aclose()

    def _tell_failure(self, why: str) -> None:
        if self._copy is not None and self._target is not None:
            found = self._target.found.total_bytes
            so_far = f"{found} bytes differ so far" if found else "nothing differs so far"
            why += f"; {self._options.path} was compared to offset {self._copy.done_below}, and {so_far}"
        tell(why)

    def _tell(self, source: CephImage, target: ComparedFile, copy: Copy) -> Iterator[str]:
        return self._as_json(source, target, copy) if self._options.as_json else self._as_text(source, target)

    def _as_text(self, source: CephImage, target: ComparedFile) -> Iterator[str]:
        path, found = self._options.path, target.found
        if not target.has_size:
            yield f"{path} has {target.size} bytes, and {self._spec} {source.size}"
        ranges = found.in_order()
        width = len(str(max(source.size, target.size)))
        if ranges:
            yield f"{'OFFSET':>{width}}  {'LENGTH':>{width}}"
        for start, end in ranges[:LINES]:
            yield f"{start:{width}}  {end - start:{width}}"
        if len(ranges) > LINES:
            yield f"and {len(ranges) - LINES} more ranges: --json has them"
        if found.total_bytes:
            yield f"{path} differs from {self._spec}: {found.total_bytes} bytes, in sectors of 512 bytes"
        elif self._is_mixture:
            yield f"all bytes are those of {self._spec} ({in_units(source.size)}), but {path} is not known to be whole"
        else:
            yield f"{path} is the same as {self._spec}, {in_units(source.size)}"

    def _as_json(self, source: CephImage, target: ComparedFile, copy: Copy) -> Iterator[str]:
        figures = {
            "image": str(self._spec),
            "path": str(self._options.path),
            "size": source.size,
            "path_size": target.size,
            "same": self._status == SAME,
            "is_mixture": self._is_mixture,
            "differing_bytes": target.found.total_bytes,
            "left_out_bytes": target.found.left_out_bytes,
            "read_bytes": copy.copied_bytes,
            "seconds": round(trio.current_time() - self._began, 3),
        }
        yield json.dumps(figures)[:-1] + ', "ranges": ['
        ranges = target.found.in_order()
        for number, (start, end) in enumerate(ranges, 1):
            yield json.dumps({"offset": start, "length": end - start}) + ("," if number < len(ranges) else "")
        yield "]}"


def _said_of(label: Label, path: Path, fsid: str, image: ImageRef) -> str:
    """What a person should know of it; nothing if it says that it is a copy of what was asked for."""
    if label.towards:
        towards = label.towards[-1]
        again = f"'rbdfs export --update {towards.image}@{towards.snapshot} {path}' goes on with it"
        if label.of is None:
            return f"{path} is not whole: an export --full of {towards} to it did not end; {again} (with --full)"
        return f"{path} is not whole, but between {label.of} and {towards}; {again}"
    if label.of is None or _is_of(label.of, fsid, image):
        return ""
    return f"{path} says that it is a copy of {label.of}, which is another image or snapshot"


def _is_of(copied: Copied, fsid: str, image: ImageRef) -> bool:
    return image.snapshot_id is not None and copied.origin == origin_of(fsid, image, copied.origin.size)
