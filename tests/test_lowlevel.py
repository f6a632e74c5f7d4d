"""Seeks and reads past pyfuse3 on real mounts: run as a program, this file is the filesystem, else it is its tests.

The filesystem runs in a process of its own, on a copy of rbdfs with or without the C library, so that whatever a test
breaks can be killed: the kernel then answers all who wait. It says what it does in lines of JSON, and goes away when
its standard input is closed, also if the tests are killed.
"""

import errno
import importlib
import importlib.machinery
import json
import logging
import mmap
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from rbdfs.errors import RbdfsError

if TYPE_CHECKING:
    from rbdfs.fuse.lowlevel import ReadRequest

KiB = 1024
SIZE = 1024 * KiB
DATA = {  # file name → extents of data (start, end) in its SIZE bytes
    "sparse": [(128 * KiB, 256 * KiB), (512 * KiB, 513 * KiB)],
    "tail": [(0, 4 * KiB), (1000 * KiB, SIZE)],
    "empty": [],
    "slow": [(64 * KiB, SIZE)],  # seeks wait until the test says "go"
    "failing": [(0, SIZE)],  # seeks fail as the offset says: FAILURES
}
NAMES = list(DATA)
INODES = {name: inode for inode, name in enumerate(NAMES, start=2)}
READ_WAITS, READ_FAILS, READ_EXPLODES, READ_IN_A_TASK, TASK_FAILS, TASK_EXPLODES = READS = range(0, 6 * 4096, 4096)
STALE, NOSYS, NO_ERRNO, UNEXPECTED, BACKWARDS, FUSE_ERROR = FAILURES = range(6)


def next_offset(extents: list[tuple[int, int]], offset: int, whence: int) -> int | None:
    """What lseek should find, None for ENXIO; the definition that the mount is compared with."""
    if offset >= SIZE:
        return None
    within = [(start, end) for start, end in extents if end > offset]
    if whence == os.SEEK_DATA:
        return max(offset, within[0][0]) if within else None
    return within[0][1] if within and within[0][0] <= offset else offset


# ---------------------------------------------------------------------- the filesystem


def tell(**event: object) -> None:
    print(json.dumps(event), flush=True)


async def lseek(inode: int, fh: int, offset: int, whence: int, go: trio.Event) -> int:
    import pyfuse3  # noqa: PLC0415  (when pyfuse3 is imported is what some tests are about)

    name = NAMES[inode - 2]
    tell(seek=name, fh=fh, offset=offset, whence=whence)
    if name == "slow":
        try:
            await go.wait()
        except trio.Cancelled:
            tell(cancelled=name)
            raise
    if name == "failing":
        errors = {
            STALE: RbdfsError("stale", errno.ESTALE),
            NOSYS: RbdfsError("not implemented", errno.ENOSYS),
            NO_ERRNO: RbdfsError("a number that is no errno", 4096),
            UNEXPECTED: ZeroDivisionError("unexpected"),
            FUSE_ERROR: pyfuse3.FUSEError(errno.EBADF),
        }
        if offset in errors:
            raise errors[offset]
        return 0
    found = next_offset(DATA[name], offset, whence)
    if found is None:
        raise RbdfsError("nothing there", errno.ENXIO)
    return found


def begin_read(request: "ReadRequest", nursery: trio.Nursery, go: trio.Event) -> None:
    """A read handler: by offset, everything that one can do with a request; the file is all "r"."""

    async def answer_later() -> None:
        await go.wait()
        request.reply(b".." + b"r" * request.length, 2, 2 + request.length)
        request.reply(b"again" * request.length, 0, request.length)  # ignored
        request.fail(errno.EIO)

    async def read(fh: int, offset: int, length: int) -> bytes:
        import pyfuse3  # noqa: PLC0415

        tell(task=offset, fh=fh, length=length)
        if offset == TASK_FAILS:
            raise pyfuse3.FUSEError(errno.ESTALE)
        if offset == TASK_EXPLODES:
            raise ZeroDivisionError("unexpected")
        return b"r" * length

    tell(read=request.offset, fh=request.handle, length=request.length)
    if request.offset == READ_WAITS:
        nursery.start_soon(answer_later)
    elif request.offset == READ_FAILS:
        request.fail(errno.EPERM)
    elif request.offset == READ_EXPLODES:
        raise ZeroDivisionError("unexpected")
    elif request.offset in READS:
        request.serve(read)
    else:
        request.reply(b"r" * (SIZE - request.offset), 0, request.length)


def mount_files(mountpoint: str) -> None:
    import pyfuse3  # noqa: PLC0415

    class Files(pyfuse3.Operations):  # type: ignore[misc, unused-ignore]
        def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
            entry = pyfuse3.EntryAttributes()
            entry.st_ino = inode
            if inode == pyfuse3.ROOT_INODE:
                entry.st_mode = stat.S_IFDIR | 0o555
            else:
                entry.st_mode, entry.st_size = stat.S_IFREG | 0o444, SIZE
            return entry

        async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:  # noqa: ARG002
            return self.attributes(inode)

        async def lookup(
            self,
            parent_inode: int,  # noqa: ARG002
            name: bytes,
            ctx: object = None,  # noqa: ARG002
        ) -> pyfuse3.EntryAttributes:
            if name.decode() not in INODES:
                raise pyfuse3.FUSEError(errno.ENOENT)
            return self.attributes(INODES[name.decode()])

        async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:  # noqa: ARG002
            return pyfuse3.FileInfo(fh=inode + 1000)

        async def read(self, fh: int, off: int, size: int) -> bytes:  # noqa: ARG002
            return b"x" * max(0, min(size, SIZE - off))

    pyfuse3.init(Files(), mountpoint, {*pyfuse3.default_options, "ro"})


def never_arrives(request: object, result: int, data: bytes) -> None:
    """No file here takes the shortcut."""
    raise AssertionError((request, result, data))


async def serve(mountpoint: str, how: list[str]) -> None:
    """Mount on `mountpoint` until told otherwise; `how` may have "pyfuse3 first", "no handler" and "reads"."""
    if "pyfuse3 first" in how:
        importlib.import_module("pyfuse3")
    from rbdfs.fuse import lowlevel  # noqa: PLC0415  isort: skip
    import pyfuse3  # noqa: PLC0415  isort: skip

    go = trio.Event()

    async def obey(scope: trio.CancelScope) -> None:
        async with trio.lowlevel.FdStream(os.dup(0)) as commands:
            async for _ in commands:
                go.set()
        scope.cancel()

    mount_files(mountpoint)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(obey, nursery.cancel_scope)
            handler = partial(lseek, go=go)
            read_handler = partial(begin_read, nursery=nursery, go=go)
            with (
                nullcontext() if "no handler" in how else lowlevel.serve_lseek(handler, nursery),
                lowlevel.serve_reads(read_handler, never_arrives, nursery) if "reads" in how else nullcontext(),
            ):
                tell(mounted=mountpoint)
                await pyfuse3.main()
                tell(main="ended")
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close()
    tell(closed=True)


# ---------------------------------------------------------------------- the tests' side of it


class Mount:
    """The other process, its mount, and the calls of this process that wait for it."""

    def __init__(self, point: Path, process: "subprocess.Popen[str]", log: Path, calls: ThreadPoolExecutor) -> None:
        self.point = point
        self._process = process
        self._log = log
        self._calls = calls

    def expect(self, **event: object) -> None:
        """Read what the filesystem does, until it does this."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if event.items() <= said.items():
                return
        pytest.fail(f"the filesystem ended without {event}; its log:\n{self.log()}")

    def go(self) -> None:
        """Let the seeks in "slow" go on."""
        assert self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)

    def stop(self) -> None:
        """Have the filesystem shut down, if it has not ended yet."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def log(self) -> str:
        return self._log.read_text()

    def ended(self) -> int:
        return self._process.wait(timeout=30)

    def seek(self, name: str, offset: int, whence: int) -> int | None:
        """The offset found; None for ENXIO."""
        descriptor = os.open(self.point / name, os.O_RDONLY)
        try:
            return os.lseek(descriptor, offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            raise
        finally:
            with suppress(OSError):  # closing sends a flush, which has nowhere to go after an unmount
                os.close(descriptor)

    def read(self, offset: int, length: int = 4096) -> bytes:
        """By direct I/O: one request, of just this."""
        descriptor = os.open(self.point / "sparse", os.O_RDONLY | os.O_DIRECT)
        try:
            buffer = mmap.mmap(-1, length)
            return buffer[: os.preadv(descriptor, [buffer], offset)]
        finally:
            with suppress(OSError):
                os.close(descriptor)

    def start_read(self, offset: int) -> "Future[bytes]":
        return self._calls.submit(self.read, offset)

    def start_seek(self, name: str, offset: int, whence: int) -> "Future[int | None]":
        return self._calls.submit(self.seek, name, offset, whence)

    def kill(self) -> None:
        self._process.kill()


@pytest.fixture(scope="module")
def packages() -> Iterator[dict[str, Path]]:
    """Two folders to import rbdfs from: one "with" the C library, one "without"."""
    compiler = shutil.which("cc")
    if compiler is None or not Path("/usr/include/fuse3/fuse_lowlevel.h").exists():
        pytest.skip("needs a C compiler and libfuse3-dev")
    with tempfile.TemporaryDirectory(prefix="rbdfs-lowlevel-") as name:
        folders = {kind: Path(name, kind) for kind in ("with", "without")}
        source = Path(__file__).parent.parent / "rbdfs"
        for folder in folders.values():
            shutil.copytree(source, folder / "rbdfs", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        fuse = folders["with"] / "rbdfs/fuse"
        library = fuse / f"_lowlevel{importlib.machinery.EXTENSION_SUFFIXES[0]}"
        warnings = ["-Wall", "-Wextra", "-Werror"]
        subprocess.run([compiler, "-shared", "-fPIC", *warnings, *fuse.glob("*.c"), "-o", library], check=True)
        yield folders


@contextmanager
def mounted(package: Path, *how: str, status: int = 0) -> Iterator[Mount]:
    """The filesystem, which must end with `status` when it is told to, or by itself."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or shutil.which("fusermount3") is None:
        pytest.skip("needs /dev/fuse and fusermount3")
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="rbdfs-lowlevel-")))
        point, log = folder / "mnt", folder / "log"
        point.mkdir()
        unmount = ["fusermount3", "-u", "-z", "-q", point]
        cleanup.callback(partial(subprocess.run, unmount, check=False))  # for what was killed; else it does nothing
        calls = cleanup.enter_context(ThreadPoolExecutor())  # its end waits for calls, so the process ends before
        process = cleanup.enter_context(
            subprocess.Popen(
                [sys.executable, "-W", "error", __file__, point, *how],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=cleanup.enter_context(log.open("w")),
                env={**os.environ, "PYTHONPATH": str(package)},
                cwd=package,
                text=True,
            )
        )
        cleanup.callback(process.kill)
        watchdog = threading.Timer(60, process.kill)  # so that what hangs, fails
        watchdog.start()
        cleanup.callback(watchdog.cancel)
        mount = Mount(point, process, log, calls)
        mount.expect(mounted=str(point))
        yield mount
        mount.stop()
        assert mount.ended() == status, mount.log()


@pytest.fixture
def mount(packages: dict[str, Path]) -> Iterator[Mount]:
    """The filesystem with the C library."""
    with mounted(packages["with"]) as mount:
        yield mount


# ---------------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", ["sparse", "tail", "empty"])
@pytest.mark.parametrize("whence", [os.SEEK_DATA, os.SEEK_HOLE], ids=["SEEK_DATA", "SEEK_HOLE"])
def test_seeks_find_the_boundaries_of_data_and_enxio_past_them(mount: Mount, name: str, whence: int) -> None:
    boundaries = {0, SIZE, *(boundary for extent in DATA[name] for boundary in extent)}
    offsets = sorted({offset + off for offset in boundaries for off in (-1, 0, 1) if offset + off >= 0} | {2 * SIZE})
    found = {offset: mount.seek(name, offset, whence) for offset in offsets}
    assert found == {offset: next_offset(DATA[name], offset, whence) for offset in offsets}
    assert found[SIZE] is None
    assert found[SIZE - 1] == {os.SEEK_DATA: None, os.SEEK_HOLE: SIZE - 1}[whence] or name == "tail"


def test_the_hole_after_the_last_data_is_the_end_of_the_file(mount: Mount) -> None:
    assert mount.seek("tail", SIZE - 1, os.SEEK_HOLE) == SIZE


def test_offsets_beyond_32_bits_arrive_whole(mount: Mount) -> None:
    assert mount.seek("sparse", 2**40 + 1, os.SEEK_DATA) is None
    mount.expect(seek="sparse", offset=2**40 + 1, whence=os.SEEK_DATA)


def test_the_handler_is_told_the_handle_that_open_gave(mount: Mount) -> None:
    mount.seek("sparse", 0, os.SEEK_DATA)
    mount.expect(seek="sparse", fh=INODES["sparse"] + 1000)


def test_reads_and_other_seeks_are_served_while_a_seek_waits(mount: Mount) -> None:
    waiting = mount.start_seek("slow", 0, os.SEEK_DATA)
    mount.expect(seek="slow")
    assert mount.seek("sparse", 0, os.SEEK_DATA) == 128 * KiB
    assert (mount.point / "sparse").read_bytes() == b"x" * SIZE
    assert (mount.point / "slow").read_bytes() == b"x" * SIZE
    assert not waiting.done()
    mount.go()
    assert waiting.result(timeout=30) == 64 * KiB


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (STALE, errno.ESTALE),
        (FUSE_ERROR, errno.EBADF),
        (NO_ERRNO, errno.EIO),
        (UNEXPECTED, errno.EIO),
        (BACKWARDS, errno.EIO),
    ],
)
def test_an_error_reaches_the_caller_as_its_errno_and_the_mount_lives_on(
    mount: Mount, failure: int, expected: int
) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011  (the errno is what is checked)
        mount.seek("failing", failure, os.SEEK_HOLE)
    assert caught.value.errno == expected
    assert mount.seek("sparse", 0, os.SEEK_DATA) == 128 * KiB
    assert ("Traceback" in mount.log()) == (failure in {UNEXPECTED, BACKWARDS})


def test_enosys_is_answered_eio_so_that_the_kernel_keeps_asking(mount: Mount) -> None:
    with pytest.raises(OSError, match="Input/output error"):
        mount.seek("failing", NOSYS, os.SEEK_DATA)
    assert mount.seek("sparse", 0, os.SEEK_DATA) == 128 * KiB


def test_a_shutdown_answers_the_seek_that_waits_and_cancels_its_handler(mount: Mount) -> None:
    waiting = mount.start_seek("slow", 0, os.SEEK_DATA)
    mount.expect(seek="slow")
    mount.stop()
    assert isinstance(waiting.exception(timeout=30), ConnectionAbortedError)
    mount.expect(cancelled="slow")
    mount.expect(closed=True)
    assert mount.ended() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may unmount by force")
def test_a_forced_unmount_answers_the_seek_that_waits_and_ends_the_server(mount: Mount) -> None:
    waiting = mount.start_seek("slow", 0, os.SEEK_DATA)
    mount.expect(seek="slow")
    # As `fuse/connections/N/abort` does: the kernel answers all requests itself, and takes no more replies.
    subprocess.run(["umount", "--force", "--lazy", mount.point], check=True)
    assert isinstance(waiting.exception(timeout=30), ConnectionAbortedError)
    mount.expect(main="ended")
    mount.expect(cancelled="slow")
    mount.expect(closed=True)
    assert mount.ended() == 0


def test_a_killed_server_leaves_nobody_waiting(packages: dict[str, Path]) -> None:
    with mounted(packages["with"], status=-signal.SIGKILL) as mount:
        waiting = mount.start_seek("slow", 0, os.SEEK_DATA)
        mount.expect(seek="slow")
        mount.kill()
        assert isinstance(waiting.exception(timeout=30), ConnectionAbortedError)
    assert not mount.point.exists()


@pytest.mark.parametrize(
    ("package", "how", "reason"),
    [("without", [], "without its C library"), ("with", ["pyfuse3 first"], "imported before rbdfs.fuse")],
    ids=["no library", "pyfuse3 imported first"],
)
def test_where_seeks_cannot_be_served_files_are_solid_and_the_log_says_why(
    packages: dict[str, Path], package: str, how: list[str], reason: str
) -> None:
    with mounted(packages[package], *how) as mount:
        assert mount.seek("sparse", 4096, os.SEEK_DATA) == 4096
        assert mount.seek("sparse", 4096, os.SEEK_HOLE) == SIZE
        assert mount.seek("sparse", SIZE, os.SEEK_DATA) is None
        (line,) = [line for line in mount.log().splitlines() if "rbdfs.fuse.lowlevel" in line]
        assert line.startswith("WARNING")
        assert reason in line


def test_without_a_handler_a_seek_is_refused_and_not_forgotten(packages: dict[str, Path]) -> None:
    with mounted(packages["with"], "no handler") as mount, pytest.raises(OSError, match="not supported"):
        mount.seek("sparse", 0, os.SEEK_DATA)


@pytest.fixture
def reads(packages: dict[str, Path]) -> Iterator[Mount]:
    """The filesystem with the C library and a handler for reads."""
    with mounted(packages["with"], "reads") as mount:
        yield mount


def test_a_read_goes_to_the_handler_and_all_else_to_pyfuse3(reads: Mount) -> None:
    assert reads.read(SIZE // 2, 8192) == b"r" * 8192
    reads.expect(read=SIZE // 2, fh=INODES["sparse"] + 1000, length=8192)
    assert (reads.point / "sparse").stat().st_size == SIZE
    assert reads.seek("sparse", 0, os.SEEK_DATA) == 128 * KiB


def test_a_read_that_waits_holds_nobody_up_and_gets_the_first_answer_only(reads: Mount) -> None:
    waiting = [reads.start_read(READ_WAITS) for _ in range(3)]
    for _ in waiting:
        reads.expect(read=READ_WAITS)
    assert reads.read(SIZE // 2) == b"r" * 4096
    assert reads.seek("sparse", 0, os.SEEK_DATA) == 128 * KiB
    assert not any(read.done() for read in waiting)
    reads.go()
    assert [read.result(timeout=30) for read in waiting] == [b"r" * 4096] * 3
    assert reads.read(SIZE // 2) == b"r" * 4096


def test_a_read_can_be_handed_to_a_task(reads: Mount) -> None:
    assert reads.read(READ_IN_A_TASK) == b"r" * 4096
    reads.expect(task=READ_IN_A_TASK, fh=INODES["sparse"] + 1000, length=4096)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (READ_FAILS, errno.EPERM),
        (READ_EXPLODES, errno.EIO),
        (TASK_FAILS, errno.ESTALE),
        (TASK_EXPLODES, errno.EIO),
    ],
)
def test_an_error_of_a_read_reaches_the_caller_and_the_mount_lives_on(reads: Mount, offset: int, expected: int) -> None:
    with pytest.raises(OSError) as caught:  # noqa: PT011  (the errno is what is checked)
        reads.read(offset)
    assert caught.value.errno == expected
    assert reads.read(SIZE // 2) == b"r" * 4096
    assert ("Traceback" in reads.log()) == (offset in {READ_EXPLODES, TASK_EXPLODES})


def test_a_shutdown_answers_the_read_that_waits(reads: Mount) -> None:
    waiting = reads.start_read(READ_WAITS)
    reads.expect(read=READ_WAITS)
    reads.stop()
    assert isinstance(waiting.exception(timeout=30), ConnectionAbortedError)
    reads.expect(closed=True)
    assert reads.ended() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may unmount by force")
def test_a_forced_unmount_ends_the_server_while_a_read_waits(reads: Mount) -> None:
    waiting = reads.start_read(READ_WAITS)
    reads.expect(read=READ_WAITS)
    subprocess.run(["umount", "--force", "--lazy", reads.point], check=True)
    assert isinstance(waiting.exception(timeout=30), ConnectionAbortedError)
    reads.expect(main="ended")
    reads.expect(closed=True)
    assert reads.ended() == 0


def test_without_the_library_pyfuse3_serves_the_reads(packages: dict[str, Path]) -> None:
    with mounted(packages["without"], "reads") as mount:
        assert mount.read(READ_FAILS) == b"x" * 4096


OTHER_LIBFUSE = r"""
#include <stddef.h>
#include <string.h>
struct libfuse_version;
static void *table[128];
static size_t size;
static void *keep(const void *op, size_t op_size) { size = op_size; memcpy(table, op, op_size); return table; }
void *fuse_session_new(void *a, const void *op, size_t s, void *u) { (void)a; (void)u; return keep(op, s); }
void *fuse_session_new_versioned(void *a, const void *op, size_t s, struct libfuse_version *v, void *u)
{ (void)a; (void)u; return v ? keep(op, s) : NULL; }
void *_fuse_session_new(void *, const void *, size_t, struct libfuse_version *, void *)
	__attribute__((alias("fuse_session_new_versioned")));
void *_fuse_session_new_317(void *, const void *, size_t, struct libfuse_version *, void *)
	__attribute__((alias("fuse_session_new_versioned")));
int fuse_reply_lseek(void *req, long offset) { (void)req; (void)offset; return 0; }
int fuse_reply_buf(void *req, const char *buf, size_t size) { (void)req; (void)buf; (void)size; return 0; }
int fuse_reply_err(void *req, int errnum) { (void)req; (void)errnum; return 0; }
size_t kept_size(void) { return size; }
"""
OTHER_PYFUSE3 = r"""
#include <stddef.h>
struct libfuse_version;
void *fuse_session_new(void *, const void *, size_t, void *);
void *_fuse_session_new(void *, const void *, size_t, struct libfuse_version *, void *);
void *_fuse_session_new_317(void *, const void *, size_t, struct libfuse_version *, void *);
void *fuse_session_new_versioned(void *, const void *, size_t, struct libfuse_version *, void *);
void *call(int which, const void *op, size_t size)
{
	void *volatile session; /* no tail call: the library looks at who calls it */
	int version;
	switch (which) {
	case 0: session = fuse_session_new(NULL, op, size, NULL); break;
	case 1: session = _fuse_session_new(NULL, op, size, (void *)&version, NULL); break;
	case 2: session = _fuse_session_new_317(NULL, op, size, (void *)&version, NULL); break;
	default: session = fuse_session_new_versioned(NULL, op, size, (void *)&version, NULL); break;
	}
	return session;
}
"""
CALL_ALL = """
import ctypes, os, sys
library = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
caller = ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_LOCAL | os.RTLD_NOW)
caller.call.restype = ctypes.POINTER(ctypes.c_void_p)
caller.kept_size.restype = ctypes.c_size_t
for which in range(4):
    for slots in (50, 45, 30):
        table = (ctypes.c_void_p * slots)(*[1 + i if i != LSEEK else None for i in range(slots)])
        session = caller.call(which, table, ctypes.c_size_t(ctypes.sizeof(table)))
        assert caller.kept_size() == 8 * max(slots, LSEEK + 1)
        assert session[LSEEK] not in (None, 1 + LSEEK) and session[READ] not in (None, 1 + READ)
        theirs = [i for i in range(slots) if i not in (LSEEK, READ)]
        assert [session[i] for i in theirs] == [1 + i for i in theirs]
        before = library.rbdfs_sessions()
        table = (ctypes.c_void_p * 50)(*range(1, 51))
        session = caller.call(which, table, ctypes.c_size_t(ctypes.sizeof(table)))
        assert [session[i] for i in range(50)] == list(range(1, 51)) and library.rbdfs_sessions() == before
"""


def test_every_libfuse_gets_its_whole_table_with_ours_filled_in(packages: dict[str, Path]) -> None:
    (library,) = (packages["with"] / "rbdfs/fuse").glob("*.so")
    slot = "#define FUSE_USE_VERSION 35\n#include <fuse3/fuse_lowlevel.h>\n#include <stddef.h>\n"
    slot += "#include <stdio.h>\nint main(void) "
    slot += '{ printf("%zu ", offsetof(struct fuse_lowlevel_ops, lseek) / sizeof(void *));\n'
    slot += 'printf("%zu", offsetof(struct fuse_lowlevel_ops, read) / sizeof(void *)); return 0; }\n'
    with tempfile.TemporaryDirectory(prefix="rbdfs-lowlevel-") as name:

        def build(source: str, target: str, *arguments: str) -> str:
            path = str(Path(name, target))
            command = ["cc", "-Wall", "-Wextra", "-fPIC", "-D_FILE_OFFSET_BITS=64", "-xc", "-", "-xnone", *arguments]
            subprocess.run([*command, "-o", path], input=source, text=True, check=True)
            return path

        libfuse = build(OTHER_LIBFUSE, "libfuse.so", "-shared")
        caller = build(OTHER_PYFUSE3, "pyfuse3.so", "-shared", libfuse)
        slots = subprocess.run([build(slot, "slot")], capture_output=True, text=True, check=True).stdout.split()
        script = CALL_ALL.replace("LSEEK", slots[0]).replace("READ", slots[1])
        subprocess.run([sys.executable, "-c", script, library, caller], check=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    trio.run(serve, sys.argv[1], sys.argv[2:])
