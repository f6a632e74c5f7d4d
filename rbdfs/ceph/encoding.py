"""How Ceph encodes what its object classes take and answer (src/include/encoding.h): little-endian, end to end."""

import struct

NANOSECONDS = 10**9


def encode_string(text: str) -> bytes:
    """32 bits of length, then the bytes."""
    data = text.encode(errors="surrogateescape")
    return struct.pack("<I", len(data)) + data


def decode_string(data: bytes) -> str:
    """The string that stands at the start of `data`."""
    return Reader(data).string()


class Reader:
    """Takes one value after the other. Raises struct.error where there are too few bytes."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self._data = data
        self._position = position

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

    def bytes(self) -> bytes:
        """32 bits of length, then the bytes."""
        start = self._position + 4
        length = self.u32()
        if start + length > len(self._data):
            raise struct.error(f"{length} bytes announced, {len(self._data) - start} there")
        self._position = start + length
        return self._data[start : self._position]

    def string(self) -> str:
        """As `bytes`; what is not UTF-8 is kept by surrogateescape."""
        return self.bytes().decode(errors="surrogateescape")

    def time_ns(self) -> int:
        """A `utime_t`: seconds and nanoseconds, each of 32 bits."""
        seconds = self.u32()
        return seconds * NANOSECONDS + self.u32()

    def version(self) -> int:
        """The start of a versioned structure (ENCODE_START); the position after its end, for `skip_to`."""
        self._position += 2  # its version, and the oldest that can be read as
        length = self.u32()
        return self._position + length

    def skip_to(self, position: int) -> None:
        """Past what a newer version of a structure has that we do not know."""
        self._position = position

    def _integer(self, layout: str, size: int) -> int:
        (value,) = struct.unpack_from(layout, self._data, self._position)
        self._position += size
        return int(value)
