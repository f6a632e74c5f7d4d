"""Translates names in RBD to file names and back. RBD takes any bytes as a name; a file system does not.

A file name is the name itself, except that `%`, `/`, `@` and NUL, and the first dot of `.`, `..` and `.snap`, are
written as `%` and two hexadecimal digits, and the empty name (a snapshot can have it) as a lone `%`. So each name has
one file name and each file name one name, and `@` only separates an image from its snapshot.

A name that would be too long is abbreviated: its beginning, then `%~` and a hash of the whole name. To find it again,
compare with the names that exist.

All are str as Python has file names: bytes that are not UTF-8 are kept by surrogateescape.
"""

import hashlib
import re

NAME_BYTES = 255
"""The longest file name (NAME_MAX): the C library's readdir() has no room for more."""

SNAP = ".snap"
"""The hidden directory with the snapshots, as CephFS calls its own."""

SEPARATOR = "@"
"""Between an image and its snapshot; before a namespace if an image has the same name."""

_ESCAPED = re.compile("[%/@\0]|^\\.(?=\\.?\\Z|snap\\Z)")
_ESCAPE = re.compile("%([0-9A-F]{2})")
_EMPTY = "%"
_ABBREVIATION = "%~"
_HASH_BYTES = 16
_UNIT = re.compile("%[0-9A-F]{2}|.", re.DOTALL)


def encode(name: str, room: int = NAME_BYTES) -> str:
    """Return the file name for a name, of `room` bytes at most."""
    if not name:
        return _EMPTY
    file_name = _ESCAPED.sub(lambda found: f"%{ord(found[0]):02X}", name)
    if len(file_name) * 4 <= room or _bytes(file_name) <= room:
        return file_name
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=_HASH_BYTES).hexdigest()
    return _beginning(file_name, room - len(_ABBREVIATION) - len(digest)) + _ABBREVIATION + digest


def decode(file_name: str, room: int = NAME_BYTES) -> str | None:
    """Return the name of a file name; None if it is not one that `encode` makes, or abbreviated."""
    name = "" if file_name == _EMPTY else _ESCAPE.sub(lambda found: chr(int(found[1], 16)), file_name)
    # Each name has only one file name: a second spelling finds nothing.
    return name if encode(name, room) == file_name else None


def is_abbreviated(file_name: str) -> bool:
    """Return whether a file name may be the beginning of a name that is too long, and its hash."""
    return _ABBREVIATION in file_name


def _beginning(file_name: str, room: int) -> str:
    """Return as many whole characters and whole escapes as fit."""
    taken = []
    for unit in _UNIT.findall(file_name):
        room -= _bytes(unit)
        if room < 0:
            break
        taken.append(unit)
    return "".join(taken)


def _bytes(file_name: str) -> int:
    return len(file_name.encode(errors="surrogateescape"))
