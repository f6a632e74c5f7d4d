"""Which pieces of an unfinished file are written, so that a later export can continue: a file beside it.

The first line names the snapshot that is copied. Then comes a record for each piece that was written, with its
range and its checksum. Nothing is synced before the end: a record is only a claim, and the file is checked against its
checksum before it is trusted. So it does not matter which parts of file and journal reached the disk, in which order.
"""

import json
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from rbdfs.catalog import ImageRef
from rbdfs.errors import TargetError

_RECORD = struct.Struct("<QIII")  # offset, length, the data's CRC-32, the CRC-32 of these three


class Origin(NamedTuple):
    """A snapshot, by what no renaming changes."""

    cluster: str
    """Its fsid."""
    pool_id: int
    namespace: str
    image_id: str
    snapshot_id: int
    size: int
    """Bytes."""


def origin_of(cluster: str, snapshot: ImageRef, size: int) -> Origin:
    """The origin of a copy of this snapshot; `cluster` is an fsid, `size` in bytes."""
    assert snapshot.snapshot_id is not None  # noqa: S101  (a HEAD changes)
    where = snapshot.namespace
    return Origin(cluster, where.pool.id, where.name, snapshot.id, snapshot.snapshot_id, size)


class Journal:
    """The journal of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_empty = True
        """Whether no piece was written."""
        self._checksums: dict[tuple[int, int], int] = {}

    def start(self, origin: Origin) -> None:
        """Start an empty journal. Raises OSError."""
        self._checksums = {}
        with self.path.open("wb") as file:
            file.write(json.dumps(origin._asdict()).encode() + b"\n")
        self._file = self.path.open("ab", buffering=0)

    def is_of_another(self, origin: Origin) -> bool:
        """Whether the journal on the disk is of another image, snapshot or size. Raises OSError."""
        head, newline, _ = self._read()
        return bool(newline) and not _is_of(head, origin)

    def _read(self) -> tuple[bytes, bytes, bytes]:
        """The first line, its newline, and the records."""
        try:
            return self.path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return b"", b"", b""

    def resume(self, origin: Origin) -> bool:
        """Continue the journal of an earlier export; False if there is none.

        Raises OSError; TargetError if it is of another image, snapshot or size.
        """
        head, newline, records = self._read()
        if not newline:
            return False
        if not _is_of(head, origin):
            raise TargetError(f"{self.path} is of another image, snapshot or size; remove it, and the file beside it")
        whole = len(records) // _RECORD.size * _RECORD.size
        for record in _RECORD.iter_unpack(records[:whole]):
            offset, length, checksum, check = record
            if check == zlib.crc32(_RECORD.pack(offset, length, checksum, 0)[:-4]):
                self._checksums[offset, length] = checksum
                self.is_empty = False
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(len(head) + 1 + whole)  # cuts off an incomplete record
        return True

    def add(self, offset: int, data: bytes) -> None:
        """Record a piece that was written. Any thread may call it. Raises OSError."""
        checksum = zlib.crc32(data)
        record = _RECORD.pack(offset, len(data), checksum, 0)[:-4]
        self.is_empty = False
        self._file.write(record + zlib.crc32(record).to_bytes(4, "little"))

    def claims(self, offset: int, length: int) -> bool:
        """Whether there is a record of this piece."""
        return (offset, length) in self._checksums

    def confirms(self, offset: int, data: bytes) -> bool:
        """Whether a record of this piece has the checksum of `data`."""
        return self._checksums.get((offset, len(data))) == zlib.crc32(data)

    def close(self) -> None:
        """Close the journal and keep it."""
        self._file.close()

    def remove(self) -> None:
        """Close the journal and remove it."""
        self._file.close()
        self.path.unlink(missing_ok=True)
        self.is_empty = True


def _is_of(head: bytes, origin: Origin) -> bool:
    try:
        return Origin(**json.loads(head)) == origin
    except (ValueError, TypeError):
        return False
