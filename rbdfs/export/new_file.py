"""A file that an export makes: it is PATH.partial until it is whole, and then gets its name."""

import errno
import os
from pathlib import Path

from rbdfs.errors import TargetError
from rbdfs.export import label, syscalls
from rbdfs.export.file import FileTarget
from rbdfs.export.journal import Journal, Origin
from rbdfs.export.label import Copied, Label
from rbdfs.image.backend import Buffer

MODE = 0o644
"""The permissions that `rbd export` gives its files; the umask takes some away."""


def partial_path(path: Path) -> Path:
    """The name of a file until it is whole."""
    return path.with_name(f"{path.name}.partial")


def check_new(path: Path, *, resume: bool) -> None:
    """Raise TargetError if it is known already that a new file cannot be made."""
    if os.path.lexists(path):
        raise TargetError(f"{path} exists, and is not overwritten; --force writes into it", errno.EEXIST)
    if not path.parent.is_dir():
        raise TargetError(f"cannot make {path}: there is no directory {path.parent}", errno.ENOENT)
    partial = partial_path(path)
    if not resume and os.path.lexists(partial):
        raise TargetError(
            f"{partial} is left of an unfinished export; continue it with --resume, or remove it", errno.EEXIST
        )


class NewFile(FileTarget):
    """A new file, with a journal beside it if the image is a snapshot, so that a later export can continue."""

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
        """`origin`: the snapshot to copy, None if the bytes may change. `copied`: the snapshot that the file's label
        names in the end. `restart`: overwrite the unfinished export of another snapshot. Raises TargetError."""
        self._path = path
        self._copied = copied
        partial = partial_path(path)
        self._journal = Journal(partial.with_name(f"{partial.name}.journal")) if origin else None
        check_new(path, resume=resume)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | (0 if resume else os.O_EXCL)
        try:
            descriptor = os.open(partial, flags, MODE)
        except OSError as error:
            raise TargetError(f"cannot make {partial}: {error.strerror}", error.errno) from error
        super().__init__(descriptor, partial, least_zeros)
        with self._preparing(f"make {partial} of {size} bytes"):
            self.is_blank = self._journal is None or origin is None or self._start(self._journal, origin, restart)
            os.ftruncate(self._descriptor, size)

    def _start(self, journal: Journal, origin: Origin, restart: bool) -> bool:
        """Start a journal or continue an earlier one. Whether the file is blank. Raises OSError, TargetError."""
        if restart and journal.is_of_another(origin):
            os.ftruncate(self._descriptor, 0)
        if os.fstat(self._descriptor).st_size == 0:
            # The journal names the snapshot before the file gets its size or any piece.
            journal.start(origin)
            return True
        if not journal.resume(origin):
            raise TargetError(f"{self.path}: no journal says what it holds; remove it")
        self._sync()  # reports a write that failed after the last export
        return False

    def may_hold(self, offset: int, length: int) -> bool:
        return not self.is_blank and self._journal is not None and self._journal.claims(offset, length)

    def verified(self, offset: int, length: int) -> Buffer | None:
        with self._errors_at(offset):
            data = os.pread(self._descriptor, length, offset)
        return data if self._journal is not None and self._journal.confirms(offset, data) else None

    def write(self, offset: int, data: Buffer) -> None:
        data = data if isinstance(data, bytes) else bytes(data)
        super().write(offset, data)
        if self._journal is not None:
            with self._errors_at(offset):
                self._journal.add(offset, data)

    def finish(self) -> None:
        """Sync the file and give it its name. Raises TargetError, also if the name was taken since the export began."""
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
        """Sync the file. If that fails, remove it and raise TargetError.

        The kernel reports a failed write once and then treats the page as clean. As long as the page is cached, the
        journal's checksums would confirm bytes that are not on the disk.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._discard()
            what = f"cannot write {self.path} to the disk: {error.strerror}; the unfinished copy was removed"
            raise TargetError(what, error.errno) from error

    def _discard(self) -> None:
        self.path.unlink(missing_ok=True)
        if self._journal is not None:
            self._journal.remove()

    def abandon(self) -> str:
        self._close()
        if self._journal is None or self._journal.is_empty:
            self._discard()
            return ""
        self._journal.close()
        return f"--resume continues {self.path}"
