"""A file or block device that an image is compared with: it is read, and never written to."""

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from rbdfs.errors import TargetError
from rbdfs.export import label
from rbdfs.export.label import Label
from rbdfs.export.ranges import FoundRanges
from rbdfs.export.update import differing

Buffer = bytes | memoryview

SECTOR = 512
"""Bytes: what differs is told in whole sectors."""

READ_BYTES = 1 << 20
"""At a time, of what must be zeros."""

_ZEROS = bytes(READ_BYTES)


class ComparedFile:
    """Takes what an image holds, and remembers where the file holds something else."""

    in_order = False
    is_blank = False

    def __init__(self, path: Path, image_size: int) -> None:
        """Raises TargetError."""
        self.path = path
        self.found = FoundRanges()
        self._finding = threading.Lock()
        try:
            # Without O_NONBLOCK, to open a pipe waits for somebody who writes to it.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise TargetError(f"cannot open {path}: {error.strerror}", error.errno) from error
        try:
            mode = os.fstat(self._descriptor).st_mode
            self.is_device = stat.S_ISBLK(mode)
            if not self.is_device and not stat.S_ISREG(mode):
                raise TargetError(f"{path} is neither a file nor a block device", errno.EINVAL)
            with self._errors_at(0):
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                self.size = os.lseek(self._descriptor, 0, os.SEEK_END)
        except BaseException:
            self.close()
            raise
        self._compared = min(self.size, image_size)
        self.has_size = self.size == image_size or (self.is_device and self.size > image_size)
        """Whether it has the size of the image, or is a device with room for it."""
        if not self.has_size:
            self.found.add(self._compared, max(self.size, image_size))

    def read_label(self) -> Label | None:
        """See `label.read`; a device has none."""
        with self._errors_at(0):
            return None if self.is_device else label.read(self._descriptor, self.path)

    def may_hold(self, offset: int, length: int) -> bool:
        """See `Target.may_hold`."""
        return False

    def held(self, offset: int, length: int) -> Buffer | None:
        """See `Target.held`."""
        return None

    def write(self, offset: int, data: Buffer) -> None:
        """See `Target.write`: compare it."""
        length = min(len(data), self._compared - offset)
        if length > 0:
            data = data if isinstance(data, bytes) else bytes(data)
            self._compare(offset, data[:length])

    def skip(self, offset: int, length: int) -> None:
        """See `Target.skip`: what is no hole of the file must be zeros."""
        end = min(offset + length, self._compared)
        while offset < end:
            offset, stop = self._next_data(offset, end)
            while offset < stop:
                count = min(READ_BYTES, stop - offset)
                self._compare(offset, _ZEROS[:count])
                offset += count

    def _next_data(self, offset: int, end: int) -> tuple[int, int]:
        """Where the file's next data are, within [offset, end); both are `end` if there are none."""
        try:
            start = os.lseek(self._descriptor, offset, os.SEEK_DATA)
            stop = os.lseek(self._descriptor, start, os.SEEK_HOLE) if start < end else end
        except OSError as error:
            if error.errno == errno.ENXIO:
                # No data are left. Where the file was cut off by now, that is found here, too.
                with self._errors_at(offset):
                    size = os.fstat(self._descriptor).st_size
                return (end, end) if self.is_device or size >= end else (max(offset, size), end)
            return offset, end  # a file system or device that does not tell
        return min(start, end), min(stop, end)

    def _compare(self, offset: int, data: bytes) -> None:
        with self._errors_at(offset):
            held = self._read(offset, len(data))
        if held != data:
            with self._finding:
                for start, end in differing(held, data, SECTOR):
                    self.found.add(offset + start, offset + end)

    def _read(self, offset: int, length: int) -> bytes:
        """Less only where the file ends. Raises OSError."""
        held = os.pread(self._descriptor, length, offset)
        while len(held) < length and (more := os.pread(self._descriptor, length - len(held), offset + len(held))):
            held += more
        return held

    def close(self) -> None:
        """Give the file back."""
        os.close(self._descriptor)

    @contextlib.contextmanager
    def _errors_at(self, offset: int) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise TargetError(f"an export writes to {self.path} now", errno.EBUSY) from None
        except OSError as error:
            what = f"cannot read {self.path} at offset {offset}: {error.strerror}"
            raise TargetError(what, error.errno) from error
