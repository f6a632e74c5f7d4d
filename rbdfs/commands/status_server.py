"""What a mount tells `rbdfs status` of itself. The cluster is not asked for anything."""

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
"""Of what there may be any number of, the oldest: open files, and requests that wait."""

SEND_SECONDS: Final = 2.0
"""How long one who asked may take to read the answer."""


def listen_for_status(device_number: tuple[int, int] | None) -> socket.socket | None:
    """From now on `rbdfs status` finds the mount; None if it cannot: the mount works without."""
    if device_number is None:
        return None  # unmounted already
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(name_of(device_number))
        listener.listen()
    except OSError as error:
        listener.close()
        log.warning("rbdfs status cannot show this mount: %s: %s", name_of(device_number)[1:], error.strerror)
        return None
    return listener


async def serve_status(live: RunningMount, listener: socket.socket) -> None:
    """Answer root and who has mounted it, until cancelled."""

    async def answer(stream: trio.SocketStream) -> None:
        try:
            _, uid = peer_of(stream.socket)
            if uid in (0, os.geteuid()):
                with trio.move_on_after(SEND_SECONDS):
                    await stream.send_all(json.dumps(report(live)).encode())
        except (OSError, trio.BrokenResourceError):
            log.debug("who asked for the status is gone")
        except Exception:
            log.exception("the status could not be told")
        finally:
            await trio.aclose_forcefully(stream)

    await trio.serve_listeners(answer, [trio.SocketListener(trio.socket.from_stdlib_socket(listener))])


def report(live: RunningMount) -> dict[str, object]:
    """All that is told. Sizes in bytes, durations in seconds, times in seconds since the epoch."""
    now, cache, waiting = monotonic(), live.cache, live.requests.waiting
    opened = list(live.operations.opened.values())
    return {
        "version": __version__,
        "fsid": live.fsid,
        "client": live.client,
        "started": live.started,
        "connected": live.health.is_connected,
        "osds_answer": live.osds_answer,
        "trouble": live.operations.troubles.summary(),
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
                "image": None if (image := live.operations.image_of(each.inode)) is None else str(image),
                "offset": each.offset if each.opcode in (READ, LSEEK) else None,
                "seconds": now - each.began,
            }
            for each in live.requests.oldest(SHOWN_MAX)
        ],
        "errors": [each._asdict() for each in live.operations.troubles.last],
    }
