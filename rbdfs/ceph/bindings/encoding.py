"""Ceph's encoding of the arguments and answers of object classes (src/include/encoding.h): little-endian, packed."""

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from rbdfs.errors import RbdfsError

NANOSECONDS = 10**9


class MalformedError(RbdfsError):
    """Bytes that Ceph would not write, or that need a newer reader."""

    errno = errno.EIO


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Name what is decoded in the message of a MalformedError."""
    try:
        yield
    except MalformedError as error:
        raise MalformedError(f"cannot understand {what}: {error}") from error


def encode_string(text: str) -> bytes:
    """32 bits of length, then the bytes."""
    data = text.encode(errors="surrogateescape")
    return struct.pack("<I", len(data)) + data


class Reader:
    """Reads one value after the other. Raises MalformedError if there are too few bytes; never reads past its end.

    Bytes after the last value that is asked for are ignored: newer releases append values.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0
        """Of the next value."""
        self._end = len(data)

    def u8(self) -> int:
        """8 bits."""
        return self._integer("<B", 1)

    def u32(self) -> int:
        """32 bits."""
        return self._integer("<I", 4)

    def u64(self) -> int:
        """64 bits."""
        return self._integer("<Q", 8)

    def s64(self) -> int:
        """64 bits with a sign."""
        return self._integer("<q", 8)

    def raw(self, length: int) -> bytes:
        """The next `length` bytes."""
        start = self._take(length)
        return self.data[start : start + length]

    def bytes(self) -> bytes:
        """32 bits of length, then the bytes."""
        return self.raw(self.u32())

    def string(self) -> str:
        """As `bytes`, decoded; surrogateescape keeps bytes that are not UTF-8."""
        return self.bytes().decode(errors="surrogateescape")

    def time_ns(self) -> int:
        """A `utime_t`: seconds and nanoseconds, each of 32 bits."""
        seconds = self.u32()
        return seconds * NANOSECONDS + self.u32()

    def structure(self, known: int) -> tuple[int, "Reader"]:
        """A versioned structure (ENCODE_START): its version, and a reader for it. This reader moves past its end.

        `known` is the newest version that the caller knows. A structure says which version a reader must know; newer
        versions append values at the end.
        """
        version, readable_as, length = self.u8(), self.u8(), self.u32()
        if readable_as > known:
            raise MalformedError(f"it needs a reader of version {readable_as}, and this one knows {known}")
        inside = Reader(self.data)
        inside.position = self._take(length)
        inside._end = self.position
        return version, inside

    def _integer(self, layout: str, size: int) -> int:
        (value,) = struct.unpack_from(layout, self.data, self._take(size))
        return int(value)

    def _take(self, length: int) -> int:
        """Move past `length` bytes; returns where they start."""
        start = self.position
        if length > self._end - start:
            raise MalformedError(f"{length} bytes announced, {self._end - start} there")
        self.position = start + length
        return start
