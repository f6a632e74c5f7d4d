"""Where a mount tells `rbdfs status` how it is: a socket of its own, with one JSON object for whoever connects and may.

The socket has an abstract name, made of the mount's device number: no file of it stays behind, and who has found the
mount in /proc/self/mountinfo knows it. Such a name belongs to whoever takes it first, so both ends ask the kernel who
the other is (SO_PEERCRED).
"""

import socket
import struct
from typing import Final, Protocol

_CREDENTIALS: Final = struct.Struct("=iII")
"""struct ucred: pid, uid, gid."""


def name_of(device_number: tuple[int, int]) -> str:
    """The socket's."""
    major, minor = device_number
    return f"\0rbdfs/{major}:{minor}"


class Connection(Protocol):
    """A socket, Python's or trio's."""

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes:
        """As `socket.socket.getsockopt`."""


def peer_of(connection: Connection) -> tuple[int, int]:
    """The process and the user at the other end: who has connected, or listens."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid
