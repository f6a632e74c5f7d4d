"""What takes bytes only in order: standard output, a pipe, a device like /dev/null."""

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator

from rbdfs.errors import TargetError

Buffer = bytes | memoryview

PIPE_BYTES = 1 << 20
"""The largest pipe that any user may have (/proc/sys/fs/pipe-max-size): fewer turns of writer and reader."""

_ZEROS = bytes(1 << 20)


class Stream:
    """A target that is written in order. Where it is a file, holes stay holes."""

    in_order = True
    is_blank = False

    def __init__(self, descriptor: int, name: str, *, owned: bool = False) -> None:
        """`owned`: the descriptor is closed in the end."""
        self.written_bytes = 0
        self._descriptor = descriptor
        self._owned = owned
        self._name = name
        self._seeks = _is_at_end_of_file(descriptor)
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def may_hold(self, offset: int, length: int) -> bool:
        """See `Target.may_hold`."""
        return False

    def held(self, offset: int, length: int) -> Buffer | None:
        """See `Target.held`."""
        return None

    def write(self, offset: int, data: Buffer) -> None:
        """See `Target.write`. Raises TargetError, with EPIPE where the reader is gone."""
        rest = memoryview(data)
        with self._errors_at(offset):
            while rest:
                count = os.write(self._descriptor, rest)
                self.written_bytes += count
                rest = rest[count:]

    def skip(self, offset: int, length: int) -> None:
        """See `Target.skip`."""
        if self._seeks:
            with self._errors_at(offset):
                os.lseek(self._descriptor, length, os.SEEK_CUR)
            return
        for start in range(0, length, len(_ZEROS)):
            self.write(offset + start, _ZEROS[: length - start])

    def finish(self) -> None:
        """All is written. Raises TargetError."""
        if self._seeks:
            with self._errors_at(0):
                os.ftruncate(self._descriptor, os.lseek(self._descriptor, 0, os.SEEK_CUR))
        self._close()

    def abandon(self) -> str:
        """Leave it unfinished. There is nothing to tell of it."""
        self._close()
        return ""

    def _close(self) -> None:
        if self._owned:
            os.close(self._descriptor)

    @contextlib.contextmanager
    def _errors_at(self, offset: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"cannot write to {self._name} at offset {offset}: {error.strerror}"
            raise TargetError(what, error.errno) from error


def _is_at_end_of_file(descriptor: int) -> bool:
    """Whether to seek leaves a hole: here a file ends, and writes do not append by themselves."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND:
        return False
    return os.lseek(descriptor, 0, os.SEEK_CUR) >= status.st_size
