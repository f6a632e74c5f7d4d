"""What is mounted where, as /proc has it; the file systems themselves get no request."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class MountInfo(NamedTuple):
    """A line of /proc/self/mountinfo."""

    id: int
    device_number: tuple[int, int]
    path: bytes
    type: str
    owner: int | None
    """The user who has mounted it; None if it is not FUSE."""


def mounted_on(path: Path) -> MountInfo | None:
    """Return the top mount on exactly this absolute path. Raises OSError."""
    number = mount_id(path, os.O_NOFOLLOW)
    return next((entry for entry in mountinfo() if (entry.id, entry.path) == (number, os.fsencode(path))), None)


def mount_id(path: Path, flags: int = 0) -> int:
    """Return the number of the mount that a path is in. `flags` are those of open(2). Raises OSError."""
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | flags)
    try:
        return int(Path(f"/proc/self/fdinfo/{descriptor}").read_text().partition("mnt_id:")[2].split()[0])
    finally:
        os.close(descriptor)


def mountinfo() -> Iterator[MountInfo]:
    """Yield the mounts of this process.

    A line, see proc(5): 36 35 98:0 /root /mount\\040point options tags... - type source options.
    """
    for line in Path("/proc/self/mountinfo").read_bytes().split(b"\n")[:-1]:
        fields = line.split(b" ")
        major, minor = fields[2].split(b":")
        path = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), fields[4])
        kind, *_, options = fields[fields.index(b"-", 6) + 1 :]
        owner = re.search(rb"(?:^|,)user_id=(\d+)", options)
        owned_by = int(owner[1]) if owner else None
        yield MountInfo(int(fields[0]), (int(major), int(minor)), path, os.fsdecode(kind), owned_by)
