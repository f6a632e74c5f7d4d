"""The session with the kernel: mount, serve, tune, unmount."""

import errno
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio

from rbdfs.errors import MountError
from rbdfs.fuse.lowlevel import serve_lseek, serve_reads
from rbdfs.fuse.operations import Operations

log = logging.getLogger(__name__)

TYPE = "fuse.rbdfs"
"""The file system type that `mount`, `df -T` and /proc/mounts show."""

READ_AHEAD_KIB = 4096
"""The kernel's own readahead. With its default of 128 KiB the page cache asks for 128 KiB at a time, with more for as
much as a request can carry, 1 MiB (256 pages)."""

MAX_BACKGROUND = 64
CONGESTION_THRESHOLD = 48
"""Readahead requests that the kernel keeps under way at once (12 by default), and from how many on it holds back."""

MIN_TASKS = 16
"""Worker tasks that stay: pyfuse3 ends idle ones above this number and starts new ones, for each request again."""

MAX_TASKS = 1024
"""Requests that pyfuse3 serves at once. Without the C library reads are among them: with as many waiting for an OSD,
even statfs waits."""


def _is_news(record: logging.LogRecord) -> bool:
    """Whether what pyfuse3 logs is any. It logs an error for an answer that nobody waits for any more (ENOENT): to a
    request that an unmount or a killed process has cut off."""
    nobody_waits = os.strerror(errno.ENOENT)
    return not ("fuse_reply_* failed" in str(record.msg) and nobody_waits in str(record.args))


logging.getLogger("pyfuse3").addFilter(_is_news)


def check_mountpoint(mountpoint: Path) -> None:
    """Raise MountError, with what to do about it, where nothing can be mounted."""
    try:
        os.statvfs(mountpoint)  # a dead mount's stat() can still come from the kernel's cache
        mode = mountpoint.stat().st_mode
    except FileNotFoundError:
        raise MountError(f"{mountpoint} does not exist; make it with: mkdir -p {mountpoint}", errno.ENOENT) from None
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ECONNABORTED):
            free = "umount" if os.geteuid() == 0 else "fusermount3 -u"
            raise MountError(
                f"{mountpoint} is a dead mount, left by a process that was killed; free it with: {free} {mountpoint}"
            ) from None
        raise MountError(f"cannot use {mountpoint}: {error.strerror}", error.errno) from None
    if not stat.S_ISDIR(mode):
        raise MountError(f"{mountpoint} is not a directory", errno.ENOTDIR)
    if _mounted_type(mountpoint.resolve()) == TYPE:
        raise MountError(f"{mountpoint} is an rbdfs mount already; end it with: umount {mountpoint}", errno.EBUSY)


@contextmanager
def mounted(operations: Operations, mountpoint: Path, options: frozenset[str]) -> Iterator[None]:
    """Mount, and unmount at the end, lazily: a reader that is under way then gets an error. Raises MountError."""
    defaults = {"fsname=rbdfs", "subtype=rbdfs", "ro", "default_permissions"}
    with _libfuse_messages() as messages:
        try:
            pyfuse3.init(operations, os.fspath(mountpoint), set(options | defaults))
        except RuntimeError as error:
            reason = " ".join(messages().split()) or str(error)
            raise MountError(f"cannot mount {mountpoint}: {reason}") from error
    try:
        yield
    finally:
        pyfuse3.close(unmount=True)


async def serve(operations: Operations, mountpoint: Path, ready: Callable[[], None]) -> None:
    """Answer the kernel until the file system is unmounted; call `ready` as soon as it is usable."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tune_when_usable, mountpoint, ready)
        with (
            serve_lseek(operations.lseek, nursery),
            serve_reads(operations.begin_read, operations.settle_read, nursery),
        ):
            await pyfuse3.main(min_tasks=MIN_TASKS, max_tasks=MAX_TASKS)
        nursery.cancel_scope.cancel()


async def _tune_when_usable(mountpoint: Path, ready: Callable[[], None]) -> None:
    # Its stat of our own mount is answered by this very thread, so it must be asked from another.
    try:
        await trio.to_thread.run_sync(_tune, mountpoint)
    except OSError as error:
        log.warning("%s was unmounted before it was used: %s", mountpoint, error)
        return
    ready()


def _tune(mountpoint: Path) -> None:
    device = mountpoint.stat().st_dev
    connection = Path(f"/sys/fs/fuse/connections/{os.minor(device)}")
    settings = {
        Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"): READ_AHEAD_KIB,
        connection / "max_background": MAX_BACKGROUND,
        connection / "congestion_threshold": CONGESTION_THRESHOLD,
    }
    refused = []
    for path, value in settings.items():
        try:
            path.write_text(f"{value}\n")
        except OSError as error:
            refused.append(f"{path} ({error.strerror})")
    if refused:
        log.info("large reads may be slower, since these could not be raised: %s", ", ".join(refused))


def _mounted_type(path: Path) -> str | None:
    """The type of what is mounted on exactly this path, None where nothing is."""
    found = None
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4].encode().decode("unicode_escape") == os.fspath(path):
            found = fields[fields.index("-") + 1]
    return found


@contextmanager
def _libfuse_messages() -> Iterator[Callable[[], str]]:
    """Catch what libfuse and fusermount3 write to stderr, to be said in one line of ours."""
    with tempfile.TemporaryFile("w+") as caught:
        stderr = os.dup(2)
        os.dup2(caught.fileno(), 2)

        def read() -> str:
            caught.seek(0)
            return caught.read()

        try:
            yield read
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
