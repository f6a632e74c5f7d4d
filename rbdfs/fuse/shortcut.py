"""Scattered reads, from the kernel to librbd and back without Python: the C library's part of it is shortcut.c.

Which reads go that way is decided there, by what is said here: which image, for how long reads of it may be answered
without a look at its header, and of which blocks the object cache holds anything.
"""

import ctypes
import errno
import os
from ctypes import c_double, c_int, c_uint64, c_void_p

from rbdfs.errors import RbdfsError
from rbdfs.fuse.lowlevel import library
from rbdfs.image.held_blocks import BLOCK_BYTES, HeldBlocks
from rbdfs.shortcut import RawImage


class _Image(ctypes.Structure):
    """`struct image` of shortcut.c."""

    _fields_ = (
        ("image", c_void_p),
        ("create_completion", c_void_p),
        ("aio_read", c_void_p),
        ("get_return_value", c_void_p),
        ("release", c_void_p),
        ("size", c_uint64),
        ("object_size", c_uint64),
        ("is_constant", c_int),
        ("held", c_void_p),
        ("block_size", c_uint64),
        ("blocks", c_uint64),
    )


if library is not None:
    library.rbdfs_new_shortcut.argtypes = [ctypes.POINTER(_Image)]
    library.rbdfs_new_shortcut.restype = c_void_p
    library.rbdfs_free_shortcut.argtypes = [c_void_p]
    library.rbdfs_free_shortcut.restype = None
    library.rbdfs_open_shortcut.argtypes = [c_void_p, c_double]
    library.rbdfs_open_shortcut.restype = None
    library.rbdfs_in_flight.argtypes = [c_void_p]
    library.rbdfs_in_flight.restype = c_uint64
    library.rbdfs_answered.argtypes = [c_void_p]
    library.rbdfs_answered.restype = c_uint64
    library.rbdfs_begin_file.argtypes = [c_uint64, c_void_p]
    library.rbdfs_end_file.argtypes = [c_uint64]
    library.rbdfs_end_file.restype = None


class LowlevelShortcut:
    """See `rbdfs.shortcut.Shortcut`. All of it in the trio thread."""

    def __init__(self, raw: RawImage, held: HeldBlocks) -> None:
        """Raises RbdfsError: ENOSYS without the C library."""
        if library is None:
            raise RbdfsError("rbdfs was installed without its C library", errno.ENOSYS)
        self._library = library
        self._held = held  # C reads it
        address, blocks = held.counts.buffer_info()
        image = _Image(*raw, held=address, block_size=BLOCK_BYTES, blocks=blocks)
        self._address = library.rbdfs_new_shortcut(ctypes.byref(image))
        if not self._address:
            raise RbdfsError(os.strerror(errno.ENOMEM), errno.ENOMEM)

    def __del__(self) -> None:
        if getattr(self, "_address", None):
            self._library.rbdfs_free_shortcut(self._address)

    def open(self, seconds: float) -> None:
        """See `rbdfs.shortcut.Shortcut.open`."""
        self._library.rbdfs_open_shortcut(self._address, seconds)

    @property
    def in_flight(self) -> int:
        """See `rbdfs.shortcut.Shortcut.in_flight`."""
        return int(self._library.rbdfs_in_flight(self._address))

    @property
    def answered(self) -> int:
        """See `rbdfs.shortcut.Shortcut.answered`."""
        return int(self._library.rbdfs_answered(self._address))

    def begin(self, handle: int) -> None:
        """See `rbdfs.shortcut.Shortcut.begin`."""
        error = self._library.rbdfs_begin_file(handle, self._address)
        if error:
            raise RbdfsError(f"no thread to receive requests: {os.strerror(error)}", error)

    def end(self, handle: int) -> None:
        """See `rbdfs.shortcut.Shortcut.end`."""
        self._library.rbdfs_end_file(handle)
