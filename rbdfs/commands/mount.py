"""`rbdfs mount`: connect, mount, and serve until the file system is unmounted."""

import faulthandler
import gc
import logging
import math
import os
import resource
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import trio

from rbdfs.ceph.bindings.malloc import use_one_heap
from rbdfs.ceph.cluster import Cluster
from rbdfs.ceph.connection.connect import ClusterOptions
from rbdfs.commands.logs import log_to
from rbdfs.commands.running_mount import RunningMount
from rbdfs.commands.shutdown import exit_at_the_latest
from rbdfs.commands.status_server import listen_for_status, serve_status
from rbdfs.commands.systemd import ServiceManager, keep_informed
from rbdfs.errors import MountError, RbdfsError
from rbdfs.fuse.attributes import FileAttributes
from rbdfs.fuse.mount_options import FuseOptions
from rbdfs.fuse.mounting import check_mountpoint
from rbdfs.fuse.operations import Operations
from rbdfs.fuse.session import Session, mounted, probe, serve
from rbdfs.fuse.tree import Tree
from rbdfs.fuse.trouble_log import TroubleLog
from rbdfs.fuse.troubles import Troubles
from rbdfs.image.cache import ObjectCache
from rbdfs.image.open_images import OpenImages
from rbdfs.image.striper import MIB
from rbdfs.threads import run_in_thread

log = logging.getLogger(__name__)

MAX_OPS = 256
MAX_BYTES = 56 * MIB
"""Reads, and their bytes, that the mount may have in flight to one pool (`rbd export`: 10 objects of 4 MiB)."""

GRACE_SECONDS = 1.0
"""How much longer than an OSD's timeout a request may take. By then librados has reported an OSD that does not answer;
the request ends even if it asks several OSDs one after the other, or waits in a queue or for a monitor."""

COLLECT_SECONDS = 600
"""What refers to itself, and has lived for a while, stays in memory for so long after its end."""
NEVER = (1 << 31) - 1

READY = "ready"
"""The background process writes this when the mount is usable; anything else is an error message."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """The options of `rbdfs mount`."""

    mountpoint: Path
    cluster: ClusterOptions
    pools: tuple[str, ...]
    """The pools to show; all if empty."""
    attributes: FileAttributes
    fuse_options: FuseOptions
    cache_bytes: int
    foreground: bool
    log_level: int
    log_file: Path | None
    metrics: tuple[str, int] | None = None
    """The address and port to serve metrics at."""


def mount(options: MountOptions) -> int:
    """Mount and serve: in this process if `foreground`, else in a background process; then return once it is usable.

    Returns the exit status. Raises RbdfsError if the mount fails; then it leaves nothing behind.
    """
    check_mountpoint(options.mountpoint)
    if options.metrics is not None:
        import rbdfs.commands.metrics  # noqa: F401, PLC0415  (takes 40 ms; now, so that a missing module is an error)
    use_one_heap()
    _allow_many_files()
    if options.foreground:
        log_to(options.log_file, options.log_level, foreground=True)
        manager = ServiceManager.from_environment(os.environ, os.getpid())
        if manager.watchdog_seconds:
            faulthandler.enable()  # at the watchdog's SIGABRT it prints the stack of every thread
        trio.run(_serve, options, lambda: None, manager)
        return 0
    return _in_background(options)


async def _serve(options: MountOptions, ready: Callable[[], None], manager: ServiceManager) -> None:
    """The composition root: wires the parts, and takes them apart in reverse."""
    manager.notify(f"STATUS=connecting to the cluster as {options.cluster.name}")
    register = await _serve_metrics(options.metrics)
    cluster = await Cluster.connect(options.cluster, options.pools)
    cache = ObjectCache(options.cache_bytes, MAX_OPS, MAX_BYTES)
    images = OpenImages(cache)
    tree = Tree(cluster, time.time_ns())
    osd_timeout = float(cluster.setting("rados_osd_op_timeout"))
    troubles = TroubleLog(Troubles(osd_timeout), tree.image_of)
    answer_seconds = osd_timeout + GRACE_SECONDS if osd_timeout else math.inf
    operations = Operations(tree, cluster, images, cluster.open_image, options.attributes, troubles, answer_seconds)

    with ExitStack() as ending:

        async def serve_and_report(session: Session, running: RunningMount) -> None:
            async with trio.open_nursery() as nursery:

                async def usable() -> None:
                    listener = await listen_for_status(session.mount.device_number())
                    if listener is not None:
                        nursery.start_soon(serve_status, running, listener)
                    ready()
                    manager.notify("READY=1", f"STATUS={status()}")
                    nursery.start_soon(keep_informed, manager, status, partial(probe, session.mount))

                def stopping() -> None:
                    manager.notify("STOPPING=1", "STATUS=closing images")
                    ending.enter_context(exit_at_the_latest(0, session.mount.unmount))

                status = partial(_status, options, operations)
                nursery.start_soon(collect_garbage)
                await serve(session, usable, stopping)
                nursery.cancel_scope.cancel()

        try:
            with mounted(operations, options.mountpoint, options.fuse_options) as session:
                running = RunningMount(
                    session.mount.mountpoint,
                    cluster.fsid,
                    options.cluster.name,
                    time.time(),
                    operations,
                    session.device.requests,
                    cache,
                    cluster.health,
                )
                register(running)
                await _until_stopped(partial(serve_and_report, session, running))
        finally:
            await images.aclose()
            await cluster.aclose()


def _allow_many_files() -> None:
    """Raise the limit of open files to its maximum: each open image takes a descriptor, and the default is 1,024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def collect_garbage() -> None:
    """Search all objects for garbage every COLLECT_SECONDS, and not whenever Python would: nothing is answered then.

    It takes 0.2 s if the kernel knows 100,000 files, and would happen ten times during a listing of these. Python still
    searches new objects as always.
    """
    gc.freeze()  # what was imported stays
    gc.set_threshold(*gc.get_threshold()[:2], NEVER)
    while True:
        await trio.sleep(COLLECT_SECONDS)
        gc.collect()


async def _serve_metrics(address: tuple[str, int] | None) -> Callable[[RunningMount], None]:
    """Serve metrics if asked to, before anything else, because it can fail. Returns what to call with the mount."""
    if address is None:
        return lambda _: None
    from rbdfs.commands.metrics import MountCollector, serve_metrics  # noqa: PLC0415  (loaded only if needed)

    registry = await run_in_thread(serve_metrics, *address, abandon_on_cancel=True)
    return lambda running: registry.register(MountCollector(running))


def _status(options: MountOptions, operations: Operations) -> str:
    """A line that says what is mounted, how many files are open, and what is wrong."""
    pools = ", ".join(options.pools) or "all pools"
    count = len(operations.files)
    trouble = operations.troubles.summary()
    is_wrong = f"; trouble: {trouble}" if trouble else ""
    return f"{pools} on {options.mountpoint}, {count} open file{'' if count == 1 else 's'}{is_wrong}"


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
    """Serve in a background process. Returns when the mount is usable; raises MountError with the error it reports."""
    report, say = os.pipe()
    # No thread has been started yet: librados would not survive a fork.
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
        log_to(options.log_file, options.log_level, foreground=False)
        trio.run(_serve, options, ready, ServiceManager())
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
