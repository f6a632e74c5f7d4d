"""Memory for image data: buffers that librbd fills, and where glibc takes them from."""

import ctypes
from collections.abc import Callable
from ctypes import c_char_p, c_ssize_t
from functools import partial

_bytes_from_string_and_size = ctypes.pythonapi["PyBytes_FromStringAndSize"]
_bytes_from_string_and_size.restype = ctypes.py_object
_bytes_from_string_and_size.argtypes = (c_char_p, c_ssize_t)


new_buffer: Callable[[int], bytes] = partial(_bytes_from_string_and_size, None)
"""A buffer to read into: so many bytes of whatever was in that memory before.

librbd fills it in place, as Ceph's own binding does with its `bytes`, so nobody may look at it before its read has
completed, and of a short read nobody may look beyond what was read. Unlike a `bytearray` it costs no pass over the
memory to clear it (with 4 MiB reads, a fifth less CPU time in all).
"""

_M_ARENA_MAX = -8  # malloc.h


def use_one_heap() -> None:
    """Have all threads allocate from one heap of glibc's; by default each of Ceph's threads fills one of its own.

    A mount that read 4 GiB by `dd` peaked at 300 to 360 MB so, and at 390 to 410 without, at the same speed and CPU
    time (4 rounds on 2 cores; thresholds for mmap and trimming changed nothing). Call it before any thread starts.
    Does nothing if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
