"""`rbdfs export`: copy one image or snapshot to a file or a pipe, without a mount."""

import hashlib
import json
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.malloc import use_one_heap
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.ceph.image.ceph_image import CephImage
from rbdfs.commands.progress import load_bar, show_progress, summary
from rbdfs.commands.resolve import connect_for, find, tell, tell_of_writers, with_pool
from rbdfs.commands.shutdown import SIGNALLED, exit_at_the_latest, until_signalled
from rbdfs.commands.update import Plan, copied_of, plan_update
from rbdfs.errors import LabelError, RbdfsError, TargetError, UsageError
from rbdfs.export.copy import Copy, CopyOptions
from rbdfs.export.forced_file import ForcedFile
from rbdfs.export.journal import origin_of
from rbdfs.export.label import Copied
from rbdfs.export.new_file import NewFile, check_new
from rbdfs.export.stream import Stream
from rbdfs.export.target import Output
from rbdfs.export.updated_file import UpdatedFile
from rbdfs.image.striper import MIB
from rbdfs.spec import ImageSpec
from rbdfs.threads import run_in_thread

STDOUT = 1
FAILED = 1
NOT_BELIEVED = 3
"""What PATH is a copy of is not known: `--full` can help."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What `rbdfs export` was asked for."""

    cluster: ClusterOptions
    image: str
    """An image spec, as the rbd command takes it."""
    path: Path | None
    """None is standard output."""
    force: bool = False
    """Whether a file or device that is there may be written over."""
    resume: bool = False
    """Whether an export that did not end is continued."""
    concurrency: int | None = None
    """Reads in flight; None is what `rbd_concurrent_management_ops` says."""
    bytes_per_second: int | None = None
    checksum: str | None = None
    """hashlib's name of a digest to print of the whole image."""
    progress: bool = True
    update: bool = False
    """Whether a copy of an earlier snapshot is brought up to date."""
    full: bool = False
    """Whether all of it is compared for that."""
    as_json: bool = False
    """Whether figures of it are printed."""


def export(options: ExportOptions) -> int:
    """Copy the image. The exit status; every failure has been told in one line by then.

    Raises UsageError, and RbdfsError where nothing was begun.
    """
    spec = ImageSpec.parse(options.image, default_pool="")
    if options.resume and not spec.snapshot:
        raise UsageError(f"{spec.image} may have changed meanwhile: --resume continues exports of a snapshot only")
    if options.resume and (options.path is None or options.force):
        raise UsageError("--resume continues a file of its own; it does not go with - or --force")
    if options.update and not spec.snapshot:
        raise UsageError(f"{spec.image} changes while it is read: --update takes a snapshot, {spec.image}@NAME")
    if options.update and (options.path is None or options.force):
        raise UsageError("--update writes to a file or block device; it does not go with - or --force")
    if options.full and not options.update:
        raise UsageError("--full is a way to --update")
    if options.as_json and options.path is None:
        raise UsageError("--json writes to standard output, and the image goes there")
    if options.path is not None and not options.force and not (options.update and os.path.lexists(options.path)):
        check_new(options.path, resume=options.resume or options.update)
    if options.progress:
        load_bar()
    use_one_heap()
    return trio.run(_Export(options, spec).run)


class _Export:
    """The composition root: wires the parts, and takes them apart in reverse."""

    def __init__(self, options: ExportOptions, spec: ImageSpec) -> None:
        self._options = options
        self._spec = spec
        self._digest = hashlib.new(options.checksum) if options.checksum else None
        self._cluster: Cluster | None = None
        self._source: CephImage | None = None
        self._output: Output | None = None
        self._plan: Plan | None = None
        self._copied: Copied | None = None
        self._copy: Copy | None = None
        self._written_bytes = 0
        self._failure: RbdfsError | None = None
        self._began = 0.0
        self._status = 0

    async def run(self) -> int:
        """The exit status."""
        self._began = trio.current_time()
        await until_signalled(self._work, self._end)
        return self._status

    async def _end(self, signalled: signal.Signals | None) -> None:
        self._status = SIGNALLED + signalled if signalled else _status_of(self._failure)
        if signalled:
            self._tell_failure(f"stopped by {signalled.name}")
        elif self._failure:
            self._tell_failure(str(self._failure))
        elif self._source is not None:
            self._tell_success(self._source.size, trio.current_time() - self._began)
        with exit_at_the_latest(self._status):
            for image in (*(self._plan.others if self._plan is not None else ()), self._source):
                if image is not None:
                    await image.close()
            if self._cluster is not None:
                await self._cluster.aclose()

    async def _work(self) -> None:
        """Raises nothing that is understood: `self._failure` has it."""
        try:
            await self._prepare()
            if self._plan is None or self._plan.towards:
                await self._copy_all()
            elif self._output is not None:
                self._output.abandon()  # it is a copy of this snapshot already
                self._output = None
            if self._failure is None and self._plan is not None and self._digest is not None:
                await run_in_thread(self._digest_file, self._digest, abandon_on_cancel=True)
        except RbdfsError as error:
            self._failure = error

    async def _prepare(self) -> None:
        self._cluster = cluster = await connect_for(self._options.cluster, self._spec)
        self._spec = with_pool(cluster, self._spec)
        image = await find(cluster, self._spec)
        if image.snapshot_id is None:
            await tell_of_writers(cluster, self._spec, image, "export")
        self._source = source = await cluster.open_image(self._spec, image)
        if self._options.path is not None:
            self._copied = await copied_of(cluster, self._spec, source, wait=self._options.update)
        if self._options.update and self._copied is None:
            raise RbdfsError(f"{self._spec} may be being filled (deep copy, mirroring, migration); try again later")
        self._output = await run_in_thread(self._open_output, cluster.fsid, image, source)
        if isinstance(self._output, UpdatedFile) and self._copied is not None:
            await self._plan_update(cluster, source, self._output, self._copied)

    async def _plan_update(self, cluster: Cluster, source: CephImage, target: UpdatedFile, new: Copied) -> None:
        self._plan = plan = await plan_update(cluster, source, new, target, full=self._options.full)
        if plan.notice:
            tell(plan.notice)
        if plan.towards:
            begin = partial(target.begin, plan.of, plan.towards, compare=plan.changes is None)
            await run_in_thread(begin)

    def _open_output(self, fsid: str, image: ImageRef, source: CephImage) -> Output:
        path = self._options.path
        if path is None:
            return Stream(STDOUT, "standard output")
        least_zeros = source.object_size * source.stripe_count
        if self._options.update and path.exists():
            return UpdatedFile(path)
        if self._options.force and path.exists():
            if not (path.is_file() or path.is_block_device()):
                return Stream(_open_to_write(path), str(path), owned=True)
            return ForcedFile(path, source.size, least_zeros, self._copied)
        origin = None if image.snapshot_id is None else origin_of(fsid, image, source.size)
        resume = self._options.resume or self._options.update
        return NewFile(
            path, source.size, least_zeros, origin, self._copied, resume=resume, restart=self._options.update
        )

    async def _copy_all(self) -> None:
        assert self._cluster is not None  # noqa: S101  (_prepare has set all three)
        assert self._source is not None  # noqa: S101
        assert self._output is not None  # noqa: S101
        concurrency = self._options.concurrency or int(self._cluster.setting("rbd_concurrent_management_ops"))
        how = CopyOptions(concurrency, self._options.bytes_per_second)
        changes = self._plan.changes if self._plan is not None else None
        digest = self._digest if self._plan is None else None  # else of all of the file, when it is whole
        self._copy = copy = Copy(self._source, self._output, how, digest, changes)
        async with trio.open_nursery() as nursery:
            if self._options.progress:
                nursery.start_soon(show_progress, copy, str(self._spec))
            try:
                await copy.run()
                if changes is not None:
                    await changes.confirm()
                await run_in_thread(self._output.finish)
                self._written_bytes = self._output.written_bytes
                self._output = None
            except RbdfsError as error:
                self._failure = error
            nursery.cancel_scope.cancel()

    def _tell_failure(self, why: str) -> None:
        if self._copy is not None:
            why += f"; the copy of {self._spec} ended at offset {self._copy.done_below}"
        if self._output is not None and (rest := self._output.abandon()):
            why += f"; {rest}"
        self._output = None
        tell(why)

    def _digest_file(self, digest: "hashlib._Hash") -> None:
        """All of what was brought up to date."""
        assert self._options.path is not None  # noqa: S101
        assert self._source is not None  # noqa: S101
        left = self._source.size  # a block device may be larger
        try:
            with self._options.path.open("rb", buffering=0) as file:
                while left and (data := file.read(min(left, MIB))):
                    digest.update(data)
                    left -= len(data)
        except OSError as error:
            raise TargetError(f"cannot read {self._options.path}: {error.strerror}", error.errno) from error

    def _tell_success(self, size: int, seconds: float) -> None:
        path, copy, plan = self._options.path, self._copy, self._plan
        if self._digest is not None:
            # As sha256sum and its kin write it; where standard output has the image or the figures, beside it.
            file = sys.stderr if path is None or self._options.as_json else sys.stdout
            print(f"{self._digest.hexdigest()}  {path or '-'}", file=file, flush=True)
        if self._options.as_json:
            figures = {
                "image": str(self._spec),
                "path": str(path),
                "from_snap": plan.of.snapshot if plan is not None and plan.of is not None else None,
                "size": size,
                "changed_bytes": copy.changed_bytes if copy is not None else 0,
                "read_bytes": copy.copied_bytes if copy is not None else 0,
                "written_bytes": self._written_bytes,
                "seconds": round(seconds, 3),
            }
            print(json.dumps(figures), flush=True)
        elif self._options.progress and not sys.stderr.isatty():
            if copy is None:
                tell(f"{path} is a copy of {self._spec} already")
            else:
                tell(summary(copy, str(self._spec), seconds))


def _status_of(failure: RbdfsError | None) -> int:
    return 0 if failure is None else NOT_BELIEVED if isinstance(failure, LabelError) else FAILED


def _open_to_write(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TargetError(f"cannot open {path}: {error.strerror}", error.errno) from error
