"""The label of a file: which snapshot it is a copy of, and whether it is whole.

It is an extended attribute of the file, or a file beside it if the file system has none. It also holds the inode, the
size and the modification time: it is not trusted on another file, nor if somebody has written to the file since.
"""

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rbdfs.errors import LabelError
from rbdfs.export import syscalls
from rbdfs.export.journal import Origin

ATTRIBUTE = "user.rbdfs.copy"

_VERSION = 1
_NO_ATTRIBUTES = frozenset({errno.ENOTSUP, errno.EPERM, errno.ENOSPC, errno.E2BIG})
"""The file system has no extended attributes, or no room for this one."""


@dataclass(frozen=True, slots=True)
class Copied:
    """A snapshot that was copied: what no renaming changes, and the names it had then."""

    origin: Origin
    image: str
    """An image spec without the snapshot."""
    snapshot: str
    created_ns: int
    """When the snapshot was made, in nanoseconds since the epoch."""

    def __str__(self) -> str:
        return f"{self.image}@{self.snapshot} (snapshot {self.origin.snapshot_id} of image {self.origin.image_id})"


@dataclass(frozen=True, slots=True)
class Label:
    """What a label says of its file."""

    of: Copied | None
    """The snapshot of which it was a whole copy; None if that is not known."""
    towards: tuple[Copied, ...] = ()
    """Empty for a whole copy. Else it is a mixture, which may hold parts of each of these."""

    @property
    def whole(self) -> Copied | None:
        """The snapshot of which it is a whole copy."""
        return None if self.towards else self.of


def write(descriptor: int, path: Path, label: Label, *, is_ended: bool = True) -> None:
    """Label an open file and sync it. Raises OSError.

    `is_ended`: rbdfs writes no more to the file, so that its modification time counts.
    """
    status = os.fstat(descriptor)
    fields = {
        "version": _VERSION,
        "of": None if label.of is None else _fields(label.of),
        "towards": list(map(_fields, label.towards)),
        "inode": status.st_ino,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns if is_ended else None,
    }
    text = json.dumps(fields).encode()
    try:
        os.setxattr(descriptor, ATTRIBUTE, text)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise
        _write_beside(path, text)
        _remove_attribute(descriptor)
        os.fsync(descriptor)
    else:
        os.fsync(descriptor)
        path_beside(path).unlink(missing_ok=True)


def read(descriptor: int, path: Path) -> Label | None:
    """The label of an open file, None without one. Raises OSError; LabelError if the label cannot be trusted."""
    text = _read_text(descriptor, path)
    if text is None:
        return None
    try:
        fields = json.loads(text)
        if fields["version"] != _VERSION:
            raise LabelError(f"{path} was labelled by a newer version of rbdfs")
        of = fields["of"]
        label = Label(None if of is None else _copied(of), tuple(map(_copied, fields["towards"])))
        inode, size, mtime_ns = fields["inode"], fields["size"], fields["mtime_ns"]
    except (ValueError, KeyError, TypeError) as error:
        raise LabelError(f"the label of {path} cannot be read") from error
    status = os.fstat(descriptor)
    if status.st_ino != inode:
        raise LabelError(
            f"{path} is not the file that rbdfs made, but a copy of it (inode {status.st_ino}, not {inode})"
        )
    if mtime_ns is not None:
        if status.st_size != size:
            raise LabelError(f"{path} was changed since rbdfs made it: it has {status.st_size} bytes, not {size}")
        if status.st_mtime_ns != mtime_ns:
            raise LabelError(f"{path} was written to since rbdfs made it (its modification time says so)")
    return label


def remove(descriptor: int, path: Path) -> None:
    """Remove the label of an open file. Raises OSError."""
    _remove_attribute(descriptor)
    os.fsync(descriptor)
    path_beside(path).unlink(missing_ok=True)
    syscalls.sync_directory(path.parent)


def path_beside(path: Path) -> Path:
    """The file that holds the label if the file system has no extended attributes."""
    return path.with_name(f"{path.name}.rbdfs")


def _read_text(descriptor: int, path: Path) -> bytes | None:
    try:
        return os.getxattr(descriptor, ATTRIBUTE)
    except OSError as error:
        if error.errno not in {errno.ENODATA, *_NO_ATTRIBUTES}:
            raise
    try:
        return path_beside(path).read_bytes()
    except FileNotFoundError:
        return None


def _write_beside(path: Path, text: bytes) -> None:
    beside = path_beside(path)
    new = beside.with_name(f"{beside.name}.new")
    with new.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.rename(beside)
    syscalls.sync_directory(path.parent)


def _remove_attribute(descriptor: int) -> None:
    try:
        os.removexattr(descriptor, ATTRIBUTE)
    except OSError as error:
        if error.errno not in {errno.ENODATA, *_NO_ATTRIBUTES}:
            raise


def _fields(copied: Copied) -> dict[str, Any]:
    names = {"image": copied.image, "snapshot": copied.snapshot, "created_ns": copied.created_ns}
    return copied.origin._asdict() | names


def _copied(fields: Mapping[str, Any]) -> Copied:
    origin = Origin(*(fields[name] for name in Origin._fields))
    return Copied(origin, fields["image"], fields["snapshot"], fields["created_ns"])
