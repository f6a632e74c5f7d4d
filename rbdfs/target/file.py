"""A file that an image is copied to: it has its name only when it is whole."""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from rbdfs.errors import TargetError
from rbdfs.target import kernel
from rbdfs.target.direct import DirectWriter
from rbdfs.target.journal import Journal, Origin
from rbdfs.target.zeros import data_runs

Buffer = bytes | memoryview

LEAST_ZEROS = 64 * 1024
"""A run of zeros this long is left out; shorter ones would cost more, as another write, than they save."""

MODE = 0o644
"""As `rbd export`; less the umask."""


def partial_path(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f"{path.name}.partial")


def check_new(path: Path, *, resume: bool) -> None:
    """Raise TargetError where a new file could not be made, as far as can be known before."""
    if os.path.lexists(path):
        raise TargetError(f"{path} exists, and is not overwritten; --force writes into it", errno.EEXIST)
    if not path.parent.is_dir():
        raise TargetError(f"cannot make {path}: there is no directory {path.parent}", errno.ENOENT)
    partial = partial_path(path)
    if not resume and os.path.lexists(partial):
        raise TargetError(
            f"{partial} is there, of an export that did not end; continue it with --resume, or remove it", errno.EEXIST
        )


class FileTarget:
    """Writes at offsets; zeros become holes where the file can have them."""

    in_order = False

    def __init__(self, descriptor: int, path: Path, least_zeros: int) -> None:
        """The descriptor is given away."""
        self.path = path
        self.is_blank = True
        self._descriptor = descriptor
        self._least_zeros = min(least_zeros, LEAST_ZEROS)
        self._writer = DirectWriter(descriptor)

    def may_hold(self, offset: int, length: int) -> bool:
        """See `Target.may_hold`."""
        return False

    def held(self, offset: int, length: int) -> Buffer | None:
        """See `Target.held`."""
        return None

    def write(self, offset: int, data: Buffer) -> None:
        """See `Target.write`."""
        data = data if isinstance(data, bytes) else bytes(data)
        with self._errors_at(offset):
            self._writer.write(offset, data, list(data_runs(data, self._least_zeros)))

    def skip(self, offset: int, length: int) -> None:
        """See `Target.skip`."""

    def finish(self) -> None:
        """All is written: see to it that it is on the disk. Raises TargetError."""
        with self._errors_at(0):
            os.fsync(self._descriptor)
        self._close()

    def abandon(self) -> str:
        """Leave it unfinished. What became of it, as a sentence."""
        self._close()
        return f"{self.path} holds a part of the image"

    def _close(self) -> None:
        self._writer.close()
        os.close(self._descriptor)

    @contextlib.contextmanager
    def _errors_at(self, offset: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = f"cannot write {self.path} at offset {offset}: {error.strerror}"
            raise TargetError(what, error.errno) from error


class NewFile(FileTarget):
    """A file that is made: PATH.partial, until it is whole.

    Of what never changes a journal is kept beside it, by which a later export can go on.
    """

    def __init__(self, path: Path, size: int, least_zeros: int, origin: Origin | None, *, resume: bool) -> None:
        """`origin` is None for what may change. Raises TargetError."""
        self._path = path
        partial = partial_path(path)
        self._journal = Journal(partial.with_name(f"{partial.name}.journal")) if origin else None
        check_new(path, resume=resume)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | (0 if resume else os.O_EXCL)
        try:
            super().__init__(os.open(partial, flags, MODE), partial, least_zeros)
        except OSError as error:
            raise TargetError(f"cannot make {partial}: {error.strerror}", error.errno) from error
        try:
            self.is_blank = self._take(size, origin)
        except OSError as error:
            self._close()
            raise TargetError(f"cannot make {partial} of {size} bytes: {error.strerror}", error.errno) from error
        except TargetError:
            self._close()
            raise

    def _take(self, size: int, origin: Origin | None) -> bool:
        """Whether it is blank. Raises OSError, TargetError."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TargetError(f"another export writes to {self.path} now", errno.EBUSY) from None
        is_blank = True
        if self._journal is not None and origin is not None:
            if os.fstat(self._descriptor).st_size == 0:
                # No piece is written, and the file has no size, before the journal says what it is of.
                self._journal.start(origin)
            elif self._journal.resume(origin):
                is_blank = False
            else:
                raise TargetError(f"{self.path}: no journal tells what is in it; remove it")
        os.ftruncate(self._descriptor, size)
        return is_blank

    def may_hold(self, offset: int, length: int) -> bool:
        """See `Target.may_hold`."""
        return not self.is_blank and self._journal is not None and self._journal.claims(offset, length)

    def held(self, offset: int, length: int) -> Buffer | None:
        """See `Target.held`."""
        with self._errors_at(offset):
            data = os.pread(self._descriptor, length, offset)
        return data if self._journal is not None and self._journal.confirms(offset, data) else None

    def write(self, offset: int, data: Buffer) -> None:
        """See `Target.write`."""
        data = data if isinstance(data, bytes) else bytes(data)
        if not self.is_blank:
            self.skip(offset, len(data))
        super().write(offset, data)
        if self._journal is not None:
            with self._errors_at(offset):
                self._journal.add(offset, data)

    def skip(self, offset: int, length: int) -> None:
        """See `Target.skip`."""
        with self._errors_at(offset):
            kernel.punch_hole(self._descriptor, offset, length)

    def finish(self) -> None:
        """Sync it, and give it its name, unless somebody else has taken that meanwhile. Raises TargetError."""
        with self._errors_at(0):
            os.fsync(self._descriptor)
        try:
            kernel.rename_to_new(self.path, self._path)
        except OSError as error:
            raise TargetError(f"cannot rename {self.path} to {self._path}: {error.strerror}", error.errno) from error
        if self._journal is not None:
            self._journal.remove()
        kernel.sync_directory(self._path.parent)
        self._close()

    def abandon(self) -> str:
        """See `FileTarget.abandon`."""
        self._close()
        if self._journal is None or self._journal.is_empty:
            self.path.unlink(missing_ok=True)
            if self._journal is not None:
                self._journal.remove()
            return ""
        self._journal.close()
        return f"--resume continues {self.path}"


class ForcedFile(FileTarget):
    """A file or block device that is there, and is overwritten (`--force`)."""

    def __init__(self, path: Path, size: int, least_zeros: int) -> None:
        """Raises TargetError."""
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC), path, least_zeros)
        except OSError as error:
            raise TargetError(f"cannot open {path}: {error.strerror}", error.errno) from error
        try:
            self._is_device = stat.S_ISBLK(os.fstat(self._descriptor).st_mode)
            if self._is_device:
                room = os.lseek(self._descriptor, 0, os.SEEK_END)
                if room < size:
                    raise TargetError(f"{path} has {room} bytes, and the image {size}", errno.ENOSPC)
            else:
                os.ftruncate(self._descriptor, 0)
                os.ftruncate(self._descriptor, size)
            self.is_blank = not self._is_device
        except OSError as error:
            self._close()
            raise TargetError(f"cannot write {path}: {error.strerror}", error.errno) from error
        except TargetError:
            self._close()
            raise

    def write(self, offset: int, data: Buffer) -> None:
        """See `Target.write`."""
        if not self._is_device:
            super().write(offset, data)
            return
        data = data if isinstance(data, bytes) else bytes(data)
        with self._errors_at(offset):
            self._writer.write(offset, data, [(0, len(data))])

    def skip(self, offset: int, length: int) -> None:
        """See `Target.skip`."""
        if self._is_device:
            with self._errors_at(offset):
                kernel.zero_device(self._descriptor, offset, length)
