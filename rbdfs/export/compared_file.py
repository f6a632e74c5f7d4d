"""A file or block device that an image is compared with: `rbdfs verify`. It is only read."""

import errno
import fcntl
import os
import threading
from contextlib import AbstractContextManager
from pathlib import Path

from rbdfs.errors import TargetError
from rbdfs.export import label
from rbdfs.export.label import Label
from rbdfs.export.ranges import FoundRanges, differing
from rbdfs.export.target import Target, errors_at, is_block_device, lock
from rbdfs.image.backend import Buffer

SECTOR = 512
"""Bytes: differences are reported in whole sectors."""

READ_BYTES = 1 << 20
"""Bytes to read at a time where the file must hold zeros."""

_ZEROS = bytes(READ_BYTES)


class ComparedFile(Target):
    """Takes the bytes of an image and records where the file differs."""

    def __init__(self, path: Path, image_size: int) -> None:
        """Raises TargetError."""
        self.path = path
        self.found = FoundRanges()
        self._finding = threading.Lock()
        try:
            # Without O_NONBLOCK, opening a pipe would wait for a writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise TargetError(f"cannot open {path}: {error.strerror}", error.errno) from error
        try:
            self.is_device = is_block_device(self._descriptor, path)
            with self._errors_at(0):
                lock(self._descriptor, fcntl.LOCK_SH, f"an export writes to {path} now")
                self.size = os.lseek(self._descriptor, 0, os.SEEK_END)
        except BaseException:
            self.close()
            raise
        self._compared = min(self.size, image_size)
        self.has_size = self.size == image_size or (self.is_device and self.size > image_size)
        """Whether it has the size of the image, or is a device that is large enough for it."""
        if not self.has_size:
            self.found.add(self._compared, max(self.size, image_size))

    def read_label(self) -> Label | None:
        """What the file's label says; None without a label. Raises TargetError; LabelError if it cannot be trusted."""
        with self._errors_at(0):
            return None if self.is_device else label.read(self._descriptor, self.path)

    def write(self, offset: int, data: Buffer) -> None:
        length = min(len(data), self._compared - offset)
        if length > 0:
            data = data if isinstance(data, bytes) else bytes(data)
            self._compare(offset, data[:length])

    def skip(self, offset: int, length: int) -> None:
        end = min(offset + length, self._compared)
        while offset < end:
            offset, stop = self._next_data(offset, end)
            while offset < stop:
                count = min(READ_BYTES, stop - offset)
                self._compare(offset, _ZEROS[:count])
                offset += count

    def _next_data(self, offset: int, end: int) -> tuple[int, int]:
        """Where the file's next data begins and ends within [offset, end); both are `end` if there is none."""
        try:
            start = os.lseek(self._descriptor, offset, os.SEEK_DATA)
            stop = os.lseek(self._descriptor, start, os.SEEK_HOLE) if start < end else end
        except OSError as error:
            if error.errno == errno.ENXIO:
                # No data is left. If the file was truncated since we opened it, the rest counts as data.
                with self._errors_at(offset):
                    size = os.fstat(self._descriptor).st_size
                return (end, end) if self.is_device or size >= end else (max(offset, size), end)
            return offset, end  # the file system or device does not report holes
        return min(start, end), min(stop, end)

    def _compare(self, offset: int, data: bytes) -> None:
        with self._errors_at(offset):
            found = self._read(offset, len(data))
        if found != data:
            with self._finding:
                for start, end in differing(found, data, SECTOR):
                    self.found.add(offset + start, offset + end)

    def _read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes, less only at the end of the file. Raises OSError."""
        found = os.pread(self._descriptor, length, offset)
        while len(found) < length and (more := os.pread(self._descriptor, length - len(found), offset + len(found))):
            found += more
        return found

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _errors_at(self, offset: int) -> AbstractContextManager[None]:
        return errors_at(f"read {self.path}", offset)
