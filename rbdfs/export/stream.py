"""An output that takes bytes only in order: standard output, a pipe, a device such as /dev/null."""

import fcntl
import os
import stat
from contextlib import AbstractContextManager, suppress

from rbdfs.export.target import Output, errors_at
from rbdfs.image.backend import Buffer

PIPE_BYTES = 1 << 20
"""The largest pipe that any user may have (/proc/sys/fs/pipe-max-size): writer and reader switch less often."""

_ZEROS = bytes(1 << 20)


class Stream(Output):
    """Writes in order. If it is a file, holes stay holes."""

    in_order = True

    def __init__(self, descriptor: int, name: str, *, owned: bool = False) -> None:
        """`owned`: close the descriptor in the end."""
        self.written_bytes = 0
        self._descriptor = descriptor
        self._owned = owned
        self._name = name
        self._seeks = _is_at_end_of_file(descriptor)
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def write(self, offset: int, data: Buffer) -> None:
        """Raises TargetError, with EPIPE if the reader is gone."""
        rest = memoryview(data)
        with self._errors_at(offset):
            while rest:
                count = os.write(self._descriptor, rest)
                self.written_bytes += count
                rest = rest[count:]

    def skip(self, offset: int, length: int) -> None:
        if self._seeks:
            with self._errors_at(offset):
                os.lseek(self._descriptor, length, os.SEEK_CUR)
            return
        for start in range(0, length, len(_ZEROS)):
            self.write(offset + start, _ZEROS[: length - start])

    def finish(self) -> None:
        if self._seeks:
            with self._errors_at(0):
                os.ftruncate(self._descriptor, os.lseek(self._descriptor, 0, os.SEEK_CUR))
        self._close()

    def abandon(self) -> str:
        self._close()
        return ""

    def _close(self) -> None:
        if self._owned:
            os.close(self._descriptor)

    def _errors_at(self, offset: int) -> AbstractContextManager[None]:
        return errors_at(f"write to {self._name}", offset)


def _is_at_end_of_file(descriptor: int) -> bool:
    """Whether a seek leaves a hole: we are at the end of a file that is not open for appending."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
        return False
    return os.lseek(descriptor, 0, os.SEEK_CUR) >= status.st_size
