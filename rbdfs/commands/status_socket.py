"""The socket on which a mount answers `rbdfs status`, with one JSON object for each connection that it allows.

The socket has an abstract name made of the mount's device number, which is in /proc/self/mountinfo, and leaves no file
behind. Any process can take such a name, so both ends ask the kernel for the other's process and user (SO_PEERCRED).
"""

import socket
import struct
from typing import Final, Protocol

_CREDENTIALS: Final = struct.Struct("=iII")
"""struct ucred: pid, uid, gid."""


def name_of(device_number: tuple[int, int]) -> str:
    """The address of a mount's socket."""
    major, minor = device_number
    return f"\0rbdfs/{major}:{minor}"


class Connection(Protocol):
    """A socket, Python's or trio's."""

    def getsockopt(self, level: int, option: int, length: int, /) -> bytes:
        """The same as `socket.socket.getsockopt`."""


def peer_of(connection: Connection) -> tuple[int, int]:
    """The process and the user at the other end: of the client, or of the listener."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(credentials)
    return pid, uid
