"""A file that an image is copied to: it has its name only when it is whole."""

import contextlib
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from rbdfs.errors import TargetError
from rbdfs.export import label, syscalls
from rbdfs.export.direct import DirectWriter
from rbdfs.export.journal import Journal, Origin
from rbdfs.export.label import Copied, Label
from rbdfs.export.zeros import data_runs

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


def open_existing(path: Path) -> int:
    """Open a file or block device that is there, to read and write. Raises TargetError."""
    # Of a device, O_EXCL is refused to all but one: while it is mounted, or another device is made of it.
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if path.is_block_device() else 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        why = error.strerror
        if error.errno == errno.EBUSY:
            why = "it is in use, mounted or part of another device (see lsblk)"
        raise TargetError(f"cannot open {path}: {why}", error.errno) from error


class FileTarget:
    """Writes at offsets; zeros become holes where the file can have them."""

    in_order = False

    def __init__(self, descriptor: int, path: Path, least_zeros: int) -> None:
        """The descriptor is given away."""
        self.path = path
        self.is_blank = True
        self.written_bytes = 0
        self._counting = threading.Lock()
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
        self._write_runs(offset, data, list(data_runs(data, self._least_zeros)))

    def _write_over(self, offset: int, data: bytes) -> None:
        """Write where something may be: what is left out is made a hole."""
        runs = list(data_runs(data, self._least_zeros))
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

    def _check_room(self, size: int) -> None:
        """Of a block device. Raises OSError, TargetError."""
        room = os.lseek(self._descriptor, 0, os.SEEK_END)
        if room < size:
            raise TargetError(f"{self.path} has {room} bytes, and the image {size}", errno.ENOSPC)

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

    def __init__(
        self,
        path: Path,
        size: int,
        least_zeros: int,
        origin: Origin | None,
        copied: Copied | None = None,
        *,
        resume: bool,
        restart: bool = False,
    ) -> None:
        """`origin` is None for what may change; `copied` is what its label shall say. `restart`: what was begun of
        something else is written over. Raises TargetError."""
        self._path = path
        self._copied = copied
        partial = partial_path(path)
        self._journal = Journal(partial.with_name(f"{partial.name}.journal")) if origin else None
        check_new(path, resume=resume)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | (0 if resume else os.O_EXCL)
        try:
            super().__init__(os.open(partial, flags, MODE), partial, least_zeros)
        except OSError as error:
            raise TargetError(f"cannot make {partial}: {error.strerror}", error.errno) from error
        try:
            self.is_blank = self._take(size, origin, restart=restart)
        except OSError as error:
            self._close()
            raise TargetError(f"cannot make {partial} of {size} bytes: {error.strerror}", error.errno) from error
        except TargetError:
            self._close()
            raise

    def _take(self, size: int, origin: Origin | None, *, restart: bool) -> bool:
        """Whether it is blank. Raises OSError, TargetError."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TargetError(f"another export writes to {self.path} now", errno.EBUSY) from None
        is_blank = True
        if self._journal is not None and origin is not None:
            if restart and self._journal.is_of_another(origin):
                os.ftruncate(self._descriptor, 0)
            if os.fstat(self._descriptor).st_size == 0:
                # No piece is written, and the file has no size, before the journal says what it is of.
                self._journal.start(origin)
            elif self._journal.resume(origin):
                is_blank = False
                self._sync()  # says whether something could not be written since the last export
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
        if self.is_blank:
            super().write(offset, data)
        else:
            self._write_over(offset, data)
        if self._journal is not None:
            with self._errors_at(offset):
                self._journal.add(offset, data)

    def skip(self, offset: int, length: int) -> None:
        """See `Target.skip`."""
        with self._errors_at(offset):
            syscalls.punch_hole(self._descriptor, offset, length)

    def finish(self) -> None:
        """Sync it, and give it its name, unless somebody else has taken that meanwhile. Raises TargetError."""
        self._sync()
        if self._copied is not None:
            with self._errors_at(0):
                label.write(self._descriptor, self._path, Label(self._copied))
        try:
            syscalls.rename_to_new(self.path, self._path)
        except OSError as error:
            raise TargetError(f"cannot rename {self.path} to {self._path}: {error.strerror}", error.errno) from error
        if self._journal is not None:
            self._journal.remove()
        syscalls.sync_directory(self._path.parent)
        self._close()

    def _sync(self) -> None:
        """Raises TargetError, and then nothing is left to resume.

        What could not be written the kernel takes for written all the same (and says so once): as long as it is in the
        page cache, the journal's checksums would confirm what is not on the disk.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._discard()
            what = f"cannot write {self.path} to the disk: {error.strerror}; what was copied is not kept"
            raise TargetError(what, error.errno) from error

    def _discard(self) -> None:
        self.path.unlink(missing_ok=True)
        if self._journal is not None:
            self._journal.remove()

    def abandon(self) -> str:
        """See `FileTarget.abandon`."""
        self._close()
        if self._journal is None or self._journal.is_empty:
            self._discard()
            return ""
        self._journal.close()
        return f"--resume continues {self.path}"


class ForcedFile(FileTarget):
    """A file or block device that is there, and is overwritten (`--force`)."""

    def __init__(self, path: Path, size: int, least_zeros: int, copied: Copied | None = None) -> None:
        """`copied` is what a file's label shall say. Raises TargetError."""
        self._copied = copied
        super().__init__(open_existing(path), path, least_zeros)
        try:
            self._is_device = stat.S_ISBLK(os.fstat(self._descriptor).st_mode)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_device:
                self._check_room(size)
            else:
                label.remove(self._descriptor, path)
                os.ftruncate(self._descriptor, 0)
                os.ftruncate(self._descriptor, size)
            self.is_blank = not self._is_device
        except BlockingIOError:
            self._close()
            raise TargetError(f"another export or verify uses {path} now", errno.EBUSY) from None
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
        self._write_runs(offset, data, [(0, len(data))])

    def skip(self, offset: int, length: int) -> None:
        """See `Target.skip`."""
        if self._is_device:
            with self._errors_at(offset):
                syscalls.zero_device(self._descriptor, offset, length)

    def finish(self) -> None:
        """See `FileTarget.finish`."""
        if self._copied is not None and not self._is_device:
            with self._errors_at(0):
                os.fsync(self._descriptor)
                label.write(self._descriptor, self.path, Label(self._copied))
        super().finish()
