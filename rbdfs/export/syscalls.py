"""System calls that Python does not bind."""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

_KEEP_SIZE_AND_PUNCH_HOLE = 0x01 | 0x02  # linux/falloc.h
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_NOREPLACE = 1  # linux/fs.h
_BLKZEROOUT = 0x127F  # linux/fs.h
_SECTOR = 512

_ZEROS = bytes(1 << 20)


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Make a range of a file a hole; write zeros if the file system has no holes. Raises OSError."""
    if _libc.fallocate(descriptor, _KEEP_SIZE_AND_PUNCH_HOLE, offset, length) != 0:
        if ctypes.get_errno() != errno.EOPNOTSUPP:
            _raise_errno()
        _write_zeros(descriptor, offset, length)


def zero_device(descriptor: int, offset: int, length: int) -> None:
    """Make a range of a block device read as zeros. Raises OSError."""
    sectors = length - length % _SECTOR
    if sectors and offset % _SECTOR == 0:
        with contextlib.suppress(OSError):
            fcntl.ioctl(descriptor, _BLKZEROOUT, struct.pack("QQ", offset, sectors))
            offset, length = offset + sectors, length - sectors
    _write_zeros(descriptor, offset, length)


def rename_to_new(old: Path, new: Path) -> None:
    """Rename. Raises OSError; FileExistsError if the new name is taken."""
    if hasattr(_libc, "renameat2"):
        arguments = (_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), _RENAME_NOREPLACE)
        if _libc.renameat2(*arguments) == 0:
            return
        if ctypes.get_errno() not in (errno.EINVAL, errno.ENOSYS):
            _raise_errno()
    os.link(old, new)  # the file system does not know the flag; NFS does not
    old.unlink()


def sync_directory(path: Path) -> None:
    """Sync the names in a directory to the disk, if the file system can."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_zeros(descriptor: int, offset: int, length: int) -> None:
    end = offset + length
    while offset < end:
        offset += os.pwrite(descriptor, _ZEROS[: end - offset], offset)


def _raise_errno() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
