"""How Ceph encodes what its object classes take and answer (src/include/encoding.h): little-endian, end to end."""

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from rbdfs.errors import RbdfsError

NANOSECONDS = 10**9


class MalformedError(RbdfsError):
    """Bytes that are not what Ceph puts there, or that only a newer reader may read."""

    errno = errno.EIO


@contextmanager
def understood(what: str) -> Iterator[None]:
    """Say in a MalformedError what it is that cannot be understood."""
    try:
        yield
    except MalformedError as error:
        raise MalformedError(f"cannot understand {what}: {error}") from error


def encode_string(text: str) -> bytes:
    """32 bits of length, then the bytes."""
    data = text.encode(errors="surrogateescape")
    return struct.pack("<I", len(data)) + data


class Reader:
    """Takes one value after the other. Raises MalformedError if there are too few bytes, and never reads past its end.

    What comes after the values that are asked for may be anything: newer releases append values.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
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
        """So many bytes."""
        start = self._take(length)
        return self._data[start : start + length]

    def bytes(self) -> bytes:
        """32 bits of length, then the bytes."""
        return self.raw(self.u32())

    def string(self) -> str:
        """As `bytes`; what is not UTF-8 is kept by surrogateescape."""
        return self.bytes().decode(errors="surrogateescape")

    def time_ns(self) -> int:
        """A `utime_t`: seconds and nanoseconds, each of 32 bits."""
        seconds = self.u32()
        return seconds * NANOSECONDS + self.u32()

    def structure(self, known: int) -> tuple[int, "Reader"]:
        """A versioned structure (ENCODE_START): its version, and a reader of it; this reader is past its end then.

        `known` is the newest version that the caller knows. A structure says which version a reader must know to read
        it; what a newer one has more stands at its end.
        """
        version, readable_as, length = self.u8(), self.u8(), self.u32()
        if readable_as > known:
            raise MalformedError(f"it needs a reader of version {readable_as}, and this one knows {known}")
        inside = Reader(self._data)
        inside._position = self._take(length)
        inside._end = self._position
        return version, inside

    def _integer(self, layout: str, size: int) -> int:
        (value,) = struct.unpack_from(layout, self._data, self._take(size))
        return int(value)

    def _take(self, length: int) -> int:
        """Go past so many bytes; where they start."""
        start = self._position
        if length > self._end - start:
            raise MalformedError(f"{length} bytes announced, {self._end - start} there")
        self._position = start + length
        return start
