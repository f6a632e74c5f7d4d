"""`rbdfs verify`: compare a file or block device with an image, byte by byte."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rbdfs.catalog import ImageRef
from rbdfs.ceph.bindings.malloc import use_one_heap
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.commands.formatting import format_bytes, json_lines
from rbdfs.commands.image_command import ImageCommand, print_stderr
from rbdfs.commands.progress import load_bar, with_progress
from rbdfs.errors import LabelError
from rbdfs.export.compared_file import ComparedFile
from rbdfs.export.copy import Copy, CopyOptions
from rbdfs.export.journal import origin_of
from rbdfs.export.label import Copied, Label
from rbdfs.threads import run_in_thread

SAME, DIFFERS = 0, 1

LINES = 100
"""Ranges to print for a person; the rest is counted."""


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """The options of `rbdfs verify`."""

    cluster: ClusterOptions
    image: str
    """An image spec, as the rbd command takes it."""
    path: Path
    concurrency: int | None = None
    """Reads in flight; None is `rbd_concurrent_management_ops`."""
    bytes_per_second: int | None = None
    progress: bool = True
    as_json: bool = False


def verify(options: VerifyOptions) -> int:
    """Compare. Returns the exit status; each failure is a line on stderr. Raises UsageError."""
    command = _Verify(options)
    if options.progress:
        load_bar()
    use_one_heap()
    return command.run()


class _Verify(ImageCommand):
    def __init__(self, options: VerifyOptions) -> None:
        super().__init__(options.cluster, options.image)
        self._options = options
        self._target: ComparedFile
        self._copy: Copy | None = None
        self._is_mixture = False

    async def work(self) -> None:
        options = self._options
        image = await self.find()
        await self.warn_of_writers(image, "verify")
        source = await self.open(image)
        self._target = target = await run_in_thread(ComparedFile, options.path, source.size)
        self.closing.callback(target.close)
        await self._read_label(target, image)
        how = CopyOptions(self.concurrency(options.concurrency), options.bytes_per_second)
        self._copy = copy = Copy(source, target, how)
        await with_progress(copy.run, copy, str(self.spec), shown=options.progress)
        differs = target.found.total_bytes > 0 or not target.has_size
        self.status = DIFFERS if differs or self._is_mixture else SAME
        self.lines = list(self._as_json(copy) if options.as_json else self._as_text())

    async def _read_label(self, target: ComparedFile, image: ImageRef) -> None:
        try:
            label = await run_in_thread(target.read_label)
        except LabelError as error:
            print_stderr(f"{error}: the label is not trusted, and all of the file is compared")
            return
        self._is_mixture = label is not None and bool(label.towards)
        if label is not None and (notice := _notice_of(label, target.path, self.cluster.fsid, image)):
            print_stderr(notice)

    def failed(self, why: str) -> None:
        if self._copy is not None:
            found = self._target.found.total_bytes
            so_far = f"{found} bytes differ so far" if found else "nothing differs so far"
            why += f"; {self._options.path} was compared to offset {self._copy.done_below}, and {so_far}"
        print_stderr(why)

    def _as_text(self) -> Iterator[str]:
        source, target, path, found = self.source, self._target, self._options.path, self._target.found
        if not target.has_size:
            yield f"{path} has {target.size} bytes, and {self.spec} {source.size}"
        ranges = found.in_order()
        width = len(str(max(source.size, target.size)))
        if ranges:
            yield f"{'OFFSET':>{width}}  {'LENGTH':>{width}}"
        for start, end in ranges[:LINES]:
            yield f"{start:{width}}  {end - start:{width}}"
        if len(ranges) > LINES:
            yield f"and {len(ranges) - LINES} more ranges: --json has them"
        if found.total_bytes:
            yield f"{path} differs from {self.spec}: {found.total_bytes} bytes, in sectors of 512 bytes"
        elif self._is_mixture:
            size = format_bytes(source.size)
            yield f"all bytes are those of {self.spec} ({size}), but {path} is not known to be whole"
        else:
            yield f"{path} is the same as {self.spec}, {format_bytes(source.size)}"

    def _as_json(self, copy: Copy) -> Iterator[str]:
        source, target = self.source, self._target
        figures = {
            "image": str(self.spec),
            "path": str(self._options.path),
            "size": source.size,
            "path_size": target.size,
            "same": self.status == SAME,
            "is_mixture": self._is_mixture,
            "differing_bytes": target.found.total_bytes,
            "left_out_bytes": target.found.left_out_bytes,
            "read_bytes": copy.copied_bytes,
            "seconds": round(self.seconds, 3),
        }
        ranges = [{"offset": start, "length": end - start} for start, end in target.found.in_order()]
        return json_lines(figures, "ranges", ranges)


def _notice_of(label: Label, path: Path, fsid: str, image: ImageRef) -> str:
    """A sentence about the label; nothing if it names the snapshot that is compared."""
    if label.towards:
        towards = label.towards[-1]
        how = f"'rbdfs export --update {towards.image}@{towards.snapshot} {path}' continues it"
        if label.of is None:
            return f"{path} is not whole: an export --full of {towards} to it did not finish; {how} (with --full)"
        return f"{path} is not whole, but between {label.of} and {towards}; {how}"
    if label.of is None or _is_of(label.of, fsid, image):
        return ""
    return f"{path} says that it is a copy of {label.of}, which is another image or snapshot"


def _is_of(copied: Copied, fsid: str, image: ImageRef) -> bool:
    return image.snapshot_id is not None and copied.origin == origin_of(fsid, image, copied.origin.size)
