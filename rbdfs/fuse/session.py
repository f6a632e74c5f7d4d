"""The session with the kernel: mount, serve until unmounted, unmount."""

import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyfuse3
import trio

from rbdfs.errors import MountError
from rbdfs.fuse import mounting
from rbdfs.fuse.device import Device
from rbdfs.fuse.mount_options import FuseOptions
from rbdfs.fuse.operations import Operations
from rbdfs.fuse.trouble_log import TroubleLog

log = logging.getLogger(__name__)

READ_AHEAD_KIB = 4096
"""The kernel's own readahead. With its default of 128 KiB the page cache asks for 128 KiB at a time, with more for as
much as a request can carry, 1 MiB (256 pages)."""

PROBE_XATTR = "user.rbdfs.watchdog"
"""An extended attribute that no file has: the kernel does not cache the answer."""

MIN_TASKS = 16
"""Worker tasks that stay: above this number pyfuse3 ends an idle task and starts a new one for each request."""

MAX_TASKS = 1024
"""Requests that pyfuse3 serves at once, without reads and seeks."""


@dataclass(frozen=True, slots=True)
class Session:
    """A mount, and the device that answers its requests."""

    mount: mounting.Mount
    device: Device
    troubles: TroubleLog


@contextmanager
def mounted(operations: Operations, mountpoint: Path, options: FuseOptions) -> Iterator[Session]:
    """Mount, and at the end unmount lazily: readers that wait get an error. Raises MountError."""
    mount = mounting.mount(mountpoint, options)
    try:
        device = Device(
            mount.device,
            operations.files,
            operations.forget_inodes,
            operations.attributes.invalidate,
            operations.attributes.seconds_until_end_known,
            operations.troubles,
            direct_io=operations.direct_io,
            answer_seconds=operations.guard.answer_seconds,
            cancel_request_of=operations.guard.cancel_request_of,
        )
        operations.attributes.notify = device.notify
        try:
            pyfuse3.init(operations, device.mountpoint_for_pyfuse3, set())
            try:
                yield Session(mount, device, operations.troubles)
            finally:
                pyfuse3.close(unmount=False)
        finally:
            device.close()
    finally:
        mount.unmount()


async def serve(session: Session, ready: Callable[[], Awaitable[None]], stopping: Callable[[], object]) -> None:
    """Answer the kernel until the file system is unmounted.

    Calls `ready` as soon as it is usable, and `stopping` when it takes no more requests: those that have begun may
    still wait for the cluster.
    """
    async with trio.open_nursery() as nursery:

        async def serve_the_rest() -> None:
            await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()

        async def tune_when_usable() -> None:
            await session.device.initialized.wait()
            _tune(session.mount)
            log.info("mounted on %s", session.mount.mountpoint)
            await ready()

        nursery.start_soon(serve_the_rest)
        nursery.start_soon(tune_when_usable)
        nursery.start_soon(session.troubles.tell)
        try:
            await session.device.serve()
        finally:
            stopping()
            nursery.cancel_scope.cancel()


def probe(mount: mounting.Mount) -> None:
    """Check that the mount answers, with a request through kernel, device, pyfuse3 and operations, but to no cluster.

    Blocks until there is an answer; call it in a worker thread. Raises MountError if the answer is wrong.
    """
    path = mount.reachable()
    if path is None:
        trio.from_thread.run_sync(lambda: None)  # it is unmounted, and only open files are served
        return
    reason = "there is such an attribute"
    try:
        os.getxattr(path, PROBE_XATTR)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return
        reason = error.strerror or str(error)
    raise MountError(f"{path} does not answer as it should: {reason}")


def _tune(mount: mounting.Mount) -> None:
    """Raise the kernel's own readahead, which only root may do."""
    number = mount.device_number()
    if number is None:
        log.warning("%s was unmounted before it was used", mount.mountpoint)
        return
    major, minor = number
    path = Path(f"/sys/class/bdi/{major}:{minor}/read_ahead_kb")
    try:
        path.write_text(f"{READ_AHEAD_KIB}\n")
    except OSError as error:
        log.info("large reads may be slower, since %s could not be raised: %s", path, error.strerror)
