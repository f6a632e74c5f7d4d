"""The answer of a mount to `rbdfs status`. It asks the cluster nothing."""

import errno
import json
import logging
import os
import socket
from time import monotonic
from typing import Final

import trio

from rbdfs import __version__
from rbdfs.commands.running_mount import RunningMount
from rbdfs.commands.status_socket import name_of, peer_of
from rbdfs.fuse.protocol import LSEEK, OPERATIONS, READ

log = logging.getLogger(__name__)

SHOWN_MAX: Final = 1000
"""Open files, and waiting requests, that an answer lists at most: the oldest."""

BIND_SECONDS: Final = 5.0
BIND_AGAIN_SECONDS: Final = 0.02
"""Of the name: the kernel gives an unmounted file system's device number to the next one, maybe before its process has
ended."""

SEND_SECONDS: Final = 2.0
"""How long a client may take to read the answer."""


async def listen_for_status(device_number: tuple[int, int] | None) -> socket.socket | None:
    """Make the mount visible to `rbdfs status`. None if that fails; the mount works without it."""
    if device_number is None:
        return None  # unmounted already
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    give_up = trio.current_time() + BIND_SECONDS
    while True:
        try:
            listener.bind(name_of(device_number))
            listener.listen()
            return listener
        except OSError as error:
            if error.errno != errno.EADDRINUSE or trio.current_time() > give_up:
                listener.close()
                log.warning("rbdfs status cannot show this mount: %s: %s", name_of(device_number)[1:], error.strerror)
                return None
        await trio.sleep(BIND_AGAIN_SECONDS)


async def serve_status(mount: RunningMount, listener: socket.socket) -> None:
    """Answer root and the user who mounted it, until cancelled."""

    async def answer(stream: trio.SocketStream) -> None:
        try:
            _, uid = peer_of(stream.socket)
            if uid in (0, os.geteuid()):
                with trio.move_on_after(SEND_SECONDS):
                    await stream.send_all(json.dumps(report(mount)).encode())
        except (OSError, trio.BrokenResourceError):
            log.debug("the client of rbdfs status is gone")
        except Exception:
            log.exception("cannot answer rbdfs status")
        finally:
            await trio.aclose_forcefully(stream)

    await trio.serve_listeners(answer, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])


def report(mount: RunningMount) -> dict[str, object]:
    """The answer. Sizes in bytes, durations in seconds, times in seconds since the epoch."""
    now, cache, waiting = monotonic(), mount.cache, mount.requests.waiting
    opened = list(mount.operations.opened.values())
    return {
        "version": __version__,
        "fsid": mount.fsid,
        "client": mount.client,
        "started": mount.started,
        "connected": mount.health.is_connected,
        "osds_answer": mount.osds_answer,
        "trouble": mount.operations.troubles.summary(),
        "cache": {
            "bytes": cache.cached_bytes,
            "budget_bytes": cache.budget_bytes,
            "hits": cache.counts.hits,
            "misses": cache.counts.misses,
        },
        "in_flight": {"reads": cache.reads_in_flight, "bytes": cache.in_flight.bytes, "queued": cache.reads_queued},
        "open_files": len(opened),
        "open": [
            {
                "image": str(each.image),
                "pid": each.process.pid,
                "command": each.process.command,
                "seconds": now - each.since,
            }
            for each in opened[:SHOWN_MAX]
        ],
        "requests_waiting": len(waiting),
        "waiting": [
            {
                "operation": OPERATIONS.get(each.opcode, f"opcode {each.opcode}"),
                "image": None if (image := mount.operations.image_of(each.inode)) is None else str(image),
                "offset": each.offset if each.opcode in (READ, LSEEK) else None,
                "seconds": now - each.began,
            }
            for each in mount.requests.oldest(SHOWN_MAX)
        ],
        "errors": [each._asdict() for each in mount.operations.troubles.last],
    }
