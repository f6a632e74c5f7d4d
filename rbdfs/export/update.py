"""A file that is a copy of an earlier snapshot, or of anything, and becomes one of a later.

From before the first write until after the last, and over a power cut in between, its label says that it is neither:
the label is on the disk before anything is written, and what was written is on the disk before it says that the copy is
whole.
"""

import errno
import fcntl
import logging
import os
import stat
from pathlib import Path

from rbdfs.errors import TargetError
from rbdfs.export import label, syscalls
from rbdfs.export.file import FileTarget, open_existing
from rbdfs.export.label import Copied, Label
from rbdfs.export.zeros import GRAIN

log = logging.getLogger(__name__)

Buffer = bytes | memoryview

COMPARED_BYTES = 64 << 10
"""What is written are whole pieces of this size that differ."""


class UpdatedFile(FileTarget):
    """A file or block device that is there, in which only what differs is written."""

    is_device: bool
    """It has no label, for nothing tells who wrote to it."""

    def __init__(self, path: Path) -> None:
        """Only `begin` changes the file. Raises TargetError."""
        descriptor = open_existing(path)
        # What has changed may be a small part of a long run of zeros: so each page of them counts.
        super().__init__(descriptor, path, GRAIN)
        self.is_blank = False
        self._label = Label(None)
        self._is_compared = False
        self._has_begun = False
        try:
            mode = os.fstat(descriptor).st_mode
            self.is_device = stat.S_ISBLK(mode)
            if not self.is_device and not stat.S_ISREG(mode):
                raise TargetError(f"{path} is neither a file nor a block device", errno.EINVAL)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise TargetError(f"another export writes to {path} now", errno.EBUSY) from None
        except BaseException:
            self._close()
            raise

    def read_label(self) -> Label | None:
        """See `label.read`."""
        with self._errors_at(0):
            return None if self.is_device else label.read(self._descriptor, self.path)

    def begin(self, of: Copied | None, towards: tuple[Copied, ...], *, compare: bool) -> None:
        """Say that it is no copy of `of` any more, and becomes one of the last of `towards`. Raises TargetError.

        `compare`: what is written may be there already.
        """
        size = towards[-1].origin.size
        self._label = Label(of, towards)
        self._is_compared = compare
        with self._errors_at(0):
            if self.is_device:
                self._check_room(size)
            else:
                label.write(self._descriptor, self.path, self._label, is_ended=False)
                self._has_begun = True
                if os.fstat(self._descriptor).st_size < size:
                    os.ftruncate(self._descriptor, size)

    def write(self, offset: int, data: Buffer) -> None:
        """See `Target.write`."""
        data = data if isinstance(data, bytes) else bytes(data)
        if not self._is_compared:
            self._write_anew(offset, data)
            return
        with self._errors_at(offset):
            held = os.pread(self._descriptor, len(data), offset)
        for start, end in differing(held, data):
            self._write_anew(offset + start, data[start:end])

    def _write_anew(self, offset: int, data: bytes) -> None:
        if self.is_device:
            self._write_runs(offset, data, [(0, len(data))])
        else:
            self._write_over(offset, data)

    def skip(self, offset: int, length: int) -> None:
        """See `Target.skip`."""
        with self._errors_at(offset):
            if self.is_device:
                syscalls.zero_device(self._descriptor, offset, length)
            else:
                syscalls.punch_hole(self._descriptor, offset, length)

    def finish(self) -> None:
        """All is written: have it on the disk, and then say so. Raises TargetError."""
        with self._errors_at(0):
            if not self.is_device:
                os.ftruncate(self._descriptor, self._label.towards[-1].origin.size)
            os.fsync(self._descriptor)
            if not self.is_device:
                label.write(self._descriptor, self.path, Label(self._label.towards[-1]))
        self._close()

    def abandon(self) -> str:
        """See `FileTarget.abandon`."""
        try:
            if self._has_begun:
                label.write(self._descriptor, self.path, self._label)
        except OSError as error:  # that of before says the same, but for when the file was last written to
            log.debug("cannot label %s: %s", self.path, error)
        finally:
            self._close()
        if self._has_begun or self.is_device:
            return f"{self.path} is not whole; the same command goes on with it"
        return f"{self.path} is as it was"


def differing(held: bytes, data: bytes, grain: int = COMPARED_BYTES) -> list[tuple[int, int]]:
    """Where two pieces differ, of which the first may be shorter: (start, end) pairs that do not touch, of whole pieces
    of `grain` bytes."""
    found: list[tuple[int, int]] = []
    if held == data:
        return found
    for start in range(0, len(data), grain):
        end = min(start + grain, len(data))
        if held[start:end] == data[start:end]:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found
