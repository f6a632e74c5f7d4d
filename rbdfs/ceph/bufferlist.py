"""Large reads without a copy: what librados received is taken over, by a C++ library that is loaded through ctypes.

It is built from bufferlist.cc when rbdfs is installed. Without it (no compiler or no headers of Ceph's C++ API then, or
a Ceph since that lays out its buffers otherwise) librbd copies what was read, as it does for small reads anyway.
"""

import ctypes
import errno
import importlib.util
from ctypes import c_size_t, c_ubyte, c_uint64, c_void_p
from functools import lru_cache

from rbdfs.ceph.memory import Data

LEAST_BYTES = 64 << 10
"""Of a read that is worth it: to take memory over costs some calls, and up to 8 KiB that lie idle around it, since
librados receives on a page boundary."""


def _load_library() -> ctypes.PyDLL | str:
    """The library, or why there is none. Its calls are short and keep the GIL, as those of librbd.py."""
    spec = importlib.util.find_spec("rbdfs.ceph._bufferlist")  # built like an extension module, never imported as one
    if spec is None or spec.origin is None:
        return "rbdfs was installed without its C++ library; install g++, librbd-dev and libradospp-dev, then reinstall"
    try:
        library = ctypes.PyDLL(spec.origin)
    except OSError as error:
        return f"rbdfs's C++ library was built for another Ceph; reinstall rbdfs ({error})"
    library.rbdfs_bufferlist_read.argtypes = [c_void_p, c_uint64, c_size_t, c_void_p]
    library.rbdfs_bufferlist_read.restype = c_void_p
    library.rbdfs_bufferlist_data.argtypes = [c_void_p, c_size_t]
    library.rbdfs_bufferlist_data.restype = c_void_p
    library.rbdfs_bufferlist_free.argtypes = [c_void_p]
    library.rbdfs_bufferlist_free.restype = None
    return library


_library = _load_library()


def unavailable() -> str | None:
    """Why large reads are copied, as a sentence; None if they are not."""
    return _library if isinstance(_library, str) else None


class Bufferlist:
    """What one read is received into: a `ceph::bufferlist`, which is freed with this, be the image open or closed."""

    __slots__ = ("_address", "_free", "_library", "length")

    def __init__(self, image: int, offset: int, length: int, completion: int) -> None:
        """Start to read `length` bytes at `offset` of a `rbd_image_t`. To be kept until the completion has come."""
        if isinstance(_library, str):
            raise RuntimeError(_library)
        self._library = _library
        self._free = _library.rbdfs_bufferlist_free  # at the interpreter's end modules go first
        self._address: int = _library.rbdfs_bufferlist_read(image, offset, length, completion)
        self.length = length

    def __del__(self) -> None:
        self._free(self._address)

    def take(self, result: int) -> tuple[int, Data]:
        """The read's result, and what it read if that is all; the data keeps this alive. After its completion."""
        if result != self.length:
            return result, b""
        address = self._library.rbdfs_bufferlist_data(self._address, self.length)
        if address is None:
            return -errno.EIO, b""
        data = _array(self.length).from_address(address)
        data.bufferlist = self  # type: ignore[attr-defined]  # an instance takes any
        return result, data


@lru_cache(maxsize=64)
def _array(length: int) -> type[ctypes.Array[c_ubyte]]:
    """A type takes 40 microseconds to make, and ctypes forgets it with its last instance."""
    return c_ubyte * length
