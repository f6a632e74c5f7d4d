"""What the files and block devices that an image is copied to have in common."""

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from rbdfs.errors import TargetError
from rbdfs.export import syscalls
from rbdfs.export.direct_io import DirectWriter
from rbdfs.export.ranges import data_runs
from rbdfs.export.target import Output, errors_at, is_block_device, lock
from rbdfs.image.backend import Buffer

LEAST_ZEROS = 64 * 1024
"""The shortest run of zeros that is left out: below, another write costs more than the zeros do."""


def open_existing(path: Path) -> int:
    """Open an existing file or block device for reading and writing. Raises TargetError."""
    # Only one program can open a device with O_EXCL: not while it is mounted or part of another device.
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if path.is_block_device() else 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        why = error.strerror
        if error.errno == errno.EBUSY:
            why = "it is in use, mounted or part of another device (see lsblk)"
        raise TargetError(f"cannot open {path}: {why}", error.errno) from error


class FileTarget(Output):
    """Writes at offsets. In a file, zeros become holes; a device gets every byte."""

    is_device: bool
    """Whether it is a block device: it has no holes and no label."""

    def __init__(self, descriptor: int, path: Path, least_zeros: int) -> None:
        """Takes over the descriptor. `least_zeros`: bytes of the shortest run of zeros to leave out."""
        self.path = path
        self.written_bytes = 0
        self._counting = threading.Lock()
        self._descriptor = descriptor
        self._least_zeros = min(least_zeros, LEAST_ZEROS)
        self._writer = DirectWriter(descriptor)

    @contextmanager
    def _preparing(self, what: str) -> Iterator[None]:
        """Lock the file, before the body prepares it; if either fails, close it and raise TargetError: "cannot `what`:
        ..."."""
        try:
            self.is_device = is_block_device(self._descriptor, self.path)
            lock(self._descriptor, fcntl.LOCK_EX, f"another export or verify uses {self.path} now")
            yield
        except OSError as error:
            self._close()
            raise TargetError(f"cannot {what}: {error.strerror}", error.errno) from error
        except BaseException:
            self._close()
            raise

    def _check_room(self, size: int) -> None:
        """Raise TargetError if the image is larger than the block device. Raises OSError."""
        room = os.lseek(self._descriptor, 0, os.SEEK_END)
        if room < size:
            raise TargetError(f"{self.path} has {room} bytes, and the image {size}", errno.ENOSPC)

    def write(self, offset: int, data: Buffer) -> None:
        data = data if isinstance(data, bytes) else bytes(data)
        if self.is_device:
            self._write_runs(offset, data, [(0, len(data))])
            return
        runs = list(data_runs(data, self._least_zeros))
        if not self.is_blank:
            start = 0
            for end, next_start in (*runs, (len(data), 0)):
                if start < end:
                    self.skip(offset + start, end - start)
                start = next_start
        self._write_runs(offset, data, runs)

    def _write_runs(self, offset: int, data: bytes, runs: list[tuple[int, int]]) -> None:
        with self._errors_at(offset):
            self._writer.write(offset, data, runs)
        with self._counting:
            self.written_bytes += sum(end - start for start, end in runs)

    def skip(self, offset: int, length: int) -> None:
        with self._errors_at(offset):
            if self.is_device:
                syscalls.zero_device(self._descriptor, offset, length)
            else:
                syscalls.punch_hole(self._descriptor, offset, length)

    def _close(self) -> None:
        self._writer.close()
        os.close(self._descriptor)

    def _errors_at(self, offset: int) -> AbstractContextManager[None]:
        return errors_at(f"write {self.path}", offset)
