"""A copy of an earlier snapshot, or of anything, that becomes a copy of a later one: `rbdfs export --update`.

From before the first write until after the last, its label says that it is a mixture, also after a power cut: the label
is on the disk before anything is written, and all data is on the disk before the label says that the copy is whole.
"""

import logging
import os
from pathlib import Path

from rbdfs.export import label
from rbdfs.export.file import FileTarget, open_existing
from rbdfs.export.label import Copied, Label
from rbdfs.export.ranges import GRAIN, differing
from rbdfs.image.backend import Buffer

log = logging.getLogger(__name__)

COMPARED_BYTES = 64 << 10
"""A difference is written as whole pieces of this size."""


class UpdatedFile(FileTarget):
    """An existing file or block device, in which only what differs is written."""

    is_blank = False

    def __init__(self, path: Path) -> None:
        """Does not change the file: `begin` does. Raises TargetError."""
        # A change may be a small part of a long run of zeros, so each page of zeros becomes a hole.
        super().__init__(open_existing(path), path, GRAIN)
        self._label = Label(None)
        self._is_compared = False
        self._has_begun = False
        with self._preparing(f"write {path}"):
            pass

    def read_label(self) -> Label | None:
        """What the file's label says; None without a label. Raises TargetError; LabelError if it cannot be trusted."""
        with self._errors_at(0):
            return None if self.is_device else label.read(self._descriptor, self.path)

    def begin(self, of: Copied | None, towards: tuple[Copied, ...], *, compare: bool) -> None:
        """Label the file as a mixture of `of` and `towards`, of which the last is the snapshot to copy. Raises
        TargetError.

        `compare`: read before each write, and write only what differs.
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
        data = data if isinstance(data, bytes) else bytes(data)
        if not self._is_compared:
            super().write(offset, data)
            return
        with self._errors_at(offset):
            old = os.pread(self._descriptor, len(data), offset)
        for start, end in differing(old, data, COMPARED_BYTES):
            super().write(offset + start, data[start:end])

    def finish(self) -> None:
        """Sync the file, then label it as whole. Raises TargetError."""
        with self._errors_at(0):
            if not self.is_device:
                os.ftruncate(self._descriptor, self._label.towards[-1].origin.size)
            os.fsync(self._descriptor)
            if not self.is_device:
                label.write(self._descriptor, self.path, Label(self._label.towards[-1]))
        self._close()

    def abandon(self) -> str:
        try:
            if self._has_begun:
                label.write(self._descriptor, self.path, self._label)
        except OSError as error:  # the label of `begin` says the same, but without the time of the last write
            log.debug("cannot label %s: %s", self.path, error)
        finally:
            self._close()
        if self._has_begun or self.is_device:
            return f"{self.path} is not whole; the same command continues it"
        return f"{self.path} is as it was"
