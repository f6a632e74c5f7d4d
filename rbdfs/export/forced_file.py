"""An existing file or block device that is overwritten: `rbdfs export --force`."""

import os
from pathlib import Path

from rbdfs.export import label
from rbdfs.export.file import FileTarget, open_existing
from rbdfs.export.label import Copied, Label


class ForcedFile(FileTarget):
    """A file that is emptied first, or a device of which every byte is overwritten."""

    def __init__(self, path: Path, size: int, least_zeros: int, copied: Copied | None = None) -> None:
        """`copied`: the snapshot that the file's label names in the end. Raises TargetError."""
        super().__init__(open_existing(path), path, least_zeros)
        self._copied = copied
        with self._preparing(f"write {path}"):
            if self.is_device:
                self._check_room(size)
            else:
                label.remove(self._descriptor, path)
                os.ftruncate(self._descriptor, 0)
                os.ftruncate(self._descriptor, size)
        self.is_blank = not self.is_device

    def finish(self) -> None:
        with self._errors_at(0):
            os.fsync(self._descriptor)
            if self._copied is not None and not self.is_device:
                label.write(self._descriptor, self.path, Label(self._copied))
        self._close()

    def abandon(self) -> str:
        self._close()
        return f"{self.path} holds a part of the image"
