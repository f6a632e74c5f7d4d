"""`rbdfs export`: copy one image or snapshot to a file or a pipe, without a mount."""

import hashlib
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.malloc import use_one_heap
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.commands.image_command import ImageCommand, print_stderr
from rbdfs.commands.progress import load_bar, summary, with_progress
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
NOT_TRUSTED = 3
"""The exit status if PATH is not known to be a copy of an earlier snapshot: `--full` can help."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """The options of `rbdfs export`."""

    cluster: ClusterOptions
    image: str
    """An image spec, as the rbd command takes it."""
    path: Path | None
    """None is standard output."""
    force: bool = False
    """Whether to overwrite an existing file or device."""
    resume: bool = False
    """Whether to continue an unfinished export."""
    concurrency: int | None = None
    """Reads in flight; None is `rbd_concurrent_management_ops`."""
    bytes_per_second: int | None = None
    checksum: str | None = None
    """Name of the digest of the whole image to print, as hashlib knows it."""
    progress: bool = True
    update: bool = False
    """Whether to write only what changed since the snapshot that PATH is a copy of."""
    full: bool = False
    """Whether to compare all of PATH instead."""
    as_json: bool = False
    """Whether to print figures."""


def export(options: ExportOptions) -> int:
    """Copy the image. Returns the exit status; each failure of the copy is a line on stderr.

    Raises UsageError; RbdfsError if nothing was begun.
    """
    command = _Export(options)
    _check(options, command.spec)
    if options.progress:
        load_bar()
    use_one_heap()
    return command.run()


def _check(options: ExportOptions, spec: ImageSpec) -> None:
    """Raise UsageError if options contradict each other; TargetError if PATH cannot be made."""
    if options.resume and not spec.snapshot:
        raise UsageError(f"{spec.image} may have changed since: --resume continues exports of a snapshot only")
    if options.resume and (options.path is None or options.force):
        raise UsageError("--resume continues PATH.partial; it does not go with - or --force")
    if options.update and not spec.snapshot:
        raise UsageError(f"{spec.image} changes while it is read: --update takes a snapshot, {spec.image}@NAME")
    if options.update and (options.path is None or options.force):
        raise UsageError("--update writes to a file or block device; it does not go with - or --force")
    if options.full and not options.update:
        raise UsageError("--full goes with --update only")
    if options.as_json and options.path is None:
        raise UsageError("--json writes to standard output, and the image goes there")
    if options.path is not None and not options.force and not (options.update and os.path.lexists(options.path)):
        check_new(options.path, resume=options.resume or options.update)


class _Export(ImageCommand):
    def __init__(self, options: ExportOptions) -> None:
        super().__init__(options.cluster, options.image)
        self._options = options
        self._digest = hashlib.new(options.checksum) if options.checksum else None
        self._output: Output | None = None
        """None once it is finished or abandoned."""
        self._plan: Plan | None = None
        self._copied: Copied | None = None
        self._copy: Copy | None = None
        self._written_bytes = 0

    async def work(self) -> None:
        options = self._options
        image = await self.find()
        await self.warn_of_writers(image, "export")
        source = await self.open(image)
        if options.path is not None:
            self._copied = await copied_of(self.cluster, self.spec, source, wait=options.update)
        if options.update and self._copied is None:
            raise RbdfsError(f"{self.spec} may be being filled (deep copy, mirroring, migration); try again later")
        self._output = output = await run_in_thread(self._open_output, image)
        if isinstance(output, UpdatedFile) and self._copied is not None:
            self._plan = await self._begin_update(output, self._copied)
        if self._plan is None or self._plan.towards:
            await self._copy_all(output)
        else:
            output.abandon()  # it is a copy of this snapshot already
        self._output = None
        if self._plan is not None and self._digest is not None and options.path is not None:
            await run_in_thread(_digest_file, self._digest, options.path, source.size, abandon_on_cancel=True)
        self._print_success()

    async def _begin_update(self, target: UpdatedFile, new: Copied) -> Plan:
        plan = await plan_update(self.cluster, self.source, new, target, self.closing, full=self._options.full)
        if plan.notice:
            print_stderr(plan.notice)
        if plan.towards:
            begin = partial(target.begin, plan.of, plan.towards, compare=plan.changes is None)
            await run_in_thread(begin)
        return plan

    def _open_output(self, image: ImageRef) -> Output:
        options, path, source = self._options, self._options.path, self.source
        if path is None:
            return Stream(STDOUT, "standard output")
        least_zeros = source.object_size * source.stripe_count
        if options.update and path.exists():
            return UpdatedFile(path)
        if options.force and path.exists():
            if not (path.is_file() or path.is_block_device()):
                return Stream(_open_to_write(path), str(path), owned=True)
            return ForcedFile(path, source.size, least_zeros, self._copied)
        origin = None if image.snapshot_id is None else origin_of(self.cluster.fsid, image, source.size)
        resume = options.resume or options.update
        return NewFile(path, source.size, least_zeros, origin, self._copied, resume=resume, restart=options.update)

    async def _copy_all(self, output: Output) -> None:
        how = CopyOptions(self.concurrency(self._options.concurrency), self._options.bytes_per_second)
        changes = self._plan.changes if self._plan is not None else None
        digest = self._digest if self._plan is None else None  # an updated file is digested as a whole, later
        self._copy = copy = Copy(self.source, output, how, digest, changes)

        async def copy_and_finish() -> None:
            await copy.run()
            if changes is not None:
                await changes.confirm()
            await run_in_thread(output.finish)
            self._written_bytes = output.written_bytes
            self._output = None

        await with_progress(copy_and_finish, copy, str(self.spec), shown=self._options.progress)

    def _print_success(self) -> None:
        path, copy = self._options.path, self._copy
        if self._digest is not None:
            # The format of sha256sum. If the image or the figures go to standard output, it goes to stderr.
            file = sys.stderr if path is None or self._options.as_json else sys.stdout
            print(f"{self._digest.hexdigest()}  {path or '-'}", file=file, flush=True)
        if self._options.as_json:
            print(json.dumps(self._figures()), flush=True)
        elif self._options.progress and not sys.stderr.isatty():
            if copy is None:
                print_stderr(f"{path} is a copy of {self.spec} already")
            else:
                print_stderr(summary(copy, str(self.spec), self.seconds))

    def _figures(self) -> dict[str, object]:
        copy, plan = self._copy, self._plan
        return {
            "image": str(self.spec),
            "path": str(self._options.path),
            "from_snap": plan.of.snapshot if plan is not None and plan.of is not None else None,
            "size": self.source.size,
            "changed_bytes": copy.changed_bytes if copy is not None else 0,
            "read_bytes": copy.copied_bytes if copy is not None else 0,
            "written_bytes": self._written_bytes,
            "seconds": round(self.seconds, 3),
        }

    def status_of(self, error: RbdfsError) -> int:
        return NOT_TRUSTED if isinstance(error, LabelError) else super().status_of(error)

    def failed(self, why: str) -> None:
        if self._copy is not None:
            why += f"; the copy of {self.spec} ended at offset {self._copy.done_below}"
        if self._output is not None and (rest := self._output.abandon()):
            why += f"; {rest}"
        print_stderr(why)


def _digest_file(digest: "hashlib._Hash", path: Path, size: int) -> None:
    """Digest the first `size` bytes: a block device may be larger than the image. Raises TargetError."""
    try:
        with path.open("rb", buffering=0) as file:
            while size and (data := file.read(min(size, MIB))):
                digest.update(data)
                size -= len(data)
    except OSError as error:
        raise TargetError(f"cannot read {path}: {error.strerror}", error.errno) from error


def _open_to_write(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise TargetError(f"cannot open {path}: {error.strerror}", error.errno) from error
