"""`rbdfs export`: copy one image or snapshot to a file or a pipe, without a mount."""

import hashlib
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from rbdfs.catalog import ImageRef
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connect import ClusterOptions
from rbdfs.ceph.image import CephImage
from rbdfs.ceph.memory import use_one_heap
from rbdfs.commands.ending import exit_at_the_latest, until_signalled
from rbdfs.commands.find import find
from rbdfs.commands.progress import load_bar, show_progress, summary
from rbdfs.errors import RbdfsError, TargetError, UsageError
from rbdfs.image.copy import Copy, CopyOptions
from rbdfs.spec import ImageSpec
from rbdfs.target.file import FileTarget, ForcedFile, NewFile, check_new
from rbdfs.target.journal import Origin
from rbdfs.target.stream import Stream
from rbdfs.threads import in_thread_to_its_end

STDOUT = 1
FAILED = 1
SIGNALLED = 128  # and the signal's number: the shell's convention


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


Output = FileTarget | Stream


def export(options: ExportOptions) -> int:
    """Copy the image. The exit status; every failure has been told in one line by then.

    Raises UsageError, and RbdfsError where nothing was begun.
    """
    spec = ImageSpec.parse(options.image, default_pool="")
    if options.resume and not spec.snapshot:
        raise UsageError(f"{spec.image} may have changed meanwhile: --resume continues exports of a snapshot only")
    if options.resume and (options.path is None or options.force):
        raise UsageError("--resume continues a file of its own; it does not go with - or --force")
    if options.path is not None and not options.force:
        check_new(options.path, resume=options.resume)
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
        self._copy: Copy | None = None
        self._failure: RbdfsError | None = None
        self._began = 0.0
        self._status = 0

    async def run(self) -> int:
        """The exit status."""
        self._began = trio.current_time()
        await until_signalled(self._work, self._end)
        return self._status

    async def _end(self, signalled: signal.Signals | None) -> None:
        self._status = SIGNALLED + signalled if signalled else FAILED if self._failure else 0
        if signalled:
            self._tell_failure(f"stopped by {signalled.name}")
        elif self._failure:
            self._tell_failure(str(self._failure))
        elif self._copy is not None:
            self._tell_success(self._copy, trio.current_time() - self._began)
        with exit_at_the_latest(self._status):
            if self._source is not None:
                await self._source.close()
            if self._cluster is not None:
                await self._cluster.aclose()

    async def _work(self) -> None:
        """Raises nothing that is understood: `self._failure` has it."""
        try:
            await self._prepare()
            await self._copy_all()
        except RbdfsError as error:
            self._failure = error

    async def _prepare(self) -> None:
        pools = (self._spec.pool,) if self._spec.pool else ()
        self._cluster = cluster = await Cluster.connect(self._options.cluster, pools)
        if not self._spec.pool:
            self._spec = replace(self._spec, pool=cluster.setting("rbd_default_pool"))
        image = await find(cluster, self._spec)
        if image.snapshot_id is None:
            await self._warn_of_writers(cluster, image)
        self._source = source = await cluster.open_image(self._spec, image)
        self._output = await in_thread_to_its_end(self._open_output, cluster.fsid, image, source)

    async def _warn_of_writers(self, cluster: Cluster, image: ImageRef) -> None:
        writers = await cluster.writers(image)
        if writers:
            snapshot = f"{self._spec}@NAME"
            _tell(
                f"warning: {self._spec} may be written to, by {', '.join(writers)}, so that the copy is of no one "
                f"moment; 'rbd snap create {snapshot}' and export {snapshot}"
            )

    def _open_output(self, fsid: str, image: ImageRef, source: CephImage) -> Output:
        path = self._options.path
        if path is None:
            return Stream(STDOUT, "standard output")
        least_zeros = source.object_size * source.stripe_count
        if self._options.force and path.exists():
            if not (path.is_file() or path.is_block_device()):
                return Stream(_open_to_write(path), str(path), owned=True)
            return ForcedFile(path, source.size, least_zeros)
        origin = None
        if image.snapshot_id is not None:
            where = image.namespace
            origin = Origin(fsid, where.pool.id, where.name, image.id, image.snapshot_id, source.size)
        return NewFile(path, source.size, least_zeros, origin, resume=self._options.resume)

    async def _copy_all(self) -> None:
        assert self._cluster is not None  # noqa: S101  (_prepare has set all three)
        assert self._source is not None  # noqa: S101
        assert self._output is not None  # noqa: S101
        concurrency = self._options.concurrency or int(self._cluster.setting("rbd_concurrent_management_ops"))
        how = CopyOptions(concurrency, self._options.bytes_per_second)
        self._copy = copy = Copy(self._source, self._output, how, self._digest)
        async with trio.open_nursery() as nursery:
            if self._options.progress:
                nursery.start_soon(show_progress, copy, str(self._spec))
            try:
                await copy.run()
                await in_thread_to_its_end(self._output.finish)
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
        _tell(why)

    def _tell_success(self, copy: Copy, seconds: float) -> None:
        if self._digest is not None:
            # As sha256sum and its kin write it; where standard output has the image, beside it.
            path = self._options.path
            file = sys.stderr if path is None else sys.stdout
            print(f"{self._digest.hexdigest()}  {path or '-'}", file=file, flush=True)
        if self._options.progress and not sys.stderr.isatty():
            _tell(summary(copy, str(self._spec), seconds))


def _open_to_write(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TargetError(f"cannot open {path}: {error.strerror}", error.errno) from error


def _tell(sentence: str) -> None:
    print(f"rbdfs: {sentence}", file=sys.stderr, flush=True)
