"""`rbdfs mount`: connect, mount, and serve until the file system is unmounted."""

import logging
import logging.handlers
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import trio

from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connect import ClusterOptions
from rbdfs.ceph.memory import use_one_heap
from rbdfs.commands.ending import exit_at_the_latest
from rbdfs.errors import MountError, RbdfsError
from rbdfs.fuse.mount_options import FuseOptions
from rbdfs.fuse.mounting import check_mountpoint
from rbdfs.fuse.operations import Operations, Presentation
from rbdfs.fuse.session import mounted, serve
from rbdfs.fuse.tree import Tree
from rbdfs.image.cache import ObjectCache
from rbdfs.image.open_images import OpenImages
from rbdfs.image.striper import MIB
from rbdfs.image.throttle import Throttle

log = logging.getLogger(__name__)

MAX_OPS = 256
MAX_BYTES = 56 * MIB
"""What the mount may have in flight towards the cluster: operations, and bytes (`rbd export`: 10 objects of 4 MiB).
librados itself stops at 1,024 operations and 100 MiB (`objecter_inflight_ops`, `objecter_inflight_op_bytes`), and
blocks the caller then."""

READY = "ready"
"""What the background process says when the mount is usable; anything else is what is wrong."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What `rbdfs mount` was asked for."""

    mountpoint: Path
    cluster: ClusterOptions
    pools: tuple[str, ...]
    """Only these; all if there are none."""
    presentation: Presentation
    fuse_options: FuseOptions
    cache_bytes: int
    foreground: bool
    log_level: int
    log_file: Path | None


def mount(options: MountOptions) -> int:
    """Mount and serve: in this process if `foreground`, else in one of its own, once it is usable. The exit status.

    Raises RbdfsError if the file system could not be mounted; then nothing stays behind.
    """
    check_mountpoint(options.mountpoint)
    use_one_heap()
    if options.foreground:
        _log_to(options, logging.StreamHandler(sys.stderr))
        trio.run(_serve, options, lambda: None)
        return 0
    return _in_background(options)


async def _serve(options: MountOptions, ready: Callable[[], None]) -> None:
    """The composition root: wires the parts, and takes them apart in reverse."""
    cluster = await Cluster.connect(options.cluster, options.pools)
    images = OpenImages(ObjectCache(options.cache_bytes, Throttle(MAX_OPS, MAX_BYTES)))
    operations = Operations(Tree(cluster, time.time_ns()), cluster, images, cluster.open_image, options.presentation)
    try:
        with mounted(operations, options.mountpoint, options.fuse_options) as session:
            await _until_stopped(partial(serve, session, ready))
    finally:
        with exit_at_the_latest(0):
            await images.aclose()
            await cluster.aclose()


async def _until_stopped(serving: Callable[[], Awaitable[None]]) -> None:
    """Serve until the file system is unmounted, or until SIGINT or SIGTERM."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def stop_at_signal() -> None:
                number = await anext(signals)
                log.info("stopping at %s", signal.Signals(number).name)
                nursery.cancel_scope.cancel()

            nursery.start_soon(stop_at_signal)
            await serving()
            nursery.cancel_scope.cancel()


def _in_background(options: MountOptions) -> int:
    """Serve in a process of its own; return when it says that the mount is usable, or raise what it says is wrong."""
    report, say = os.pipe()
    # Nothing has started a thread yet: librados would not live on after a fork.
    child = os.fork()
    if child == 0:
        os.close(report)
        _serve_in_child(options, say)
    os.close(say)
    try:
        with os.fdopen(report) as pipe:
            answer = pipe.read()
    except KeyboardInterrupt:
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    if answer == READY:
        return 0
    _, status = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(status)
    raise MountError(answer or f"the mount ended before it was usable (status {status}); see what -d logs")


def _serve_in_child(options: MountOptions, say: int) -> NoReturn:
    """The background process, from fork to exit."""

    def ready() -> None:
        os.write(say, READY.encode())
        os.close(say)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        os.close(null)

    status = 1
    try:
        os.setsid()
        _log_to(options, _syslog())
        trio.run(_serve, options, ready)
        status = 0
    except RbdfsError as error:
        os.write(say, str(error).encode(errors="backslashreplace"))
    except BaseException as error:
        log.critical("the mount ended", exc_info=True)
        with suppress(OSError):  # closed, once it was usable
            os.write(say, f"unexpected {type(error).__name__}: {error}".encode())
    finally:
        logging.shutdown()
        os._exit(status)


def _log_to(options: MountOptions, default: logging.Handler) -> None:
    """Log to `--log-file`, else to the given place."""
    handler = logging.FileHandler(options.log_file) if options.log_file else default
    handler.setFormatter(logging.Formatter("%(asctime)s rbdfs[%(process)d] %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=options.log_level, handlers=[handler])


def _syslog() -> logging.Handler:
    """The system's log, where there is one."""
    device = Path("/dev/log")
    return logging.handlers.SysLogHandler(os.fspath(device)) if device.exists() else logging.NullHandler()
