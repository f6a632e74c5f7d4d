"""A TCP port on loopback for the mon."""

import random
import socket

MON_PORTS = range(20000, 32000)  # below Linux's ephemeral ports, away from Ceph's own 6800-7568


def free_port() -> int:
    """A port that nothing listens on now; whether it stays so, the mon finds out."""
    while not port_is_free(port := random.choice(MON_PORTS)):  # noqa: S311
        pass
    return port


def port_is_free(port: int) -> bool:
    """Whether it could be bound at this moment."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Ceph does: connections that linger do no harm
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
